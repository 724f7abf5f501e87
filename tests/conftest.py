"""Tiny models and texts, made in memory or in a temporary folder; nothing is downloaded."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from postgrad.models.pretrained import save_pretrained
from tests.tiny_lineage import runs  # noqa: F401 (a fixture)

torch.set_num_threads(1)

VOCABULARY = 320


def old_text(count: int, seed: int = 0) -> list[str]:
    """Documents of one kind: short sentences about numbers."""
    rng = random.Random(seed)
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    return [
        " ".join(f"{rng.choice(words)} and {rng.choice(words)}." for _ in range(rng.randint(3, 12)))
        for _ in range(count)
    ]


def new_text(count: int, seed: int = 1) -> list[str]:
    """Documents of another kind: assignments."""
    rng = random.Random(seed)

    def line() -> str:
        return f"x{rng.randint(0, 9)} = y{rng.randint(0, 9)} * {rng.randint(0, 99)};"

    return ["\n".join(line() for _ in range(rng.randint(2, 9))) for _ in range(count)]


def write_jsonl(path: Path, documents: list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": d}) + "\n" for d in documents))
    return path


def make_tokenizer(vocabulary: int = VOCABULARY, *, bos: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on the tests' own texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|end|>", "<|begin|>"] if bos else ["<|end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(old_text(50) + new_text(50), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", bos_token="<|begin|>" if bos else None
    )


def make_llama(seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    """A two-layer Llama with random weights."""
    torch.manual_seed(seed)
    config = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": 0,
        **changes,
    }
    return LlamaForCausalLM(LlamaConfig(**config)).eval()


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model and texts: base/, old.jsonl, new.jsonl and their held-out parts."""
    folder = tmp_path_factory.mktemp("base")
    save_pretrained(make_llama(), make_tokenizer(), folder / "base", dtype=torch.float32)
    for name, make in (("old", old_text), ("new", new_text)):
        write_jsonl(folder / f"{name}.jsonl", make(150, 10))
        write_jsonl(folder / f"{name}-heldout.jsonl", make(30, 20))
    return folder


StageOf = Callable[..., dict[str, Any]]


@pytest.fixture
def stage_of(base: Path, tmp_path: Path) -> StageOf:
    """A stage as plain data; keyword arguments replace keys."""

    def make(**changes: Any) -> dict[str, Any]:
        return {
            "name": "tiny",
            "model": str(base / "base"),
            "output": str(tmp_path / "run"),
            "tokens": 6000,
            "data": {
                "sequence_length": 32,
                "sources": [
                    {"name": "new", "path": str(base / "new.jsonl"), "share": 0.75},
                    {"name": "old", "path": str(base / "old.jsonl"), "share": 0.25, "role": "replay"},
                ],
            },
            "batch": {"global_batch_size": 8, "micro_batch_size": 4},
            "schedule": {"kind": "rewarm", "peak": 1e-2, "floor": 1e-3, "warmup": "2 steps"},
            "evaluation": {
                "retained": [str(base / "old-heldout.jsonl")],
                "learned": [str(base / "new-heldout.jsonl")],
                "every": "50%",
                "eval_tokens": 500,
                "samples": 1,
            },
            "save": {"every": "5 steps"},
            "compute": {"threads": 1, "dtype": "float32", "compile": False},
            **changes,
        }

    return make


@pytest.fixture
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache for the whole session: token stores are immutable."""
    return tmp_path_factory.getbasetemp() / "cache"


@pytest.fixture(autouse=True, scope="session")
def default_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What has no cache of its own (the memo of verified models) goes to the session's cache, not to the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("POSTGRAD_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        yield

"""Tiny models and texts, made in memory or in a temporary folder; nothing is downloaded."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import hypothesis
import pytest
import torch

from postgrad.models.pretrained import save_pretrained
from tests.tiny_lineage import runs  # noqa: F401 (a fixture)
from tests.tiny_models import VOCABULARY as VOCABULARY
from tests.tiny_models import make_llama as make_llama
from tests.tiny_models import make_tokenizer as make_tokenizer
from tests.tiny_models import new_text as new_text
from tests.tiny_models import old_text as old_text

torch.set_num_threads(1)
# A shell lets its background jobs ignore Ctrl-C, and nohup lets them ignore SIGHUP; tests send both.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
hypothesis.settings.register_profile("tests", deadline=None)  # a busy machine is no failure
hypothesis.settings.load_profile("tests")


def write_jsonl(path: Path, documents: list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": d}) + "\n" for d in documents))
    return path


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

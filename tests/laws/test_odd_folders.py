"""Laws of folders that are uncommon and right: a stage reads one, resumes to the same bits, and publishes its like."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast

from postgrad.errors import DataError, ModelError
from postgrad.evaluation.generate_answers import StoppingRule, generate_answers
from postgrad.evaluation.generate_documents import generate_documents
from postgrad.models import sampling
from postgrad.models.model import CausalModel
from postgrad.models.sampling import count_token_ids, sample_continuations, suppressed_ids
from postgrad.run.events import CheckpointSaved, RunFinished
from postgrad.run.run import run_stage
from tests.conftest import VOCABULARY, StageOf, make_llama, make_tokenizer
from tests.run.test_run import events_of, plan_of, trace
from tests.tiny_models import make_bpe
from tests.tiny_stages import bos_tokenizer, chat_examples, save_model, write_rows

PADDED = 384
"""Embeddings of a table that is filled to a round size."""
DATED = (
    "{{ strftime_now('%d %B %Y') }}{% for m in messages %}{{ '\\n' + m['role'] + ': ' + m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\nassistant:' }}{% endif %}"
)
NEEDS_TOOLS = "{% if not tools %}{{ raise_exception('this template needs tools') }}{% endif %}" + DATED


def sharded(folder: Path) -> None:
    """Weights in several files with an index."""
    make_llama().save_pretrained(folder, max_shard_size="20KB")
    make_tokenizer().save_pretrained(folder)
    assert (folder / "model.safetensors.index.json").exists() and len(list(folder.glob("*.safetensors"))) > 2


def without_special_tokens(folder: Path) -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=make_bpe([]))
    assert not tokenizer.all_special_ids
    save_model(make_llama(eos_token_id=None), tokenizer, folder)


def several_ends(folder: Path) -> None:
    """And a table that is filled to a round size."""
    model = make_llama(vocab_size=PADDED, tie_word_embeddings=False, eos_token_id=[0, 5])
    model.generation_config = GenerationConfig(eos_token_id=[0, 5])
    save_model(model, make_tokenizer(), folder)


def dated(folder: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = DATED
    save_model(make_llama(), tokenizer, folder)


FOLDERS: dict[str, Any] = {
    "sharded": sharded,
    "padded": lambda folder: save_model(make_llama(vocab_size=PADDED), make_tokenizer(), folder),
    "no special tokens": without_special_tokens,
    "BOS": lambda folder: save_model(make_llama(), bos_tokenizer(), folder),
    "several ends": several_ends,
    "dated": dated,
}


def shapes(folder: Path) -> dict[str, list[int]]:
    out = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            out |= {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    return out


@pytest.mark.parametrize(
    "name", [name if name == "several ends" else pytest.param(name, marks=pytest.mark.slow) for name in FOLDERS]
)
def test_a_stage_on_it_resumes_to_the_same_bits_and_publishes_its_like(
    name: str, stage_of: StageOf, cache: Path, tmp_path: Path
) -> None:
    FOLDERS[name](tmp_path / "m")
    write_rows(tmp_path / "chat.jsonl", chat_examples(30))
    chats = {"name": "chat", "path": str(tmp_path / "chat.jsonl"), "share": 0.5, "max_passes": 100}
    raw = stage_of(model=str(tmp_path / "m"), tokens=700, save={"every": "1 step"})
    raw["data"]["sources"] = [{**raw["data"]["sources"][0], "share": 0.5}, chats]
    raw["data"]["sequence_length"] = 64
    raw["evaluation"] = {"learned": raw["evaluation"]["learned"], "samples": 1, "every": "100%", "drift_tokens": 0}
    raw["compute"] = {"threads": 1, "dtype": "float32", "compile": False, "attention": "sdpa"}
    if name == "no special tokens":
        with pytest.raises(ModelError, match="no end-of-text token") as caught:
            plan_of(raw, cache)
        assert caught.value.where == "data.eos"
        raw["data"]["eos"] = "\u0120"
        with pytest.raises(ModelError, match="no EOS token to end an answer with"):
            plan_of(raw, cache)
        raw["data"]["sources"] = [{**raw["data"]["sources"][0], "share": 1}]
        raw["tokens"] = 2100  # as many steps: every token is a label
    whole, parts = ({**raw, "output": str(tmp_path / output)} for output in ("whole", "parts"))
    assert isinstance(events_of(whole, cache)[-1], RunFinished)
    events = run_stage(plan_of(parts, cache), command="test", cache=cache)
    next(event for event in events if isinstance(event, CheckpointSaved))
    events.close()  # type: ignore[attr-defined]
    events_of(parts, cache)
    published = tmp_path / "whole" / "model"
    assert trace(tmp_path / "parts")[-1] == trace(tmp_path / "whole")[-1]
    assert shapes(published) == shapes(tmp_path / "m")
    for file in ("config.json", "generation_config.json"):
        before, after = (json.loads((folder / file).read_text()) for folder in (tmp_path / "m", published))
        assert after.get("eos_token_id") == before.get("eos_token_id")
    AutoModelForCausalLM.from_pretrained(published)


def test_a_template_that_needs_tools_says_so(stage_of: StageOf, cache: Path, tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = NEEDS_TOOLS
    save_model(make_llama(), tokenizer, tmp_path / "m")
    raw = stage_of(model=str(tmp_path / "m"), tokens=700)
    tools = [{"type": "function", "function": {"name": "add", "description": "adds", "parameters": {}}}]
    for extra in ({"tools": tools}, {}):
        write_rows(tmp_path / "chat.jsonl", [{**row, **extra} for row in chat_examples(30)])
        raw["data"]["sources"] = [{"name": "chat", "path": str(tmp_path / "chat.jsonl"), "max_passes": 100}]
        if extra:
            assert plan_of(raw, cache).steps
            continue
        with pytest.raises(DataError, match="this template needs tools"):
            plan_of(raw, cache)


# --- what is generated ------------------------------------------------------------------------------------------------


def padded_model() -> CausalModel:
    """A model that likes embeddings without a token best."""
    model = make_llama(vocab_size=PADDED, tie_word_embeddings=False)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        model.lm_head.weight[VOCABULARY:] = 5 * torch.randn(PADDED - VOCABULARY, 32, generator=generator)
    return CausalModel(model)


def generates_tokens_alone(token_ids: int | None, tokenizer: PreTrainedTokenizerFast) -> bool:
    """Whether every way of generating keeps to the tokenizer's ids."""
    model, prompts = padded_model(), np.ones((4, 3), np.int64)
    sampled, _ = sample_continuations(
        model, torch.from_numpy(prompts), np.full((4, 8), 0.7), temperature=1.0, eos=0, token_ids=token_ids
    )
    written = generate_documents(model, prompts, range(4), seed=0, max_new_tokens=8, stop_ids={0}, token_ids=token_ids)
    own = model.pretrained.generate(
        torch.from_numpy(prompts), max_new_tokens=8, suppress_tokens=suppressed_ids(model.pretrained, tokenizer)
    )
    return (
        max(int(ids.max(initial=0)) for ids in (sampled.numpy(), own.numpy(), *(each.ids for each in written)))
        < VOCABULARY
    )


def test_embeddings_without_a_token_are_never_generated(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = make_tokenizer()
    assert generates_tokens_alone(count_token_ids(tokenizer), tokenizer)
    assert not generates_tokens_alone(None, tokenizer), "the mutant: all embeddings"
    monkeypatch.setattr(sampling, "count_token_ids", lambda tokenizer: PADDED)
    assert not generates_tokens_alone(VOCABULARY, tokenizer), "the mutant: none is suppressed"


def test_any_of_several_ends_ends_an_answer() -> None:
    model, tokenizer = make_llama(), make_tokenizer()
    prompts = [[7, 8, 9]]
    whole = generate_answers(model, tokenizer, prompts, StoppingRule(8), eos_ids=[0], pad=0)[0]
    with torch.no_grad():
        ids = model.generate(torch.tensor(prompts), max_new_tokens=8, do_sample=False, eos_token_id=0)[0, 3:].tolist()
    model.generation_config.eos_token_id = [0, ids[2]]
    cut = generate_answers(model, tokenizer, prompts, StoppingRule(8), eos_ids=[0], pad=0)[0]
    assert cut == tokenizer.decode(ids[: ids.index(ids[2])]) != whole

"""What a model writes itself is judged by a teacher: prompts, writing with a cache, the step by hand, and resuming."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from postgrad.check.check import check_stage
from postgrad.data.layouts.rows import IGNORED
from postgrad.data.random_streams import RandomStreams, derive_key
from postgrad.distributed.world import World
from postgrad.errors import StageError
from postgrad.hardware.execution import Execution
from postgrad.models.cpu_attention import CAUSAL_BLOCKS
from postgrad.models.model import CausalModel
from postgrad.models.pretrained import save_pretrained
from postgrad.models.sampling import sample_continuations
from postgrad.plan.plan import Plan
from postgrad.run.build import build_run, make_loader, make_step
from postgrad.run.tuned_model import make_tuned_model
from postgrad.stats import bootstrap
from postgrad.training.on_policy import OnPolicySampler
from postgrad.training.step import Run
from tests.conftest import VOCABULARY, make_llama, make_tokenizer
from tests.tiny_stages import Workspace, make_workspace, run_interrupted, run_trace

CPU = World(torch.device("cpu"))
WRITES = {"kind": "on-policy", "prompt_tokens": 5, "max_new_tokens": 7, "teacher": "other"}
NEXT = {"kind": "next-token"}


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workspace]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bootstrap, "DRAWS", 200)
        made = make_workspace(tmp_path_factory.mktemp("writes"), tmp_path_factory.getbasetemp() / "cache")
        save_pretrained(make_llama(7), make_tokenizer(), made.folder / "other", dtype=torch.float32)
        yield made


def stage_of(shelf: Workspace, name: str, **changes: Any) -> dict[str, Any]:
    return shelf.stage(name, **{"objectives": [{**NEXT, "on": ["new"]}, {**WRITES, "on": ["old"]}], **changes})


def built(plan: Plan, micro: int = 2) -> tuple[Run, Any]:
    execution = Execution("float32", False, "sdpa", 1, micro, False, 0.0)
    run = build_run(plan, make_tuned_model(plan, CPU), execution, CPU)
    run.model.train()
    return run, make_loader(plan, execution, CPU)


# -- writing ---------------------------------------------------------------------------------------------------------------


def by_hand(model: Any, prompt: list[int], uniform: np.ndarray, temperature: float, eos: int) -> list[int]:
    """Without a cache: the whole text is read anew for each token."""
    ids = list(prompt)
    for u in uniform:
        with torch.no_grad():
            logits = model(torch.tensor([ids]), use_cache=False).logits[0, -1].double() / temperature
        sums = logits.softmax(-1).cumsum(-1)
        ids.append(min(int((sums <= u * sums[-1]).sum()), len(sums) - 1))
        if ids[-1] == eos:
            break
    return ids[len(prompt) :]


@pytest.mark.parametrize("attention", ["sdpa", "eager", CAUSAL_BLOCKS])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_what_is_written_with_the_cache_is_what_is_written_without(attention: str, temperature: float) -> None:
    model = make_llama()
    with torch.no_grad():
        model.lm_head.weight *= 8  # so sure of something that draws differ
    prompts = torch.randint(2, VOCABULARY, (6, 9), generator=torch.Generator().manual_seed(0))
    uniform = np.random.default_rng(0).random((6, 12))
    wanted = [by_hand(model, p.tolist(), u, temperature, 5) for p, u in zip(prompts, uniform, strict=True)]
    eos = next(token for text in wanted for token in text[2:6])  # one that is met in the middle of a text
    wanted = [by_hand(model, p.tolist(), u, temperature, eos) for p, u in zip(prompts, uniform, strict=True)]
    model.set_attn_implementation(attention)
    written, size = sample_continuations(CausalModel(model).train(), prompts, uniform, temperature=temperature, eos=eos)
    assert [row[:n].tolist() for row, n in zip(written, size.tolist(), strict=True)] == wanted
    assert len({len(text) for text in wanted}) > 1 and model.training
    assert model.config._attn_implementation == attention


def test_tokens_come_as_often_as_they_are_likely() -> None:
    model = make_llama()
    with torch.no_grad():
        model.lm_head.weight *= 10
        p = model(torch.tensor([[3, 4, 5]])).logits[0, -1].double().softmax(-1)
    uniform = np.random.default_rng(1).random((4000, 1))
    written, _ = sample_continuations(
        CausalModel(model), torch.tensor([[3, 4, 5]]).expand(4000, -1), uniform, temperature=1.0, eos=0
    )
    counts = torch.bincount(written[:, 0], minlength=VOCABULARY).double()
    likely = p * 4000 >= 5
    z = (counts - 4000 * p)[likely] / (4000 * p * (1 - p))[likely].sqrt()
    assert z.abs().max() < 4 and z.square().mean() < 1.6


# -- rows --------------------------------------------------------------------------------------------------------------------


def test_prompts_are_the_beginnings_of_windows_and_of_examples(shelf: Workspace) -> None:
    plan = shelf.plan(stage_of(shelf, "rows"))
    rows, store = plan.data.rows[1], plan.data.sources[1].store
    texts = {document: store.read(document).tolist()[:-1] for document in range(len(store))}
    seen: dict[int, list[list[int]]] = {}
    for i in range(len(rows)):
        row = rows.get_row(i, i)
        asked = row.labels != IGNORED
        assert row.label_count == asked.sum() == 7 and len(row.labels) == asked.argmax() + 7
        prompt = row.inputs["input_ids"][: asked.argmax() + 1].tolist()
        document = int(rows.document_R[i])  # type: ignore[index]
        text = texts[document]
        assert any(text[at : at + len(prompt)] == prompt for at in range(len(text))) and len(prompt) <= 5
        seen.setdefault(document, []).append(prompt)
    for document, prompts in seen.items():
        assert prompts[0] == texts[document][:5] and len(prompts) == -(-len(texts[document]) // 12)
    assert rows.ledger.trained == 7 * len(rows)
    empty = shelf.plan(stage_of(shelf, "empty", objectives=[{**WRITES, "prompt_tokens": 0}])).data.rows[0]
    assert empty.get_row(3, 3).inputs["input_ids"][:1].tolist() == [plan.model.inputs.encoder.eos]
    asked = shelf.plan(stage_of(shelf, "asked", objectives=[WRITES], sources=[shelf.source("completion")]))
    row, leaf = asked.data.rows[0].get_row(0, 0), asked.data.sources[0]
    whole = leaf.store.read(int(asked.data.rows[0].document_R[0])).tolist()  # type: ignore[index]
    marks = leaf.store.marks(int(asked.data.rows[0].document_R[0]))  # type: ignore[index]
    assert marks is not None and row.inputs["input_ids"][:-6].tolist() == whole[: int(np.argmax(marks != 0))]
    with pytest.raises(StageError, match="no room"):
        shelf.plan(stage_of(shelf, "room", objectives=[{**WRITES, "max_new_tokens": 49}]))


# -- the step ----------------------------------------------------------------------------------------------------------------


def test_a_step_is_the_reverse_divergence_on_what_was_written_by_hand(shelf: Workspace) -> None:
    plan = shelf.plan(stage_of(shelf, "by-hand", objectives=[WRITES]))
    run, loader = built(plan)
    batches = loader.read_batches(1)
    student = make_llama()
    teacher = AutoModelForCausalLM.from_pretrained(shelf.folder / "other")
    total, counted, eos = torch.zeros(()), 0, plan.model.inputs.encoder.eos
    draws = RandomStreams(derive_key(plan.stage.seed, 0x0F11))
    for batch in batches:
        for i, labels in enumerate(batch.labels):
            first = int((labels != IGNORED).int().argmax())
            prompt = batch.inputs["input_ids"][i, : first + 1].tolist()
            text = by_hand(student, prompt, draws.generator(int(batch.position_B[i]), 0).random(7), 1.0, eos)
            ids = torch.tensor([prompt + text])
            log_q, log_p = (m(ids).logits[0, first:-1].log_softmax(-1) for m in (student, teacher))
            total = total + (log_q.exp() * (log_q - log_p.detach())).sum()
            counted += len(text)
    report = make_step(plan, run)(run, batches)
    assert report.tokens == counted and report.loss == pytest.approx(total.item() / counted, rel=1e-5)
    other, again = built(plan, micro=4)
    assert make_step(plan, other)(other, again.read_batches(1)).loss == pytest.approx(report.loss, rel=1e-5)


def test_a_model_that_is_its_teacher_learns_nothing_from_what_it_writes(shelf: Workspace) -> None:
    plan = shelf.plan(stage_of(shelf, "same", objectives=[{**WRITES, "teacher": "start"}]))
    run, loader = built(plan)
    report = make_step(plan, run)(run, loader.read_batches(1))
    assert abs(report.loss) < 1e-6 and report.gradient_norm < 1e-6


def test_labels_that_are_not_what_was_written_would_be_caught() -> None:
    """Alignment: the input of a place is the token before, the label what was written there."""
    model = CausalModel(make_llama())
    writer = OnPolicySampler(model, 1.0, 0, 3)
    plain = torch.full((2, 8), 9)
    batch = dataclasses.replace(_batch(plain, first=[2, 4], new=[6, 4]), position_B=np.array([11, 12]))
    written = writer(batch)
    for i, (first, new) in enumerate(((2, 6), (4, 4))):
        labels, ids = written.labels[i], written.inputs["input_ids"][i]
        asked = (labels != IGNORED).nonzero().flatten()
        assert asked[0] == first and len(asked) <= new and written.label_count_B[i] == len(asked)
        assert ids[first + 1 : first + len(asked)].tolist() == labels[asked[:-1]].tolist()
        mutant = ids[first : first + len(asked) - 1].tolist()
        assert mutant != labels[asked[:-1]].tolist()
        text = by_hand(
            model.pretrained,
            plain[i, : first + 1].tolist(),
            RandomStreams(derive_key(3, 0x0F11)).generator(11 + i, 0).random(new),
            1.0,
            0,
        )
        assert labels[asked].tolist() == text


def _batch(ids: Tensor, first: list[int], new: list[int]) -> Any:
    from postgrad.data.loading.batch import Batch

    labels = torch.full_like(ids, IGNORED)
    for i, (begin, count) in enumerate(zip(first, new, strict=True)):
        labels[i, begin : begin + count] = 0
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    return Batch({"input_ids": ids, "position_ids": positions}, labels, np.zeros(2, np.int64), np.array(new))


# -- as a stage ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tuning", [None, {"kind": "lora", "rank": 4}, {"kind": "prompt", "length": 3}], ids=str)
def test_a_stage_that_writes_resumes_bit_for_bit(shelf: Workspace, tuning: dict[str, Any] | None) -> None:
    kind = tuning["kind"] if tuning else "full"
    whole, parts = (
        stage_of(shelf, f"{kind}-{part}", **({"tuning": tuning} if tuning else {})) for part in ("whole", "parts")
    )
    one, two = shelf.run(whole), run_interrupted(shelf, parts)
    assert run_trace(one.run_folder) == run_trace(two.run_folder)
    sources = {s.name: s.trained_tokens for s in one.record.totals.sources}
    assert sources["old"] > 0 and set(one.record.changes) == {"old-heldout", "new-heldout"}


def test_where_it_cannot_be_is_refused(shelf: Workspace) -> None:
    with pytest.raises(StageError, match="needs a decoder"):
        shelf.plan(stage_of(shelf, "t5", model="t5", objectives=[WRITES]))
    cached = [WRITES, {"kind": "distill", "on": ["old"], "cache": "sampled"}]
    with pytest.raises(StageError, match="teacher predictions on 'old' cannot be cached"):
        shelf.plan(stage_of(shelf, "cached", objectives=cached))
    # Distillation that names no source leaves what is written to its own teacher.
    both = shelf.plan(
        stage_of(shelf, "both", objectives=[{**NEXT, "on": ["new"]}, {**WRITES, "on": ["old"]}, {"kind": "distill"}])
    )
    assert both.data.objective_indices == ((0, 2), (1,))

    class Sharded(World):
        @property
        def is_distributed(self) -> bool:
            return True

    plan = shelf.plan(stage_of(shelf, "sharded"))
    run, _ = built(plan)
    run.world = Sharded(torch.device("cpu"))
    with pytest.raises(StageError, match="cannot generate"):
        make_step(plan, run)


def test_check_says_what_the_writing_takes(shelf: Workspace) -> None:
    found = check_stage(shelf.plan(stage_of(shelf, "cost")), cache=shelf.cache)
    (record,) = found["teachers"]
    assert record["writing_share_of_step"] > 0 and ", generation " in found["text"]

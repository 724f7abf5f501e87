"""Law: examples that share a row are trained as if each had one to itself, whatever of them is a label."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from postgrad.data.layouts.packed_examples import PackedExampleRows
from postgrad.data.layouts.prefix_lm import PrefixRows
from postgrad.data.layouts.rows import Row, Rows
from postgrad.data.loading.batch import Batch, collate
from postgrad.data.render.frame import Frame
from postgrad.models.cpu_attention import CAUSAL_BLOCKS
from postgrad.models.model import wrap_model
from postgrad.models.task import Task
from postgrad.objectives.next_token import TokenLoss
from tests.conftest import VOCABULARY, make_llama
from tests.data.memory import InMemoryStore, lay_out

LENGTH, EOS, BOS = 32, 0, 1


def make_gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, **sizes, **off))


MODELS: dict[str, Callable[[], PreTrainedModel]] = {"llama": make_llama, "gpt2": make_gpt2}


def examples(count: int = 14, seed: int = 0) -> InMemoryStore:
    """Examples of several turns: questions and answers of random lengths, and some running text in between."""
    rng = np.random.default_rng(seed)
    documents, marks = [], []
    for _ in range(count):
        turns = [(int(rng.integers(1, 6)), mark) for mark in (0, 1) * int(rng.integers(1, 3))]
        size = sum(n for n, _ in turns)
        documents.append([BOS, *rng.integers(2, VOCABULARY, size).tolist(), EOS])
        marks.append([0, *(mark for n, mark in turns for _ in range(n)), 1])
    return InMemoryStore(documents, marks)


def read(rows: Rows) -> list[Row]:
    return [rows.get_row(i, 0) for i in range(len(rows))]


def trained(model: PreTrainedModel, batches: Sequence[Batch], attention: str) -> tuple[float, dict[str, Tensor]]:
    """The summed loss of all labels, and its gradient."""
    model.set_attn_implementation(attention)
    view, total = wrap_model(model, Task.CAUSAL), 0.0
    model.zero_grad()
    for batch in batches:
        loss, _ = TokenLoss()(view(**batch.inputs), batch)
        loss.backward()
        total += loss.item()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return total, found


def isolated(model: PreTrainedModel, rows: list[Row], alone: list[Row], attention: str) -> bool:
    """Whether rows together give the loss and the gradient of the same examples in rows of their own."""
    together = [collate(rows[i : i + 3], [0] * len(rows[i : i + 3])) for i in range(0, len(rows), 3)]
    single = [collate([row], [0]) for row in alone]
    (loss, gradient), (wanted, expected) = (trained(model, b, attention) for b in (together, single))
    size = max(float(g.abs().max()) for g in expected.values())
    same = all(torch.allclose(gradient[n], expected[n], rtol=1e-3, atol=1e-5 * size) for n in expected)
    return loss == pytest.approx(wanted, rel=1e-5) and same


FRAMES = {"bare": {}, "framed": {"frame": Frame((BOS, 5, 6), (7,)), "lead": 1}}


@pytest.mark.parametrize("attention", ["sdpa", "eager", CAUSAL_BLOCKS])
@pytest.mark.parametrize("train_on", ["answers", "all"])
@pytest.mark.parametrize("frame", FRAMES)
def test_examples_in_a_row_are_trained_as_if_alone(frame: str, train_on: Any, attention: str) -> None:
    options = {"train_on": train_on, **FRAMES[frame]}
    packed = lay_out(PackedExampleRows, examples(), LENGTH, **options)
    rows, alone = read(packed), read(lay_out(PackedExampleRows, examples(), LENGTH, pack=False, **options))
    assert len(rows) < len(alone) and packed.ledger.padding > 0
    assert sum(row.label_count for row in rows) == sum(row.label_count for row in alone) == packed.ledger.trained
    for name in ("llama", "gpt2"):
        assert isolated(MODELS[name](), rows, alone, attention), name


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_prefixes_in_a_row_are_trained_as_if_alone(attention: str) -> None:
    rows, alone = (read(lay_out(PrefixRows, examples(), LENGTH, seed=0, pack=t)) for t in (True, False))
    assert len(rows) < len(alone) and sum(row.label_count for row in rows) == sum(row.label_count for row in alone)
    assert isolated(make_llama(), rows, alone, attention)


def test_examples_that_see_one_another_are_caught() -> None:
    """The mutants: positions that go on through a row; a label that asks for the next example's first token."""
    rows, alone = (read(lay_out(PackedExampleRows, examples(), LENGTH, pack=t)) for t in (True, False))
    model = make_llama()
    assert isolated(model, rows, alone, "sdpa")
    through = [row._replace(inputs={**row.inputs, "position_ids": np.arange(LENGTH)}) for row in rows]
    assert not isolated(model, through, alone, "sdpa")
    shifted = [row._replace(labels=np.append(row.inputs["input_ids"][1:], EOS)) for row in rows]
    assert not isolated(model, shifted, alone, "sdpa")

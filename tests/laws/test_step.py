"""Laws of a step: one divisor, micro-batches do not matter, nothing hidden moves, closed curves of AdamW."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from postgrad.data.layouts.packed_text import PackedRows
from postgrad.data.layouts.rows import IGNORED
from postgrad.data.loading.batch import Batch, collate
from postgrad.distributed.world import World
from postgrad.models.model import CausalModel
from postgrad.objectives.next_token import TokenLoss
from postgrad.optim import lr_schedules
from postgrad.optim.optimizer import AdamW, Weights
from postgrad.training.step import Run, train_step
from postgrad.tuning.weight_subsets import FullFinetuning
from tests.conftest import VOCABULARY, make_llama
from tests.data.memory import lay_out
from tests.data.test_packed_text import Memory

LENGTH = 24
EPS = 1e-3
"""Large, so that an update is a smooth function of the gradient and rounding is not blown up to a whole step."""


def rows(count: int = 8) -> PackedRows:
    """Rows whose counts of trained tokens differ: documents of very different length."""
    rng = np.random.default_rng(0)
    documents = [[*rng.integers(2, VOCABULARY, rng.choice([2, 3, 40])).tolist(), 0] for _ in range(count * LENGTH // 4)]
    return lay_out(PackedRows, Memory(documents), LENGTH)


def batches(sizes: Sequence[int]) -> list[Batch]:
    packed, out, at = rows(), [], 0
    for size in sizes:
        out.append(collate([packed.get_row(i, i) for i in range(at, at + size)], [i % 2 for i in range(size)]))
        at += size
    return out


def run_of(dtype: torch.dtype = torch.float32, clip: float = 1e9) -> Run:
    model = CausalModel(make_llama())
    weights = Weights(model, FullFinetuning(model.pretrained), dtype, master_copies=True)
    optimizer = AdamW(weights, betas=(0.9, 0.95), eps=EPS, weight_decay=0.1)
    return Run(
        model=model,
        weights=weights,
        optimizer=optimizer,
        objectives=[TokenLoss()],
        penalties=[],
        schedule=lr_schedules.chain((lr_schedules.constant(1e-3), 10)),
        world=World(torch.device("cpu")),
        sources=["a", "b"],
        max_grad_norm=clip,
        seed=0,
        trained_tokens_by_source=np.zeros(2, np.int64),
    )


def after(sizes: Sequence[int], steps: int = 1) -> tuple[list[float], torch.Tensor]:
    run = run_of()
    reports = [train_step(run, batches(sizes)) for _ in range(steps)]
    return [r.loss for r in reports], torch.cat([m.detach().flatten() for m in run.weights.masters])


def test_micro_batches_do_not_matter() -> None:
    losses, whole = after([8], steps=3)
    for sizes in ([4, 4], [1] * 8, [5, 3]):
        other_losses, other = after(sizes, steps=3)
        assert other_losses == pytest.approx(losses, rel=1e-6)
        assert torch.allclose(other, whole, atol=2e-6)


def gradient(sizes: Sequence[int], *, mean_of_means: bool) -> torch.Tensor:
    run, parts = run_of(), batches(sizes)
    counted = sum(b.label_count for b in parts)
    for batch in parts:
        loss, _ = TokenLoss()(run.model(**batch.inputs), batch)
        (loss / (batch.label_count * len(parts)) if mean_of_means else loss / counted).backward()
    return torch.cat([m.grad.flatten() for m in run.weights.masters if m.grad is not None])


def test_a_mean_of_means_would_be_caught() -> None:
    whole = gradient([8], mean_of_means=False)
    ours = (gradient([1] * 8, mean_of_means=False) - whole).norm() / whole.norm()
    theirs = (gradient([1] * 8, mean_of_means=True) - whole).norm() / whole.norm()
    assert ours < 1e-6 < 0.01 < theirs


def test_the_loss_is_that_of_transformers_over_the_whole_batch() -> None:
    batch = batches([8])[0]
    run = run_of()
    with torch.no_grad():
        logits = run.model.pretrained(**batch.inputs, use_cache=False).logits
        wanted = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORED)
    report = train_step(run, [batch])
    assert report.loss == pytest.approx(float(wanted), rel=1e-6)
    assert sum(nats for nats, _ in report.losses_by_source.values()) / report.tokens == pytest.approx(
        report.loss, rel=1e-6
    )
    assert report.tokens == int((batch.labels != IGNORED).sum())


def test_three_steps_are_those_of_a_plain_torch_loop() -> None:
    """The reference: nothing of ours but the batches."""
    model = make_llama()
    table = model.get_input_embeddings().weight
    decay = [p for p in model.parameters() if p.ndim >= 2 and p is not table]
    rest = [p for p in model.parameters() if p.ndim < 2 or p is table]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}],
        lr=1e-3,
        betas=(0.9, 0.95),
        eps=EPS,
    )
    batch = batches([8])[0]
    for _ in range(3):
        logits = model(**batch.inputs, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
    run = run_of(clip=0.5)
    for _ in range(3):
        train_step(run, batches([4, 4]))
    for ours, theirs in zip(run.weights.masters, model.parameters(), strict=True):
        assert torch.allclose(ours, theirs, atol=2e-6)


def test_small_updates_survive_in_bf16_and_would_be_lost_without_masters() -> None:
    run = run_of(torch.bfloat16)
    before = [m.detach().clone() for m in run.weights.masters]
    bare = [p.detach().to(torch.bfloat16) for p in make_llama().parameters()]
    bare_before = [p.clone() for p in bare]
    run.schedule = lr_schedules.chain((lr_schedules.constant(1e-5), 100))
    for _ in range(10):
        train_step(run, batches([8]))
        for p in bare:
            p.sub_(1e-5)  # the mutant: the same size of step, on bf16 weights
    moved = torch.cat([(a != b).flatten() for a, b in zip(run.weights.masters, before, strict=True)])
    moved_bare = torch.cat([(a != b).flatten() for a, b in zip(bare, bare_before, strict=True)])
    assert moved.float().mean() > 0.95 > 0.5 > moved_bare.float().mean()


def test_bf16_with_masters_follows_fp32() -> None:
    curves = []
    for dtype in (torch.float32, torch.bfloat16):
        run = run_of(dtype)
        curves.append([train_step(run, batches([8])).loss for _ in range(20)])
    assert curves[1] == pytest.approx(curves[0], rel=5e-3)
    assert curves[1][-1] < curves[1][0] - 0.3


def test_full_precision_computes_with_the_masters_and_gives_the_copies_back() -> None:
    run = run_of(torch.bfloat16)
    train_step(run, batches([8]))
    batch = batches([8])[0]
    with torch.no_grad():
        low = run.model(**batch.inputs).hidden
        with run.weights.full_precision():
            high = run.model(**batch.inputs).hidden
        again = run.model(**batch.inputs).hidden
    assert low.dtype == torch.bfloat16 and high.dtype == torch.float32
    assert torch.equal(low, again) and not torch.equal(low.float(), high)


def test_moments_can_be_kept_or_kept_in_part() -> None:
    run = run_of()
    for _ in range(3):
        train_step(run, batches([8]))
    moments = run.optimizer.moments()
    assert set(run.optimizer.update_counts().values()) == {3}
    kept, second = run_of(), run_of()
    kept.optimizer.restore(moments, run.optimizer.update_counts())
    second.optimizer.restore(moments, run.optimizer.update_counts(), keep=("exp_avg_sq",))
    name = next(iter(moments)).removesuffix(".exp_avg")
    assert torch.equal(kept.optimizer.moments()[f"{name}.exp_avg"], moments[f"{name}.exp_avg"])
    assert not second.optimizer.moments()[f"{name}.exp_avg"].any()
    assert torch.equal(second.optimizer.moments()[f"{name}.exp_avg_sq"], moments[f"{name}.exp_avg_sq"])

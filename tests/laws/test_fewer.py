"""Laws of updates that move fewer numbers: all of them is the plain update to the bit, a share is that share exactly, and
what does not move is bit for bit what it was, whatever decays."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

from postgrad.data.layouts.rows import IGNORED, Row
from postgrad.data.loading.batch import Batch, collate
from postgrad.distributed.fsdp import checkpoint_activations
from postgrad.models.model import CausalModel, HeadedModel, Model
from postgrad.optim.migu import MiguMask
from postgrad.optim.mofo import MofoMask
from postgrad.optim.optimizer import AdamW, Weights
from postgrad.optim.sparse_update import FullMask, SparseMask, UpdateMask
from postgrad.optim.top_k import share_count
from postgrad.penalties.anchor import Anchor, AnchoredWeight
from postgrad.training.step import Run, train_step
from postgrad.tuning.lora import LoraAdapter
from postgrad.tuning.weight_subsets import FullFinetuning
from tests.laws.test_step import EPS, batches, run_of
from tests.tiny_stages import make_bert, make_t5
from tests.tuning.families import build_model

Make = Callable[[Run], UpdateMask]


def momentum(share: float) -> Make:
    return lambda run: MofoMask(share, run.weights.masters)


def magnitude(share: float) -> Make:
    return lambda run: MiguMask(share, run.model, run.weights.entries)


KINDS = {"momentum": momentum, "magnitude": magnitude}


def made(make: Make, dtype: torch.dtype = torch.float32) -> Run:
    run = run_of(dtype)
    run.optimizer.update_mask = make(run)
    return run


def values(run: Run) -> dict[str, Tensor]:
    return {w.name: w.master.detach().clone() for w in run.weights.entries}


def after(run: Run, steps: int = 1, sizes: Sequence[int] = (4, 4)) -> dict[str, Tensor]:
    for _ in range(steps):
        train_step(run, batches(sizes))
    return values(run)


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def linear(name: str) -> bool:
    return "proj" in name


# -- all, and exactly so many -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_share_of_all_is_the_plain_update_to_the_bit(kind: str, dtype: torch.dtype) -> None:
    plain, whole, half = run_of(dtype), made(KINDS[kind](1.0), dtype), made(KINDS[kind](0.5), dtype)
    assert same(after(whole, 3), after(plain, 3))
    assert not same(after(half, 3), values(plain))  # which a law that always holds would not see
    for one, two in zip(whole.weights.entries, plain.weights.entries, strict=True):
        assert torch.equal(one.parameter, two.parameter)


@pytest.mark.parametrize("share", [0.05, 0.3])
def test_of_each_matrix_exactly_the_share_moves_and_the_rest_stays_to_the_bit(share: float) -> None:
    run = made(momentum(share))
    before, found = values(run), after(run)
    for name, old in before.items():
        moved = int((found[name] != old).sum())
        if old.ndim < 2:
            assert moved == old.numel()
        elif "embed" in name:
            assert moved <= share_count(share, old.numel())  # tokens that do not occur have nowhere to go
        else:
            assert moved == share_count(share, old.numel())


@pytest.mark.parametrize("share", [0.1, 0.3])
def test_of_each_linear_layer_exactly_the_share_of_rows_moves(share: float) -> None:
    run = made(magnitude(share))
    before, found = values(run), after(run)
    for name, old in before.items():
        changed = found[name] != old
        if linear(name):
            rows = changed.any(1)
            assert int(rows.sum()) == share_count(share, len(old))
            assert torch.equal(rows, changed.all(1))
        else:
            assert changed.any()


@pytest.mark.parametrize("kind", KINDS)
def test_the_report_says_how_many_moved(kind: str) -> None:
    run = made(KINDS[kind](0.2))
    before = values(run)
    report = train_step(run, batches([8]))
    moved = sum(int((new != before[name]).sum()) for name, new in values(run).items() if "embed" not in name)
    table = next(w.master for w in run.weights.entries if w.is_embedding)
    whole = share_count(0.2, table.numel()) if kind == "momentum" else table.numel()
    assert report.num_updated == moved + whole
    assert (
        isinstance(run.optimizer.update_mask, SparseMask)
        and run.optimizer.update_mask.num_updated == report.num_updated
    )
    assert train_step(run_of(), batches([8])).num_updated is None


# -- which ones ---------------------------------------------------------------------------------------------------------


def gradients(run: Run) -> dict[str, Tensor]:
    """Those of one step, as they stand when the update begins."""
    found: dict[str, Tensor] = {}

    class Keeping(FullMask):
        def before_update(self) -> None:
            for w in run.weights.entries:
                assert w.master.grad is not None
                found[w.name] = w.master.grad.clone()

    moving, run.optimizer.update_mask = run.optimizer.update_mask, Keeping()
    train_step(run, batches([8]))
    run.optimizer.update_mask = moving
    return found


def by_hand(share: float, steps: int, *, by_gradient: bool = False, decays_all: bool = False) -> dict[str, Tensor]:
    """MoFO written out in fp64; `by_gradient`, `decays_all`: two mutants."""
    run = run_of()
    table = next(w.name for w in run.weights.entries if w.is_embedding)
    ours = {name: value.double() for name, value in values(run).items()}
    first = {name: torch.zeros_like(v) for name, v in ours.items()}
    second = {name: torch.zeros_like(v) for name, v in ours.items()}
    for step in range(1, steps + 1):
        for w in run.weights.entries:
            w.master.data.copy_(ours[w.name].float())
        for name, g in gradients(run).items():
            g = g.double()
            first[name] = 0.9 * first[name] + 0.1 * g
            second[name] = 0.95 * second[name] + 0.05 * g * g
            size = (g if by_gradient else first[name]).abs()
            mask = torch.ones_like(g, dtype=torch.bool)
            if g.ndim >= 2:
                mask = size >= size.flatten().sort(descending=True).values[share_count(share, g.numel()) - 1]
            decay = 0.1 if g.ndim >= 2 and name != table else 0.0
            step_of = (first[name] / (1 - 0.9**step)) / ((second[name] / (1 - 0.95**step)).sqrt() + EPS)
            decayed = decay * ours[name] * (torch.ones_like(mask) if decays_all else mask)
            ours[name] = ours[name] - 1e-3 * (step_of * mask + decayed)
    return {name: v.float() for name, v in ours.items()}


def apart(one: dict[str, Tensor], two: dict[str, Tensor]) -> float:
    return max(float((one[name] - two[name]).abs().max()) for name in one)


def test_it_is_the_published_update_written_out() -> None:
    found = after(made(momentum(0.1)), 3, [8])
    assert apart(found, by_hand(0.1, 3)) < 2e-6
    # The mutants: chosen by the gradient, and decay of what does not move, as the authors' own code has it.
    assert apart(found, by_hand(0.1, 3, by_gradient=True)) > 1e-4
    assert apart(found, by_hand(0.1, 3, decays_all=True)) > 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_moments_are_those_of_all_numbers(kind: str) -> None:
    plain, few = run_of(), made(KINDS[kind](0.1))
    after(plain), after(few)
    assert same(few.optimizer.moments(), plain.optimizer.moments())
    assert few.optimizer.update_counts() == plain.optimizer.update_counts()


def outputs(model: nn.Module, run: Run, batch: Batch) -> dict[str, Tensor]:
    """What each linear layer gives, without any hook of ours."""
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        return lambda _m, _i, output: found.update({name: output.detach()})

    handles = [m.register_forward_hook(keep(n)) for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    with torch.no_grad():
        run.model(**batch.inputs)
    for handle in handles:
        handle.remove()
    return found


def test_the_rows_are_those_of_the_largest_outputs() -> None:
    run = made(magnitude(0.25))
    batch = batches([8])[0]
    said = outputs(run.model.pretrained, run, batch)
    real = torch.zeros_like(batch.labels, dtype=torch.bool)
    for row, labels in zip(real, batch.labels, strict=True):
        row[: int((labels != IGNORED).nonzero().max()) + 1] = True
    before = values(run)
    train_step(run, [batch])
    for name, old in before.items():
        if linear(name):
            h = said[name.removesuffix(".weight")][real].double().abs()
            shares = (h / h.sum(1, keepdim=True)).mean(0)
            wanted = shares.argsort(descending=True)[: share_count(0.25, len(shares))]
            rows = (values(run)[name] != old).any(1).nonzero()[:, 0]
            assert set(rows.tolist()) == set(wanted.tolist())
            assert set(rows.tolist()) != set(h.mean(0).argsort()[: len(wanted)].tolist())


def sums(run: Run) -> list[Tensor]:
    """How large the outputs were in a step, before its update."""
    moving = run.optimizer.update_mask
    assert isinstance(moving, MiguMask)
    found: list[Tensor] = []
    masks = moving.masks

    def watched(masters: Sequence[Tensor], states: object) -> list[Tensor]:
        found.extend(layer.sums_O.clone() for layer in moving.layers)
        return masks(masters, states)  # type: ignore[arg-type]

    moving.masks = watched  # type: ignore[method-assign]
    return found


def heard(sizes: Sequence[int], prepare: Callable[[Run], None] = lambda run: None) -> Tensor:
    run = made(magnitude(0.25))
    prepare(run)
    found = sums(run)
    run.model.train()
    train_step(run, batches(sizes))
    return torch.cat(found)


def test_micro_batches_do_not_matter() -> None:
    whole = heard([8])
    for sizes in ([4, 4], [1] * 8, [5, 3]):
        assert torch.allclose(heard(sizes), whole, rtol=1e-5)


def test_each_step_hears_its_own_text_alone() -> None:
    """A token's outputs are shares of one, so over a layer's rows they add up to the tokens of the step."""
    run = made(magnitude(0.25))
    found = sums(run)
    layers = len(run.optimizer.update_mask.layers)  # type: ignore[attr-defined]
    for step, rows in enumerate((8, 4)):
        batch = batches([rows])[0]
        train_step(run, [batch])
        tokens = sum(int((labels != IGNORED).nonzero().max()) + 1 for labels in batch.labels)
        for sums_O in found[step * layers :]:
            assert float(sums_O.sum()) == pytest.approx(tokens, rel=1e-5)


def test_a_layer_that_no_token_was_sent_to_stays() -> None:
    """An expert that was left out: it has a gradient still where a penalty pulls, and moments of earlier steps."""
    left_out = "layers.0.mlp."
    moved = {}
    for kind in (None, magnitude(0.25)):
        run = run_of()
        run.penalties = [
            Anchor([AnchoredWeight(w.master, torch.zeros_like(w.master)) for w in run.weights.entries], strength=1.0)
        ]
        if kind:
            run.optimizer.update_mask = kind(run)
        after(run)
        before = values(run)
        run.model.pretrained.get_submodule("model.layers.0.mlp").forward = torch.zeros_like  # type: ignore[method-assign]
        moved[kind is None] = {name for name, value in after(run).items() if not torch.equal(value, before[name])}
    inside = {name for name in before if left_out in name}
    assert len(inside) == 3 and moved[True] == before.keys() and moved[False] == before.keys() - inside


class _Always(MiguMask):
    """A mutant: it listens in the backward pass, too."""

    @property
    def _token_masks(self) -> object:
        return self.now

    @_token_masks.setter
    def _token_masks(self, value: object) -> None:
        self.now = value if value is not None else self.__dict__.get("now")


def test_activations_that_are_computed_again_are_heard_once() -> None:
    whole = heard([8])
    assert torch.allclose(heard([8], lambda run: checkpoint_activations(run.model)), whole, rtol=1e-5)

    def twice(run: Run) -> None:
        checkpoint_activations(run.model)
        run.optimizer.update_mask = _Always(0.25, run.model, run.weights.entries)

    assert not torch.allclose(heard([8], twice), whole, rtol=1e-5)


def test_what_is_read_outside_of_a_step_is_not_heard() -> None:
    def elsewhere(run: Run) -> None:
        with torch.no_grad():
            run.model(**batches([8])[0].inputs)

    assert torch.equal(heard([4, 4], elsewhere), heard([4, 4]))


def with_padding(lengths: Sequence[int], *, decoder: Sequence[int] = ()) -> list[Row]:
    generator = torch.Generator().manual_seed(5)

    def ids(length: int) -> Tensor:
        return torch.randint(10, 100, (length,), generator=generator)

    rows = []
    for i, length in enumerate(lengths):
        read = ids(length).numpy()
        inputs = {"input_ids": read, "attention_mask": (read > 0).astype("int64")}
        if decoder:
            inputs["decoder_input_ids"] = ids(decoder[i]).numpy()
        labels = ids(decoder[i] if decoder else length).numpy()
        rows.append(Row(inputs, labels, len(labels)))
    return rows


def alone_and_together(pretrained: nn.Module, rows: list[Row]) -> list[Tensor]:
    found = []
    for parts in ([rows], [[row] for row in rows]):
        model = HeadedModel(copy.deepcopy(pretrained))  # type: ignore[arg-type]
        weights = Weights(model, FullFinetuning(model.pretrained), torch.float32, master_copies=True)
        optimizer = AdamW(weights, betas=(0.9, 0.95), eps=EPS, weight_decay=0.1)
        run = dataclasses.replace(run_of(), model=model, weights=weights, optimizer=optimizer)
        optimizer.update_mask = MiguMask(0.25, model, weights.entries)
        kept = sums(run)
        train_step(run, [collate(part, [0] * len(part)) for part in parts])
        found.append(torch.cat(kept))
    return found


PADDED = {
    "encoder": (lambda: make_bert(128), with_padding([3, 9, 17])),
    "encoder-decoder": (lambda: make_t5(128), with_padding([3, 9, 17], decoder=[12, 2, 5])),
    "sides of one length": (lambda: make_t5(128), with_padding([3, 8, 16], decoder=[16, 2, 5])),
}


@pytest.mark.parametrize("name", PADDED)
def test_padding_is_not_heard(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, rows = PADDED[name]
    together, alone = alone_and_together(make(), rows)
    assert torch.allclose(together, alone, rtol=1e-4)
    monkeypatch.setattr("postgrad.optim.migu._align_token_mask", lambda tokens, sizes: torch.ones(sizes.shape[:-1]))
    together, alone = alone_and_together(make(), rows)
    assert not torch.allclose(together, alone, rtol=1e-4)


def test_cross_attention_reads_the_encoder() -> None:
    """Without looking for it, its keys would be weighed by the decoder's padding where both sides are of one length."""
    model = HeadedModel(make_t5(128))
    moving = MiguMask(
        0.25, model, Weights(model, FullFinetuning(model.pretrained), torch.float32, master_copies=True).entries
    )
    names = {id(module): name for name, module in model.pretrained.named_modules()}
    written = {names[id(layer.output_module)]: layer.is_decoder_side for layer in moving.layers}
    for name, side in written.items():
        across = "EncDecAttention" in name and name[-1] in "kv"
        assert side == (name.startswith("decoder") and not across)
    assert sum(written.values()) == 2 * (4 + 2 + 2)


def test_transposed_layers_move_by_columns_with_their_biases() -> None:
    """GPT-2 holds its weights as (inputs, outputs)."""
    model = CausalModel(build_model("gpt2", "lm"))
    weights = Weights(model, FullFinetuning(model.pretrained), torch.float32, master_copies=True)
    optimizer = AdamW(weights, betas=(0.9, 0.95), eps=EPS, weight_decay=0.1)
    run = dataclasses.replace(run_of(), model=model, weights=weights, optimizer=optimizer)
    optimizer.update_mask = MiguMask(0.25, model, weights.entries)
    before = values(run)
    ids = torch.randint(5, 100, (4, 12), generator=torch.Generator().manual_seed(3))
    rows = [Row({"input_ids": row.numpy()}, row.numpy(), len(row)) for row in ids]
    report = train_step(run, [collate(rows, [0] * 4)])
    assert report.num_updated == optimizer.update_mask.num_updated < sum(m.numel() for m in weights.masters)
    for name, old in before.items():
        if ".h." in name and "ln_" not in name and name.endswith("weight"):
            changed = values(run)[name] != old
            bias = name.removesuffix("weight") + "bias"
            assert torch.equal(changed.all(0), changed.any(0))
            assert int(changed.any(0).sum()) == share_count(0.25, old.shape[1])
            # A key's bias has no gradient, whichever way it is chosen: the softmax does not see it.
            assert not ((values(run)[bias] != before[bias]) & ~changed.any(0)).any()


# -- beside a tuning ----------------------------------------------------------------------------------------------------


def test_low_rank_parts_move_by_rows_though_b_begins_at_zero() -> None:
    run = run_of()
    model: Model = run.model
    tuning = LoraAdapter(model.pretrained, rank=8, seed=0)
    weights = Weights(model, tuning, torch.float32, master_copies=True)
    optimizer = AdamW(weights, betas=(0.9, 0.95), eps=EPS, weight_decay=0.1)
    run = dataclasses.replace(run, weights=weights, optimizer=optimizer)
    optimizer.update_mask = MiguMask(0.25, model, weights.entries)
    assert {id(m) for m in optimizer.update_mask.sparse_masters} == {id(m) for m in weights.masters}
    before = values(run)
    for _ in (1, 2):  # A has no gradient while B is zero
        train_step(run, batches([8]))
    for w in weights.entries:
        rows = (w.master != before[w.name]).any(1)
        top = share_count(0.25, len(rows))
        assert (top <= int(rows.sum()) <= 2 * top) if "lora_B" in w.name else (0 < int(rows.sum()) <= 2 * top)


def test_what_has_no_gradient_yet_is_left_alone() -> None:
    run = made(momentum(0.3))
    held = next(w for w in run.weights.entries if "layers.0.mlp.up" in w.name)
    held.parameter.requires_grad_(False)
    before = values(run)
    report = train_step(run, batches([8]))
    held.parameter.requires_grad_(True)
    assert torch.equal(held.master, before[held.name])
    assert isinstance(run.optimizer.update_mask, SparseMask)
    assert report.num_updated == run.optimizer.update_mask.num_updated - share_count(0.3, held.master.numel())
    train_step(run, batches([8]))
    assert int((held.master != before[held.name]).sum()) == share_count(0.3, held.master.numel())

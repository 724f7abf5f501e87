"""Is the sum of adapters the sum of their updates, where it says so, and an adapter like any other?

Legend: R rank, I inputs and O outputs of a layer; A is (R, I) and B (O, R).
"""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from postgrad.errors import TuningError
from postgrad.tuning.lora import LoraAdapter, scalings
from postgrad.tuning.merge_adapters import MergeMethod, merge_adapters
from postgrad.tuning.tuning import TuningExport
from tests.tuning import checks
from tests.tuning.families import batch, build_model, logits

PRUNING = [how for how in get_args(MergeMethod) if how.startswith(("ties", "dare", "magnitude"))]


def adapter(family: str = "llama", *, seed: int = 0, **options: Any) -> TuningExport:
    """A trained adapter of one base."""
    model = build_model(family, "lm")
    tuning = LoraAdapter(model, seed=seed, **{"rank": 4, **options})
    checks.train(model, tuning, family, "lm", steps=2, first=1 + 10 * seed)
    return tuning.export()


def updates(part: TuningExport) -> dict[str, Tensor]:
    """s B A by layer."""
    return {
        name: scaling * part.state[f"{name}.lora_B.weight"] @ part.state[f"{name}.lora_A.weight"]
        for name, scaling in scalings(part).items()
    }


def total(parts: list[tuple[TuningExport, float]]) -> dict[str, Tensor]:
    """The weighted sum of updates."""
    found: dict[str, Tensor] = {}
    for part, weight in parts:
        for name, update in updates(part).items():
            found[name] = found.get(name, torch.zeros_like(update)) + weight * update
    return found


def same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    assert found.keys() == expected.keys()
    for name, update in expected.items():
        assert (found[name] - update).abs().max() <= tolerance * max(1.0, update.abs().max().item())


MIXED = [
    ({"seed": 0}, 0.5),
    ({"seed": 1, "variant": "rslora"}, 1.5),
    ({"seed": 2, "variant": "pissa", "rank": 2}, -0.7),
]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("first", range(3))
def test_side_by_side_is_the_very_sum_of_every_form_whichever_comes_first(family: str, first: int) -> None:
    order = MIXED[first:] + MIXED[:first]
    parts = [(adapter(family, **options), weight) for options, weight in order]
    model = build_model(family, "lm")
    combined = merge_adapters(model, parts, "cat")
    same(updates(combined.export()), total(parts))
    assert combined.rank == 12
    expected = logits(model, batch(family, "lm"))
    combined.merge()
    assert (logits(model, batch(family, "lm")) - expected).abs().max() < 1e-4


def test_svd_is_the_best_of_the_largest_rank() -> None:
    parts = [(adapter(**options), weight) for options, weight in MIXED]
    found = updates(merge_adapters(build_model("llama", "lm"), parts, "svd").export())
    expected = {}
    for name, update in total(parts).items():
        u, s, v = torch.linalg.svd(update)
        expected[name] = u[:, :4] @ torch.diag(s[:4]) @ v[:4]
    same(found, expected)


def test_one_by_one_sums_the_factors() -> None:
    parts = [(adapter(seed=0), 0.5), (adapter(seed=1), -0.7)]
    combined = merge_adapters(build_model("llama", "lm"), parts, "linear").export()
    name = "model.layers.1.mlp.down_proj"
    roots = [(abs(w) * scalings(p)[name]) ** 0.5 for p, w in parts]
    a_RI = sum(
        r * (1 if w > 0 else -1) * p.state[f"{name}.lora_A.weight"] for r, (p, w) in zip(roots, parts, strict=True)
    )
    b_OR = sum(r * p.state[f"{name}.lora_B.weight"] for r, (p, _) in zip(roots, parts, strict=True))
    torch.testing.assert_close(updates(combined)[name], b_OR @ a_RI)


@pytest.mark.parametrize("how", PRUNING)
def test_pruning_drops_values_reproducibly(how: MergeMethod) -> None:
    pair = [(adapter(), 1.0), (adapter(seed=1), 1.0)]

    def merged(density: float) -> dict[str, Tensor]:
        return updates(merge_adapters(build_model("llama", "lm"), pair, how, density=density).export())

    most, half, again = merged(0.999), merged(0.5), merged(0.5)
    assert all(torch.equal(half[name], again[name]) for name in half)
    assert all(not torch.equal(half[name], most[name]) for name in half)


def test_pruning_the_largest_of_whole_updates() -> None:
    """Two copies of an update, pruned and summed: the best approximation of twice its largest numbers."""
    part = adapter()
    found = updates(
        merge_adapters(
            build_model("llama", "lm"), [(part, 1.0), (part, 1.0)], "magnitude_prune_svd", density=0.25
        ).export()
    )
    expected = {}
    for name, update in updates(part).items():
        kept = torch.zeros_like(update).flatten()
        largest = update.abs().flatten().topk(update.numel() // 4).indices
        kept[largest] = 2 * update.flatten()[largest]
        u, s, v = torch.linalg.svd(kept.view_as(update))
        expected[name] = u[:, :4] @ torch.diag(s[:4]) @ v[:4]
    same(found, expected)


@pytest.mark.parametrize("how", PRUNING)
def test_layers_of_one_part_alone_are_pruned_too(how: MergeMethod) -> None:
    parts = [(adapter(targets="attention"), 1.0), (adapter(seed=1, targets=["q_proj"]), 1.0)]
    found = updates(merge_adapters(build_model("llama", "lm"), parts, how, density=0.5).export())
    alone = "model.layers.0.self_attn.o_proj"
    assert not torch.allclose(found[alone], updates(parts[0][0])[alone], rtol=1e-3)


def test_parts_of_different_layers_and_ranks() -> None:
    parts = [(adapter(targets="attention"), 1.0), (adapter(seed=1, targets=["q_proj", "up_proj"], rank=3), 2.0)]
    combined = merge_adapters(build_model("llama", "lm"), parts)
    same(updates(combined.export()), total(parts))
    assert {a.shape[0] for a in combined.directions().values()} == {3, 4, 7}
    with pytest.raises(TuningError, match="adapters of the ranks 4, 3"):
        merge_adapters(build_model("llama", "lm"), parts, "linear")


def test_attached_parts_give_way_to_their_sum() -> None:
    model = build_model("llama", "lm")
    first = LoraAdapter(model, rank=4)
    checks.train(model, first, "llama", "lm", steps=2)
    second = LoraAdapter(model, rank=4, seed=1)
    checks.train(model, second, "llama", "lm", steps=2, first=5)
    answer = logits(model, batch("llama", "lm"))
    merge_adapters(model, [(first, 1.0), (second, 1.0)])
    assert (logits(model, batch("llama", "lm")) - answer).abs().max() < 1e-4
    assert not first.directions() and not second.directions()


def test_a_head_of_one_part_comes_along_and_two_are_not_averaged() -> None:
    def trained(seed: int) -> TuningExport:
        model = build_model("bert", "classify")
        tuning = LoraAdapter(model, rank=2, seed=seed, also_train=["classifier"])
        checks.train(model, tuning, "bert", "classify", steps=2)
        return tuning.export()

    first, second = trained(0), trained(1)
    bare = TuningExport({k: v for k, v in second.options.items() if k != "also"}, {})
    bare.state.update({name: tensor for name, tensor in second.state.items() if ".lora_" in name})
    combined = merge_adapters(build_model("bert", "classify"), [(first, 1.0), (bare, 0.5)])
    assert torch.equal(combined.state()["classifier.weight"], first.state["classifier.weight"])
    with pytest.raises(TuningError, match="two of the adapters trained the base weight classifier"):
        merge_adapters(build_model("bert", "classify"), [(first, 1.0), (second, 0.5)])


@pytest.mark.parametrize(
    ("how", "density", "says"),
    [
        ("average", None, "unknown method 'average'"),
        ("tie", None, "did you mean 'ties'"),
        ("ties", None, "ties with a density of None"),
        ("dare_ties", 1.0, "with a density of 1.0"),
        ("cat", 0.5, "every value is kept"),
    ],
)
def test_what_cannot_be_is_refused(how: Any, density: float | None, says: str) -> None:
    with pytest.raises(TuningError, match=f"(?s){says}"):
        merge_adapters(build_model("llama", "lm"), [(adapter(), 1.0)] * 2, how, density=density)


def test_nothing_and_dora_are_no_summands() -> None:
    with pytest.raises(TuningError, match="cat of 0 adapters"):
        merge_adapters(build_model("llama", "lm"), [])
    with pytest.raises(TuningError, match=r"(?s)ties of 1 adapters.*two adapters or more"):
        merge_adapters(build_model("llama", "lm"), [(adapter(), 1.0)], "ties", density=0.5)
    model = build_model("llama", "lm")
    dora = LoraAdapter(model, rank=2, variant="dora")
    for part in (dora, dora.export()):
        with pytest.raises(TuningError, match="dora adapter cannot be summed"):
            merge_adapters(model, [(part, 1.0)])
    assert dora.directions()

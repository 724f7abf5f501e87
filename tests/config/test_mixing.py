"""Shares of sources that name none: T5's formulas by hand, and trained tokens that keep to what came out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from postgrad.config.mixing import EqualMixing, ProportionalMixing, TemperatureMixing, fill_shares
from postgrad.config.stage_file import parse_stage
from postgrad.data.layouts.rows import IGNORED
from postgrad.data.tokens.held_out_split import held_out_mask, select_documents
from postgrad.errors import StageError
from postgrad.plan.plan import Plan
from tests.tiny_stages import Workspace, make_workspace, source_target_examples, write_rows

SIZES = {"a": 1_000, "b": 9_000, "c": 200_000}
NONE = {"a": None, "b": None, "c": None}


@pytest.mark.parametrize(
    ("mixing", "shares"),
    [
        (ProportionalMixing(kind="examples"), [1 / 210, 9 / 210, 200 / 210]),
        (ProportionalMixing(kind="examples", cap=10_000), [0.05, 0.45, 0.5]),  # min(n, K): 1, 9 and 10 thousand
        (TemperatureMixing(kind="temperature", temperature=1, cap=10_000), [0.05, 0.45, 0.5]),
        # square roots of 1, 9 and 16 thousand are as 1 : 3 : 4
        (TemperatureMixing(kind="temperature", temperature=2, cap=16_000), [1 / 8, 3 / 8, 4 / 8]),
        (TemperatureMixing(kind="temperature", temperature=1e9), [1 / 3, 1 / 3, 1 / 3]),
        (EqualMixing(kind="equal"), [1 / 3, 1 / 3, 1 / 3]),
    ],
)
def test_the_published_rules_by_hand(mixing: Any, shares: list[float]) -> None:
    assert list(fill_shares(NONE, mixing, SIZES).values()) == pytest.approx(shares)


def test_what_is_given_stays_and_the_others_part_the_rest() -> None:
    found = fill_shares({"a": None, "b": 0.6, "c": None}, ProportionalMixing(kind="examples", cap=3_000), SIZES)
    assert found == pytest.approx({"a": 0.1, "b": 0.6, "c": 0.3})


def test_the_limit_comes_before_the_temperature() -> None:
    """The mutant, a limit on the weights, would leave a large source its size."""
    mixing = TemperatureMixing(kind="temperature", temperature=2, cap=4_000)
    right = fill_shares(NONE, mixing, SIZES)
    wrong = {name: min(n**0.5, 4_000) for name, n in SIZES.items()}
    assert right["b"] == right["c"]
    assert wrong["c"] / sum(wrong.values()) > 1.5 * right["c"]


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return make_workspace(tmp_path_factory.mktemp("shelf"), tmp_path_factory.getbasetemp() / "cache")


# -- in a stage --------------------------------------------------------------------------------------------------------


def sizes_of(plan: Plan) -> list[int]:
    """Training documents of each source, counted one by one."""
    out = []
    for leaf in plan.data.sources:
        digests = np.asarray(leaf.store.documents)["digest"]
        out.append(int((~held_out_mask(digests, leaf.held_out)).sum()))
    return out


def trained(plan: Plan) -> np.ndarray:
    """Trained tokens of each source in the rows of the whole stage."""
    out = np.zeros(len(plan.data.sources), np.int64)
    for step in range(plan.steps):
        for i, (source, row) in enumerate(zip(*plan.data.mixture.rows(step), strict=True)):
            out[source] += int(
                (
                    plan.data.rows[source].get_row(int(row), step * plan.data.mixture.block_size + i).labels != IGNORED
                ).sum()
            )
    return out


def mixed(shelf: Workspace, folder: Path, **data: Any) -> dict[str, Any]:
    sources = []
    for name, count in (("small", 40), ("middle", 90), ("large", 400)):
        path = write_rows(folder / f"{name}.jsonl", source_target_examples(count, count))
        sources.append({"name": name, "path": str(path), "max_passes": 1000, "held_out": 0.1})
    return shelf.stage(
        "mixed",
        model="t5",
        sources=sources,
        tokens=12_000,
        objectives=[{"kind": "text-to-text"}],
        evaluation={"every": "100%", "samples": 0},
        batch={"global_batch_size": 12},
        data=data,
    )


@pytest.mark.parametrize(
    "mixing",
    [
        {"kind": "examples"},
        {"kind": "examples", "cap": 100},
        {"kind": "temperature", "temperature": 3},
        {"kind": "equal"},
    ],
    ids=lambda mixing: "-".join(map(str, mixing.values())),
)
def test_trained_tokens_keep_to_the_shares(shelf: Workspace, tmp_path: Path, mixing: dict[str, Any]) -> None:
    plan = shelf.plan(mixed(shelf, tmp_path, mixing=mixing))
    n = np.array(sizes_of(plan), float)
    weights = np.minimum(n, mixing.get("cap", np.inf)) ** (1 / mixing.get("temperature", 1))
    wanted = np.ones(3) / 3 if mixing["kind"] == "equal" else weights / weights.sum()
    read = trained(plan)
    assert read / read.sum() == pytest.approx(wanted, abs=0.02)
    said = next(note for note in plan.notes if note.startswith("shares by"))
    assert all(f"({int(size):,} examples" in said for size in n)
    assert f"small {wanted[0]:.2%}" in said


def test_a_given_share_stands_beside_a_mixing_and_a_curriculum_goes_on(shelf: Workspace, tmp_path: Path) -> None:
    raw = mixed(shelf, tmp_path, mixing={"kind": "equal"}, curriculum=[{"at": "50%", "shares": {"large": 1.0}}])
    raw["data"]["sources"][0]["share"] = 0.5
    plan = shelf.plan(raw)
    read = trained(plan)
    assert read / read.sum() == pytest.approx([0.25, 0.125, 0.625], abs=0.03)


def test_copies_of_held_out_rows_are_no_examples(shelf: Workspace, tmp_path: Path) -> None:
    raw = mixed(shelf, tmp_path, mixing={"kind": "examples"})
    made = source_target_examples(40, 40)
    held_out = write_rows(tmp_path / "held-out.jsonl", made[:10])
    raw["evaluation"]["learned"] = [str(held_out)]
    plan = shelf.plan(raw)
    digests = np.asarray(plan.data.sources[0].store.documents)["digest"]
    kept = select_documents(plan.data.sources[0].store, held_out=plan.data.sources[0].held_out, excluded=digests[:10])
    said = next(note for note in plan.notes if note.startswith("shares by"))
    assert f"({len(kept.documents)} examples" in said.split(",")[0]


def test_a_replay_of_everything_seen_is_one_source_of_all_its_examples(shelf: Workspace) -> None:
    first = shelf.stage("seen-first", tokens=6 * 4 * 48)
    shelf.run(first)
    sources = [
        {"name": "fresh", "path": shelf.file("new"), "max_passes": 100, "held_out": 0.0},
        {"name": "replay", "seen_so_far": True, "role": "replay", "max_passes": 100},
    ]
    raw = shelf.stage("seen-second", model="runs/seen-first", sources=sources, data={"mixing": {"kind": "examples"}})
    plan = shelf.plan(raw)
    n = np.array(sizes_of(plan), float)
    assert len(n) == 3
    parts = np.array([leaf.spec.fraction for leaf in plan.data.sources])
    wanted = np.array([n[0], n[1:].sum(), n[1:].sum()]) / n.sum() * parts
    found = [source.share for source in plan.as_record().sources]
    assert found == pytest.approx(wanted, abs=0.03)


@pytest.mark.parametrize(
    ("data", "share", "said"),
    [
        ({}, None, "data.mixing"),
        ({"mixing": {"kind": "equal"}}, 0.5, "each of them names one"),
        ({"mixing": {"kind": "temperature"}}, None, "missing"),
        ({"mixing": {"kind": "temperature", "temperature": 0.5}}, None, "greater than or equal to 1"),
        ({"mixing": {"kind": "examples", "limit": 3}}, None, "there is no key 'limit'"),
        ({"mixing": {"kind": "example"}}, None, "did you mean 'examples'?"),
    ],
)
def test_what_does_not_go_together_is_told(data: dict[str, Any], share: float | None, said: str) -> None:
    sources = [{"name": name, "path": name, **({"share": share} if share else {})} for name in ("a", "b")]
    raw = {
        "name": "x",
        "model": "m",
        "tokens": 10,
        "data": {"sources": sources, **data},
        "schedule": {"kind": "constant", "peak": 1},
    }
    with pytest.raises(StageError, match=said):
        parse_stage(raw, "x.yaml")

"""A lineage is found where it lies, also after it moved; a parent that was replaced is refused; the matrix is the records'."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from postgrad.errors import StageError
from postgrad.lineage.record import FORMAT, ConsumedSource, add_consumed, parse_record, read_record, write_record
from postgrad.lineage.tree import Stages, lineage_matrix, read_lineage
from postgrad.storage.fingerprint import differences, fingerprint


def run(
    place: Path,
    sets: dict[str, tuple[str, float, float]],
    parent: Path | None = None,
    *,
    hashes: dict[str, str] | None = None,
) -> Path:
    """A run's record with `sets[name] = (role, loss before, loss after)`."""
    place.mkdir(parents=True, exist_ok=True)
    parents = []
    if parent is not None:
        relative = os.path.relpath(parent, place)
        parents = [{"path": str(parent), "relative": relative, "name": parent.name, "id": read_record(parent).id}]
    raw = {
        "format": FORMAT,
        "id": f"id-{place.name}",
        "name": place.name,
        "status": "finished",
        "created": "2026-01-01T00:00:00+00:00",
        "parents": parents,
        "model": {"start_model": str(parent or "base")},
        "plan": {"steps": 10, "tokens": 1000},
        "totals": {"steps": 10, "tokens": 1000},
        "changes": {name: {"role": role} for name, (role, _, _) in sets.items()},
        "scores": {
            "before": {name: {"nats": before} for name, (_, before, _) in sets.items()},
            "after": {name: {"nats": after} for name, (_, _, after) in sets.items()},
        },
        "fingerprints": {"sets": {name: (hashes or {}).get(name, f"hash-{name}") for name in sets}},
    }
    write_record(place, parse_record(raw, str(place)))
    return place


def three(folder: Path) -> Path:
    """Old text all along, and one new set in each stage."""
    one = run(folder / "one", {"old": ("retained", 2.0, 2.1), "a": ("learned", 5.0, 3.0)})
    two = run(folder / "two", {"old": ("retained", 2.1, 2.4), "b": ("learned", 6.0, 4.0)}, one)
    return run(folder / "three", {"old": ("retained", 2.4, 2.2), "a": ("retained", 3.6, 3.3)}, two)


def ids(stages: Stages) -> list[str]:
    return [record.id for _, record in stages]


def test_a_chain_goes_from_the_first_stage_to_the_run(tmp_path: Path) -> None:
    last = three(tmp_path)
    assert ids(read_lineage(last)) == ["id-one", "id-two", "id-three"]
    assert ids(read_lineage(tmp_path / "one")) == ["id-one"]
    assert [path for path, _ in read_lineage(last)] == [tmp_path / n for n in ("one", "two", "three")]


def test_folders_that_moved_together_are_found(tmp_path: Path) -> None:
    three(tmp_path / "here")
    shutil.move(tmp_path / "here", tmp_path / "elsewhere")
    assert ids(read_lineage(tmp_path / "elsewhere" / "three")) == ["id-one", "id-two", "id-three"]


def test_a_relative_name_and_a_link_lead_to_the_same_chain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    last = three(tmp_path)
    (tmp_path / "latest").symlink_to(last)
    monkeypatch.chdir(tmp_path)
    assert (
        ids(read_lineage(Path("three"))) == ids(read_lineage(tmp_path / "latest")) == ["id-one", "id-two", "id-three"]
    )


def test_a_parent_that_is_gone_is_named(tmp_path: Path) -> None:
    last = three(tmp_path)
    shutil.rmtree(tmp_path / "one")
    with pytest.raises(StageError, match=r"the parent of two is missing[\s\S]*one"):
        read_lineage(last)


def test_a_parent_that_was_replaced_is_refused(tmp_path: Path) -> None:
    last = three(tmp_path)
    record = read_record(tmp_path / "one")
    write_record(tmp_path / "one", record.model_copy(update={"id": "another"}))
    with pytest.raises(StageError, match=r"no longer the run that two started from[\s\S]*id-one, not another"):
        read_lineage(last)


def test_a_parent_with_another_model_is_refused(tmp_path: Path) -> None:
    last = three(tmp_path)
    for place, model in (("one", "m1"), ("two", "m2")):
        record = read_record(tmp_path / place)
        record.fingerprints.model = model
        write_record(tmp_path / place, record)
    child = read_record(last)
    write_record(
        last, child.model_copy(update={"parents": [child.parents[0].model_copy(update={"fingerprint": "m2"})]})
    )
    assert len(read_lineage(last)) == 3
    record.fingerprints.model = "another"
    write_record(tmp_path / "two", record)
    with pytest.raises(StageError, match=r"two is no longer the one that three started from[\s\S]*m2, not another"):
        read_lineage(last)


def test_a_circle_is_refused(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    run(one, {})
    run(two, {}, one)
    run(one, {}, two)
    with pytest.raises(StageError, match="circle"):
        read_lineage(two)


def test_what_is_no_run_is_told_with_one_that_is(tmp_path: Path) -> None:
    three(tmp_path)
    (tmp_path / "model").mkdir()
    with pytest.raises(StageError, match=r"not a run folder[\s\S]*such as .*one"):
        read_lineage(tmp_path / "model")
    (tmp_path / "one" / "record.json").write_text("{")
    with pytest.raises(StageError, match=r"record\.json: broken JSON"):
        read_lineage(tmp_path / "one")
    (tmp_path / "one" / "record.json").write_text(json.dumps({"format": 99}))
    with pytest.raises(StageError, match=r"record format 99[\s\S]*expected: 2[\s\S]*upgrade postgrad"):
        read_lineage(tmp_path / "one")


def test_the_matrix_is_what_the_records_say_and_asks_for_the_rest(tmp_path: Path) -> None:
    asked: list[tuple[int, str]] = []

    def missing(row: int, key: str) -> float | None:
        asked.append((row, key))
        return {(0, "b:hash-b"): 6.5, (3, "b:hash-b"): 4.2}.get((row, key))

    found = lineage_matrix(read_lineage(three(tmp_path)), missing)
    assert [s.name for s in found.sets] == ["old", "a", "b"]
    assert [s.learnt_at for s in found.sets] == [0, 1, 2]
    assert [s.name for s in found.stages] == ["start", "one", "two", "three"]
    assert found.R == [[2.0, 5.0, 6.5], [2.1, 3.0, 6.0], [2.4, 3.6, 4.0], [2.2, 3.3, 4.2]]
    assert sorted(asked) == [(0, "b:hash-b"), (3, "b:hash-b")]  # no cell that a record holds is computed again
    # By hand, with losses turned into scores.
    summary = found.summary
    assert pytest.approx(-(2.2 + 3.3 + 4.2) / 3) == summary.ACC
    assert pytest.approx(-((2.2 - 2.0) + (3.3 - 3.0) + (4.2 - 4.0)) / 3) == summary.BWT
    assert pytest.approx(6.5 - 6.0) == summary.FWT
    assert summary.forgetting == pytest.approx(((2.2 - 2.0) + (3.3 - 3.0) + (4.2 - 4.0)) / 3)
    assert summary.denominators["BWT"].startswith("3 ")


def test_a_cell_that_nobody_knows_stays_empty_and_is_counted(tmp_path: Path) -> None:
    found = lineage_matrix(read_lineage(three(tmp_path)), lambda row, key: None)
    assert [row[2] for row in found.R] == [None, 6.0, 4.0, None]
    assert pytest.approx(-((2.2 - 2.0) + (3.3 - 3.0)) / 2) == found.summary.BWT
    assert found.summary.denominators["BWT"].startswith("2 ")
    assert found.summary.FWT is None
    json.dumps(found.as_json(), allow_nan=False)


def test_another_text_under_the_same_name_is_another_column(tmp_path: Path) -> None:
    one = run(tmp_path / "one", {"old": ("retained", 2.0, 2.1)})
    two = run(tmp_path / "two", {"old": ("retained", 7.0, 7.1)}, one, hashes={"old": "changed"})
    found = lineage_matrix(read_lineage(two), lambda row, key: None)
    assert found.R == [[2.0, None], [2.1, 7.0], [None, 7.1]]
    names = [s.name for s in found.sets]
    assert len(set(names)) == 2
    assert all(n.startswith("old-") for n in names)


def test_the_same_text_under_another_name_is_one_column_that_was_learnt_when_it_was(tmp_path: Path) -> None:
    """A stage that replays everything seen holds the old texts out under names of its own."""
    one = run(tmp_path / "one", {"a": ("learned", 5.0, 3.0)})
    two = run(
        tmp_path / "two",
        {"b": ("learned", 6.0, 4.0), "replay-a": ("retained", 3.0, 3.5)},
        one,
        hashes={"replay-a": "hash-a"},
    )
    found = lineage_matrix(read_lineage(two), lambda row, key: None)
    assert [s.name for s in found.sets] == ["a", "b"]
    assert [s.learnt_at for s in found.sets] == [1, 2]
    assert found.R == [[5.0, None], [3.0, 6.0], [3.5, 4.0]]
    assert pytest.approx(-0.5) == found.summary.BWT  # not 5.0 - 3.5, a gain, as from a column of its own


def test_a_ledger_of_what_was_seen_adds_up() -> None:
    def item(name: str, tokens: int) -> tuple[str, ConsumedSource]:
        return f"f-{name}", ConsumedSource(name=name, tokens=tokens, origin={"path": name})

    first = add_consumed({}, [item("pile", 300)])
    second = add_consumed(first, [item("pile", 5), item("one", 95)])
    assert {key: entry.tokens for key, entry in second.items()} == {"f-pile": 305, "f-one": 95}
    assert first["f-pile"].tokens == 300  # the parent's sources are unchanged
    assert second["f-one"].origin == {"path": "one"}


def test_differences_name_the_keys() -> None:
    before = {"a": 1, "b": {"c": [1, 2], "d": None}, "gone": True}
    now = {"a": 1, "b": {"c": [1, 3], "d": "x"}, "new": 2.5}
    assert differences(before, now) == ["b.c[1]: 2 -> 3", "b.d: None -> 'x'", "gone: True -> None", "new: None -> 2.5"]
    assert differences(before, before) == []
    assert differences([1], [1, 2]) == [": [1] -> [1, 2]"]


def test_fingerprints_are_of_contents_not_of_the_order_of_keys() -> None:
    assert fingerprint({"a": 1, "b": [2]}) == fingerprint({"b": [2], "a": 1})
    assert len({fingerprint(x) for x in ({"a": 1}, {"a": 2}, {"b": 1}, {"a": "1"}, [1], 1, "1", None)}) == 8

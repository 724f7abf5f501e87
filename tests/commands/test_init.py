"""What `init` writes is a stage that can be read, with a warm-up that is one and a rate for the size of the model."""

from __future__ import annotations

from pathlib import Path

import pytest

from postgrad.analysis.shift_advice import usual_peak_rate
from postgrad.commands import init
from postgrad.commands.init import write_stage
from postgrad.config.schedules import DecaySchedule
from postgrad.config.stage_file import load_stage, parse_stage
from postgrad.errors import StageError
from postgrad.plan.plan import make_plan
from tests.conftest import new_text, write_jsonl


def test_the_stage_is_read_and_warms_up(
    base: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also for a text of few documents, which is split."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "one.txt").write_text("\n\n".join(new_text(2500, 3)))
    many = write_jsonl(tmp_path / "many.jsonl", new_text(150, 10))
    for name, data in (("few", tmp_path / "one.txt"), ("many", many)):
        _ = write_stage(f"{name}.yaml", data=str(data), model=str(base / "base"), cache=cache)
        stage = load_stage(tmp_path / f"{name}.yaml")
        assert stage.data.sources[0].document_unit == ("passages" if name == "few" else "auto")
        plan = make_plan(stage, tmp_path, cache)
        assert not any("schedule.warmup" in note for note in plan.notes)
        assert isinstance(stage.schedule, DecaySchedule)
        assert (stage.schedule.peak, stage.schedule.floor) == (1e-3, 1e-4)
    # The mutants: 1 % of few steps, and an earlier name of a key.
    short = stage.model_copy(update={"schedule": stage.schedule.model_copy(update={"warmup": "1%"})})
    assert any("schedule.warmup: 1%" in note for note in make_plan(short, tmp_path, cache).notes)
    text = (tmp_path / "few.yaml").read_text().replace("document_unit", "documents")
    (tmp_path / "old.yaml").write_text(text)
    with pytest.raises(StageError, match="renamed to `document_unit`"):
        load_stage(tmp_path / "old.yaml")


@pytest.mark.parametrize(("tokens", "wanted"), [(37_000, "5 steps"), (200_000, "20 steps"), (10_000_000, "1%")])
def test_the_warmup_is_a_share_or_the_fewest_steps(tokens: int, wanted: str) -> None:
    assert init._suggested_warmup(tokens, 1000) == wanted


def test_the_rate_falls_with_the_size() -> None:
    rates = [usual_peak_rate(10**size) for size in range(3, 12)]
    assert rates == sorted(rates, reverse=True) and rates[0] == 1e-3 and rates[-1] == 2e-5


@pytest.mark.parametrize(("share", "way"), [("1%", "give new a larger `held_out`"), ("0", "remove `held_out: 0`")])
def test_a_text_too_small_to_hold_out_is_told_as_it_is(
    base: Path, tmp_path: Path, cache: Path, share: str, way: str
) -> None:
    file = write_jsonl(tmp_path / "few.jsonl", new_text(3, 10))
    source = {"name": "new", "path": str(file), "held_out": share, "max_passes": 100}
    stage = {
        "name": "few", "model": str(base / "base"), "tokens": 100, "data": {"sequence_length": 32, "sources": [source]},
        "schedule": {"kind": "constant", "peak": 1e-3},
    }  # fmt: skip
    with pytest.raises(StageError, match="no held-out text") as caught:
        make_plan(parse_stage(stage, "test"), tmp_path, cache)
    assert way in (caught.value.hint or "")

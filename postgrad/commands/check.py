"""Check a stage without training: its plan, probed documents, memory and time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from postgrad.check import check
from postgrad.check.dry_run import DryRun, walk_step
from postgrad.check.preview_rows import PreviewSource
from postgrad.commands.results import Result
from postgrad.commands.train import StageSource, plan_stage
from postgrad.foreign_text import multiline_text
from postgrad.plan.plan import Plan
from postgrad.storage.cache_folder import cache_folder


@dataclass(frozen=True)
class StageCheck(Result):
    """What a stage will do and cost."""

    plan: Plan
    parameters: int
    trainable: int
    """Parameters that are trained."""
    memory_bytes: int
    """Estimated peak memory."""
    seconds: float
    """Estimated time of training, without evaluation."""
    notes: tuple[str, ...]
    text: str
    """The plan in words, as `postgrad check` prints it."""
    rows: tuple[PreviewSource, ...]
    """Of each source the first rows as the model sees them, if requested."""
    record: Mapping[str, object]

    def as_dict(self) -> dict[str, object]:
        """The plan and its costs as plain data."""
        rows = {"shown": [source.as_record() for source in self.rows]} if self.rows else {}
        return {**self.record, **rows}

    def _repr_html_(self) -> str:
        return f"<pre>{escape(multiline_text(self.text))}</pre>"


def dry_run(
    stage: StageSource | Plan,
    overrides: Sequence[str] = (),
    *,
    world: int,
    device: str = "h100",
    folder: Path | str | None = None,
    cache: Path | None = None,
) -> DryRun:
    """Memory, communication and speed of a step on `world` devices that are not here, by walking it without values.

    The start model needs no weights, only its configuration and tokenizer. `device`: a100, h100, h200 or b200. Raises the error
    of what is wrong with the plan, `StageError` for a device, a mesh or a tuning that cannot be walked.
    """
    plan = stage if isinstance(stage, Plan) else plan_stage(stage, overrides, folder=folder, cache=cache)
    return walk_step(plan, world, device)


def check_stage(
    stage: StageSource | Plan,
    overrides: Sequence[str] = (),
    *,
    show: int = 0,
    folder: Path | str | None = None,
    cache: Path | None = None,
) -> StageCheck:
    """Check a stage: its plan, whether packed documents stay apart, memory and time. Raises the error of what is wrong.

    `show`: how many rows of each source to preview. `folder` as in `plan_stage`.
    """
    plan = stage if isinstance(stage, Plan) else plan_stage(stage, overrides, folder=folder, cache=cache)
    record = check.check_stage(plan, cache=cache or cache_folder(), show=show)
    text, rows = str(record.pop("text")), tuple(record.pop("shown", ()))
    return StageCheck(
        plan, record["parameters"], record["trainable"], record["memory"]["total"], record["seconds"],
        tuple(record["notes"]), text, rows, record,
    )  # fmt: skip

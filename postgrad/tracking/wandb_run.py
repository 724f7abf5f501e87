"""Weights & Biases: a run whose id is that of the postgrad run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from postgrad.config.trackers import WandbConfig
from postgrad.lineage.record import Record
from postgrad.tracking.points import Point
from postgrad.tracking.tracker import TrackedRun, TrackerMemory


class WandbTracker:
    """Logs to one run; W&B's own step is a point's index, which it never takes twice."""

    def __init__(self, run: TrackedRun, config: WandbConfig, memory: TrackerMemory) -> None:
        import wandb

        entity, _, project = config.project.rpartition("/")
        folder = run.tracking_folder
        folder.mkdir(parents=True, exist_ok=True)
        quiet = wandb.Settings(
            silent=True,
            console="off",
            disable_git=True,
            disable_code=True,
            save_code=False,
            x_disable_stats=True,
            x_disable_meta=True,
            init_timeout=30,
            **({"base_url": config.address} if config.address else {}),
        )
        self.run = run
        self._run = wandb.init(
            id=run.id,
            resume="allow",
            project=project,
            entity=entity or None,
            name=run.display_name,
            dir=str(folder),
            config=dict(run.settings),
            settings=quiet,
        )
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")

    def missing_points(self, points: Sequence[Point]) -> Sequence[Point]:
        """The points after the last step that the server has; offline there is no server to ask."""
        return [point for point in points if point.index >= self._run.step]

    def send(self, points: Sequence[Point]) -> None:
        """Queue the values; W&B's own process sends them."""
        for point in points:
            self._run.log({"step": point.step, **point.values}, step=point.index)

    def finish(self, record: Record, page: Path | None, results: Point) -> None:
        """Write the results into the summary and attach the page."""
        import wandb

        self._run.summary.update({**results.values, "status": record.status})
        if page is not None:
            artifact = wandb.Artifact(f"report-{self.run.id}", "report")
            artifact.add_file(str(page))
            self._run.log_artifact(artifact)

    def close(self) -> None:
        """Flush and end the connection."""
        self._run.finish()

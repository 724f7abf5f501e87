"""MLflow: a run in an experiment, found again by the id of the postgrad run."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from postgrad.config.trackers import MlflowConfig
from postgrad.errors import StageError
from postgrad.lineage.record import Record
from postgrad.tracking.points import Point
from postgrad.tracking.tracker import TrackedRun, TrackerMemory

_ID_TAG = "postgrad.run_id"
_METRICS_PER_CALL, _PARAMS_PER_CALL = 900, 90  # the limits of a server are 1000 and 100


class MlflowTracker:
    """Logs metrics to a tracking server or a local store."""

    def __init__(self, run: TrackedRun, config: MlflowConfig, memory: TrackerMemory) -> None:
        address = config.address or os.environ.get("MLFLOW_TRACKING_URI")
        if not address:
            raise StageError(
                "MLflow has no address",
                where="track",
                expected="`{kind: mlflow, address: http://127.0.0.1:5000}`, or MLFLOW_TRACKING_URI",
                hint="a local one: address: sqlite:///mlflow.db",
            )
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        from mlflow import MlflowClient

        self.run, self._client = run, MlflowClient(tracking_uri=address)
        experiment = self._client.get_experiment_by_name(config.project)
        experiment_id = experiment.experiment_id if experiment else self._client.create_experiment(config.project)
        filter_by_id = f"tags.`{_ID_TAG}` = '{run.id}'"
        runs = self._client.search_runs([experiment_id], filter_by_id, max_results=1)
        if runs:
            self._id = runs[0].info.run_id
        else:
            tags = {_ID_TAG: run.id}
            start = int(run.created * 1000)
            self._id = self._client.create_run(experiment_id, start, tags, run.display_name).info.run_id
        self._log_settings()
        memory["run"] = self._id

    def missing_points(self, points: Sequence[Point]) -> Sequence[Point]:
        """The points, without the values that the store has at their steps."""
        names = {name for point in points for name in point.values}
        steps = {name: {m.step for m in self._client.get_metric_history(self._id, name)} for name in names}
        rest = []
        for point in points:
            values = {name: value for name, value in point.values.items() if point.step not in steps[name]}
            if values:
                rest.append(Point(point.index, point.step, point.seconds, values))
        return rest

    def send(self, points: Sequence[Point]) -> None:
        """Log the values, some hundreds a call."""
        from mlflow.entities import Metric

        metrics = (
            Metric(name, value, int(point.seconds * 1000), point.step)
            for point in points
            for name, value in point.values.items()
        )
        while batch := list(islice(metrics, _METRICS_PER_CALL)):
            self._client.log_batch(self._id, metrics=batch)

    def finish(self, record: Record, page: Path | None, results: Point) -> None:
        """Attach the page and end the run; one whose gate failed is marked by a tag."""
        if page is not None:
            self._client.log_artifact(self._id, str(page))
        self._client.set_tag(self._id, "postgrad.status", record.status)
        self._client.set_terminated(self._id, "FINISHED", int(results.seconds * 1000))

    def close(self) -> None:
        """Nothing is open."""

    def _log_settings(self) -> None:
        from mlflow.entities import Param

        known = self._client.get_run(self._id).data.params
        params = (Param(key, value) for key, value in self.run.settings.items() if key not in known)
        while batch := list(islice(params, _PARAMS_PER_CALL)):
            self._client.log_batch(self._id, params=batch)

"""Experiment trackers that a stage forwards its metrics to, a closed union."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from postgrad.config.quantities import Method


class TrackerConfig(Method):
    """What all trackers have. The implementation gets the tracked run, this and its `TrackerMemory`."""

    packages: ClassVar[tuple[str, ...]]
    """The packages to install, the imported one first."""
    kind: str


class TensorBoardConfig(TrackerConfig):
    """TensorBoard: event files in the run folder."""

    implementation: ClassVar[str] = "postgrad.tracking.tensorboard_events:TensorBoardTracker"
    packages: ClassVar[tuple[str, ...]] = ("tensorboard",)
    kind: Literal["tensorboard"]
    address: str | None = None
    """Folder of the event files. Default: `tracking/tensorboard` in the run folder."""


class WandbConfig(TrackerConfig):
    """Weights & Biases; its own environment variables hold the key (WANDB_API_KEY) and the mode (WANDB_MODE=offline)."""

    implementation: ClassVar[str] = "postgrad.tracking.wandb_run:WandbTracker"
    packages: ClassVar[tuple[str, ...]] = ("wandb",)
    kind: Literal["wandb"]
    project: str = "postgrad"
    """Project of the run; `entity/project` for a team."""
    address: str | None = None
    """URL of a server of one's own. Default: WANDB_BASE_URL, or the public one."""


class MlflowConfig(TrackerConfig):
    """MLflow."""

    implementation: ClassVar[str] = "postgrad.tracking.mlflow_run:MlflowTracker"
    packages: ClassVar[tuple[str, ...]] = ("mlflow",)
    kind: Literal["mlflow"]
    project: str = "postgrad"
    """The experiment."""
    address: str | None = None
    """Tracking URI: `http://127.0.0.1:5000`, `sqlite:///mlflow.db`. Default: MLFLOW_TRACKING_URI."""


class TrackioConfig(TrackerConfig):
    """trackio, on this machine or in a Hugging Face Space."""

    implementation: ClassVar[str] = "postgrad.tracking.trackio_run:TrackioTracker"
    packages: ClassVar[tuple[str, ...]] = ("trackio",)
    kind: Literal["trackio"]
    project: str = "postgrad"
    """The project."""
    address: str | None = None
    """A Space, `owner/name`, or the URL of a server. Default: this machine (TRACKIO_DIR)."""


_Tracker = Annotated[TensorBoardConfig | WandbConfig | MlflowConfig | TrackioConfig, Field(discriminator="kind")]


def _expand_kind(value: Any) -> Any:
    return {"kind": value} if isinstance(value, str) else value


AnyTracker = Annotated[_Tracker, BeforeValidator(_expand_kind, json_schema_input_type=str | _Tracker)]

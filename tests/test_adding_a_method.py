"""A new schedule, objective, penalty, tuning and sparse update: each one class with its function, and one line in a union."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import pytest
import torch
from pydantic import Field
from torch import Tensor

from postgrad.config.objectives import AnyObjective, NextTokenObjective
from postgrad.config.penalties import AnchorPenalty, PenaltyConfig
from postgrad.config.quantities import Method
from postgrad.config.schedules import AnySchedule
from postgrad.config.sparse_updates import AnyUpdate, SparseUpdate
from postgrad.config.stage import OptimizerConfig, Stage
from postgrad.config.tunings import AnyTuning, PartialTuning
from postgrad.lineage.metrics import read_metrics
from postgrad.lineage.record import read_record
from postgrad.objectives.next_token import TokenLoss
from postgrad.optim.mofo import MofoMask
from postgrad.plan.lr_schedule import ScheduleContext
from postgrad.plan.plan import make_plan
from postgrad.run.build import PenaltyContext
from postgrad.run.losses import LossContext
from postgrad.run.run import run_stage
from postgrad.tuning.weight_subsets import NormFinetuning
from tests.tiny_stages import Workspace, make_workspace

HERE = "tests.test_adding_a_method"


class SawtoothSchedule(Method):
    """A rate that alternates between two values."""

    implementation: ClassVar[str] = f"{HERE}:make_sawtooth"
    kind: Literal["sawtooth"]
    low: float
    high: float


def make_sawtooth(spec: SawtoothSchedule, stage: ScheduleContext) -> Any:
    return lambda step: spec.high if int(step) % 2 else spec.low


class HalfObjective(NextTokenObjective):
    """Next-token prediction at half the weight."""

    implementation: ClassVar[str] = f"{HERE}:make_half"
    kind: Literal["half"]  # type: ignore[assignment]


def make_half(spec: HalfObjective, context: LossContext) -> TokenLoss:
    return TokenLoss(context.name, spec.weight / 2)


class ZeroPull(PenaltyConfig):
    """A quadratic pull of all trained weights to zero."""

    implementation: ClassVar[str] = f"{HERE}:PullToZero"
    kind: Literal["zero"]


class PullToZero:
    def __init__(self, spec: ZeroPull, context: PenaltyContext) -> None:
        self.name, self.strength, self.masters = "zero", float(spec.strength), context.weights.masters
        self.metadata = {
            "name": "zero", "weights": 1, "tensors": len(self.masters), "reference": {"model": "zero", "fingerprint": None},
            "importance": None, "bytes": {}, "skipped": [], "notes": [],
        }  # fmt: skip

    @torch.no_grad()
    def __call__(self) -> Tensor:
        for master in self.masters:
            assert master.grad is not None
            master.grad += self.strength * master
        return 0.5 * self.strength * self.pull_norm() ** 2

    def pull_norm(self) -> Tensor:
        return torch.stack([master.detach().square().sum() for master in self.masters]).sum().sqrt()


class FinalNormTuning(PartialTuning):
    """The norms alone, under another name."""

    implementation: ClassVar[str] = f"{HERE}:FinalNormFinetuning"
    kind: Literal["norms-again"]


class FinalNormFinetuning(NormFinetuning):
    kind = "norms-again"


class FirstHalfUpdate(SparseUpdate):
    """The half of each matrix with the largest momentum."""

    implementation: ClassVar[str] = f"{HERE}:make_first_half"
    selection: ClassVar[str] = "one half of each matrix"
    kind: Literal["half"]
    share: float = 0.5


def make_first_half(spec: FirstHalfUpdate, plan: Any, tuned_model: Any, weights: Any) -> MofoMask:
    return MofoMask(0.5, weights.masters)


class ExtendedOptimizer(OptimizerConfig):
    sparse_update: Annotated[AnyUpdate | FirstHalfUpdate, Field(discriminator="kind")] | None = None  # type: ignore[assignment]


class ExtendedStage(Stage):
    schedule: Annotated[AnySchedule | SawtoothSchedule, Field(discriminator="kind")]  # type: ignore[assignment]
    objectives: list[Annotated[AnyObjective | HalfObjective, Field(discriminator="kind")]] = []  # type: ignore[assignment]  # noqa: RUF012
    penalties: list[Annotated[AnchorPenalty | ZeroPull, Field(discriminator="kind")]] = []  # type: ignore[assignment]  # noqa: RUF012
    tuning: Annotated[AnyTuning | FinalNormTuning, Field(discriminator="kind")]  # type: ignore[assignment]
    optimizer: ExtendedOptimizer = ExtendedOptimizer()


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return make_workspace(tmp_path_factory.mktemp("shelf"), tmp_path_factory.getbasetemp() / "cache")


METHODS: dict[str, dict[str, Any]] = {
    "schedule": {"schedule": {"kind": "sawtooth", "low": 1e-4, "high": 1e-2}},
    "objective": {"objectives": [{"kind": "half"}]},
    "penalty": {"penalties": [{"kind": "zero", "strength": 0.1}]},
    "tuning": {"tuning": {"kind": "norms-again"}},
    "sparse update": {"optimizer": {"sparse_update": {"kind": "half"}}},
}


@pytest.mark.parametrize(
    "names", [[name] for name in METHODS if name != "sparse update"] + [["sparse update", "penalty"]]
)
def test_a_new_method_trains_a_stage(shelf: Workspace, names: list[str], tmp_path: Path) -> None:
    changes = {key: value for name in names for key, value in METHODS[name].items()}
    raw = {**shelf.stage("-".join(names).replace(" ", "-"), tokens=600), "tuning": {"kind": "full"}, **changes}
    raw["output"] = str(tmp_path / "run")
    plan = make_plan(ExtendedStage.model_validate(raw), shelf.folder, shelf.cache)
    list(run_stage(plan, command="test", cache=shelf.cache))
    record, rows = read_record(tmp_path / "run"), list(read_metrics(tmp_path / "run" / "metrics.jsonl"))
    steps = [row for row in rows if row.kind == "step"]
    assert steps and record.status == "finished"
    if "schedule" in names:
        assert [step.learning_rate for step in steps[:2]] == [1e-2, 1e-4]
    if "objective" in names:
        assert list(steps[0].losses_by_objective) == ["half"]
    if "penalty" in names:
        assert steps[0].penalties["zero"] > 0 and record.penalties[0].name == "zero"
    if "sparse update" in names:
        assert steps[0].updated_weights is not None and record.sparse_update.kind == "half"

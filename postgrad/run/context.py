"""State that the phases of one run share."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from postgrad.distributed.world import World
from postgrad.evaluation import before_after
from postgrad.evaluation.before_after import AllScores
from postgrad.hardware.execution import Execution
from postgrad.lineage.saved_plan import SavedPlan
from postgrad.models.location import locate_model
from postgrad.models.model import CausalModel, Model, verify_model, wrap_model
from postgrad.plan.plan import Plan
from postgrad.run.run_folder import MODEL, Interrupt
from postgrad.run.tuned_model import ParameterCounts, TunedModel, load_start_model, make_tuned_model
from postgrad.storage.fingerprint import fingerprint
from postgrad.tuning.open_model import BaseReference, open_model


@dataclass
class RunContext:
    """One run from its claim to its record.

    All fields are fixed by the claim, except `tuned_model`: the device may have room for one model only, so a phase that
    loads another one releases it first.
    """

    plan: Plan
    world: World
    interrupt: Interrupt
    command: str
    """The command line, for the record."""
    cache: Path
    start_identity: str
    """Fingerprint of the start model; the name of one from the Hub."""
    fingerprints: dict[str, Any]
    saved_plan: SavedPlan
    """Content of plan.json: what a resumed run must repeat (execution, penalty strengths, id)."""
    execution: Execution
    counts: ParameterCounts
    passes_documents: bool
    """Whether the borders of packed documents are arguments of the model."""
    notes: tuple[str, ...]
    tuned_model: TunedModel | None

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self.plan.output

    def score_path(self, name: str) -> Path:
        """A file of scores, answers or samples in the run folder."""
        return self.folder / "scores" / name

    def write_scores(self, name: str, scores: AllScores) -> None:
        """Write a file of scores of this run."""
        before_after.write_scores(self.score_path(name), scores, self.saved_plan.id)

    def read_scores(self, name: str) -> AllScores:
        """Read a file of scores of this run. Raises `DataError` when it is missing, damaged, or another run's."""
        return before_after.read_scores(self.score_path(name), self.saved_plan.id)

    def load_tuned_model(self) -> TunedModel:
        """The start model with the stage's tuning, loaded when it is not in memory."""
        if self.tuned_model is None:
            self.tuned_model = make_tuned_model(self.plan, self.world)
            self.tuned_model.shard(self.world, self.execution.compute)
            set_attention(self.tuned_model.model, self.execution)
            if isinstance(self.tuned_model.model, CausalModel):
                self.tuned_model.model.passes_documents = self.passes_documents
        return self.tuned_model

    def release_tuned_model(self) -> None:
        """Drop the model, to make room for another."""
        self.tuned_model = None

    def load_start_model(self, *, is_whole: bool = False) -> Model:
        """The exact start model; see `tuned_model.load_start_model`."""
        return load_start_model(self.plan, self.world, is_whole=is_whole).model

    def load_published_model(self) -> Model:
        """The model that the run has published, verified and read back with plain transformers."""
        opened = open_model(locate_model(str(self.folder / MODEL), self.folder))
        return wrap_model(opened.model, opened.task).to(self.world.device)

    def base_reference(self, folder: Path) -> dict[str, Any]:
        """The reference to the base model that a tuning's `folder` holds."""
        model = self.plan.model
        return BaseReference.from_start(
            model.start,
            folder,
            model.task,
            model.task_layer,
            model.inputs.soft_prompt_frame,
            bool(self.plan.prefix_length),
        ).as_dict()

    @property
    def score_identity(self) -> str:
        """Cache key of the start model's scores; includes the task layer, which the stage's seed initialises."""
        layer = self.plan.model.task_layer
        return fingerprint([self.start_identity, dataclasses.asdict(layer)]) if layer else self.start_identity

    def is_stop_requested(self) -> bool:
        """Whether the user interrupted any rank. Collective: all ranks call it."""
        return self.interrupt.requested_on_any_rank(self.world)


def set_attention(model: Model, execution: Execution) -> None:
    """Select the attention implementation."""
    if model.pretrained.config._attn_implementation != execution.attention:
        model.pretrained.set_attn_implementation(execution.attention)


def prepare_model(plan: Plan, model: Model, execution: Execution) -> None:
    """Select the attention implementation, and check that the model can be trained here."""
    set_attention(model, execution)
    verify_model(model, packed=execution.packed, row_length=plan.model.context_length, prefix_tokens=plan.prefix_length)

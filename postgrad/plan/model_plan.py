"""The model a stage trains: its start, tokenizer, task and task layer, and how it reads text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from postgrad.config import stage as s
from postgrad.data.problem_type import ProblemType
from postgrad.data.read.labels import Labels
from postgrad.errors import StageError
from postgrad.models.location import ModelLocation
from postgrad.models.model_sizes import load_model_sizes
from postgrad.models.pretrained import ClassifierSpec, load_tokenizer
from postgrad.models.task import Task
from postgrad.models.task_head import TaskHeadConfig
from postgrad.plan.model_inputs import ModelInputs, make_encoder, make_model_inputs
from postgrad.plan.sources import SourceSpec
from postgrad.plan.task_layer import resolve_representation


@dataclass(frozen=True)
class ModelPlan:
    """The model a stage trains: where it starts, and how it reads text."""

    start: ModelLocation
    tokenizer: PreTrainedTokenizerBase
    vocab_size: int
    context_length: int
    task: Task
    problem: ProblemType
    """What a classifier predicts."""
    task_layer: ClassifierSpec | None
    inputs: ModelInputs
    """How text becomes inputs under the stage's tuning."""


def plan_model(
    stage: s.Stage, start_model: ModelLocation, task: Task, source_specs: Sequence[SourceSpec], labels: Labels | None
) -> ModelPlan:
    """The model plan of a stage whose objectives need `task`; labels of words make a classifier a token classifier.

    Raises `ModelError` for a tokenizer that does not fit the model, `StageError` for rows longer than its positions.
    """
    tokenizer = load_tokenizer(start_model)
    sizes = load_model_sizes(start_model)
    encoder = make_encoder(tokenizer, sizes.vocab_size, stage.data.eos)
    length, limit = stage.data.sequence_length, sizes.positions
    if limit and length > limit:
        raise StageError(
            f"rows of {length:,} tokens do not fit the model, which has {limit:,} positions",
            where="data.sequence_length",
            expected=f"at most {limit:,}",
        )
    if labels and labels.problem == ProblemType.TAGS and task == Task.CLASSIFY:
        task = Task.TAG
    representation = resolve_representation([spec.objective for spec in source_specs], start_model, task)
    inputs = make_model_inputs(
        task, start_model, tokenizer, encoder, length=length, seed=stage.seed, tuning=stage.tuning
    )
    task_layer = None
    if labels and task.is_classifier:
        task_layer = _make_task_layer(labels, inputs.pad_id, stage.seed, representation)
    return ModelPlan(
        start=start_model,
        tokenizer=tokenizer,
        vocab_size=sizes.vocab_size,
        context_length=length,
        task=task,
        problem=labels.problem if labels else ProblemType.CLASS,
        task_layer=task_layer,
        inputs=inputs,
    )


def _make_task_layer(labels: Labels, pad: int, seed: int, representation: TaskHeadConfig | None) -> ClassifierSpec:
    """The task layer of a classifier; a regression has a single output."""
    names = tuple(str(name) for name in labels.names) or ("number",)
    return ClassifierSpec(names, labels.problem.transformers_name, pad, seed, representation)

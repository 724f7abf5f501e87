"""Demonstrations of instruction prompt tuning, drawn from the training rows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from postgrad.config import stage as s
from postgrad.config.tunings import InstructionPromptTuning
from postgrad.data.read.documents import read_examples
from postgrad.data.read.examples import Example
from postgrad.data.read.row_kinds import RUNNING_TEXT_KINDS
from postgrad.data.render.demonstrations import Demonstrations
from postgrad.data.render.renderer import Renderer
from postgrad.data.tokens.held_out_split import held_out_mask
from postgrad.data.tokens.store import digest
from postgrad.errors import StageError
from postgrad.plan.model_inputs import ModelInputs
from postgrad.plan.row_renderers import DemonstrationWrapper
from postgrad.plan.sources import SourceSpec, held_out_share


def make_demonstration_wrapper(
    stage: s.Stage, source_specs: Sequence[SourceSpec], model_inputs: ModelInputs
) -> DemonstrationWrapper | None:
    """Puts demonstrations from the training rows before each example; None unless the stage's tuning needs them.

    Raises `StageError` when no source has examples.
    """
    if not isinstance(stage.tuning, InstructionPromptTuning):
        return None
    pool: list[Example] = []
    for spec in source_specs:
        if spec.kind not in RUNNING_TEXT_KINDS:
            examples = [example for example, _ in read_examples(spec.files)]
            digests = np.array([digest(example.text.encode()) for example in examples], np.uint64)
            trained = ~held_out_mask(digests, held_out_share(stage, spec, len(examples)))
            pool += [example for example, is_trained in zip(examples, trained, strict=True) if is_trained]
    if not pool:
        raise StageError(
            "no source has examples for demonstrations",
            where="tuning.demonstrations",
            expected="rows with answers, such as prompt and completion",
        )
    config, seed = stage.tuning.demonstrations, stage.seed

    def add_demonstrations(renderer: Renderer, kind: str) -> Renderer:
        same_kind = [example for example in pool if example.kind == kind]  # a template may not fit other kinds
        if not same_kind:
            return renderer
        return Demonstrations(
            renderer,
            same_kind,
            config.count,
            "seed" if config.sampler == "random" else config.sampler,
            config.max_tokens,
            model_inputs.count_tokens,
            model_inputs.mean_embedding,
            seed,
        )

    return add_demonstrations

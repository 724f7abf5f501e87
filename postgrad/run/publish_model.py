"""How does a trained model leave its run? As a plain Hugging Face folder, or as a tuning's folder on the model it sits on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from postgrad.models.prefix_lm_attention import mark_prefix_lm
from postgrad.models.pretrained import save_chat_template, save_pretrained, stored_dtype
from postgrad.plan.plan import Plan
from postgrad.run.build import TunedModel
from postgrad.storage.atomic import publish_folder
from postgrad.tuning.attach import attach
from postgrad.tuning.folder import save_tuning
from postgrad.tuning.open_model import BaseReference, open_model


def base_reference(plan: Plan, folder: Path) -> dict[str, Any]:
    """What a folder of this stage's tuning says of the model that it sits on."""
    return BaseReference.from_start(
        plan.model.start,
        folder,
        plan.model.task,
        plan.model.task_layer,
        plan.model.inputs.soft_prompt_frame,
        bool(plan.prefix_length),
    ).as_dict()


def publish_trained_model(folder: Path, plan: Plan, tuned_model: TunedModel, state: dict[str, Tensor]) -> None:
    """Publish the trained model in fp32 `state`: of a whole model its weights, of a tuning its own tensors.

    A tuning is put on the start model anew, in full precision: whatever the training computed in, what leaves is exact.
    """
    dtype = stored_dtype(plan.model.start) if plan.stage.save.dtype == "auto" else getattr(torch, plan.stage.save.dtype)
    if tuned_model.tuning.is_full:
        pretrained = tuned_model.model.pretrained
        publish_folder(
            folder, lambda staged: save_pretrained(pretrained, plan.model.tokenizer, staged, dtype=dtype, state=state)
        )
        return
    opened = open_model(plan.model.start, plan.model.task, layer=plan.model.task_layer)
    mark_prefix_lm(opened.model.config, bool(plan.prefix_length))
    tuning = attach(opened.model, tuned_model.options, tokenizer=plan.model.tokenizer)
    tuning.load(state)
    if tuning.is_merged_on_export:
        tuning.merge()
        publish_folder(folder, lambda staged: save_pretrained(opened.model, plan.model.tokenizer, staged, dtype=dtype))
    else:
        base = base_reference(plan, folder)

        def write(staged: Path) -> None:
            save_tuning(tuning, staged, base)
            save_chat_template(plan.model.tokenizer, staged)

        publish_folder(folder, write)

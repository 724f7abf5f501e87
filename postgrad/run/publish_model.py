"""How does a trained model leave its run? As a plain Hugging Face folder, or as a tuning's folder on the model it sits on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from postgrad.models.prefix_lm_attention import mark
from postgrad.models.pretrained import save_chat_template, save_pretrained, stored_dtype
from postgrad.plan.plan import Plan
from postgrad.run.build import Subject
from postgrad.storage.atomic import publish
from postgrad.tuning.attach import attach, save_tuning
from postgrad.tuning.open_model import Sitting, open_model


def sitting(plan: Plan, folder: Path) -> dict[str, Any]:
    """What a folder of this stage's tuning says of the model that it sits on."""
    return Sitting.on(plan.start, folder, plan.task, plan.layer, plan.reading.set_around, bool(plan.prefixes)).as_dict()


def publish_trained(folder: Path, plan: Plan, subject: Subject, state: dict[str, Tensor]) -> None:
    """Publish the trained model in fp32 `state`: of a whole model its weights, of a tuning its own tensors.

    A tuning is put on the start model anew, in full precision: whatever the training computed in, what leaves is exact.
    """
    dtype = stored_dtype(plan.start) if plan.stage.save.dtype == "auto" else getattr(torch, plan.stage.save.dtype)
    if subject.tuning.whole:
        pretrained = subject.model.pretrained
        publish(folder, lambda staged: save_pretrained(pretrained, plan.tokenizer, staged, dtype=dtype, state=state))
        return
    opened = open_model(plan.start, plan.task, layer=plan.layer)
    mark(opened.model.config, bool(plan.prefixes))
    tuning = attach(opened.model, subject.options, tokenizer=plan.tokenizer)
    tuning.load(state)
    if tuning.leaves_model:
        tuning.merge()
        publish(folder, lambda staged: save_pretrained(opened.model, plan.tokenizer, staged, dtype=dtype))
    else:
        base = sitting(plan, folder)

        def write(staged: Path) -> None:
            save_tuning(tuning, staged, base)
            save_chat_template(plan.tokenizer, staged)

        publish(folder, write)

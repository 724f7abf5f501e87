"""Soft prompts and prefixes in PEFT's format: one tensor `prompt_embeddings`, and whole layers that were trained with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor
from transformers import PreTrainedModel

from postgrad.errors import TuningError
from postgrad.tuning.tuning import check_choice


class PeftPrompt(NamedTuple):
    """The contents of a PEFT folder: the vectors, and the layers (a task layer) saved with them."""

    peft_type: str
    vectors: Tensor
    extra: dict[str, Tensor]


def prompt_config(model: PreTrainedModel, peft_type: str, task: str, length: int, width: int) -> dict[str, Any]:
    """The part of `adapter_config.json` that prompts and prefixes share."""
    return {
        "peft_type": peft_type,
        "task_type": task,
        "base_model_name_or_path": model.config.name_or_path or None,
        "inference_mode": True,
        "num_virtual_tokens": length,
        "token_dim": width,
        # PEFT's default of 2 for T5 makes a second half that nothing reads.
        "num_transformer_submodules": 1,
    }


def read_prompt(config: Mapping[str, Any], state: Mapping[str, Tensor], peft_types: Sequence[str]) -> PeftPrompt:
    """Split a PEFT folder's contents. Raises `TuningError` for other methods, and without enough vectors."""
    peft_type = str(getattr(config.get("peft_type"), "value", config.get("peft_type")))
    check_choice(peft_type, peft_types, "peft_type")
    vectors, length = state.get("prompt_embeddings"), config.get("num_virtual_tokens")
    if vectors is None or not isinstance(length, int) or len(vectors) < length:
        raise TuningError(
            f"this PEFT folder has {'no' if vectors is None else len(vectors)} vectors for {length} virtual tokens",
            where="tuning",
            expected="`prompt_embeddings` with one row per virtual token",
        )
    extra = {name.removeprefix("base_model."): t for name, t in state.items() if name != "prompt_embeddings"}
    # For an encoder-decoder PEFT also saves a second half that it never reads.
    return PeftPrompt(peft_type, vectors[:length], extra)

"""Loading a model together with the tunings of its lineage.

A start is a plain model, or the folder of a tuning, which records its base, and so on down to a plain model. Going back up,
each tuning is attached: one with an exact merge becomes part of the weights, any other stays in the model, frozen.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from transformers import PreTrainedModel

from postgrad.data.render.frame import EMPTY_FRAME, Frame
from postgrad.errors import TuningError
from postgrad.models.auto_classes import load_config
from postgrad.models.location import PEFT_FILE, TUNING_FILE, ModelLocation
from postgrad.models.model_sizes import load_model_sizes
from postgrad.models.prefix_lm_attention import is_prefix_lm, mark_prefix_lm
from postgrad.models.pretrained import ClassifierSpec, detect_task, load_pretrained, load_tokenizer
from postgrad.models.task import Task
from postgrad.storage.fingerprint import fingerprint, model_fingerprint
from postgrad.storage.read_json import parse_json, read_json
from postgrad.tuning.adapter_folder import load_tuning
from postgrad.tuning.tuning import Tuning, freeze

MAX_VIRTUAL_TOKENS = 1 << 16

_OLD_KEYS = {
    "prefix_ids": "before",
    "separator_ids": "between",
    "suffix_ids": "after",
    "base_of_base": "below",
    "is_prefix_lm": "prefixes",
}
"""Keys of a tuning's base and frame, and their names in folders of earlier versions."""


def _rename_old_keys(raw: dict[str, Any]) -> dict[str, Any]:
    """A recorded base under this version's keys."""
    return {**{new: raw[old] for new, old in _OLD_KEYS.items() if old in raw}, **raw}


@dataclass(frozen=True)
class BaseReference:
    """A tuning's base, as recorded in its folder."""

    name: str
    relative: str | None = None
    """Path of the base, relative to the tuning's folder."""
    fingerprint: str | None = None
    task: Task = Task.CAUSAL
    layer: ClassifierSpec | None = None
    frame: Frame = EMPTY_FRAME
    """Ids around each text: a soft prompt's virtual ids, and a template's words and special tokens."""
    base_of_base: str | None = None
    """Location of the base's own base, if the user set it."""
    is_prefix_lm: bool = False
    """Whether it was trained with bidirectional attention in the prompt."""

    @classmethod
    def from_start(
        cls,
        start: ModelLocation,
        folder: Path,
        task: Task,
        layer: ClassifierSpec | None,
        frame: Frame,
        is_prefix_lm: bool = False,
    ) -> BaseReference:
        """The reference for the folder of a tuning on `start`."""
        # A run's path refers to its final model; a checkpoint of it is another model.
        base_path = start.run if start.run and start.folder == start.run / "model" else start.folder
        return cls(
            start.name if start.folder is None else str(base_path),
            os.path.relpath(base_path, folder) if base_path else None,
            start_fingerprint(start),
            task,
            layer,
            frame,
            str(start.base.folder or start.base.name) if start.base and start.trusted else None,
            is_prefix_lm,
        )

    @classmethod
    def read_folder(cls, start: ModelLocation) -> BaseReference | None:
        """The reference in the folder of a start; None for a plain model."""
        if start.base is None or start.folder is None:
            return None
        if not (start.folder / TUNING_FILE).exists():
            return _read_peft_reference(start, start.base)
        file = start.folder / TUNING_FILE
        raw = _rename_old_keys(read_json(file, _TuningBase, error=TuningError).base)
        if isinstance(raw.get("frame"), dict):
            raw["frame"] = _rename_old_keys(raw["frame"])
        return parse_json(json.dumps(raw).encode(), cls, where=f"{file}: base", error=TuningError)

    def as_dict(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


_PEFT_TASKS: dict[str, Task] = {
    "CAUSAL_LM": Task.CAUSAL,
    "SEQ_2_SEQ_LM": Task.TEXT_TO_TEXT,
    "SEQ_CLS": Task.CLASSIFY,
    "TOKEN_CLS": Task.TAG,
}


@dataclass(frozen=True)
class _TuningBase:
    """The recorded base in our description of a tuning, with keys of any version."""

    base: dict[str, Any]


@dataclass(frozen=True)
class _PeftReference:
    """What PEFT's configuration says of the base."""

    base_model_name_or_path: str | None = None
    task_type: str | None = None
    peft_type: str | None = None
    num_virtual_tokens: Annotated[int, Field(ge=1, le=MAX_VIRTUAL_TOKENS)] | None = None


def _read_peft_reference(start: ModelLocation, base: ModelLocation) -> BaseReference:
    """The reference in PEFT's configuration; PEFT puts a prompt before every text, its special tokens included."""
    assert start.folder is not None
    file = start.folder / PEFT_FILE
    config = read_json(file, _PeftReference, error=TuningError)
    task = _PEFT_TASKS.get(config.task_type or "") or get_task(base)
    prompt_ids: tuple[int, ...] = ()
    if config.peft_type in ("PROMPT_TUNING", "P_TUNING"):
        if config.num_virtual_tokens is None:
            raise TuningError("`num_virtual_tokens` is missing", where=str(file), expected="the length of the prompt")
        first = load_model_sizes(start).vocab_size
        prompt_ids = tuple(range(first, first + config.num_virtual_tokens))
    return BaseReference(config.base_model_name_or_path or "", None, None, task, frame=Frame(outer_ids=prompt_ids))


@dataclass(frozen=True)
class LoadedModel:
    """A model with the tunings of its lineage."""

    model: PreTrainedModel
    task: Task
    layer: ClassifierSpec | None
    new_weights: tuple[str, ...] = ()
    """Randomly initialised weights: a new task layer."""
    tunings: tuple[Tuning, ...] = ()
    """Unmerged tunings in the model, frozen."""
    frame: Frame = EMPTY_FRAME
    """Ids to put around each text."""
    notes: tuple[str, ...] = field(default=())


def start_fingerprint(start: ModelLocation) -> str | None:
    """The fingerprint of a start's folder and all its bases; None for a model known by name only."""
    if start.folder is None:
        return None
    own = model_fingerprint(start.folder)
    if start.base is None:
        return own
    base = start_fingerprint(start.base)
    return None if base is None else fingerprint([own, base])


def get_task(start: ModelLocation) -> Task:
    """The task of a start's model."""
    reference = BaseReference.read_folder(start)
    return reference.task if reference else detect_task(start.full_model)


def starts_as_prefix_lm(start: ModelLocation) -> bool:
    """Whether the model of a start was trained with bidirectional attention in the prompt."""
    reference = BaseReference.read_folder(start)
    return reference.is_prefix_lm if reference else is_prefix_lm(load_config(start.name_or_path))


def open_model(
    start: ModelLocation,
    task: Task | None = None,
    *,
    layer: ClassifierSpec | None = None,
    attention: str | None = None,
    dtype: torch.dtype = torch.float32,
) -> LoadedModel:
    """Load the model of a start for a task (default: its own), in eval mode.

    Raises `TuningError` if a tuning's base is not the one that it was trained on and the user did not set it, and if a tuning
    can neither be merged nor serve the task.
    """
    if start.base is None or start.folder is None:
        task = task or detect_task(start)
        pretrained = load_pretrained(start, task, layer=layer, attention=attention, dtype=dtype)
        return LoadedModel(pretrained.model, task, layer, pretrained.new_weights, notes=pretrained.notes)
    reference = BaseReference.read_folder(start)
    assert reference is not None
    base = open_model(start.base, reference.task, layer=reference.layer, attention=attention, dtype=dtype)
    base_fingerprint = start_fingerprint(start.base)
    tuning = load_tuning(
        base.model,
        start.folder,
        tokenizer=load_tokenizer(start.full_model),
        fingerprint=base_fingerprint,
        force=start.trusted,
    )
    notes = base.notes
    if reference.fingerprint and base_fingerprint and reference.fingerprint != base_fingerprint:
        notes += (f"{start.name} was trained on another model than {start.base.name} (its fingerprint differs)",)
    if not (start.folder / TUNING_FILE).exists():
        notes += tuple(tuning.notes)
    freeze(base.model)
    mark_prefix_lm(base.model.config, reference.is_prefix_lm)
    unmerged: tuple[Tuning, ...] = (tuning,)
    if tuning.has_exact_merge and dtype == torch.float32:
        tuning.merge()
        unmerged = ()
    loaded = LoadedModel(
        base.model,
        reference.task,
        reference.layer,
        tunings=base.tunings + unmerged,
        frame=reference.frame,
        notes=notes,
    )
    task = task or reference.task
    if task == reference.task and (layer is None or layer == reference.layer):
        return loaded
    return _replace_task_layer(loaded, start, task, layer, attention, dtype)


def _replace_task_layer(
    loaded_model: LoadedModel,
    start: ModelLocation,
    task: Task,
    layer: ClassifierSpec | None,
    attention: str | None,
    dtype: torch.dtype,
) -> LoadedModel:
    """The same backbone under another task layer."""
    if loaded_model.tunings:
        raise TuningError(
            f"`{loaded_model.tunings[-1].kind}` of {start.name} belongs to another task and cannot be merged into the model",
            where="model",
            hint="start from its base",
        )
    pretrained = load_pretrained(
        start, task, layer=layer, attention=attention, dtype=dtype, state=loaded_model.model.state_dict()
    )
    return LoadedModel(pretrained.model, task, layer, pretrained.new_weights, notes=loaded_model.notes)

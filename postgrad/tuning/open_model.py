"""Loading a model together with the tunings of its lineage.

A start is a plain model, or the folder of a tuning, which records its base, and so on down to a plain model. Going back up,
each tuning is attached: one with an exact merge becomes part of the weights, any other stays in the model, frozen.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel

from postgrad.data.render.frame import EMPTY_FRAME, Frame
from postgrad.errors import TuningError
from postgrad.models.location import PEFT_FILE, TUNING_FILE, ModelLocation
from postgrad.models.prefix_lm_attention import is_prefix_lm, mark_prefix_lm
from postgrad.models.pretrained import ClassifierSpec, detect_task, load_pretrained, load_tokenizer
from postgrad.models.task import Task
from postgrad.storage.fingerprint import fingerprint, model_fingerprint
from postgrad.tuning.adapter_folder import load_tuning
from postgrad.tuning.tuning import Tuning, freeze

_OLD_KEYS = {
    "prefix_ids": "before",
    "separator_ids": "between",
    "suffix_ids": "after",
    "base_of_base": "below",
    "is_prefix_lm": "prefixes",
}
"""Keys of a tuning's base and frame, and their names in folders of earlier versions."""


def _read_key(raw: Mapping[str, Any], key: str) -> Any:
    return raw[key] if key in raw else raw[_OLD_KEYS[key]]


def _read_frame(raw: Mapping[str, list[int]]) -> Frame:
    parts = (tuple(_read_key(raw, key)) for key in ("prefix_ids", "separator_ids", "suffix_ids"))
    return replace(Frame(*parts), outer_ids=tuple(raw.get("outer_ids", ())))


@dataclass(frozen=True)
class BaseReference:
    """A tuning's base, as recorded in its folder."""

    name: str
    relative: str | None
    """Path of the base, relative to the tuning's folder."""
    fingerprint: str | None
    task: Task
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
            return _read_peft_reference(start, start.base, json.loads((start.folder / PEFT_FILE).read_text()))
        raw = json.loads((start.folder / TUNING_FILE).read_text())["base"]
        layer = raw.get("layer")
        return cls(
            raw["name"],
            raw.get("relative"),
            raw.get("fingerprint"),
            Task(raw.get("task", Task.CAUSAL)),
            ClassifierSpec.from_dict(layer) if layer else None,
            _read_frame(raw["frame"]),
            _read_key(raw, "base_of_base"),
            raw.get("is_prefix_lm", raw.get("prefixes", False)),
        )

    def as_dict(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


_PEFT_TASKS: dict[str, Task] = {
    "CAUSAL_LM": Task.CAUSAL,
    "SEQ_2_SEQ_LM": Task.TEXT_TO_TEXT,
    "SEQ_CLS": Task.CLASSIFY,
    "TOKEN_CLS": Task.TAG,
}


def _read_peft_reference(start: ModelLocation, base: ModelLocation, config: dict[str, Any]) -> BaseReference:
    """The reference in PEFT's configuration; PEFT puts a prompt before every text, its special tokens included."""
    task = _PEFT_TASKS.get(config.get("task_type") or "") or get_task(base)
    prompt_ids: tuple[int, ...] = ()
    if config.get("peft_type") in ("PROMPT_TUNING", "P_TUNING"):
        first = int(AutoConfig.from_pretrained(start.name_or_path).vocab_size)
        prompt_ids = tuple(range(first, first + int(config["num_virtual_tokens"])))
    return BaseReference(
        config.get("base_model_name_or_path") or "", None, None, task, frame=Frame(outer_ids=prompt_ids)
    )


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
    return reference.is_prefix_lm if reference else is_prefix_lm(AutoConfig.from_pretrained(start.name_or_path))


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
        return LoadedModel(pretrained.model, task, layer, pretrained.new_weights)
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

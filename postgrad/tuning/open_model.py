"""How does a model come in with the tunings that its lineage has left on it?

A start is a plain model, or a folder that holds a tuning and says which model it sits on, and so on down to a plain one. From
there up each tuning is put on again: one that can become part of the weights does so, any other stays where it stands, held
fast.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel

from postgrad.data.render.frame import EMPTY_FRAME, Frame
from postgrad.errors import TuningError
from postgrad.models.prefix_lm_attention import is_prefix_lm, mark_prefix_lm
from postgrad.models.pretrained import (
    PEFT_FILE,
    TUNING_FILE,
    ClassifierSpec,
    ModelLocation,
    detect_task,
    load_pretrained,
    load_tokenizer,
)
from postgrad.models.task import Task
from postgrad.storage.fingerprint import fingerprint, model_fingerprint
from postgrad.tuning.attach import load_tuning
from postgrad.tuning.tuning import Tuning, freeze

_FRAME_PARTS = (("prefix_ids", "before"), ("separator_ids", "between"), ("suffix_ids", "after"))
"""Keys of a frame in a tuning's folder, and their names in folders of earlier versions."""


def _read_frame(raw: Mapping[str, list[int]]) -> Frame:
    return Frame(*(tuple(raw[new] if new in raw else raw[old]) for new, old in _FRAME_PARTS))


@dataclass(frozen=True)
class BaseReference:
    """What a tuning's folder says of the model that it sits on."""

    name: str
    relative: str | None
    """Where that model lies, seen from the tuning's folder."""
    fingerprint: str | None
    task: Task
    layer: ClassifierSpec | None = None
    frame: Frame = EMPTY_FRAME
    """Ids that were set around each text: the places of a soft prompt, and a template's words and special tokens."""
    below: str | None = None
    """Where what it sits on has its own base, when the user had to say it."""
    prefixes: bool = False
    """Whether it was trained to read a prompt in both directions."""

    @classmethod
    def from_start(
        cls,
        start: ModelLocation,
        folder: Path,
        task: Task,
        layer: ClassifierSpec | None,
        frame: Frame,
        prefixes: bool = False,
    ) -> BaseReference:
        """What the folder of a tuning on `start` says."""
        # A run stands for its final model; a checkpoint of it is another model.
        at = start.run if start.run and start.folder == start.run / "model" else start.folder
        return cls(
            start.name if start.folder is None else str(at),
            os.path.relpath(at, folder) if at else None,
            start_fingerprint(start),
            task,
            layer,
            frame,
            str(start.base.folder or start.base.name) if start.base and start.trusted else None,
            prefixes,
        )

    @classmethod
    def read_folder(cls, start: ModelLocation) -> BaseReference | None:
        """What the folder of a start says, when it holds a tuning."""
        if start.base is None or start.folder is None:
            return None
        if not (start.folder / TUNING_FILE).exists():
            return _read_peft_reference(start, start.base, json.loads((start.folder / PEFT_FILE).read_text()))
        said = json.loads((start.folder / TUNING_FILE).read_text())["base"]
        layer = said.get("layer")
        return cls(
            said["name"],
            said.get("relative"),
            said.get("fingerprint"),
            Task(said.get("task", Task.CAUSAL)),
            ClassifierSpec.from_dict(layer) if layer else None,
            _read_frame(said["frame"]),
            said["below"],
            said.get("prefixes", False),
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
    """What PEFT's own description says: a prompt stands before every text."""
    task = _PEFT_TASKS.get(config.get("task_type") or "") or get_task(base)
    before: tuple[int, ...] = ()
    if config.get("peft_type") in ("PROMPT_TUNING", "P_TUNING"):
        first = int(AutoConfig.from_pretrained(start.name_or_path).vocab_size)
        before = tuple(range(first, first + int(config["num_virtual_tokens"])))
    return BaseReference(config.get("base_model_name_or_path") or "", None, None, task, frame=Frame(before))


@dataclass(frozen=True)
class LoadedModel:
    """A model as its lineage left it."""

    model: PreTrainedModel
    task: Task
    layer: ClassifierSpec | None
    new_weights: tuple[str, ...] = ()
    """Weights that nothing had: a new task layer."""
    tunings: tuple[Tuning, ...] = ()
    """Those that stand in the model, held fast."""
    frame: Frame = EMPTY_FRAME
    """Ids that are to be set around each text."""
    notes: tuple[str, ...] = field(default=())


def start_fingerprint(start: ModelLocation) -> str | None:
    """Of the folder of a start, and of all that it sits on; None where a model is known by a name alone."""
    if start.folder is None:
        return None
    own = model_fingerprint(start.folder)
    if start.base is None:
        return own
    below = start_fingerprint(start.base)
    return None if below is None else fingerprint([own, below])


def get_task(start: ModelLocation) -> Task:
    """What the model of a start is for."""
    said = BaseReference.read_folder(start)
    return said.task if said else detect_task(start.full_model)


def starts_as_prefix_lm(start: ModelLocation) -> bool:
    """Whether the model of a start was trained to read a prompt in both directions."""
    said = BaseReference.read_folder(start)
    return said.prefixes if said else is_prefix_lm(AutoConfig.from_pretrained(start.name_or_path))


def open_model(
    start: ModelLocation,
    task: Task | None = None,
    *,
    layer: ClassifierSpec | None = None,
    attention: str | None = None,
    dtype: torch.dtype = torch.float32,
) -> LoadedModel:
    """The model of a start for a task (left out: its own), in eval mode.

    Raises `TuningError` when a tuning sits on another model than it was trained on and the user did not name that model, or
    when it can neither become part of the weights nor serve the task.
    """
    if start.base is None or start.folder is None:
        task = task or detect_task(start)
        loaded = load_pretrained(start, task, layer=layer, attention=attention, dtype=dtype)
        return LoadedModel(loaded.model, task, layer, loaded.new_weights)
    said = BaseReference.read_folder(start)
    assert said is not None
    own = said.task
    below = open_model(start.base, own, layer=said.layer, attention=attention, dtype=dtype)
    found = start_fingerprint(start.base)
    tuning = load_tuning(
        below.model,
        start.folder,
        tokenizer=load_tokenizer(start.full_model),
        fingerprint=found,
        force=start.trusted,
    )
    notes = below.notes
    if said.fingerprint and found and said.fingerprint != found:
        notes += (f"{start.name} was trained on another model than {start.base.name} (its fingerprint differs)",)
    freeze(below.model)
    mark_prefix_lm(below.model.config, said.prefixes)
    stands = () if _merge_if_exact(tuning, dtype) else (tuning,)
    opened = LoadedModel(
        below.model,
        own,
        said.layer,
        (),
        below.tunings + stands,
        said.frame,
        notes,
    )
    wanted = task or own
    if wanted == own and (layer is None or layer == opened.layer):
        return opened
    return _replace_task_layer(opened, start, wanted, layer, attention, dtype)


def _merge_if_exact(tuning: Tuning, dtype: torch.dtype) -> bool:
    """Whether a tuning became part of the weights: in full precision, where a model of the same inputs comes of it."""
    if not tuning.has_exact_merge or dtype != torch.float32:
        return False
    tuning.merge()
    return True


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
            f"`{loaded_model.tunings[-1].kind}` of {start.name} stands in a model for another task, and cannot become part of it",
            where="model",
            hint="start from the model that it sits on",
        )
    loaded = load_pretrained(
        start, task, layer=layer, attention=attention, dtype=dtype, state=loaded_model.model.state_dict()
    )
    return LoadedModel(loaded.model, task, layer, loaded.new_weights, notes=loaded_model.notes)

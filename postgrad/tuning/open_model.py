"""How does a model come in with the tunings that its lineage has left on it?

A start is a plain model, or a folder that holds a tuning and says which model it sits on, and so on down to a plain one. From
there up each tuning is put on again: one that can become part of the weights does so, any other stays where it stands, held
fast.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel

from postgrad.data.render.frame import BARE, Frame
from postgrad.errors import TuningError
from postgrad.models.prefix_lm_attention import mark, reads_prefixes
from postgrad.models.pretrained import PEFT, TUNING, Start, Task, TaskLayer, load, load_tokenizer, task_of
from postgrad.storage.fingerprint import fingerprint, model_fingerprint
from postgrad.tuning.attach import load_tuning
from postgrad.tuning.tuning import Tuning, freeze


@dataclass(frozen=True)
class Sitting:
    """What a tuning's folder says of the model that it sits on."""

    name: str
    relative: str | None
    """Where that model lies, seen from the tuning's folder."""
    fingerprint: str | None
    task: Task
    layer: TaskLayer | None = None
    frame: Frame = BARE
    """Ids that were set around each text: the places of a soft prompt, and a template's words and special tokens."""
    below: str | None = None
    """Where what it sits on has its own base, when the user had to say it."""
    prefixes: bool = False
    """Whether it was trained to read a prompt in both directions."""

    @classmethod
    def on(
        cls, start: Start, folder: Path, task: Task, layer: TaskLayer | None, frame: Frame, prefixes: bool = False
    ) -> Sitting:
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
    def of(cls, start: Start) -> Sitting | None:
        """What the folder of a start says, when it holds a tuning."""
        if start.base is None or start.folder is None:
            return None
        if not (start.folder / TUNING).exists():
            return _of_peft(start, start.base, json.loads((start.folder / PEFT).read_text()))
        said = json.loads((start.folder / TUNING).read_text())["base"]
        layer = said.get("layer")
        return cls(
            said["name"],
            said.get("relative"),
            said.get("fingerprint"),
            said.get("task", "causal"),
            TaskLayer.of(layer) if layer else None,
            Frame(*(tuple(said["frame"][part]) for part in ("before", "between", "after"))),
            said["below"],
            said.get("prefixes", False),
        )

    def as_dict(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


_PEFT_TASKS: dict[str, Task] = {
    "CAUSAL_LM": "causal",
    "SEQ_2_SEQ_LM": "text-to-text",
    "SEQ_CLS": "classify",
    "TOKEN_CLS": "tag",
}


def _of_peft(start: Start, base: Start, config: dict[str, Any]) -> Sitting:
    """What PEFT's own description says: a prompt stands before every text."""
    task = _PEFT_TASKS.get(config.get("task_type") or "") or task_at(base)
    before: tuple[int, ...] = ()
    if config.get("peft_type") in ("PROMPT_TUNING", "P_TUNING"):
        first = int(AutoConfig.from_pretrained(start.source).vocab_size)
        before = tuple(range(first, first + int(config["num_virtual_tokens"])))
    return Sitting(config.get("base_model_name_or_path") or "", None, None, task, frame=Frame(before))


@dataclass(frozen=True)
class Opened:
    """A model as its lineage left it."""

    model: PreTrainedModel
    task: Task
    layer: TaskLayer | None
    new: tuple[str, ...] = ()
    """Weights that nothing had: a new task layer."""
    tunings: tuple[Tuning, ...] = ()
    """Those that stand in the model, held fast."""
    frame: Frame = BARE
    """Ids that are to be set around each text."""
    notes: tuple[str, ...] = field(default=())


def start_fingerprint(start: Start) -> str | None:
    """Of the folder of a start, and of all that it sits on; None where a model is known by a name alone."""
    if start.folder is None:
        return None
    own = model_fingerprint(start.folder)
    if start.base is None:
        return own
    below = start_fingerprint(start.base)
    return None if below is None else fingerprint([own, below])


def task_at(start: Start) -> Task:
    """What the model of a start is for."""
    said = Sitting.of(start)
    return said.task if said else task_of(start.plain)


def prefixes_at(start: Start) -> bool:
    """Whether the model of a start was trained to read a prompt in both directions."""
    said = Sitting.of(start)
    return said.prefixes if said else reads_prefixes(AutoConfig.from_pretrained(start.source))


def open_model(
    start: Start,
    task: Task | None = None,
    *,
    layer: TaskLayer | None = None,
    attention: str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Opened:
    """The model of a start for a task (left out: its own), in eval mode.

    Raises `TuningError` when a tuning sits on another model than it was trained on and the user did not name that model, or
    when it can neither become part of the weights nor serve the task.
    """
    if start.base is None or start.folder is None:
        task = task or task_of(start)
        loaded = load(start, task, layer=layer, attention=attention, dtype=dtype)
        return Opened(loaded.model, task, layer, loaded.new)
    said = Sitting.of(start)
    assert said is not None
    own = said.task
    below = open_model(start.base, own, layer=said.layer, attention=attention, dtype=dtype)
    found = start_fingerprint(start.base)
    tuning = load_tuning(
        below.model,
        start.folder,
        tokenizer=load_tokenizer(start.plain),
        fingerprint=found,
        force=start.trusted,
    )
    notes = below.notes
    if said.fingerprint and found and said.fingerprint != found:
        notes += (f"{start.name} was trained on another model than {start.base.name} (its fingerprint differs)",)
    freeze(below.model)
    mark(below.model.config, said.prefixes)
    stands = () if _becomes_part(tuning, dtype) else (tuning,)
    opened = Opened(
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
    return _for_task(opened, start, wanted, layer, attention, dtype)


def _becomes_part(tuning: Tuning, dtype: torch.dtype) -> bool:
    """Whether a tuning became part of the weights: in full precision, where a model of the same inputs comes of it."""
    if not tuning.folds or dtype != torch.float32:
        return False
    tuning.merge()
    return True


def _for_task(
    opened: Opened, start: Start, task: Task, layer: TaskLayer | None, attention: str | None, dtype: torch.dtype
) -> Opened:
    """The same backbone under another task layer."""
    if opened.tunings:
        raise TuningError(
            f"`{opened.tunings[-1].kind}` of {start.name} stands in a model for another task, and cannot become part of it",
            where="model",
            way_out="start from the model that it sits on",
        )
    loaded = load(start, task, layer=layer, attention=attention, dtype=dtype, state=opened.model.state_dict())
    return Opened(loaded.model, task, layer, loaded.new, notes=opened.notes)

"""Locations of models: a folder, a run, a checkpoint, a Hub name, and the base model of an adapter."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from postgrad.errors import ModelError, suggest_nearest, suggest_path
from postgrad.storage.regular_file import describe_special_file, find_special_file

TUNING_FILE, PEFT_FILE = "tuning.json", "adapter_config.json"
"""Descriptions of a tuning's folder: ours, and PEFT's."""


@dataclass(frozen=True)
class ModelLocation:
    """The folder (or Hub name) of a model, and the run that trained it, if any."""

    name: str
    folder: Path | None
    run: Path | None = None
    base: ModelLocation | None = None
    """The base model, for a folder that holds an adapter or other tuning."""
    trusted: bool = False
    """The base was given by the user, not by the tuning's folder."""
    scratch_recipe: Mapping[str, Any] | None = None
    """How a model was made that is trained from scratch."""

    @property
    def full_model(self) -> ModelLocation:
        """The plain model under all tunings."""
        return self.base.full_model if self.base else self

    @property
    def name_or_path(self) -> str:
        """The argument of `from_pretrained`."""
        plain = self.full_model
        return str(plain.folder) if plain.folder else plain.name


def locate_model(name: str, root: Path, base: str | None = None, *, where: str = "model") -> ModelLocation:
    """Resolve a folder, a run folder (its final model), a checkpoint of a run, or a Hub name, relative to `root`.

    The folder of a tuning names its base model; `base` overrides that name. `where`: the key or option of the name, for errors.
    Raises `ModelError` for a path that does not exist.
    """
    if not name.strip():
        raise ModelError(
            "the name of the model is empty", where=where, expected="a folder, a run folder, or a Hub name (owner/name)"
        )
    folder = (root / Path(name).expanduser()).resolve()
    if folder.is_dir():
        if special := find_special_file(folder):
            raise ModelError(
                f"{special} is {describe_special_file(special)}", where=where, expected="a folder of regular files"
            )
        if (folder / "stage.yaml").exists():  # a run folder
            if not _has_model_config(folder / "model"):
                raise ModelError(
                    f"the run {name} has not finished and has no model yet",
                    where=where,
                    hint=f"finish the run, or name one of its checkpoints: {name}/checkpoints/step-...",
                )
            return _resolve_base(ModelLocation(name, folder / "model", folder), root, base)
        if not _has_model_config(folder):
            raise ModelError(
                f"{name} is a folder without a config.json",
                where=where,
                expected="a Hugging Face model folder, a run folder, a checkpoint, or a tuning's folder",
            )
        run = folder.parent.parent if folder.parent.name == "checkpoints" else None
        return _resolve_base(
            ModelLocation(name, folder, run if run and (run / "stage.yaml").exists() else None), root, base
        )
    refuse_missing_folder(
        name,
        root,
        where=where,
        expected="a folder with config.json and safetensors weights, a run folder, or a Hub name (owner/name)",
    )
    return ModelLocation(name, None)


def refuse_missing_folder(name: str, root: Path, *, where: str, expected: str) -> None:
    """Raise `ModelError` for a name that cannot be one on the Hub: a mistyped path is not looked up there.

    A Hub name is `owner/name`, where `owner` is no folder of `root`, and no folder there is called nearly the same.
    """
    path = root / Path(name).expanduser()
    parts = path.relative_to(root).parts if path.is_relative_to(root) else ()
    is_hub_name = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*(?<!\.json)", name, re.ASCII) and len(parts) == 2
    if is_hub_name and not path.parent.is_dir():
        near = suggest_nearest(parts[0], [entry.name for entry in root.iterdir() if (entry / parts[1]).is_dir()])
        if not near:
            return
    place = "" if Path(name).expanduser().is_absolute() else f" in {root.resolve()}"
    raise ModelError(f"there is no folder {name}{place}", where=where, expected=expected, hint=suggest_path(path))


def _has_model_config(folder: Path) -> bool:
    return any((folder / name).exists() for name in ("config.json", TUNING_FILE, PEFT_FILE))


def _resolve_base(start: ModelLocation, root: Path, base: str | None) -> ModelLocation:
    """The location with its base model, when it is a tuning's folder."""
    folder = start.folder
    assert folder is not None
    if (folder / "config.json").exists():
        if base is not None:
            raise ModelError(f"{start.name} is a full model and has no base model", where="base")
        return start
    if base is not None:
        return dataclasses.replace(start, base=locate_model(base, root), trusted=True)
    try:
        if (folder / TUNING_FILE).exists():
            recorded = json.loads((folder / TUNING_FILE).read_text())["base"]
            candidates = [recorded["relative"], recorded["name"]]
            below = recorded.get("base_of_base", recorded.get("below"))  # "below" in folders of earlier versions
        else:
            below = None
            candidates = [json.loads((folder / PEFT_FILE).read_text())["base_model_name_or_path"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"{start.name} does not name its base model ({type(error).__name__})",
            where="model",
            hint="give the base model as `base`",
        ) from None
    for candidate in candidates:
        if candidate and (folder / candidate).is_dir():
            return dataclasses.replace(start, base=locate_model(candidate, folder, below))
    try:
        return dataclasses.replace(start, base=locate_model(candidates[-1], folder, below))
    except ModelError as error:
        raise ModelError(
            f"the base model of {start.name}, {candidates[-1]}, does not exist",
            where="model",
            hint="give the path of the base model as `base`",
        ) from error

"""Locations of models: a folder, a run, a checkpoint, a Hub name, and the base model of an adapter."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from postgrad.errors import CheckpointError, ModelError
from postgrad.lineage.record import RECORD, read_record
from postgrad.storage.atomic import MANIFEST, Manifest, read_manifest
from postgrad.storage.cache_folder import cache_folder
from postgrad.storage.fingerprint import manifest_fingerprint
from postgrad.storage.verification import verify_published

TUNING_FILE, PEFT_FILE = "tuning.json", "adapter_config.json"
"""Descriptions of a tuning's folder: ours, and PEFT's."""
_READ_SUFFIXES = {".json", ".safetensors", ".jinja", ".model", ".txt", ".bin", ".py"}
"""Of files that transformers or PEFT may read in a model's folder."""


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
    Raises `ModelError` for a path that does not exist, and `CheckpointError` for a published model that is damaged
    (`storage.verification`: read whole once, then sampled blocks).
    """
    if not name.strip():
        raise ModelError(
            "the name of the model is empty", where=where, expected="a folder, a run folder, or a Hub name (owner/name)"
        )
    folder = (root / Path(name).expanduser()).resolve()
    if folder.is_dir():
        if (folder / "stage.yaml").exists():  # a run folder
            if not _has_model_config(folder / "model"):
                raise ModelError(
                    f"the run {name} has not finished and has no model yet",
                    where=where,
                    hint=f"finish the run, or name one of its checkpoints: {name}/checkpoints/step-...",
                )
            _verify_run_model(folder)
            return _resolve_base(ModelLocation(name, folder / "model", folder), root, base)
        if not _has_model_config(folder):
            raise ModelError(
                f"{name} is a folder without a config.json",
                where=where,
                expected="a Hugging Face model folder, a run folder, a checkpoint, or a tuning's folder",
            )
        run = folder.parent.parent if folder.parent.name == "checkpoints" else None
        if run or _is_published(folder):
            _verify_folder(folder, f"restore the folder from a backup; to use an edited model, remove its {MANIFEST}")
        return _resolve_base(
            ModelLocation(name, folder, run if run and (run / "stage.yaml").exists() else None), root, base
        )
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or ((root / name).parent.is_dir() and "/" not in name):
        raise ModelError(
            f"there is no folder {name}",
            where=where,
            expected="a folder with config.json and safetensors weights, a run folder, or a Hub name (owner/name)",
        )
    return ModelLocation(name, None)


def _verify_run_model(run: Path) -> None:
    """Verify a run's published model against its manifest and the run's record. Raises `CheckpointError`."""
    folder = run / "model"
    recorded = read_record(run).fingerprints.model if (run / RECORD).exists() else None
    hint = (
        f"restore {folder} from a backup; or remove it and {run / RECORD} and repeat the `postgrad train` command, which "
        f"publishes the model again; to use an edited model, copy the folder without {MANIFEST}"
    )
    manifest = _verify_folder(folder, hint)
    found = manifest_fingerprint(manifest)
    if recorded is not None and found != recorded:
        raise CheckpointError(
            "this is not the model that the run published",
            where=str(folder),
            expected=f"the fingerprint {recorded}, not {found}",
            hint=hint,
        )


def _verify_folder(folder: Path, hint: str) -> Manifest:
    """Verify a published folder. Raises `CheckpointError` for one that is damaged, or has files that would be read too."""
    try:
        manifest = verify_published(folder, cache_folder())
        for path in sorted(folder.iterdir()):
            if path.suffix in _READ_SUFFIXES and path.name not in (*manifest, MANIFEST):
                raise CheckpointError("the file was added after the folder was published", where=str(path))
    except CheckpointError as error:
        raise CheckpointError(error.problem, where=error.where, expected=error.expected, hint=hint) from error
    return manifest


def _is_published(folder: Path) -> bool:
    """Whether a folder has a manifest; a foreign model's folder has none, or a file of that name with other content."""
    try:
        return bool(read_manifest(folder))
    except CheckpointError:
        return False


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

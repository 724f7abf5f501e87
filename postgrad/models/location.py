"""Locations of models: a folder, a run, a checkpoint, a Hub name, and the base model of an adapter."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from postgrad.errors import CheckpointError, ModelError, suggest_nearest, suggest_path
from postgrad.lineage.record import RECORD, read_record
from postgrad.storage.atomic import MANIFEST, Manifest, read_manifest
from postgrad.storage.cache_folder import cache_folder
from postgrad.storage.fingerprint import manifest_fingerprint
from postgrad.storage.read_json import read_json
from postgrad.storage.regular_file import describe_special_file, find_special_file
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
    return _locate(name, (root,), base, where, ())


def _locate(name: str, roots: Sequence[Path], base: str | None, where: str, tunings: tuple[Path, ...]) -> ModelLocation:
    """The location of a name relative to one of `roots`, as the base of `tunings` (folders)."""
    root, folder = _find_folder(name, roots, where)
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
            _verify_run_model(folder)
            return _resolve_base(ModelLocation(name, folder / "model", folder), root, base, tunings)
        if not _has_model_config(folder):
            raise ModelError(
                f"{name} is a folder without a config.json",
                where=where,
                expected="a Hugging Face model folder, a run folder, a checkpoint, or a tuning's folder",
            )
        run = folder.parent.parent if folder.parent.name == "checkpoints" else None
        run = run if run and (run / "stage.yaml").exists() else None
        if run or _is_published(folder):
            _verify_folder(folder, f"restore the folder from a backup; to use an edited model, remove its {MANIFEST}")
        return _resolve_base(ModelLocation(name, folder, run), root, base, tunings)
    refuse_missing_folder(
        name,
        root,
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


def refuse_missing_folder(name: str, root: Path, *, where: str, expected: str) -> None:
    """Raise `ModelError` for a name that cannot be one on the Hub: a mistyped path is not looked up there.

    A Hub name is `owner/name`, where `owner` is no folder of `root`, and no folder there is called nearly the same.
    """
    path = root / Path(name).expanduser()
    parts = path.relative_to(root).parts if path.is_relative_to(root) else ()
    is_hub_name = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*(?<!\.json)", name, re.ASCII) and len(parts) == 2
    if is_hub_name and not path.parent.is_dir():
        entries = root.iterdir() if root.is_dir() else ()
        if not suggest_nearest(parts[0], [entry.name for entry in entries if (entry / parts[1]).is_dir()]):
            return
    place = "" if Path(name).expanduser().is_absolute() else f" in {root.resolve()}"
    raise ModelError(f"there is no folder {name}{place}", where=where, expected=expected, hint=suggest_path(path))


def _has_model_config(folder: Path) -> bool:
    return any((folder / name).exists() for name in ("config.json", TUNING_FILE, PEFT_FILE))


def _find_folder(name: str, roots: Sequence[Path], where: str) -> tuple[Path, Path]:
    """The first of `roots` from which a name is a folder, and that folder; else those of the first root."""
    expected = "a folder, a run folder, or a Hub name (owner/name)"
    if not name.strip():
        raise ModelError("the name of the model is empty", where=where, expected=expected)
    try:
        found = [(root, (root / Path(name).expanduser()).resolve()) for root in roots]
        return next((pair for pair in found if pair[1].is_dir()), found[0])
    except (OSError, ValueError, RuntimeError) as error:  # too long, a NUL, a loop of links
        raise ModelError(f"{name[:100]!r} is no usable path ({error})", where=where, expected=expected) from None


@dataclass(frozen=True)
class _BaseNames:
    """The names of the base in our description of a tuning; `below` is the last in folders of earlier versions."""

    name: str
    relative: str | None = None
    base_of_base: str | None = None
    below: str | None = None


@dataclass(frozen=True)
class _TuningNames:
    """The part of our description of a tuning that names its base."""

    base: _BaseNames


@dataclass(frozen=True)
class _PeftNames:
    """The part of PEFT's description that names its base."""

    base_model_name_or_path: str


def _is_full_model(folder: Path) -> bool:
    """Whether a folder holds a model's weights; many trainers copy the base's `config.json` into an adapter's folder.

    Raises `ModelError` for a folder with weights and an adapter.
    """
    if not (folder / "config.json").exists():
        return False
    adapters = [name for name in (TUNING_FILE, PEFT_FILE) if (folder / name).exists()]
    weights = [path for pattern in ("model*.safetensors*", "pytorch_model*.bin*") for path in folder.glob(pattern)]
    if adapters and weights:
        raise ModelError(
            f"the folder holds a full model ({weights[0].name}) and an adapter ({adapters[0]})",
            where=str(folder),
            expected="one of them",
            hint="move the adapter to a folder of its own, and name this one as its `base`",
        )
    return not adapters


def _resolve_base(start: ModelLocation, root: Path, base: str | None, tunings: tuple[Path, ...]) -> ModelLocation:
    """The location with its base model, when it is a tuning's folder."""
    folder = start.folder
    assert folder is not None
    if _is_full_model(folder):
        if base is not None:
            raise ModelError(f"{start.name} is a full model and has no base model", where="base")
        return start
    if folder in tunings:
        raise ModelError(
            f"the tunings {', '.join(path.name for path in tunings)} are each other's base models",
            where=str(folder),
            expected="a plain model under all tunings",
            hint="give the base model as `base`",
        )
    tunings += (folder,)
    if base is not None:
        found = _locate(base, (root,), None, "model", tunings)
        return dataclasses.replace(start, base=found, trusted=True)
    hint = "give the base model as `base`"
    expected = f"the base model of {start.name}"
    if (folder / TUNING_FILE).exists():
        recorded = read_json(folder / TUNING_FILE, _TuningNames, error=ModelError, expected=expected, hint=hint).base
        candidates = [recorded.relative, recorded.name]
        below = recorded.base_of_base or recorded.below
    else:
        below = None
        peft = read_json(folder / PEFT_FILE, _PeftNames, error=ModelError, expected=expected, hint=hint)
        candidates = [peft.base_model_name_or_path]
    # A name is relative to the tuning's folder, to the place that led here, or (as PEFT writes it) to the working directory.
    roots = (folder, root, Path.cwd())
    names = [name for name in candidates if name]
    found = next((name for name in names if _find_folder(name, roots, "model")[1].is_dir()), (names or [""])[-1])
    try:
        return dataclasses.replace(start, base=_locate(found, roots, below, "model", tunings))
    except ModelError as error:
        if error.where != "model":
            raise
        raise ModelError(
            f"the base model of {start.name}, {found}, does not exist",
            where="model",
            hint=hint,
        ) from error

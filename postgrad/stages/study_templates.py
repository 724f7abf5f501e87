"""What does a study file look like? The levers against forgetting side by side, or the protocol of the paper, as files to edit.

At laptop size the texts are made from what every Python carries (`postgrad.data.material`), so the files run as they are. At
`gpu` size they name texts of the user's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from postgrad.data.material import write_kinds
from postgrad.errors import StageError, nearest
from postgrad.publish import write_atomically
from postgrad.stages.init import refuse_name
from postgrad.stages.study import load_study

_PAPER = {
    "laptop": ("strong", "weak", "parts", "shifts", "large"),
    "gpu": ("strong", "weak", "parts", "large"),
}
"""The files of the paper, by what they ask: a strong and a weak shift, parts without and with shifts, a larger model."""
_SIZES = tuple(_PAPER)


@dataclass(frozen=True)
class _Wanted:
    """Files to be written, and whether they read texts that have to be made."""

    texts: Mapping[Path, str]
    material: bool


def write_study(place: Path, template: str, size: str, *, force: bool) -> dict[str, Any]:
    """Write the files of a template, and the texts that they read.

    Raises `StageError` for an unknown template or size, a name that can name no folder, and files that are there.
    """
    refuse_name(place)
    for option, said, known in (("--template", template, ("levers", "paper")), ("--size", size, _SIZES)):
        if said not in known:
            raise StageError(
                f"there is no {option.removeprefix('--')} {said!r}",
                where=option,
                expected=", ".join(known),
                way_out=nearest(said, known),
            )
    if template == "levers" and size != "laptop":
        raise StageError(
            "the levers are written at laptop size", where="--size", expected="laptop, or --template paper"
        )
    wanted = _levers(place) if template == "levers" else _paper(place, size)
    there = [path for path in wanted.texts if path.exists()]
    if there and not force:
        raise StageError(f"{there[0]} is there already", where="init", way_out="choose another name, or give --force")
    said = []
    if wanted.material:
        folder = place.with_name(f"{place.stem}-data")
        write_kinds(folder)
        said.append(f"made {folder}/ from this Python's own documentation and library")
    for path, text in wanted.texts.items():
        write_atomically(path, text)
        load_study(path)  # what is written can be read
        said.append(f"wrote {path}")
    names = " ".join(path.name for path in wanted.texts)
    said += [f"what it will do: postgrad study {names} --dry-run", f"next: postgrad study {names}"]
    return {"text": "\n".join(said), "files": [str(path) for path in wanted.texts]}


def _levers(place: Path) -> _Wanted:
    return _Wanted({place: _filled("study-levers", place, place.stem)}, material=True)


def _paper(place: Path, size: str) -> _Wanted:
    texts = {}
    for part in _PAPER[size]:
        path = place.with_name(f"{place.stem}-{part}.yaml")
        texts[path] = _filled(f"paper-{size}-{part}", path, place.stem)
    return _Wanted(texts, material=size == "laptop")


def _filled(name: str, path: Path, stem: str) -> str:
    text = files("postgrad.stages").joinpath("templates", f"{name}.yaml").read_text("utf-8")
    return Template(text).substitute(name=path.stem, file=path.name, data=f"{stem}-data", shelf=f"studies/{stem}")

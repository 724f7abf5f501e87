"""Templates of study files: the levers against forgetting side by side, and the protocol of Ibrahim et al. 2024.

At laptop size the texts come from the Python installation (`builtin_corpus`), so the files run as they are. At `gpu` size
they name texts of the user.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from postgrad.commands.builtin_corpus import is_builtin_corpus, write_corpus
from postgrad.commands.init import check_name
from postgrad.errors import StageError, require_choice
from postgrad.storage.atomic import write_atomically
from postgrad.storage.read_yaml import read_yaml
from postgrad.studies.study import parse_study

_PAPER_FILES = ("strong", "weak", "parts", "shifts", "large")
"""Files of the paper template: strong and weak shift, stages without and with shifts, a larger model."""

_SIZE_VALUES: Mapping[str, Mapping[str, str]] = {
    "laptop": {
        "model": "llama-1M",
        "large": "llama-3M",
        "vocabulary": "2048",
        "base_tokens": "1.2M",
        "tokens": "600k",
        "length": "256",
        "sequences": "8",
        "peak": "3.0e-3",
        "half": "1.5e-3",
        "twice": "6.0e-3",
        "constant": "1.65e-3",
        "floor": "3.0e-4",
        "passes": "20",
        "look": "4k",
        "judged": "60k",
        "seeds": "[0, 1, 2]",
        "few": "[0, 1]",
        "old_name": "english",
        "old_kind": "English documentation",
        "weak": "comments",
        "weak_kind": "comments in code",
        "strong": "code",
        "strong_kind": "code without prose",
        "third": "listing",
        "third_kind": "instructions of the interpreter",
    },
    "gpu": {
        "model": "llama-45M",
        "large": "llama-110M",
        "vocabulary": "16000",
        "base_tokens": "300M",
        "tokens": "300M",
        "length": "1024",
        "sequences": "128",
        "peak": "1.0e-3",
        "half": "5.0e-4",
        "twice": "2.0e-3",
        "constant": "5.5e-4",
        "floor": "1.0e-4",
        "passes": "4",
        "look": "50k",
        "judged": "1M",
        "seeds": "[0, 1, 2]",
        "few": "[0]",
        "old_name": "web",
        "old_kind": "English web text",
        "weak": "encyclopedia",
        "weak_kind": "an English encyclopedia",
        "strong": "german",
        "strong_kind": "German text",
        "third": "code",
        "third_kind": "code",
    },
}
"""Values filled into the files at each size. Peak and floor are those of the base, a factor of ten apart, as in the paper."""


@dataclass(frozen=True)
class _StudyFiles:
    """Files to write, and whether they need the built-in corpus."""

    texts: Mapping[Path, str]
    needs_corpus: bool


def write_study_template(study_file: Path, template: str, size: str, *, force: bool) -> dict[str, Any]:
    """Write the files of a template and their texts.

    Raises `StageError` for an unknown template or size, an invalid name, and existing files.
    """
    check_name(study_file)
    require_choice("template", template, ("levers", "paper"), where="--template")
    require_choice("size", size, _SIZE_VALUES, where="--size")
    if template == "levers" and size != "laptop":
        raise StageError(
            "the levers template exists at laptop size only", where="--size", expected="laptop, or --template paper"
        )
    wanted = _lever_files(study_file) if template == "levers" else _paper_files(study_file, size)
    folder = study_file.with_name(f"{study_file.stem}-data")
    there = [path for path in wanted.texts if path.exists()]
    if wanted.needs_corpus and folder.exists() and not is_builtin_corpus(folder):
        there.append(folder)
    if there and not force:
        raise StageError(f"{there[0]} exists already", where="init", hint="choose another name, or pass --force")
    for path, text in wanted.texts.items():
        parse_study(read_yaml(text), path.name)  # what is written can be read
    lines = []
    if wanted.needs_corpus:
        write_corpus(folder)
        lines.append(f"wrote {folder}/ from this Python installation's documentation and library")
    for path, text in wanted.texts.items():
        write_atomically(path, text)
        lines.append(f"wrote {path}")
    names = " ".join(path.name for path in wanted.texts)
    lines += [f"preview: postgrad study {names} --dry-run", f"next: postgrad study {names}"]
    return {"text": "\n".join(lines), "files": [str(path) for path in wanted.texts]}


def _lever_files(study_file: Path) -> _StudyFiles:
    return _StudyFiles({study_file: _fill_template("levers", study_file, study_file.stem, {})}, needs_corpus=True)


def _paper_files(study_file: Path, size: str) -> _StudyFiles:
    paths = {part: study_file.with_name(f"{study_file.stem}-{part}.yaml") for part in _PAPER_FILES}
    values = {**_SIZE_VALUES[size], "all": f"{study_file.stem}-*.yaml"}
    texts = {path: _fill_template(f"paper-{part}", path, study_file.stem, values) for part, path in paths.items()}
    return _StudyFiles(texts, needs_corpus=size == "laptop")


def _fill_template(name: str, path: Path, stem: str, values: Mapping[str, str]) -> str:
    text = files("postgrad.studies").joinpath("templates", f"{name}.yaml").read_text("utf-8")
    return Template(text).substitute(
        name=path.stem, file=path.name, data=f"{stem}-data", shelf=f"studies/{stem}", **values
    )

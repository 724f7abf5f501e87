"""What does a stage of each strategy look like? Commented files that run as they are, on the user's text or on our own.

Without the user's text the rows are made from what every Python carries (`builtin_corpus`), and without the user's
model a second stage trains a small one first. The texts of the files lie in `templates/`.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from itertools import islice
from pathlib import Path
from string import Template
from typing import Any, NamedTuple

from postgrad.analysis import domain_shift
from postgrad.analysis.shift_advice import make_proposals, shift_strength
from postgrad.commands.builtin_corpus import ROW_GENERATORS, write_rows, write_texts
from postgrad.commands.init import check_name
from postgrad.config.stage_file import load_stage
from postgrad.data.read.documents import read_documents
from postgrad.data.read.files import RawSource
from postgrad.data.read.train_test_split import split_rows
from postgrad.errors import DataError, StageError, suggest_nearest
from postgrad.storage.atomic import write_atomically

Notify = Callable[[str], None]

_MAX_DOCUMENTS = 2000
"""Of each text, by which the shift between them is told."""


@dataclass(frozen=True)
class TemplateRequest:
    """What the user named."""

    name: str
    data: str | None
    model: str | None
    replay: str | None
    test: str | None = None


@dataclass(frozen=True)
class TemplateKind:
    """A strategy: the rows it reads, the model it goes on from, its rates on our own small models and on the user's."""

    rows: str | None
    base: str | None
    demo_rates: tuple[str, str]
    user_rates: tuple[str, str]
    measurements: str
    """What came of it on our own text and model: measured, and when and on what."""


_MEASUREMENT_HEADER = "Measured on Python 3.11's text (95 % intervals), seconds of one busy core:"

TEMPLATE_KINDS: Mapping[str, TemplateKind] = {
    "continue": TemplateKind(
        None,
        "decoder",
        ("2.0e-3", "2.0e-4"),
        ("2.0e-5", "2.0e-6"),
        f"""{_MEASUREMENT_HEADER} 90 s the base, 50 s this stage. Nats per token, before and after:
  english (retained)  4.930  5.237  (+0.285 to +0.333)
  code (learned)      5.268  4.310  (-1.043 to -0.874)""",
    ),
    "instruct": TemplateKind(
        "instructions",
        "decoder",
        ("2.0e-3", "2.0e-4"),
        ("1.0e-6", "1.0e-7"),
        f"""{_MEASUREMENT_HEADER} 90 s the base, 45 s this stage. Nats per token of text or answers, before, after:
  english (retained)   4.930  4.993  (+0.005 to +0.111)
  questions (learned)  5.271  4.284  (-1.038 to -0.933)""",
    ),
    "mixed": TemplateKind(
        "instructions",
        "decoder",
        ("2.0e-3", "2.0e-4"),
        ("2.0e-5", "2.0e-6"),
        f"""{_MEASUREMENT_HEADER} 90 s the base, 100 s this stage. Nats per token of text or answers, before, after:
  english (retained)   4.930  5.021  (+0.066 to +0.114)
  code (learned)       5.268  4.284  (-1.064 to -0.903)
  questions (learned)  5.271  4.560  (-0.756 to -0.667)""",
    ),
    "classify": TemplateKind(
        "labelled",
        "encoder",
        ("1.0e-3", "1.0e-5"),
        ("2.0e-5", "2.0e-6"),
        f"""{_MEASUREMENT_HEADER} 200 s the base, 45 s this stage. 200 test rows of five classes:
  accuracy 0.760 (0.700 to 0.815), macro F1 0.756 (0.688 to 0.810), the most frequent class 0.265""",
    ),
    "probe": TemplateKind(
        "labelled",
        "encoder",
        ("1.0e-2", "1.0e-4"),
        ("1.0e-2", "1.0e-4"),
        f"""{_MEASUREMENT_HEADER} 200 s the base, 20 s each of these. 200 test rows of five classes, accuracy:
  probe: embeddings 0.655 (0.595 to 0.715), layer 3 0.625 (0.555 to 0.690), last 3 side by side 0.630 (0.570 to 0.695)
  this stage: 0.590 (0.525 to 0.650); the most frequent class: 0.265. So small a base adds nothing to its embeddings.""",
    ),
    "mlm": TemplateKind(
        None,
        "encoder",
        ("1.0e-3", "1.0e-4"),
        ("2.0e-5", "2.0e-6"),
        f"""{_MEASUREMENT_HEADER} 200 s the base, 60 s this stage. Nats per masked token, before and after:
  english (retained)  5.884  5.903  (-0.004 to +0.042)      one token at a time  6.319  6.351  (+0.005 to +0.062)
  code (learned)      5.986  5.434  (-0.603 to -0.500)      one token at a time  6.279  5.743  (-0.637 to -0.431)""",
    ),
    "text2text": TemplateKind(
        "pairs",
        "encoder-decoder",
        ("2.0e-3", "2.0e-4"),
        ("1.0e-4", "1.0e-5"),
        f"""{_MEASUREMENT_HEADER} 145 s the base, 140 s this stage. Nats per token, before, after:
  english (retained)  5.162  5.127  (-0.053 to -0.015)
  summary (learned)   7.175  5.672  (-1.537 to -1.469)
  part (learned)      7.330  2.233  (-5.198 to -4.993)
  choice (learned)    7.167  5.672  (-1.529 to -1.461)""",
    ),
    "from-scratch": TemplateKind(
        None,
        None,
        ("3.0e-3", "3.0e-4"),
        ("3.0e-3", "3.0e-4"),
        f"""{_MEASUREMENT_HEADER} 75 s. Nats per token on the test set, before and after:
  english  7.629  5.123  (-2.577 to -2.435)      published: step 245 of 245, the best of 11 looks""",
    ),
    "few-shot": TemplateKind(
        "choices",
        "decoder",
        ("2.0e-3", "2.0e-4"),
        ("2.0e-5", "2.0e-6"),
        f"""{_MEASUREMENT_HEADER} 90 s the base, 15 s the questions, 40 s this stage. Accuracy of 200, chance 0.25:
  zero-shot 0.235 (0.175 to 0.295), after this stage the same (-0.015 to +0.015); two-shot 0.230 (0.172 to 0.290)
So small a model cannot answer; give --model and --data.""",
    ),
}
"""The strategies by name."""


_KINDS_WITH_TEST = ("classify", "probe", "few-shot")
"""The strategies that put rows aside to test; of the last two a user's rows are parted, where no `--test` is named."""


class TemplateFiles(NamedTuple):
    """The files of a template, the commands that carry it out, in order, and what is said of what had to be made."""

    files: list[Path]
    commands: list[str]
    notes: list[str]


def write_template(
    stage_path: Path, kind: str, request: TemplateRequest, *, force: bool, notify: Notify = lambda _: None
) -> dict[str, Any]:
    """Write the stage of a strategy, and what it needs; `say` is told of what takes seconds, before it does.

    Raises `StageError` for an unknown strategy, files that are there, and a name that can name no run.
    """
    check_name(stage_path)
    if kind not in TEMPLATE_KINDS:
        raise StageError(
            f"there is no template {kind!r}",
            where="--template",
            expected=", ".join(TEMPLATE_KINDS),
            hint=suggest_nearest(kind, TEMPLATE_KINDS),
        )
    wanted = [stage_path.with_name(f"{request.name}{ending}.yaml") for ending in ("", *_extra_suffixes(kind, request))]
    there = [path for path in wanted if path.exists()]
    if there and not force:
        raise StageError(f"{there[0]} is there already", where="init", hint="choose another name, or give --force")
    _check_test(kind, request)
    written = _write_files(stage_path, kind, request, notify)
    said = [*written.notes, *(f"wrote {path}" for path in written.files)]
    said += ["carry it out:", *(f"  {command}" for command in written.commands), f"next: {written.commands[0]}"]
    return {"text": "\n".join(said), "files": [str(path) for path in written.files], "commands": written.commands}


def _check_test(kind: str, request: TemplateRequest) -> None:
    """Raise `StageError` for rows to test that no file would name."""
    if request.test is not None and kind not in _KINDS_WITH_TEST:
        raise StageError(
            f"{kind} puts no rows aside to test",
            where="--test",
            expected=f"a --template of {', '.join(_KINDS_WITH_TEST)}",
        )
    if request.test is not None and request.data is None:
        raise StageError(
            "there are rows to test and none to learn from",
            where="--test",
            expected="--data with rows of the same kind",
        )


def _split_rows(kind: str, request: TemplateRequest, folder: Path) -> tuple[TemplateRequest, list[str]]:
    """The user's rows in two files, where a strategy needs both and one is named; and what is said of it."""
    if kind not in ("probe", "few-shot") or request.data is None or request.test is not None:
        return request, []
    train, test = (folder / f"rows.{part}.jsonl" for part in ("train", "test"))
    counts = split_rows(RawSource("rows", request.data, root=Path.cwd(), where="--data"), train, test)
    names = [f"{folder.name}/{place.name}" for place in (train, test)]
    said = f"parted {request.data}: {counts[0]:,} rows in {names[0]}, {counts[1]:,} to test in {names[1]}"
    return replace(request, data=names[0], test=names[1]), [said]


def _extra_suffixes(kind: str, request: TemplateRequest) -> list[str]:
    """Endings of the files beside the stage's own."""
    base = ["-base"] if TEMPLATE_KINDS[kind].base and request.model is None else []
    return [*base, *(["-tasks"] if kind == "few-shot" else [])]


def _write_files(stage_path: Path, kind: str, request: TemplateRequest, notify: Notify) -> TemplateFiles:
    spec = TEMPLATE_KINDS[kind]
    folder = f"{request.name}-data"
    request, made = _split_rows(kind, request, stage_path.parent / folder)
    if kind == "continue" and None in (request.data, request.replay):  # how far they are apart is read off them
        _make_texts(stage_path.parent / folder, notify)
    values = {
        **_common_values(stage_path, kind, request, folder),
        **_KIND_VALUES.get(kind, _no_values)(request, folder),
    }
    texts: dict[Path, str] = {}
    commands: list[str] = []
    if spec.base and request.model is None:
        base = stage_path.with_name(f"{request.name}-base.yaml")
        texts[base] = _fill_template(f"base-{spec.base}", {**values, "file": base.name})
        commands.append(f"postgrad train {base.name}")
    if kind == "few-shot":
        tasks = stage_path.with_name(f"{request.name}-tasks.yaml")
        texts[tasks] = _fill_template("few-shot-tasks", values)
        commands.append(f"postgrad eval {values['model']} --tasks {tasks.name}")
    if kind == "probe":
        commands.append(f"postgrad probe {values['probed']} --report {request.name}.html")
    texts[stage_path] = _fill_template(kind, values)
    if _make_builtin_data(stage_path.parent / folder, "\n".join(texts.values()), notify):
        made.insert(0, f"made {folder}/ from this Python's own documentation and library")
    for path, text in texts.items():
        write_atomically(path, text)
    load_stage(stage_path)  # what is written can be read
    return TemplateFiles(list(texts), [*commands, f"postgrad train {stage_path.name}"], made)


def _make_texts(folder: Path, notify: Notify) -> None:
    if not folder.exists():
        notify("reading this Python's own documentation and library ...")
    write_texts(folder)


def _make_builtin_data(folder: Path, text: str, notify: Notify) -> bool:
    """Make what the files name of it, before they are there; whether that was anything at all."""
    texts = re.search(rf"\b{re.escape(folder.name)}/(old|new)\b", text) is not None
    if texts:
        _make_texts(folder, notify)
    named = [rows for rows in ROW_GENERATORS if f"{folder.name}/{rows}." in text]
    for rows in named:
        write_rows(folder, rows)
    return texts or bool(named)


def _fill_template(name: str, values: Mapping[str, str]) -> str:
    text = files("postgrad.commands").joinpath("templates", f"{name}.yaml").read_text("utf-8")
    filled = Template(text).substitute(values)
    return re.sub(r"^\n|(?<=\n)\n+", "", filled)  # a line that nothing was filled into


def _common_values(stage_path: Path, kind: str, request: TemplateRequest, folder: str) -> dict[str, str]:
    """What most templates ask for."""
    spec = TEMPLATE_KINDS[kind]
    ours = request.data is None
    own_model = spec.base is not None and request.model is None
    peak, floor = spec.demo_rates if own_model or spec.base is None else spec.user_rates
    rows = f"{folder}/{spec.rows}" if spec.rows else ""
    data = request.data or (f"{rows}.train.jsonl" if rows and kind != "mixed" else f"{folder}/new.jsonl")
    if kind == "from-scratch" and ours:
        data = f"{folder}/old.jsonl"
    english, code = (
        f"{{name: english, path: {folder}/old-heldout.jsonl}}",
        f"{{name: code, path: {folder}/new-heldout.jsonl}}",
    )
    measured = {
        "continue": {"retained": [english], "learned": [code]},
        "mlm": {"retained": [english], "learned": [code]},
        "from-scratch": {"test": [english]},
        "instruct": {"retained": [english], "learned": [_set_entry("questions", rows, "valid", "instructions")]},
        "mixed": {"retained": [english], "learned": [code, _set_entry("questions", rows, "valid", "instructions")]},
        "classify": {
            "learned": [_set_entry("valid", rows, "valid", "rows")],
            "test": [_set_entry("final", rows, "test", "rows")],
        },
        "probe": {
            "learned": [_set_entry("valid", rows, "valid", "rows")],
            "test": [_set_entry("final", rows, "test", "rows")],
        },
    }
    return {
        "name": request.name,
        "file": stage_path.name,
        "folder": folder,
        "model": request.model or f"runs/{request.name}-base",
        "data": _quote_path(data),
        "replay": _quote_path(request.replay or f"{folder}/old.jsonl"),
        "peak": peak,
        "floor": floor,
        "sets": _sets_yaml(measured.get(kind, {}) if ours else _test_sets(request)),
        "figures": _comment(spec.measurements) if ours and (own_model or spec.base is None) else "",
        "held": ", held_out: 0" if ours else "",
        "chooser": "valid" if ours else "rows",
        "new_share": "90%",
        "replay_share": "10%",
        "why": "old text, against forgetting",
        "rate": "1e-6 is usual for all weights of a large model"
        if peak.startswith("1.0e-6")
        else "a small model: 1e-6 for a large one",
    }


def _sets_yaml(sets: Mapping[str, Sequence[str]]) -> str:
    """Held-out sets by role, a line each."""
    return "\n".join(
        line for role, items in sets.items() for line in (f"  {role}:", *(f"    - {item}" for item in items))
    )


def _test_sets(request: TemplateRequest) -> dict[str, list[str]]:
    """The user's rows that are looked at once, at the end."""
    return {"test": [f"{{name: final, path: {_quote_path(request.test)}, like: rows}}"]} if request.test else {}


def _set_entry(name: str, rows: str, part: str, source: str) -> str:
    return f"{{name: {name}, path: {rows}.{part}.jsonl, like: {source}}}"


def _comment(measurements: str) -> str:
    return "\n".join(f"# {line}" for line in measurements.splitlines())


def _quote_path(path: str) -> str:
    return path if re.fullmatch(r"[\w./*-]+", path) else "'" + path.replace("'", "''") + "'"


def _no_values(request: TemplateRequest, folder: str) -> dict[str, str]:
    return {}


def _mixed_values(request: TemplateRequest, folder: str) -> dict[str, str]:
    return {"instructions": f"{folder}/instructions.train.jsonl"}


def _probe_values(request: TemplateRequest, folder: str) -> dict[str, str]:
    """What the verb `probe` is given, in a line and as the head of the file has it."""
    model = request.model or f"runs/{request.name}-base"
    if request.data:
        given = shlex.join([model, request.data, str(request.test)])
    else:
        parts = {part: f"{folder}/labelled.{part}.jsonl" for part in ("train", "test", "valid")}
        given = f"{model} {parts['train']} {parts['test']} --dev {parts['valid']} --kind labelled"
    given += " --pooling mean"  # as the stage reads them
    return {"probed": given, "probed_lines": given.replace(" --dev", " \\\n#             --dev")}


def _text2text_values(request: TemplateRequest, folder: str) -> dict[str, str]:
    """Three tasks of ours, or the one of the user."""
    if request.data:
        return {
            "tasks": f"    - {{name: rows, path: {_quote_path(request.data)}, max_passes: 20}}",
            "task_names": "rows",
        }
    lines = [
        f"    - {{name: summary, path: {folder}/pairs.train.jsonl, max_passes: 20}}",
        f"    - {{name: part, path: {folder}/labelled.train.jsonl, kind: labelled, max_passes: 20, "
        'prompt: "part of the library: {text}"}',
        f"    - {{name: choice, path: {folder}/choices.train.jsonl, max_passes: 20}}",
    ]
    sets = {
        "retained": [f"{{name: english, path: {folder}/old-heldout.jsonl, like: replay}}"],
        "learned": [
            f"{{name: {name}-valid, path: {folder}/{rows}.valid.jsonl, like: {name}}}"
            for name, rows in (("summary", "pairs"), ("part", "labelled"), ("choice", "choices"))
        ],
    }
    return {"tasks": "\n".join(lines), "task_names": "summary, part, choice", "sets": _sets_yaml(sets)}


def _few_shot_values(request: TemplateRequest, folder: str) -> dict[str, str]:
    """The questions of the tasks file, once more inside of the stage."""
    values = {
        "train": _quote_path(request.data or f"{folder}/choices.train.jsonl"),
        "test": _quote_path(request.test or f"{folder}/choices.test.jsonl"),
        "kind": "auto" if request.data else "choices",
        "name": request.name,
    }
    listed = _fill_template("few-shot-tasks", values).splitlines()
    lines = [f"    {line}" for line in listed if not line.startswith("#")]
    return {**values, "questions": "\n".join(lines)}


def _continue_values(request: TemplateRequest, folder: str) -> dict[str, str]:
    """As much replay as the shift between the two texts asks for."""
    old, new = request.replay or f"{folder}/old.jsonl", request.data or f"{folder}/new.jsonl"
    try:
        found = domain_shift.js_divergence(
            *(
                domain_shift.byte_counts(_read_passages(where, path))
                for where, path in (("--replay", old), ("--data", new))
            )
        )
    except DataError:  # too little text to tell
        return {}
    strength = shift_strength(found.value, found.same or 0.0)
    share = make_proposals(strength, tokens=0, old_bytes_per_token=1, new_bytes_per_token=1, unknown=0)[0].value
    said = {"none": "no shift to speak of", "weak": "a weak shift", "strong": "a strong shift"}[strength]
    return {
        "replay_share": share,
        "new_share": f"{100 - int(share.removesuffix('%'))}%",
        "why": f"{said}: {found.value:.2f} bits (postgrad shift tells more)",
    }


def _read_passages(where: str, path: str) -> domain_shift.Passages:
    documents = read_documents(RawSource(where, path, root=Path.cwd(), where=where))
    return domain_shift.make_passages(
        [d.text for d in islice(documents, _MAX_DOCUMENTS) if d.text and not d.is_empty], where
    )


_KIND_VALUES: Mapping[str, Callable[[TemplateRequest, str], dict[str, str]]] = {
    "continue": _continue_values,
    "mixed": _mixed_values,
    "probe": _probe_values,
    "text2text": _text2text_values,
    "few-shot": _few_shot_values,
}

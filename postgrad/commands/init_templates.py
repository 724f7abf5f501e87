"""Write a commented stage of each training strategy, which runs as it is on the user's text or on built-in text.

Without the user's text the rows come from `builtin_corpus`; without the user's model a second stage trains a small one first.
The files are filled in from `templates/`.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.resources import files
from itertools import islice
from pathlib import Path
from string import Template
from typing import NamedTuple

from postgrad.analysis import domain_shift
from postgrad.analysis.shift_advice import LARGE_RATE, make_proposals, shift_strength, usual_peak_rate
from postgrad.commands.builtin_corpus import ROW_GENERATORS, write_rows, write_texts
from postgrad.commands.init import (
    Budget,
    check_name,
    init_command,
    measure_budget,
    row_kind_error,
    template_command,
)
from postgrad.commands.results import Result
from postgrad.config.editor_schema import write_stage_file
from postgrad.config.objectives import ANSWER_KINDS
from postgrad.config.stage_file import load_stage
from postgrad.data.read.documents import detect_kind, detect_source_columns, read_documents
from postgrad.data.read.files import RawSource
from postgrad.data.read.row_kinds import RUNNING_TEXT_KINDS
from postgrad.data.read.train_test_split import split_rows
from postgrad.errors import DataError, StageError, suggest_nearest
from postgrad.models.auto_classes import load_config
from postgrad.models.families import count_weights
from postgrad.models.location import locate_model
from postgrad.storage.atomic import write_atomically
from postgrad.storage.cache_folder import cache_folder

Notify = Callable[[str], None]

_CHAT_SHARE, _REPLAY_SHARE = 0.2, 0.1
"""Shares of the trained tokens in `mixed`."""
_MAX_DOCUMENTS = 2000
"""Documents of each text from which the shift is measured."""


@dataclass(frozen=True)
class TemplateRequest:
    """The name of a stage, and the texts and the model to use; None: built-in ones."""

    name: str
    data: str | None = None
    model: str | None = None
    replay: str | None = None
    test: str | None = None
    chat: str | None = None
    """Of `mixed`: the rows with answers, beside the running text in `data`."""


@dataclass(frozen=True)
class TemplateKind:
    """A strategy: its rows, its base model, and peak and floor rates for the built-in small models and for the user's."""

    rows: str | None
    base: str | None
    demo_rates: tuple[str, str]
    user_rates: tuple[str, str]
    measurements: str
    """Results on the built-in text and model, as a comment of the file."""


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


_ROW_KINDS: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(("continue", "mlm", "from-scratch", "mixed"), RUNNING_TEXT_KINDS),
    **dict.fromkeys(("instruct", "text2text", "few-shot"), ANSWER_KINDS),
    **dict.fromkeys(("classify", "probe"), ("labelled", "tagged")),
}
"""The kinds of rows that each strategy trains on (`mixed` also on rows with answers)."""

_KINDS_WITH_TEST = ("classify", "probe", "few-shot")
"""The strategies with test rows; for the last two a user's rows are split if `--test` is not given."""


@dataclass(frozen=True)
class WrittenTemplate(Result):
    """The files of a strategy that were written."""

    files: tuple[Path, ...]
    commands: tuple[str, ...]
    """The commands to run, in order."""
    notes: tuple[str, ...]
    """Which data had to be generated or split."""


class _TemplateFiles(NamedTuple):
    """The files of a template, the commands to run in order, and notes on generated data."""

    files: list[Path]
    commands: list[str]
    notes: list[str]


def write_template(
    stage_path: Path, kind: str, request: TemplateRequest, *, force: bool = False, notify: Notify = lambda _: None
) -> WrittenTemplate:
    """Write the stage of a strategy, and the files that it needs; `notify` is called before slow work.

    Raises `StageError` for an unknown strategy, files that exist, and a name that cannot name a run.
    """
    check_name(stage_path)
    if kind not in TEMPLATE_KINDS:
        raise StageError(
            f"there is no template {kind!r}",
            where="--template",
            expected=", ".join(TEMPLATE_KINDS),
            hint=suggest_nearest(kind, TEMPLATE_KINDS),
        )
    paths = [stage_path.with_name(f"{request.name}{ending}.yaml") for ending in ("", *_extra_suffixes(kind, request))]
    existing = [path for path in paths if path.exists()]
    if existing and not force:
        raise StageError(f"{existing[0]} already exists", where="init", hint="choose another name, or add --force")
    _check_test(kind, request)
    _check_chat(kind, request)
    row_kind = _detect_rows(kind, request)
    written = _write_files(stage_path, kind, request, row_kind, notify)
    return WrittenTemplate(tuple(written.files), tuple(written.commands), tuple(written.notes))


def _check_test(kind: str, request: TemplateRequest) -> None:
    """Raise `StageError` for test rows that the strategy does not use."""
    if request.test is not None and kind not in _KINDS_WITH_TEST:
        raise StageError(
            f"{kind} has no test rows",
            where="--test",
            expected=f"a --template of {', '.join(_KINDS_WITH_TEST)}",
        )
    if request.test is not None and request.data is None:
        raise StageError(
            "--test needs training rows",
            where="--test",
            expected="--data with rows of the same kind",
        )


def _split_rows(kind: str, request: TemplateRequest, folder: Path) -> tuple[TemplateRequest, list[str]]:
    """Split the user's rows in two files if a strategy needs test rows and none are given; with a note on it."""
    if kind not in ("probe", "few-shot") or request.data is None or request.test is not None:
        return request, []
    train, test = (folder / f"rows.{part}.jsonl" for part in ("train", "test"))
    counts = split_rows(RawSource("rows", request.data, root=Path.cwd(), where="--data"), train, test)
    names = [f"{folder.name}/{path.name}" for path in (train, test)]
    note = f"split {request.data}: {counts[0]:,} training rows in {names[0]}, {counts[1]:,} test rows in {names[1]}"
    return replace(request, data=names[0], test=names[1]), [note]


def _extra_suffixes(kind: str, request: TemplateRequest) -> list[str]:
    """Suffixes of further files."""
    base = ["-base"] if TEMPLATE_KINDS[kind].base and request.model is None else []
    return [*base, *(["-tasks"] if kind == "few-shot" else [])]


def _check_chat(kind: str, request: TemplateRequest) -> None:
    """Raise `StageError` for `--chat` of another template than `mixed`, and for `mixed` with one of its two texts alone."""
    if request.chat is not None and kind != "mixed":
        raise StageError(
            f"{kind} trains on one file of rows",
            where="--chat",
            expected="--data alone, or --template mixed",
        )
    if kind == "mixed" and (request.data is None) != (request.chat is None):
        given, missing = ("--data", "--chat") if request.chat is None else ("--chat", "--data")
        raise StageError(
            f"mixed trains on text and on rows with answers, and {given} is given alone",
            where=given,
            expected=f"{missing} too",
            hint=template_command(
                request.name, kind, request.data or "TEXT", request.model, request.replay, request.chat or "ROWS"
            ),
        )


def sort_texts(data: Sequence[str], chat: str | None) -> tuple[str | None, str | None]:
    """The text and the rows with answers of a stage: two of `--data` are told apart by the kinds of their rows."""
    first, second = (*data, None, None)[:2]
    if (second is not None and chat is not None) or len(data) > 2:
        raise StageError(
            f"{len(data) + (chat is not None)} texts",
            where="--data",
            expected="one, and --chat; a folder or a pattern for several files",
        )
    if second is None:
        return first, chat
    kinds = [detect_kind(RawSource("rows", path, root=Path.cwd(), where="--data")) for path in data]
    is_text = [kind in RUNNING_TEXT_KINDS for kind in kinds]
    if is_text[0] == is_text[1]:
        raise StageError(
            f"{first} has rows of `{kinds[0]}`, and {second} of `{kinds[1]}`",
            where="--data",
            expected="one text, and rows with answers as --chat",
        )
    return (first, second) if is_text[0] else (second, first)


class _RowKind(NamedTuple):
    """The kind of the user's rows, and whether it must be written: rows with `text` and `label` count as running text."""

    name: str
    is_detected: bool

    @property
    def key(self) -> str:
        """The key of a source, where it is needed."""
        return "" if self.is_detected else f", kind: {self.name}"


def _detect_rows(kind: str, request: TemplateRequest) -> _RowKind | None:
    """The kind of the user's rows with answers or labels. Raises `StageError` for rows that the strategy cannot train on."""
    accepted = _ROW_KINDS[kind]
    found = None if request.data is None else _match_row_kind("--data", request.data, accepted, request)
    if request.chat is not None:
        found = _match_row_kind("--chat", request.chat, ANSWER_KINDS, request)
    if request.replay is not None:
        causal = () if kind in ("mlm", "text2text", "few-shot") else ANSWER_KINDS
        _match_row_kind("--replay", request.replay, (*RUNNING_TEXT_KINDS, *causal), request)
    if request.test is not None:
        _match_row_kind("--test", request.test, accepted, request)
    return found


def _match_row_kind(option: str, path: str, accepted: Sequence[str], request: TemplateRequest) -> _RowKind:
    """The kind of some rows, one of `accepted`."""
    rows = RawSource("rows", path, root=Path.cwd(), where=option)
    detected = detect_kind(rows)
    if detected in accepted:
        return _RowKind(detected, is_detected=True)
    for other in accepted if detected in RUNNING_TEXT_KINDS else ():
        with suppress(DataError):
            if detect_source_columns(replace(rows, kind=other)):
                return _RowKind(other, is_detected=False)
    raise row_kind_error(option, path, detected, accepted, _fitting_command(option, path, detected, request))


def _fitting_command(option: str, path: str, kind: str, request: TemplateRequest) -> str:
    """The command for rows of another kind than a template trains on."""
    if request.data and request.chat:
        is_swapped = kind in (ANSWER_KINDS if option == "--data" else RUNNING_TEXT_KINDS) and option != "--replay"
        swapped = template_command(request.name, "mixed", request.chat, request.model, request.replay, request.data)
        return swapped if is_swapped else ""
    return init_command(request.name, kind, path, request.model, request.replay) if option == "--data" else ""


def _write_files(
    stage_path: Path, kind: str, request: TemplateRequest, row_kind: _RowKind | None, notify: Notify
) -> _TemplateFiles:
    spec = TEMPLATE_KINDS[kind]
    folder = f"{request.name}-data"
    request, notes = _split_rows(kind, request, stage_path.parent / folder)
    if kind == "continue" and None in (request.data, request.replay):  # the shift is measured on them
        _make_texts(stage_path.parent / folder, notify)
    values = {
        **_common_values(stage_path, kind, request, folder),
        "kind": row_kind.name if row_kind else "labelled",
        "kind_key": row_kind.key if row_kind else "",
        **_KIND_VALUES.get(kind, _no_values)(request, folder, row_kind),
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
        notes.insert(0, f"generated {folder}/ from this Python's own documentation and library")
    for path, text in texts.items():
        (write_atomically if path.stem.endswith("-tasks") else write_stage_file)(path, text)
    load_stage(stage_path)  # validates the stage
    return _TemplateFiles(list(texts), [*commands, f"postgrad train {stage_path.name}"], notes)


def _make_texts(folder: Path, notify: Notify) -> None:
    if not folder.exists():
        notify("reading this Python's own documentation and library ...")
    write_texts(folder)


def _make_builtin_data(folder: Path, text: str, notify: Notify) -> bool:
    """Generate the built-in data that the files name; whether there was any."""
    texts = re.search(rf"\b{re.escape(folder.name)}/(old|new)\b", text) is not None
    if texts:
        _make_texts(folder, notify)
    kinds = [rows for rows in ROW_GENERATORS if f"{folder.name}/{rows}." in text]
    for rows in kinds:
        write_rows(folder, rows)
    return texts or bool(kinds)


def _fill_template(name: str, values: Mapping[str, str]) -> str:
    text = files("postgrad.commands").joinpath("templates", f"{name}.yaml").read_text("utf-8")
    filled = Template(text).substitute(values)
    return re.sub(r"^\n|(?<=\n)\n+", "", filled)  # a line whose placeholder is empty


def _common_values(stage_path: Path, kind: str, request: TemplateRequest, folder: str) -> dict[str, str]:
    """The placeholders of most templates."""
    spec = TEMPLATE_KINDS[kind]
    is_builtin = request.data is None
    own_model = spec.base is not None and request.model is None
    peak, floor = _suggested_rates(spec, None if own_model else request.model)
    rows = f"{folder}/{spec.rows}" if spec.rows else ""
    data = request.data or (f"{rows}.train.jsonl" if rows and kind != "mixed" else f"{folder}/new.jsonl")
    if kind == "from-scratch" and is_builtin:
        data = f"{folder}/old.jsonl"
    english, code = (
        f"{{name: english, path: {folder}/old-heldout.jsonl}}",
        f"{{name: code, path: {folder}/new-heldout.jsonl}}",
    )
    sets = {
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
        "sets": _sets_yaml(sets.get(kind, {}) if is_builtin else _test_sets(request)),
        "figures": _comment(spec.measurements) if is_builtin and (own_model or spec.base is None) else "",
        "held": ", held_out: 0" if is_builtin else "",
        "chooser": "valid" if is_builtin else "rows",
        "replay_share": "10%",
        "why": "old text, against forgetting",
        "rate": "1e-6 is usual for all weights of a large model"
        if peak == spec.user_rates[0]
        else "a small model: 1e-6 for a large one",
    }


def _suggested_rates(spec: TemplateKind, model: str | None) -> tuple[str, str]:
    """Peak and floor: those of the built-in small model, or for the user's `model` by its size.

    The rates of decoders are those of a billion weights; smaller ones take more, at most what a very small one does.
    """
    if spec.base is None or model is None:
        return spec.demo_rates
    if spec.base != "decoder" or not Path(model).exists():
        return spec.user_rates
    weights = count_weights(load_config(locate_model(model, Path.cwd()).name_or_path))
    factor = usual_peak_rate(weights) / LARGE_RATE
    pairs = zip(spec.user_rates, spec.demo_rates, strict=True)
    peak, floor = (f"{min(float(usual) * factor, float(most)):.1e}".replace("e-0", "e-") for usual, most in pairs)
    return peak, floor


def _sets_yaml(sets: Mapping[str, Sequence[str]]) -> str:
    """Held-out sets by role, a line each."""
    return "\n".join(
        line for role, items in sets.items() for line in (f"  {role}:", *(f"    - {item}" for item in items))
    )


def _test_sets(request: TemplateRequest) -> dict[str, list[str]]:
    """The user's test rows."""
    return (
        {"test": [f"{{name: final, path: {_quote_path(request.test)}, same_format_as: rows}}"]} if request.test else {}
    )


def _set_entry(name: str, rows: str, part: str, source: str) -> str:
    return f"{{name: {name}, path: {rows}.{part}.jsonl, same_format_as: {source}}}"


def _comment(measurements: str) -> str:
    return "\n".join(f"# {line}" for line in measurements.splitlines())


def _quote_path(path: str) -> str:
    return path if re.fullmatch(r"[\w./*-]+", path) else "'" + path.replace("'", "''") + "'"


def _no_values(request: TemplateRequest, folder: str, row_kind: _RowKind | None) -> dict[str, str]:
    return {}


def _mixed_values(request: TemplateRequest, folder: str, row_kind: _RowKind | None) -> dict[str, str]:
    """The user's rows, and the size of a stage with their text for a model of this machine; without old text, room for it."""
    budget, has_replay = Budget("300k", 256, 16, "1%"), request.model is None or request.replay is not None
    if request.data and request.model and Path(request.model).exists():
        share = 1 - _CHAT_SHARE - (_REPLAY_SHARE if has_replay else 0)
        budget = measure_budget(request.data, request.model, share, cache_folder())
    old = _quote_path(request.replay or f"{folder}/old.jsonl")
    source = f"{{name: replay, path: {old}, share: {_REPLAY_SHARE:.0%}, role: replay}}"
    return {
        "instructions": _quote_path(request.chat or f"{folder}/instructions.train.jsonl"),
        "replay_source": f"    - {source}     # old text, against forgetting"
        if has_replay
        else "    # Without old text the model forgets. Uncomment, and name text of the kind it was trained on:\n"
        f"    # - {source.replace(old, 'old-text/*.jsonl')}",
        "chat_share": f"{_CHAT_SHARE:.0%}",
        "tokens": budget.tokens,
        "length": str(budget.length),
        "sequences": str(budget.sequences),
        "warmup": budget.warmup,
    }


def _probe_values(request: TemplateRequest, folder: str, row_kind: _RowKind | None) -> dict[str, str]:
    """The arguments of the verb `probe`, in a line and wrapped for the head of the file."""
    model = request.model or f"runs/{request.name}-base"
    if request.data:
        kind = ["--kind", row_kind.name] if row_kind else []
        arguments = shlex.join([model, request.data, str(request.test), *kind])
    else:
        parts = {part: f"{folder}/labelled.{part}.jsonl" for part in ("train", "test", "valid")}
        arguments = f"{model} {parts['train']} {parts['test']} --dev {parts['valid']} --kind labelled"
    arguments += " --pooling mean"  # as in the stage
    return {"probed": arguments, "probed_lines": arguments.replace(" --dev", " \\\n#             --dev")}


def _text2text_values(request: TemplateRequest, folder: str, row_kind: _RowKind | None) -> dict[str, str]:
    """Three built-in tasks, or the user's own."""
    if request.data:
        key = row_kind.key if row_kind else ""
        return {
            "tasks": f"    - {{name: rows, path: {_quote_path(request.data)}{key}, max_passes: 20}}",
            "task_names": "rows",
        }
    lines = [
        f"    - {{name: summary, path: {folder}/pairs.train.jsonl, max_passes: 20}}",
        f"    - {{name: part, path: {folder}/labelled.train.jsonl, kind: labelled, max_passes: 20, "
        'prompt: "part of the library: {text}"}',
        f"    - {{name: choice, path: {folder}/choices.train.jsonl, max_passes: 20}}",
    ]
    sets = {
        "retained": [f"{{name: english, path: {folder}/old-heldout.jsonl, same_format_as: replay}}"],
        "learned": [
            f"{{name: {name}-valid, path: {folder}/{rows}.valid.jsonl, same_format_as: {name}}}"
            for name, rows in (("summary", "pairs"), ("part", "labelled"), ("choice", "choices"))
        ],
    }
    return {"tasks": "\n".join(lines), "task_names": "summary, part, choice", "sets": _sets_yaml(sets)}


def _few_shot_values(request: TemplateRequest, folder: str, row_kind: _RowKind | None) -> dict[str, str]:
    """The questions of the tasks file, repeated in the stage."""
    values = {
        "train": _quote_path(request.data or f"{folder}/choices.train.jsonl"),
        "test": _quote_path(request.test or f"{folder}/choices.test.jsonl"),
        "kind": row_kind.name if row_kind else "choices",
        "name": request.name,
    }
    text = _fill_template("few-shot-tasks", values)
    lines = [f"    {line}" for line in text.splitlines() if not line.startswith("#")]
    return {**values, "questions": "\n".join(lines)}


def _continue_values(request: TemplateRequest, folder: str, row_kind: _RowKind | None) -> dict[str, str]:
    """A replay share that follows the shift between the two texts."""
    old, new = request.replay or f"{folder}/old.jsonl", request.data or f"{folder}/new.jsonl"
    try:
        distance = domain_shift.js_divergence(
            *(
                domain_shift.byte_counts(_read_passages(where, path))
                for where, path in (("--replay", old), ("--data", new))
            )
        )
    except DataError:  # too little text to measure
        return {}
    strength = shift_strength(distance.value, distance.same or 0.0)
    share = make_proposals(strength, tokens=0, old_bytes_per_token=1, new_bytes_per_token=1, unknown=0)[0].value
    title = {"none": "no shift", "weak": "a weak shift", "strong": "a strong shift"}[strength]
    return {
        "replay_share": share,
        "why": f"{title}: {distance.value:.2f} bits (details: postgrad shift)",
    }


def _read_passages(where: str, path: str) -> domain_shift.Passages:
    documents = read_documents(RawSource(where, path, root=Path.cwd(), where=where))
    return domain_shift.make_passages(
        [d.text for d in islice(documents, _MAX_DOCUMENTS) if d.text and not d.is_empty], where
    )


_KIND_VALUES: Mapping[str, Callable[[TemplateRequest, str, _RowKind | None], dict[str, str]]] = {
    "continue": _continue_values,
    "mixed": _mixed_values,
    "probe": _probe_values,
    "text2text": _text2text_values,
    "few-shot": _few_shot_values,
}

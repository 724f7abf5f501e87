"""Write a first stage file for a model and a text, each key explained."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import yaml

from postgrad.analysis.shift_advice import usual_peak_rate
from postgrad.commands.results import Result
from postgrad.config.editor_schema import write_stage_file
from postgrad.config.stage import OptimizerConfig
from postgrad.config.stage_file import parse_recorded_stage
from postgrad.data.read.documents import detect_kind, read_documents
from postgrad.data.read.files import RawSource as Files
from postgrad.data.read.row_kinds import RUNNING_TEXT_KINDS
from postgrad.data.tokens.tokenize import build_store
from postgrad.errors import StageError, format_names
from postgrad.lineage.record import RECORD, read_record
from postgrad.models.auto_classes import load_config
from postgrad.models.families import count_weights
from postgrad.models.location import ModelLocation, locate_model
from postgrad.models.model_sizes import load_model_sizes
from postgrad.models.pretrained import load_tokenizer
from postgrad.optim.lr_schedules import shortest_warmup
from postgrad.plan.model_inputs import make_encoder, unknown_notes
from postgrad.storage.cache_folder import cache_folder

_REPLAY_SHARE = 0.10
_MIN_DOCUMENTS = 40
"""With fewer documents a held-out part is too small to measure."""

_STRATEGIES = {**dict.fromkeys(RUNNING_TEXT_KINDS, "continue"), "labelled": "classify", "tagged": "classify"}
"""The strategy for rows of each kind; for the others `instruct`."""

_TEMPLATE = """\
# {head}
#   check:  postgrad check {file}
#   train:  postgrad train {file}      (Ctrl-C saves; the same command resumes)
name: {name}
model: {model}
tokens: {tokens}                # the budget in trained tokens, replay included: {why}
data:
  sequence_length: {length}        # tokens in a row; at most the model's {positions} positions
  sources:
    - {{name: new, path: {data}{new_cut}}}
{replay}schedule:
  kind: rewarm                  # warm up, then cosine to the floor; others: infinite, wsd, from-floor, constant
  peak: {peak}                 # {rate}
  floor: {floor}
  warmup: {warmup}
batch:
  global_batch_size: {sequences}                 # rows in a step: {step_tokens} tokens
evaluation: {{every: 10%}}        # the held-out part of each source is scored before, during and after{retained}
# max_forgetting: 2%            # fail (exit code 4) when the loss on retained text rises by more
"""


@dataclasses.dataclass(frozen=True)
class WrittenStage(Result):
    """A stage file that was written, and the text that it trains on."""

    stage: Path
    data: str
    documents: int
    tokens: int
    bytes: int
    kind: str
    """How the text was read, such as `text` or `chat`."""
    samples: tuple[str, ...]
    """The first 100 characters of the first three documents."""
    notes: tuple[str, ...]


def write_stage(
    stage_path: Path | str,
    *,
    data: str,
    model: str,
    replay: str | None = None,
    force: bool = False,
    cache: Path | None = None,
) -> WrittenStage:
    """Write a stage file for a model and a text. Raises `StageError` when the file exists and `force` is not given."""
    stage_path, cache = Path(stage_path), cache or cache_folder()
    if stage_path.exists() and not force:
        raise StageError(f"{stage_path} already exists", where="init", hint="choose another name, or add --force")
    check_name(stage_path)
    name = stage_path.stem
    root = stage_path.resolve().parent
    start = locate_model(model, root)
    sizes = load_model_sizes(start)
    tokenizer = load_tokenizer(start)
    encoder = make_encoder(tokenizer, sizes.vocab_size)
    positions = sizes.positions or 1024
    files = Files("new", data, root=root, where="--data")
    if (kind := detect_kind(files)) not in RUNNING_TEXT_KINDS:
        raise row_kind_error("--data", data, kind, RUNNING_TEXT_KINDS, init_command(name, kind, data, model, replay))
    store = build_store(files, encoder, cache)
    unit = ""
    if len(store) < _MIN_DOCUMENTS and store.kind == "text":
        # Whole documents are held out; a text of few documents is split into passages for that.
        passages = dataclasses.replace(files, documents="passages")
        finer = build_store(passages, encoder, cache)
        if len(finer) > len(store):
            files, store, unit = passages, finer, ", document_unit: passages"
    samples = [
        " ".join((document.text or str(list((document.ids or [])[:20]))).split())[:100]
        for document in islice(read_documents(files), 3)
    ]
    share = 1.0
    if replay:
        build_store(Files("replay", replay, root=root, where="--replay"), encoder, cache)
        share = 1 - _REPLAY_SHARE
        replay_lines = (
            f"    - {{name: replay, path: {_yaml_scalar(replay)}, share: {_REPLAY_SHARE:.0%}, role: replay}}"
            "   # old text, against forgetting\n"
        )
    else:
        replay_lines = (
            "    # Without old text the model forgets. Uncomment, and name text of the kind it was trained on:\n"
            "    # - {name: replay, path: old-text/*.jsonl, share: 10%, role: replay}\n"
        )
    peak, floor, rate = _suggested_rates(start, model)
    budget = suggest_budget(store.tokens, share, positions)
    text = _TEMPLATE.format(
        head=f"{name}: continue {model} on {data}",
        name=_yaml_scalar(name),
        model=_yaml_scalar(model),
        data=_yaml_scalar(data),
        file=stage_path.name,
        tokens=budget.tokens,
        why="about one pass over the new text",
        length=budget.length,
        positions=f"{positions:,}",
        new_cut=unit,
        replay=replay_lines,
        peak=peak,
        floor=floor,
        rate=rate,
        sequences=budget.sequences,
        warmup=budget.warmup,
        step_tokens=f"{budget.sequences * budget.length:,}",
        retained="" if replay else "\n  # retained: [old-heldout.jsonl]   # old text, to measure forgetting",
    )
    write_stage_file(stage_path, text)
    notes = unknown_notes(tokenizer, encoder, {data: store})
    return WrittenStage(
        stage_path, data, len(store), store.tokens, store.bytes, store.kind, tuple(samples), tuple(notes)
    )


class Budget(NamedTuple):
    """The size of a stage, as its file states it."""

    tokens: str
    length: int
    sequences: int
    warmup: str


def suggest_budget(text_tokens: int, share: float, positions: int) -> Budget:
    """About one pass over new text that is a `share` of the trained tokens; at least 50 steps where there is text for them."""
    tokens = max(1000, round(text_tokens * 0.98 / share))
    length = min(1024, positions)
    sequences = max(1, min(32, tokens // (length * 50)))
    return Budget(_format_tokens(tokens), length, sequences, _suggested_warmup(tokens, sequences * length))


def measure_budget(data: str, model: str, share: float, cache: Path) -> Budget:
    """The budget for a text that is a `share` of the trained tokens, counted in the model's own tokens."""
    start = locate_model(model, Path.cwd())
    sizes = load_model_sizes(start)
    encoder = make_encoder(load_tokenizer(start), sizes.vocab_size)
    store = build_store(Files("text", data, root=Path.cwd(), where="--data"), encoder, cache)
    return suggest_budget(store.tokens, share, sizes.positions or 1024)


def _suggested_rates(start: ModelLocation, model: str) -> tuple[str, str, str]:
    """Peak and floor with a comment: those of the model's own run, if it trained all weights, or usual ones."""
    comment = "higher learns more and forgets more"
    if start.run is not None and (start.run / RECORD).exists():
        record = read_record(start.run)
        curve = [rate for _, rate in record.schedule_curve]
        if curve and parse_recorded_stage(record.stage, record.name).tuning.kind == "full":
            peak, floor = (f"{rate:.1e}".replace("e-0", "e-") for rate in (max(curve), max(curve) / 10))
            return peak, floor, f"that of {model}; {comment}"
    weights = count_weights(load_config(start.name_or_path))
    rate = usual_peak_rate(weights)
    peak, floor = (f"{each:.1e}".replace("e-0", "e-") for each in (rate, rate / 10))
    return peak, floor, f"for {weights:,} weights (docs/schedules.md); {comment}"


def _suggested_warmup(tokens: int, step_tokens: int) -> str:
    """1 % of the steps, or the fewest that are a warm-up."""
    steps = max(1, tokens // step_tokens)
    shortest = shortest_warmup(steps, OptimizerConfig().betas[1])
    return "1%" if steps >= 100 * shortest else f"{shortest} steps"


def row_kind_error(option: str, path: str, kind: str, accepted: Sequence[str], command: str = "") -> StageError:
    """The error of rows of a kind that is not accepted; `command` writes a stage for them."""
    return StageError(
        f"{path} has rows of `{kind}`",
        where=option,
        expected=f"rows of {format_names(accepted, limit=8)}",
        hint=command,
    )


def init_command(name: str, kind: str, data: str, model: str | None, replay: str | None) -> str:
    """The command that writes the stage of the strategy that trains on rows of a kind."""
    return template_command(name, _STRATEGIES.get(kind, "instruct"), data, model, replay)


def template_command(
    name: str, template: str, data: str, model: str | None, replay: str | None, chat: str | None = None
) -> str:
    """The command that writes the stage of a strategy."""
    options = [("--data", data), ("--chat", chat), ("--model", model), ("--replay", replay)]
    given = [word for option, value in options if value is not None for word in (option, value)]
    return shlex.join(["postgrad", "init", name, "--template", template, *given])


def check_name(stage_path: Path) -> None:
    """Raise `StageError` for a stage file whose name cannot also name a run folder."""
    if not re.fullmatch(r"[\w.\-]*\w[\w.\-]*", stage_path.stem) or stage_path.parent != Path():
        raise StageError(
            f"{str(stage_path.with_suffix(''))!r} cannot name a run folder",
            where="init",
            expected="letters, digits, '.', '_' and '-', and not dots alone",
        )


def _yaml_scalar(text: str) -> str:
    """A text as a YAML scalar: quoted when it would be read as a number, an alias, a comment or a list."""
    try:
        plain = yaml.safe_load(f"{{x: {text}}}") == {"x": text}
    except (yaml.YAMLError, ValueError):
        plain = False
    return text if plain else json.dumps(text, ensure_ascii=False)


def _format_tokens(tokens: int) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if tokens >= 10 * size:
            return f"{tokens / size:.0f}{unit}"
        if tokens >= size:
            return f"{tokens / size:.1f}{unit}"
    return str(tokens)

"""How do models stand beside each other? Any models on any text, runs on what they held out, stages of a lineage."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import yaml
from transformers import AutoConfig

from postgrad.config import stage as s
from postgrad.config.objectives import TextToTextObjective
from postgrad.config.stage_file import parse_recorded_stage
from postgrad.data.problem_type import ProblemType
from postgrad.data.read.documents import detect_kind, read_labels
from postgrad.data.read.examples import RUNNING_TEXT_KINDS
from postgrad.data.read.files import RawSource
from postgrad.data.read.labels import Labels
from postgrad.data.tokens.tokenize import build_store
from postgrad.distributed.world import World
from postgrad.errors import ModelError, StageError, suggest_nearest
from postgrad.evaluation import before_after
from postgrad.evaluation.held_out import HeldOutSet
from postgrad.evaluation.perplexity import Scores, score_held_out
from postgrad.evaluation.pseudo_perplexity import score_masked_tokens
from postgrad.hardware import machine
from postgrad.lineage.metrics import read_metrics
from postgrad.lineage.record import Record, read_record
from postgrad.lineage.tree import lineage_matrix, read_lineage, set_key
from postgrad.models.model import wrap_model
from postgrad.models.pretrained import ModelLocation, load_tokenizer, locate_model
from postgrad.models.task import Task
from postgrad.plan.held_out_sets import HeldOutDocuments, make_held_out_set, make_masked_held_out_text
from postgrad.plan.model_inputs import ModelInputs, make_encoder, make_model_inputs
from postgrad.plan.objective_rows import (
    RowTemplate,
    get_start_objectives,
    make_renderer,
    match_objectives,
    resolve_objectives,
)
from postgrad.plan.plan import make_plan
from postgrad.plan.sources import make_text_files
from postgrad.plan.start_model import resolve_start_model
from postgrad.reports.html import document
from postgrad.reports.pages import comparison_page, lineage_page
from postgrad.reports.sections.comparison_table import arm_names, comparison_table
from postgrad.reports.sections.lineage_tables import lineage_summary_table, lineage_table
from postgrad.reports.sections.task_section import comparison_task_table
from postgrad.run import task_scores
from postgrad.stats.forgetting import paired_change
from postgrad.tuning.open_model import BaseReference, get_task, open_model, start_fingerprint, starts_as_prefix_lm

_DEFAULT_CONTEXT = 1024
_MAX_TOKENS = 10_000_000
_DOCUMENT_MODES = get_args(s.HeldOutFile.model_fields["document_unit"].annotation)
_CLASSIFIER_ROW_KINDS = {Task.CLASSIFY: "labelled", Task.TAG: "tagged"}
"""The rows that a classifier is scored on."""


@dataclass(frozen=True)
class FileSets:
    """Files as held-out sets, read as a model reads them."""

    model_inputs: ModelInputs
    documents: tuple[HeldOutDocuments, ...]
    sets: tuple[HeldOutSet, ...]


def load_file_sets(
    start: ModelLocation,
    files: list[str],
    documents: str,
    column: str | None,
    context: int,
    cache: Path,
    limit: int = _MAX_TOKENS,
) -> FileSets:
    """Files as held-out sets, read as the model of a start reads them. `limit`: about how many tokens of each file."""
    reading = load_model_inputs(start, context)
    found = list(load_documents(start, files, documents, column, reading, cache))
    sets = [make_held_out_set(chosen, reading, limit, [], problem=problem) for chosen, problem in found]
    return FileSets(reading, tuple(chosen for chosen, _ in found), tuple(sets))


def load_documents(
    start: ModelLocation, files: list[str], documents: str, column: str | None, model_inputs: ModelInputs, cache: Path
) -> Iterator[tuple[HeldOutDocuments, ProblemType]]:
    """The documents of each file, with the objective that a model's own task takes on them, and what a classifier decides.

    Raises `StageError` for a cut that there is not.
    """
    if documents not in _DOCUMENT_MODES:
        raise StageError(
            f"there is no cut {documents!r}",
            where="--documents",
            expected=", ".join(_DOCUMENT_MODES),
            hint=suggest_nearest(documents, _DOCUMENT_MODES),
        )
    objectives = resolve_objectives([], start)
    if model_inputs.task.is_encoder_decoder:  # which serves rows with answers besides
        objectives += (TextToTextObjective(kind="text-to-text"),)
    decided = _CLASSIFIER_ROW_KINDS.get(model_inputs.task)
    taken: set[str] = set()
    for path in files:
        item = s.HeldOutFile.model_validate(
            {**s.expand_held_out_file(path), "document_unit": documents, "columns": {"text": column} if column else {}}
        )
        name, number = item.name, 2
        while name in taken:
            name, number = f"{item.name}-{number}", number + 1
        taken.add(name)
        asked = {"kind": decided} if decided else {}
        given = make_text_files(name, {**item.model_dump(), "hub": None, **asked}, Path.cwd(), path)
        kind = detect_kind(given)
        objective = match_objectives(name, kind, objectives, get_start_objectives(start), path).row_objective
        labels = _class_labels(start, model_inputs.task, given) if decided else None
        renderer = make_renderer(objective, kind, model_inputs, RowTemplate(), labels)
        store = build_store(given, model_inputs.encoder, cache, renderer=renderer)
        chosen = HeldOutDocuments(name, "learned", store, np.arange(len(store)), objective, renderer)
        problem: ProblemType = labels.problem if labels else ProblemType.CLASS
        yield chosen, problem


def _class_labels(start: ModelLocation, task: Task, files: RawSource) -> Labels:
    """What a classifier decides between, its names as the rows write them."""
    said = BaseReference.read_folder(start)
    if said and said.layer:
        names, problem = said.layer.labels, said.layer.problem
    else:
        config: Any = AutoConfig.from_pretrained(start.name_or_path)
        names = tuple(config.id2label[i] for i in range(config.num_labels))
        problem = config.problem_type
    decision = ProblemType.TAGS if task == Task.TAG else ProblemType.from_transformers(problem, len(names))
    if decision == ProblemType.NUMBER:
        return Labels(ProblemType.NUMBER)
    written = {str(name): name for name in read_labels(files).names}
    return Labels(decision, tuple(written.get(name, name) for name in names))


def load_model_inputs(start: ModelLocation, context: int) -> ModelInputs:
    """How the model of a start reads text, outside of any stage."""
    tokenizer = load_tokenizer(start)
    vocabulary = int(AutoConfig.from_pretrained(start.name_or_path).vocab_size)
    encoder = make_encoder(tokenizer, vocabulary)
    return make_model_inputs(get_task(start), start, tokenizer, encoder, length=context, seed=0)


def score_model(
    start: ModelLocation,
    sets: Sequence[before_after.ScoredSet],
    context: int,
    cache: Path,
    scorer: Callable[..., Scores] = score_held_out,
) -> dict[str, Scores]:
    """What the model of a start scores on sets; from the cache when it was scored before."""
    device = machine.default_device()
    identity = start_fingerprint(start)
    opened = open_model(start)
    model = wrap_model(opened.model, opened.task).to(device)
    return before_after.score_sets(
        model, sets, scorer, context=context, world=World(device), identity=identity, cache=cache
    )


def context_length(start: ModelLocation, requested: int | None) -> int:
    """Tokens that a model sees at once: as many as asked, or its own limit, at most 1,024."""
    limit = getattr(AutoConfig.from_pretrained(start.name_or_path), "max_position_embeddings", None) or _DEFAULT_CONTEXT
    if requested is not None and not 2 <= requested <= limit:
        raise ModelError(
            f"a context of {requested} does not fit {start.name}", where="--context", expected=f"2 to {limit}"
        )
    return requested or min(limit, _DEFAULT_CONTEXT)


def evaluate_files(
    model: str,
    files: list[str],
    *,
    context: int | None,
    documents: str,
    column: str | None,
    cache: Path,
    base: str | None = None,
    pseudo: int = 0,
) -> dict[str, Any]:
    """Score a model on files; with `pseudo` also about so many tokens of each, masked one at a time.

    Raises `ModelError`, `DataError` or, for a model that fills in no masks, `StageError`.
    """
    machine.tune_allocator()
    start = locate_model(model, Path.cwd(), base)
    used = context_length(start, context)
    texts = load_file_sets(start, files, documents, column, used, cache)
    found = score_model(start, texts.sets, used, cache)
    summaries = {name: scores.summary() for name, scores in found.items()}
    for name, scores in _pseudo_scores(start, texts, pseudo, used, cache).items():
        summaries[name]["pseudo"] = scores.summary()
    scored = "every token scored once"
    if starts_as_prefix_lm(start):
        scored = "a beginning of each text read in both directions, every token behind it scored once"
    lines = [
        f"{model}, {used} tokens of context, {scored}",
        f"  {'text':<24} {'nats/token':>10} {'95 % interval':>17} {'perplexity':>11} {'bits/byte':>10} "
        f"{'tokens':>11} {'documents':>10}",
    ]
    for name, row in summaries.items():
        interval = f"{row['low']:.4f}–{row['high']:.4f}"
        lines.append(
            f"  {name:<24} {row['nats']:>10.4f} {interval:>17} {row['perplexity']:>11.2f} {row['bits_per_byte']:>10.4f} "
            f"{row['tokens']:>11,} {row['documents']:>10,}"
        )
        if asked := row.get("pseudo"):
            lines.append(
                f"    each given all the others: {asked['nats']:.4f} nats/token ({asked['low']:.4f}–{asked['high']:.4f}), "
                f"pseudo-perplexity {asked['perplexity']:.2f}, {asked['tokens']:,} tokens masked one at a time"
            )
        for metric, value in row.get("metrics", {}).items():
            lines.append(f"    {metric} {value['value']:.4f} ({value['low']:.4f}–{value['high']:.4f})")
    writes = get_task(start).generates
    following = ["generate", model] if writes else ["export", model, "exported"]
    lines.append(f"next: {shlex.join(['postgrad', *following])}")
    return {"text": "\n".join(lines), "model": model, "context": used, "sets": summaries}


def _pseudo_scores(start: ModelLocation, texts: FileSets, tokens: int, context: int, cache: Path) -> dict[str, Scores]:
    """The scores of texts of which every token is masked in turn."""
    if not tokens:
        return {}
    if tokens < 0 or texts.model_inputs.task != Task.MASKED:
        raise StageError(
            f"{start.name} fills in no masks" if tokens > 0 else f"{tokens} is no number of tokens",
            where="--pseudo",
            expected="a masked language model, and 1 or more tokens",
        )
    running = [chosen for chosen in texts.documents if chosen.store.kind in RUNNING_TEXT_KINDS]
    sets = [make_masked_held_out_text(chosen, texts.model_inputs, tokens) for chosen in running]
    return score_model(start, sets, context, cache, score_masked_tokens)


def compare_models(models: list[str], files: list[str], *, cache: Path) -> dict[str, Any]:
    """Score several models on the same text; each is held against the first, document by document."""
    if len(models) < 2:
        raise StageError("one model has nothing to be compared with", where="compare", expected="two or more models")
    machine.tune_allocator()
    starts = [locate_model(m, Path.cwd()) for m in models]
    if len({starts_as_prefix_lm(start) for start in starts}) > 1:
        raise StageError(
            "some of these models read a prompt in both directions and others do not: they are scored on other tokens",
            where="compare",
            expected="models that read alike",
            hint="compare runs of one start model, whose stages scored it as they read",
        )
    context = min(context_length(start, None) for start in starts)
    texts = [load_file_sets(start, files, "auto", None, context, cache) for start in starts]
    found = [score_model(start, t.sets, context, cache) for start, t in zip(starts, texts, strict=True)]
    own = texts[0].sets
    names = [h.name for h in own]
    rows: list[dict[str, Any]] = []
    lines = [f"each model held against {models[0]}, document by document"]
    for name in names:
        lines.append(f"\n{name}")
        lines.append(f"  {'model':<32} {'nats/token':>10} {'bits/byte':>10}   change (95 % interval)")
        first = found[0][name]
        for model, scores, read in zip(models, found, texts, strict=True):
            sets, vocabulary = read.sets, read.model_inputs.encoder.vocabulary
            summary = scores[name].summary()
            row: dict[str, Any] = {"model": model, "set": name, **summary, "change": None}
            line = f"  {model:<32} {summary['nats']:>10.4f} {summary['bits_per_byte']:>10.4f}"
            same = [h.fingerprint for h in sets] == [h.fingerprint for h in own]
            if scores is not found[0]:
                if same:
                    change = before_after.loss_change(first, scores[name], vocabulary)
                    row["change"] = asdict(change)
                    line += f"   {change.difference:+.4f} nats/token ({change.low:+.4f} to {change.high:+.4f})"
                else:
                    held = next(h for h in sets if h.name == name), next(h for h in own if h.name == name)
                    found_change = _bits_per_byte_change(first, scores[name], held[::-1])
                    row["change"] = {"bits_per_byte": found_change}
                    line += (
                        f"   {found_change[0]:+.4f} bits/byte ({found_change[1]:+.4f} to {found_change[2]:+.4f}); "
                        "another tokenizer"
                    )
            lines.append(line)
            rows.append(row)
    lines.append(f"next: {shlex.join(['postgrad', 'generate', models[0], '--beside', models[1]])}")
    return {"text": "\n".join(lines), "context": context, "rows": rows}


def _bits_per_byte_change(
    before: Scores, after: Scores, sets: tuple[HeldOutSet, HeldOutSet]
) -> tuple[float, float, float]:
    """Difference in bits per byte with its interval, for models that cut text into different tokens.

    Documents are paired by their content: a tokenizer may leave out one that is a single token to it.
    """
    nats = [
        dict(zip(h.digests.tolist(), np.bincount(s.document_W, s.nats_W, len(s.bytes_N)).tolist(), strict=True))
        for h, s in zip(sets, (before, after), strict=True)
    ]
    sizes = dict(zip(sets[0].digests.tolist(), sets[0].bytes.tolist(), strict=True))
    both = [digest for digest in nats[0] if digest in nats[1]]
    a, b = (np.array([n[digest] for digest in both]) / np.log(2) for n in nats)
    change = paired_change(a, b, np.array([sizes[digest] for digest in both]), total_bytes=1, vocabulary=2)
    return change.difference, change.low, change.high


def compare_runs(runs: list[Path], report: Path | None) -> dict[str, Any]:
    """Set finished runs that share a start model side by side, on what they held out."""
    records = [read_record(run) for run in runs]
    first = records[0]
    for run, record in zip(runs, records, strict=True):
        if not record.changes:
            raise StageError(f"{run} has not finished", where="compare", hint="finish it with the same train command")
        if record.fingerprints.start_model != first.fingerprints.start_model:
            raise StageError(
                f"{run} and {runs[0]} start from different models",
                where="compare",
                hint="compare their models on text: postgrad compare ... --on FILE",
            )
        if record.model.context_length != first.model.context_length:
            raise StageError(
                f"{run} was scored with {record.model.context_length} tokens of context and {runs[0]} with "
                f"{first.model.context_length}",
                where="compare",
                hint="compare their models on text: postgrad compare ... --on FILE",
            )
        for name in record.changes.keys() & first.changes.keys():
            if record.fingerprints.sets[name] != first.fingerprints.sets[name]:
                raise StageError(f"the held-out set '{name}' of {run} is not that of {runs[0]}", where="compare")
    text = comparison_table(records, arm_names(records)[0]).text()
    asked = comparison_task_table(records)
    text += f"\n\n{asked.text()}" if asked else ""
    found: dict[str, Any] = {
        "arms": [
            {"run": str(run), **{key: r.as_json()[key] for key in ("changes", "totals", "tasks")}}
            for run, r in zip(runs, records, strict=True)
        ],
        "paired": _paired_changes(runs, records),
        "paired_tasks": task_scores.paired_task_changes(runs, records, arm_names(records)),
    }
    budgets = {record.totals.tokens for record in records}
    if max(budgets) > 1.02 * min(budgets):
        text += "\nThe budgets differ: " + ", ".join(
            f"{name} {record.totals.tokens:,} tokens" for name, record in zip(arm_names(records), records, strict=True)
        )
    for item in found["paired"]:
        text += (
            f"\n{item['set']}: {item['arm']} - {item['against']} = {item['difference']:+.4f} nats/token "
            f"({item['low']:+.4f} to {item['high']:+.4f})"
        )
    for item in found["paired_tasks"]:
        text += (
            f"\n{item['task']}: {item['arm']} - {item['against']} = {item['difference']:+.3f} {item['metric']} "
            f"({item['low']:+.3f} to {item['high']:+.3f})"
        )
    if report:
        metrics = [list(read_metrics(run / "metrics.jsonl")) for run in runs]
        title = " and ".join(arm_names(records))
        document.write_page(report, comparison_page.comparison_page(records, metrics, title, arm_names(records)[0]))
        text += f"\n\nreport: {report}\nnext: open it in a browser"
    else:
        text += f"\nnext: {shlex.join(['postgrad', 'compare', *map(str, runs), '--report', 'compare.html'])}"
    return {"text": text, **found.as_json()}


def _paired_changes(runs: list[Path], records: list[Record]) -> list[dict[str, Any]]:
    """Paired differences between each later run's model and the first one's, on the same documents."""
    out: list[dict[str, Any]] = []
    names = arm_names(records)
    first = before_after.read_scores(runs[0] / "scores" / "after.npz")
    for run, record, name in zip(runs[1:], records[1:], names[1:], strict=True):
        other = before_after.read_scores(run / "scores" / "after.npz")
        for held_out in [n for n in first if n in other]:
            change = before_after.loss_change(first[held_out], other[held_out], record.model.vocab_size)
            out.append(
                {
                    "set": held_out,
                    "arm": name,
                    "against": names[0],
                    "difference": change.difference,
                    "low": change.low,
                    "high": change.high,
                }
            )
    return out


def show_lineage(run: Path, report: Path | None, *, cache: Path) -> dict[str, Any]:
    """The chain of stages that led to a run, its R matrix and summary; cells that no run measured are measured now."""
    machine.tune_allocator()
    stages = read_lineage(run)
    known: dict[str, HeldOutSet] = {}

    def missing(row: int, key: str) -> float | None:
        place, record = stages[0] if row == 0 else stages[row - 1]
        if key not in known:
            known.update(_load_stage_sets(stages, key, cache))
        if key not in known:
            return None
        start = _load_first_start(record, cache) if row == 0 else locate_model(str(place), Path.cwd())
        held_out = known[key]
        return score_model(start, [held_out], record.model.context_length, cache)[held_out.name].nats

    found = lineage_matrix(stages, missing)
    text = lineage_table(found).text() + "\n\n" + lineage_summary_table(found).text(max_characters=100)
    if report:
        document.write_page(report, lineage_page.lineage_page(found))
        text += f"\n\nreport: {report}\nnext: open it in a browser"
    else:
        text += f"\nnext: {shlex.join(['postgrad', 'lineage', str(run), '--report', 'lineage.html'])}"
    return {"text": text, **found.as_json()}


def _load_first_start(record: Record, cache: Path) -> ModelLocation:
    """The model that a run started from; one that was made anew is made again when it is gone."""
    if record.model.new_model is None:
        return locate_model(record.model.source, Path(record.stage_folder))
    return resolve_start_model(
        parse_recorded_stage(yaml.safe_load(record.stage_yaml), record.name), Path(record.stage_folder), cache
    )


def _load_stage_sets(stages: list[tuple[Path, Record]], key: str, cache: Path) -> dict[str, HeldOutSet]:
    """The held-out sets of the stage that knows `key`, read again."""
    for _, record in stages:
        if any(set_key(record, name) == key for name in record.changes):
            raw = yaml.safe_load(record.stage_yaml)
            raw["evaluation"]["tasks"] = []  # which may have moved since, and have no column in the matrix
            plan = make_plan(parse_recorded_stage(raw, record.name), Path(record.stage_folder), cache)
            return {f"{h.name}:{h.fingerprint}": h for h in plan.evaluation.sets}
    return {}

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
from postgrad.config.stage_file import parse_stage
from postgrad.data.read.documents import read_labels, source_kind
from postgrad.data.read.examples import RUNNING, Labels
from postgrad.data.read.files import Source
from postgrad.data.tokens.tokenize import build_store
from postgrad.distributed.world import World
from postgrad.errors import ModelError, StageError, nearest
from postgrad.evaluation import before_after
from postgrad.evaluation.held_out import AnyHeldOut
from postgrad.evaluation.perplexity import Scores, score
from postgrad.evaluation.pseudo_perplexity import score_one_by_one
from postgrad.hardware import machine
from postgrad.lineage.record import Record, read_record
from postgrad.lineage.tree import chain, set_key, tree
from postgrad.models.model import model_for
from postgrad.models.pretrained import Start, Task, load_tokenizer, locate
from postgrad.objectives.classification_loss import Problem
from postgrad.plan.held_out_sets import Chosen, as_read, one_by_one
from postgrad.plan.model_inputs import Reading, make_encoder, make_reading
from postgrad.plan.objective_rows import Wording, made_with, objective_for, objectives_for, renderer_for
from postgrad.plan.plan import make_plan
from postgrad.plan.sources import files_of
from postgrad.plan.start_model import start_of
from postgrad.reports.html import document, tables
from postgrad.reports.pages import comparison_page, lineage_page
from postgrad.reports.sections.task_tables import arms_task_table
from postgrad.run import task_scores
from postgrad.stats.forgetting import paired_change
from postgrad.training.metrics_log import read_metrics
from postgrad.tuning.open_model import Sitting, open_model, prefixes_at, start_fingerprint, task_at

_CONTEXT = 1024
_LIMIT = 10_000_000
_CUTS = get_args(s.HeldOutFile.model_fields["documents"].annotation)
_KINDS = {"classify": "labelled", "tag": "tagged"}
"""The rows that a classifier is scored on."""


@dataclass(frozen=True)
class Texts:
    """Files as held-out sets, read as a model reads them."""

    reading: Reading
    chosen: tuple[Chosen, ...]
    sets: tuple[AnyHeldOut, ...]


def files_as_read(
    start: Start,
    files: list[str],
    documents: str,
    column: str | None,
    context: int,
    cache: Path,
    limit: int = _LIMIT,
) -> Texts:
    """Files as held-out sets, read as the model of a start reads them. `limit`: about how many tokens of each file."""
    reading = read_by(start, context)
    found = list(chosen_files(start, files, documents, column, reading, cache))
    sets = [as_read(chosen, reading, limit, [], problem=problem) for chosen, problem in found]
    return Texts(reading, tuple(chosen for chosen, _ in found), tuple(sets))


def chosen_files(
    start: Start, files: list[str], documents: str, column: str | None, reading: Reading, cache: Path
) -> Iterator[tuple[Chosen, Problem]]:
    """The documents of each file, with the objective that a model's own task takes on them, and what a classifier decides.

    Raises `StageError` for a cut that there is not.
    """
    if documents not in _CUTS:
        raise StageError(
            f"there is no cut {documents!r}",
            where="--documents",
            expected=", ".join(_CUTS),
            way_out=nearest(documents, _CUTS),
        )
    objectives = objectives_for([], start)
    if reading.task == "text-to-text":  # which serves rows with answers besides
        objectives += (TextToTextObjective(kind="text-to-text"),)
    decided = _KINDS.get(reading.task)
    taken: set[str] = set()
    for path in files:
        item = s.HeldOutFile.model_validate(
            {**s.held_out_file(path), "documents": documents, "columns": {"text": column} if column else {}}
        )
        name, number = item.name, 2
        while name in taken:
            name, number = f"{item.name}-{number}", number + 1
        taken.add(name)
        asked = {"kind": decided} if decided else {}
        given = files_of(name, {**item.model_dump(), "hub": None, **asked}, Path.cwd(), path)
        kind = source_kind(given)
        objective = objective_for(name, kind, objectives, made_with(start), path).made_for
        labels = _labels(start, reading.task, given) if decided else None
        renderer = renderer_for(objective, kind, reading, Wording(), labels)
        store = build_store(given, reading.encoder, cache, renderer=renderer)
        chosen = Chosen(name, "learned", store, np.arange(len(store)), objective, renderer)
        problem: Problem = labels.problem if labels else "class"  # type: ignore[assignment]
        yield chosen, problem


def _labels(start: Start, task: Task, files: Source) -> Labels:
    """What a classifier decides between, its names as the rows write them."""
    said = Sitting.of(start)
    if said and said.layer:
        names, problem = said.layer.labels, said.layer.problem
    else:
        config: Any = AutoConfig.from_pretrained(start.source)
        names = tuple(config.id2label[i] for i in range(config.num_labels))
        problem = config.problem_type or ("regression" if len(names) == 1 else "single_label_classification")
    if problem == "regression":
        return Labels("number")
    written = {str(name): name for name in read_labels(files).names}
    sort = "tags" if task == "tag" else "multi" if problem == "multi_label_classification" else "class"
    return Labels(sort, tuple(written.get(name, name) for name in names))


def read_by(start: Start, context: int) -> Reading:
    """How the model of a start reads text, outside of any stage."""
    tokenizer = load_tokenizer(start)
    vocabulary = int(AutoConfig.from_pretrained(start.source).vocab_size)
    encoder = make_encoder(tokenizer, vocabulary)
    return make_reading(task_at(start), start, tokenizer, encoder, length=context, seed=0)


def scores_of(
    start: Start, sets: Sequence[before_after.Named], context: int, cache: Path, by: Callable[..., Scores] = score
) -> dict[str, Scores]:
    """What the model of a start scores on sets; from the cache when it was scored before."""
    device = machine.device()
    identity = start_fingerprint(start)
    opened = open_model(start)
    model = model_for(opened.model, opened.task).to(device)
    return before_after.measure(model, sets, by, context=context, world=World(device), identity=identity, cache=cache)


def context_of(start: Start, asked: int | None) -> int:
    """Tokens that a model sees at once: as many as asked, or its own limit, at most 1,024."""
    limit = getattr(AutoConfig.from_pretrained(start.source), "max_position_embeddings", None) or _CONTEXT
    if asked is not None and not 2 <= asked <= limit:
        raise ModelError(f"a context of {asked} does not fit {start.name}", where="--context", expected=f"2 to {limit}")
    return asked or min(limit, _CONTEXT)


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
    start = locate(model, Path.cwd(), base)
    used = context_of(start, context)
    texts = files_as_read(start, files, documents, column, used, cache)
    found = scores_of(start, texts.sets, used, cache)
    summaries = {name: scores.summary() for name, scores in found.items()}
    for name, scores in _one_by_one(start, texts, pseudo, used, cache).items():
        summaries[name]["pseudo"] = scores.summary()
    scored = "every token scored once"
    if prefixes_at(start):
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
    writes = task_at(start) in ("causal", "text-to-text")
    following = ["generate", model] if writes else ["export", model, "exported"]
    lines.append(f"next: {shlex.join(['postgrad', *following])}")
    return {"text": "\n".join(lines), "model": model, "context": used, "sets": summaries}


def _one_by_one(start: Start, texts: Texts, tokens: int, context: int, cache: Path) -> dict[str, Scores]:
    """The scores of texts of which every token is masked in turn."""
    if not tokens:
        return {}
    if tokens < 0 or texts.reading.task != "masked":
        raise StageError(
            f"{start.name} fills in no masks" if tokens > 0 else f"{tokens} is no number of tokens",
            where="--pseudo",
            expected="a masked language model, and 1 or more tokens",
        )
    running = [chosen for chosen in texts.chosen if chosen.store.kind in RUNNING]
    sets = [one_by_one(chosen, texts.reading, tokens) for chosen in running]
    return scores_of(start, sets, context, cache, score_one_by_one)


def compare_models(models: list[str], files: list[str], *, cache: Path) -> dict[str, Any]:
    """Score several models on the same text; each is held against the first, document by document."""
    if len(models) < 2:
        raise StageError("one model has nothing to be compared with", where="compare", expected="two or more models")
    machine.tune_allocator()
    starts = [locate(m, Path.cwd()) for m in models]
    if len({prefixes_at(start) for start in starts}) > 1:
        raise StageError(
            "some of these models read a prompt in both directions and others do not: they are scored on other tokens",
            where="compare",
            expected="models that read alike",
            way_out="compare runs of one start model, whose stages scored it as they read",
        )
    context = min(context_of(start, None) for start in starts)
    texts = [files_as_read(start, files, "auto", None, context, cache) for start in starts]
    found = [scores_of(start, t.sets, context, cache) for start, t in zip(starts, texts, strict=True)]
    own = texts[0].sets
    names = [h.name for h in own]
    rows: list[dict[str, Any]] = []
    lines = [f"each model held against {models[0]}, document by document"]
    for name in names:
        lines.append(f"\n{name}")
        lines.append(f"  {'model':<32} {'nats/token':>10} {'bits/byte':>10}   change (95 % interval)")
        first = found[0][name]
        for model, scores, read in zip(models, found, texts, strict=True):
            sets, vocabulary = read.sets, read.reading.encoder.vocabulary
            summary = scores[name].summary()
            row: dict[str, Any] = {"model": model, "set": name, **summary, "change": None}
            line = f"  {model:<32} {summary['nats']:>10.4f} {summary['bits_per_byte']:>10.4f}"
            same = [h.fingerprint for h in sets] == [h.fingerprint for h in own]
            if scores is not found[0]:
                if same:
                    change = before_after.change(first, scores[name], vocabulary)
                    row["change"] = asdict(change)
                    line += f"   {change.difference:+.4f} nats/token ({change.low:+.4f} to {change.high:+.4f})"
                else:
                    held = next(h for h in sets if h.name == name), next(h for h in own if h.name == name)
                    found_change = _by_bytes(first, scores[name], held[::-1])
                    row["change"] = {"bits_per_byte": found_change}
                    line += (
                        f"   {found_change[0]:+.4f} bits/byte ({found_change[1]:+.4f} to {found_change[2]:+.4f}); "
                        "another tokenizer"
                    )
            lines.append(line)
            rows.append(row)
    lines.append(f"next: {shlex.join(['postgrad', 'generate', models[0], '--beside', models[1]])}")
    return {"text": "\n".join(lines), "context": context, "rows": rows}


def _by_bytes(before: Scores, after: Scores, sets: tuple[AnyHeldOut, AnyHeldOut]) -> tuple[float, float, float]:
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
        if not record.get("changes"):
            raise StageError(
                f"{run} has not finished", where="compare", way_out="finish it with the same train command"
            )
        if record["fingerprints"]["start_model"] != first["fingerprints"]["start_model"]:
            raise StageError(
                f"{run} and {runs[0]} start from different models",
                where="compare",
                way_out="compare their models on text: postgrad compare ... --on FILE",
            )
        if record["model"]["context"] != first["model"]["context"]:
            raise StageError(
                f"{run} was scored with {record['model']['context']} tokens of context and {runs[0]} with "
                f"{first['model']['context']}",
                where="compare",
                way_out="compare their models on text: postgrad compare ... --on FILE",
            )
        for name in record["changes"].keys() & first["changes"].keys():
            if record["fingerprints"]["sets"][name] != first["fingerprints"]["sets"][name]:
                raise StageError(f"the held-out set '{name}' of {run} is not that of {runs[0]}", where="compare")
    text = tables.arms_table(records, tables.arm_names(records)[0]).text()
    asked = arms_task_table(records)
    text += f"\n\n{asked.text()}" if asked else ""
    found: dict[str, Any] = {
        "arms": [
            {"run": str(run), "changes": r["changes"], "achieved": r["achieved"], "tasks": r.get("tasks", [])}
            for run, r in zip(runs, records, strict=True)
        ],
        "paired": _between(runs, records),
        "paired_tasks": task_scores.between(runs, records, tables.arm_names(records)),
    }
    budgets = {record["achieved"]["tokens"] for record in records}
    if max(budgets) > 1.02 * min(budgets):
        text += "\nThe budgets differ: " + ", ".join(
            f"{name} {record['achieved']['tokens']:,} tokens"
            for name, record in zip(tables.arm_names(records), records, strict=True)
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
        title = " and ".join(tables.arm_names(records))
        document.write(report, comparison_page.comparison_page(records, metrics, title, tables.arm_names(records)[0]))
        text += f"\n\nreport: {report}\nnext: open it in a browser"
    else:
        text += f"\nnext: {shlex.join(['postgrad', 'compare', *map(str, runs), '--report', 'compare.html'])}"
    return {"text": text, **found}


def _between(runs: list[Path], records: list[Record]) -> list[dict[str, Any]]:
    """Paired differences between each later run's model and the first one's, on the same documents."""
    out: list[dict[str, Any]] = []
    names = tables.arm_names(records)
    first = before_after.read_scores(runs[0] / "scores" / "after.npz")
    for run, record, name in zip(runs[1:], records[1:], names[1:], strict=True):
        other = before_after.read_scores(run / "scores" / "after.npz")
        for held_out in [n for n in first if n in other]:
            change = before_after.change(first[held_out], other[held_out], record["model"]["vocabulary"])
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
    stages = chain(run)
    known: dict[str, AnyHeldOut] = {}

    def missing(row: int, key: str) -> float | None:
        place, record = stages[0] if row == 0 else stages[row - 1]
        if key not in known:
            known.update(_sets_of(stages, key, cache))
        if key not in known:
            return None
        start = _first(record, cache) if row == 0 else locate(str(place), Path.cwd())
        held_out = known[key]
        return scores_of(start, [held_out], record["model"]["context"], cache)[held_out.name].nats

    found = tree(stages, missing)
    text = tables.lineage_table(found).text() + "\n\n" + tables.summary_table(found).text(most=100)
    if report:
        document.write(report, lineage_page.lineage_page(found))
        text += f"\n\nreport: {report}\nnext: open it in a browser"
    else:
        text += f"\nnext: {shlex.join(['postgrad', 'lineage', str(run), '--report', 'lineage.html'])}"
    return {"text": text, **found}


def _first(record: Record, cache: Path) -> Start:
    """The model that a run started from; one that was made anew is made again when it is gone."""
    if "fresh" not in record["model"]:
        return locate(record["model"]["source"], Path(record["root"]))
    return start_of(parse_stage(yaml.safe_load(record["stage_yaml"]), record["name"]), Path(record["root"]), cache)


def _sets_of(stages: list[tuple[Path, Record]], key: str, cache: Path) -> dict[str, AnyHeldOut]:
    """The held-out sets of the stage that knows `key`, read again."""
    for _, record in stages:
        if any(set_key(record, name) == key for name in record.get("changes", {})):
            raw = yaml.safe_load(record["stage_yaml"])
            raw["evaluation"]["tasks"] = []  # which may have moved since, and have no column in the matrix
            plan = make_plan(parse_stage(raw, record["name"]), Path(record["root"]), cache)
            return {f"{h.name}:{h.fingerprint}": h for h in plan.held_out}
    return {}

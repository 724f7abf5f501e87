"""The model card of a run's model: `README.md` with the front matter that the Hugging Face Hub reads."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from postgrad.config.stage_file import dump_stage, parse_recorded_stage
from postgrad.errors import StageError
from postgrad.foreign_text import mask_secrets, multiline_text, plain_text
from postgrad.lineage.record import MetricValue, Record
from postgrad.lineage.tree import read_ancestors
from postgrad.reports.html.notation import (
    escape_markdown,
    finite,
    format_compact,
    format_count,
    format_duration,
    format_percent,
)
from postgrad.reports.html.table import Column, Table, count_cell, share_cell, text_cell, value_cell
from postgrad.reports.sections.ability_section import ability_table, gate_sentence
from postgrad.reports.sections.held_out_tables import metrics_table, pseudo_perplexity_table, score_table, set_names
from postgrad.reports.sections.task_section import task_table
from postgrad.storage.atomic import write_without_secrets

CARD = "README.md"
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_PIPELINES = {
    "causal": "text-generation",
    "text-to-text": "text2text-generation",
    "masked": "fill-mask",
    "classify": "text-classification",
    "tag": "token-classification",
}
_MAX_YAML_CHARACTERS = 20_000


@dataclass(frozen=True)
class CardOptions:
    """What a card says that the record does not."""

    library: str = "transformers"
    """What loads the folder: transformers, peft or postgrad."""
    license: str | None = None
    """Default: the card names no license."""


def write_model_card(folder: Path, run_folder: Path, record: Record, license_name: str | None = None) -> bool:
    """Write the card of a run's model into its folder; False, and nothing written, where there is a card already."""
    if (folder / CARD).exists() or not folder.is_dir():
        return False
    card = model_card(record, read_ancestors(run_folder, record), card_options(folder, license_name))
    write_without_secrets(folder / CARD, card)
    return True


def card_options(folder: Path, license_name: str | None) -> CardOptions:
    """The library that loads a model's folder, and the license."""
    has_peft, has_config = ((folder / name).exists() for name in ("adapter_config.json", "config.json"))
    return CardOptions("peft" if has_peft else "transformers" if has_config else "postgrad", license_name)


def model_card(record: Record, ancestors: Sequence[Record] = (), options: CardOptions = CardOptions()) -> str:
    """The whole card. `ancestors`: the records of the earlier stages, the first one first."""
    front = _front_matter(record, ancestors, options)
    text = yaml.safe_dump(front, sort_keys=False, allow_unicode=True, width=10**6)
    return f"---\n{text}---\n\n{card_body(record, ancestors)}"


def card_body(record: Record, ancestors: Sequence[Record] = ()) -> str:
    """The card without its front matter."""
    name = escape_markdown(record.name, 120)
    start = escape_markdown(mask_secrets(_start_name((*ancestors, record)[0])), 200)
    tokens = format_compact(record.published_tokens)
    tables = (
        score_table(record, brief=True),
        metrics_table(record),
        pseudo_perplexity_table(record, brief=True),
        task_table(record, brief=True),
        ability_table(record, brief=True),
    )
    parts = [
        f"# {name}",
        f"{start}, trained further on {tokens} tokens with postgrad"
        f"{f' in {len(ancestors) + 1} stages' if ancestors else ''}. Every change below is measured on held-out text, on the"
        " same documents before and after this stage, with 95 % intervals (paired bootstrap).",
        "## Learned and kept",
        *_gate_sentences(record),
        *(table.markdown() for table in tables if table and table.rows),
        "## Training data",
        _source_table(record).markdown(),
        "## Training",
        *_training_lines(record),
        *(("## Lineage", _lineage_list(record, ancestors)) if ancestors or record.parents else ()),
        "## How to reproduce",
        *_reproduction(record),
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(record: Record, ancestors: Sequence[Record], options: CardOptions) -> dict[str, Any]:
    first, is_adapter = (*ancestors, record)[0], options.library != "transformers"
    front: dict[str, Any] = {}
    if options.license:
        front["license"] = plain_text(options.license, 100)
    front["library_name"] = options.library
    if first.model.new_model is None and _is_hub_name(first):
        front["base_model"] = first.model.start_model
        front["base_model_relation"] = "adapter" if is_adapter else "finetune"
    if data_sets := sorted({str(name) for name in _hub_data_sets(record)}):
        front["datasets"] = data_sets
    if pipeline := _PIPELINES.get(record.model.task):
        front["pipeline_tag"] = pipeline
    front["tags"] = [
        "postgrad",
        "continual-learning",
        *([plain_text(_tuning(record), 40)] if _tuning(record) != "full" else []),
    ]
    results = [result for name in set_names(record) if (result := _set_result(record, name))]
    if results:
        front["model-index"] = [{"name": plain_text(record.name, 120), "results": results}]
    return front


def _set_result(record: Record, name: str) -> dict[str, Any] | None:
    """The scores of a held-out set as an entry of a model index."""
    score = record.scores.after.get(name)
    if score is None:
        return None
    metrics = [("loss", MetricValue(value=score.nats, low=score.low, high=score.high))]
    metrics += [(key, MetricValue(value=value)) for key, value in _plain_scores(record, name)]
    if change := record.changes.get(name):
        label = "change of the loss, after minus before"
        metrics.append((label, MetricValue(value=change.difference, low=change.low, high=change.high)))
    metrics += list(score.metrics.items())
    role = record.changes[name].role if name in record.changes else ""
    return {
        "task": {"type": _PIPELINES.get(record.model.task, "other")},
        "dataset": {"name": plain_text(f"{name} ({role})" if role else name, 120), "type": "held-out"},
        "metrics": [
            {"type": plain_text(key, 60), "value": round(value.value, 6), "name": _interval_name(key, value)}
            for key, value in metrics
            if finite(value.value) is not None and value.value is not None
        ],
    }


def _plain_scores(record: Record, name: str) -> Iterator[tuple[str, float]]:
    score = record.scores.after[name]
    for key, value in (("perplexity", score.perplexity), ("bits_per_byte", score.bits_per_byte)):
        if value is not None:
            yield key, value


def _interval_name(key: str, value: MetricValue) -> str:
    known = value.low is not None and value.high is not None
    return f"{plain_text(key, 60)} (95 % {value.low:.4g} to {value.high:.4g})" if known else plain_text(key, 60)


def _gate_sentences(record: Record) -> list[str]:
    sentences = []
    if gate := record.retention_gate:
        word = "passed" if gate.passed else "**failed**"
        sentences.append(
            f"The retention gate {word}: the loss on {escape_markdown(gate.worst.set, 80)} changed by "
            f"{format_percent(gate.worst.relative_difference)} (upper end {format_percent(gate.worst.relative_high)}); "
            f"{format_percent(gate.max_forgetting)} was allowed."
        )
    if record.abilities and (bound := record.abilities.gate):
        word = "passed" if bound.passed else "**failed**"
        sentences.append(f"The gate on abilities {word}: {gate_sentence(bound)}.")
    return sentences


def _source_table(record: Record) -> Table:
    generated = {source.name: source.generated_by for source in record.plan.sources}
    rows = tuple(
        (
            text_cell(source.name),
            text_cell(f"{source.role}, generated" if generated.get(source.name) else source.role),
            share_cell(source.share),
            count_cell(source.trained_tokens),
            value_cell(source.passes, 2),
        )
        for source in record.totals.sources
    )
    columns = (Column("source", is_text=True), Column("role", is_text=True), Column("share"), Column("tokens"))
    return Table("Sources and their shares of the trained tokens", (*columns, Column("passes")), rows)


def _training_lines(record: Record) -> list[str]:
    model, totals, stage = record.model, record.totals, record.stage
    facts = [
        ("tuning", _tuning(record)),
        ("parameters", format_compact(model.parameters)),
        ("trained parameters", format_compact(model.trainable)),
        ("steps", format_count(totals.steps)),
        ("tokens per row", format_count(record.plan.sequence_length)),
        ("rows per step", format_count(stage.get("batch", {}).get("global_batch_size"))),
        ("schedule", " ".join(f"{key} {value}" for key, value in stage.get("schedule", {}).items())),
        ("seed", str(stage.get("seed", 0))),
        ("precision", record.execution.dtype),
        ("time", format_duration(totals.seconds)),
    ]
    return ["\n".join(f"- {key}: {escape_markdown(value, 200)}" for key, value in facts if value)]


def _lineage_list(record: Record, ancestors: Sequence[Record]) -> str:
    lines = [escape_markdown(mask_secrets(_start_name((*ancestors, record)[0])), 200)]
    if not ancestors:
        lines += [escape_markdown(parent.name, 120) for parent in record.parents]
    lines += [f"{escape_markdown(each.name, 120)}, {format_count(each.published_tokens)} tokens" for each in ancestors]
    lines.append(f"{escape_markdown(record.name, 120)}, {format_count(record.published_tokens)} tokens (this model)")
    return "\n".join(f"{number}. {line}" for number, line in enumerate(lines, 1))


def _reproduction(record: Record) -> list[str]:
    versions = ", ".join(f"{name} {version}" for name, version in record.versions.items())
    prints = {"start model": record.fingerprints.start_model, "model": record.fingerprints.model}
    lines = [f"- {key} (sha256): `{value[:16]}`" for key, value in prints.items() if value and value.isalnum()]
    yaml_text = multiline_text(
        mask_secrets(_stage_text(record)).replace(os.path.expanduser("~"), "~"), _MAX_YAML_CHARACTERS
    )
    fence = "`" * max([3, *(len(run) + 1 for run in re.findall(r"`+", yaml_text))])
    return [
        "With the same start model, data and versions, this stage gives the same weights:",
        f"{fence}yaml\n{yaml_text.rstrip()}\n{fence}",
        "\n".join([f"- versions: {escape_markdown(versions, 400)}", *lines]),
    ]


def _stage_text(record: Record) -> str:
    """The stage without defaults and trackers; as it was recorded, where this version does not read it."""
    try:
        stage = parse_recorded_stage(record.stage, record.name)
    except StageError:
        return record.stage_yaml
    return dump_stage(stage.model_dump(mode="json", exclude_defaults=True, exclude={"track", "output"}))


def _tuning(record: Record) -> str:
    return str(record.stage.get("tuning", {}).get("kind") or "full")


def _start_name(first: Record) -> str:
    """The model at the beginning of a lineage; a folder by its name, which says nothing of this machine."""
    if first.model.new_model:
        return "A new model with random weights"
    return first.model.start_model if _is_hub_name(first) else Path(first.model.start_model).name


def _is_hub_name(first: Record) -> bool:
    """Whether a stage started from a model of the Hub: its source is then no path."""
    model = first.model
    return model.source == model.start_model and bool(_HUB_NAME.fullmatch(model.start_model))


def _hub_data_sets(record: Record) -> Iterator[object]:
    for source in record.consumed.values():
        if _HUB_NAME.fullmatch(str(source.origin.get("hub") or "")):
            yield source.origin["hub"]

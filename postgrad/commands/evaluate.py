"""Score any language model or classifier on files of text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from postgrad.commands.results import Result, TextScore, summarize_scores
from postgrad.commands.score_files import FileSets, context_length, load_file_sets, score_model
from postgrad.data.read.row_kinds import RUNNING_TEXT_KINDS
from postgrad.errors import StageError
from postgrad.evaluation.perplexity import Scores
from postgrad.evaluation.pseudo_perplexity import score_masked_tokens
from postgrad.hardware import machine
from postgrad.hardware.memory import memory_errors
from postgrad.lineage.record import Interval
from postgrad.models.location import ModelLocation, locate_model
from postgrad.models.task import Task
from postgrad.plan.held_out_sets import make_masked_held_out_text
from postgrad.reports.html.table import Column, Table, count_cell, interval_cell, text_cell, value_cell
from postgrad.reports.notebook import tables_html
from postgrad.storage.cache_folder import cache_folder
from postgrad.tuning.open_model import get_task, starts_as_prefix_lm


@dataclass(frozen=True)
class TextEvaluation(Result):
    """A model's scores on texts."""

    model: str
    context: int
    """Tokens that the model reads at once."""
    sets: Mapping[str, TextScore]
    """The scores by the name of each file."""
    task: Task
    is_prefix_lm: bool
    """Whether a prefix of each text is read in both directions; only the tokens after it are scored."""

    def _repr_html_(self) -> str:
        columns = (
            Column("text", is_text=True), Column("loss (95 %)", "nats per token"), Column("perplexity"),
            Column("bits per byte"), Column("tokens"), Column("documents"),
        )  # fmt: skip
        rows = tuple(
            (
                text_cell(name),
                interval_cell(Interval(value=score.nats, low=score.low, high=score.high), 4),
                value_cell(score.perplexity, 2),
                value_cell(score.bits_per_byte, 4),
                count_cell(score.tokens),
                count_cell(score.documents),
            )
            for name, score in self.sets.items()
        )
        return tables_html(Table(f"Loss of {self.model}", columns, rows))


@memory_errors("eval", "a smaller --context")
def evaluate(
    model: str,
    files: Sequence[str],
    *,
    context: int | None = None,
    document_unit: str = "auto",
    column: str | None = None,
    base: str | None = None,
    pseudo: int = 0,
    cache: Path | None = None,
) -> TextEvaluation:
    """Score a model on files: nats per token, perplexity, bits per byte, each with its 95 % interval.

    `context`: tokens the model reads at once. Default: its own limit, up to 1,024. `document_unit`: auto, file, passages,
    paragraphs or lines. `column`: the column that holds the text. `base`: the base model of an adapter's folder, if it has
    moved. `pseudo`: of a masked language model, about how many tokens of each text are masked one at a time.

    Raises `ModelError`, `DataError`, or `StageError` for `pseudo` of a model that is no masked language model.
    """
    machine.tune_allocator()
    cache = cache or cache_folder()
    start = locate_model(str(model), Path.cwd(), base)
    length = context_length(start, context)
    texts = load_file_sets(start, list(map(str, files)), document_unit, column, length, cache)
    scores = score_model(start, texts.sets, length, cache)
    masked = _pseudo_scores(start, texts, pseudo, length, cache)
    sets = {name: summarize_scores(score, masked.get(name)) for name, score in scores.items()}
    return TextEvaluation(str(model), length, sets, get_task(start), starts_as_prefix_lm(start))


def _pseudo_scores(start: ModelLocation, texts: FileSets, tokens: int, context: int, cache: Path) -> dict[str, Scores]:
    """Scores of texts whose tokens are masked one at a time."""
    if not tokens:
        return {}
    if tokens < 0 or texts.model_inputs.task != Task.MASKED:
        raise StageError(
            f"{start.name} is not a masked language model" if tokens > 0 else f"cannot mask {tokens} tokens",
            where="--pseudo",
            expected="a masked language model, and 1 or more tokens",
        )
    running = [chosen for chosen in texts.documents if chosen.store.kind in RUNNING_TEXT_KINDS]
    sets = [make_masked_held_out_text(chosen, texts.model_inputs, tokens) for chosen in running]
    return score_model(start, sets, context, cache, score_masked_tokens)

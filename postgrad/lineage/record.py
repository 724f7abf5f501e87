"""The record of a run: `record.json` as one typed, versioned document.

`Record` lists every field. `docs/record.schema.json` is its JSON Schema. Losses are nats per token (per label for a
classifier); shares and relative differences are fractions (0.05 is 5 %). Unknown fields are ignored, and records of the
previous format are converted on reading.
"""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Iterable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError

from postgrad.errors import StageError, suggest_path
from postgrad.lineage.previous_format import PREVIOUS_FORMAT, upgrade_record
from postgrad.storage.checked_files import read_cached_json, read_checked_json, write_checked_json

RECORD = "record.json"
STAGE = "stage.yaml"
PLAN = "plan.json"
LOCK = "lock"
FORMAT = 2

_DAMAGED_HINT = "the file is damaged, or postgrad did not write it: train the stage again"
_DAMAGED_RECORD_HINT = "delete it and repeat the `postgrad train` command, which scores the model and writes it again"

Status = Literal["running", "stopped", "finished", "gate-failed"]
Document = TypeVar("Document", bound="RecordPart")


class RecordPart(BaseModel):
    """A part of a record or of another file of a run. Absent optional fields read as their default."""

    model_config = ConfigDict(extra="ignore", use_attribute_docstrings=True, protected_namespaces=())

    def as_json(self) -> dict[str, Any]:
        """JSON-compatible data without the fields that are None."""
        return self.model_dump(mode="json", exclude_none=True)


def _check_path_part(name: Any) -> Any:
    if not isinstance(name, str) or "/" in name or "\0" in name or name in (".", ".."):
        raise ValueError(f"{name!r} is no name")
    return name


def _check_time(time: str) -> str:
    try:
        dt.datetime.fromisoformat(time).timestamp()
    except OverflowError as error:
        raise ValueError(str(error)) from None
    return time


def _check_sections(stage: dict[str, Any]) -> dict[str, Any]:
    """A stage with a name that is no path, and with mappings for the sections that pages read."""
    _check_path_part(stage.get("name", ""))
    for name in ("tuning", "batch", "optimizer", "schedule"):
        if not isinstance(stage.get(name, {}), dict):
            raise ValueError(f"`{name}` is no mapping")
    return stage


RunId = Annotated[str, AfterValidator(_check_path_part)]
"""It is in the names of files that trackers write."""
Time = Annotated[str, AfterValidator(_check_time)]
"""In the form of ISO 8601."""
RecordedStage = Annotated[dict[str, Any], AfterValidator(_check_sections)]
"""A stage as resolved."""


def notebook_html(function: str, document: RecordPart) -> str:
    """What a notebook shows of a document; the function is named and not imported, since it belongs to a layer above."""
    return getattr(import_module("postgrad.reports.notebook"), function)(document)


class Interval(RecordPart):
    """An estimate with its 95 % bootstrap interval."""

    value: float
    low: float | None = None
    """Null where there is one unit, such as a single document: it has no interval."""
    high: float | None = None


# --- inputs ---------------------------------------------------------------------------------------------------------------


class NewModel(RecordPart):
    """The recipe of a randomly initialized start model."""

    requested: dict[str, Any] = {}
    """`model.from_scratch` of the stage file."""
    weights: int | None = None
    """Number of weights."""
    tokenizer: str | None = None
    vocab_size: int | None = None
    seed: int | None = None
    config: dict[str, Any] = {}
    """The transformers configuration."""


class ModelSummary(RecordPart):
    """The start model, and how much of it was trained."""

    start_model: str
    """As written in the stage file."""
    source: str = ""
    """The resolved folder or hub name."""
    parameters: int | None = None
    trainable: int | None = None
    """Trainable parameters, those of the tuning included."""
    task: str = "causal"
    vocab_size: int = 0
    context_length: int = 0
    """Tokens per row."""
    new_model: NewModel | None = None


class Fingerprints(RecordPart):
    """Content hashes of everything that determines the run, and of the published model."""

    model_config = ConfigDict(extra="allow")

    stage: str | None = None
    data: dict[str, str] = {}
    """By source."""
    sets: dict[str, str] = {}
    """By held-out set."""
    start_model: str | None = None
    model: str | None = None
    """The published model."""

    def all(self) -> dict[str, Any]:
        """Every fingerprint, those of optional inputs (tasks, teachers, penalties) included."""
        return self.as_json()


class Parent(RecordPart):
    """The run whose model this run started from."""

    path: str
    relative: str = ""
    """Path relative to this run's folder, for folders that moved together."""
    name: str = ""
    id: str | None = None
    step: int | None = None
    """The parent's checkpoint; null for its published model."""
    trained_tokens: int | None = None
    """Trained tokens at that checkpoint."""
    fingerprint: str = ""


class DocumentCounts(RecordPart):
    documents: int
    tokens: int


class DocumentPreview(RecordPart):
    """The beginning of a document, with its score."""

    text: str
    value: float | None = None
    duplicate_of: str | None = None
    """The beginning of the document it duplicates."""


class ScoreHistogram(RecordPart):
    """Documents per score bin."""

    bin_edges: list[float]
    kept: list[int]
    dropped: list[int]


class DocumentSelection(RecordPart):
    """One document filter applied to a source."""

    kind: str
    description: str = ""
    before: DocumentCounts
    after: DocumentCounts
    unit: str = ""
    """Unit of the scores; empty when documents are not scored."""
    score_bounds: list[float] | None = None
    """Lowest and highest score that is kept."""
    unscored: int = 0
    """Documents that are too short to be scored."""
    score_histogram: ScoreHistogram | None = None
    kept: list[DocumentPreview] = []
    dropped: list[DocumentPreview] = []


class PlannedSource(RecordPart):
    """A training source as planned."""

    name: str
    role: str = "new"
    requested_share: float | None = None
    share: float = 0.0
    """Share of the trained tokens, after rounding to whole rows."""
    rows: int = 0
    trained_tokens: int = 0
    passes: float = 0.0
    available_tokens: int | None = None
    documents: int | None = None
    kind: str = ""
    """Row format."""
    generated_by: str | None = None
    """The model that generated the texts."""
    selection: list[DocumentSelection] = []


class PlanSummary(RecordPart):
    """The plan in numbers."""

    steps: int
    rows: int = 0
    sequence_length: int = 0
    tokens: int
    """Trained tokens."""
    sources: list[PlannedSource] = []


class ExecutionSummary(RecordPart):
    """How the training was computed, and why."""

    model_config = ConfigDict(extra="allow")

    packed: bool = True
    """Whether the documents of a packed row went through the model together."""
    dtype: str = ""
    compile: bool = False
    attention: str = ""
    threads: int = 0
    reasons: dict[str, str] = {}
    """By setting."""


class TokenLedger(RecordPart):
    """Where every token of a source went: read = held_out + dropped + truncated + placed."""

    read: int = 0
    held_out: int = 0
    dropped: int = 0
    truncated: int = 0
    placed: int = 0
    padding: int = 0
    trained: int = 0
    context: int = 0
    """Tokens read without being trained on."""


class Contamination(RecordPart):
    """Overlap of a held-out set with the training text (13-grams)."""

    documents: int
    duplicates: int = 0
    any_overlap: int = 0
    """Documents that share a 13-gram."""
    half_overlap: int = 0
    """Documents that share at least half of their 13-grams."""


class HeldOutSummary(RecordPart):
    name: str
    role: str
    documents: int
    fingerprint: str


class ConsumedSource(RecordPart):
    """A source that the model has consumed, in this run or an earlier one."""

    name: str
    tokens: int
    origin: dict[str, Any] = {}
    """Where the source comes from, in the keys of a stage file."""


# --- results --------------------------------------------------------------------------------------------------------------


class SourceLoss(RecordPart):
    """How the training loss of a source moved, nats per trained token."""

    first_tenth: float
    last_tenth: float
    change: float
    low: float | None = None
    high: float | None = None
    change_per_million_tokens: float | None = None
    share_of_loss: float
    """Share of the summed training loss."""


class TrainedSource(RecordPart):
    """A training source as trained."""

    name: str
    role: str = "new"
    share: float = 0.0
    trained_tokens: int = 0
    rows: int = 0
    passes: float = 0.0
    loss: SourceLoss | None = None


class SkippedRow(RecordPart):
    """A training row, by its number (from 0) in its source."""

    source: str
    row: int


class SkippedStep(RecordPart):
    """A step that changed no weight, since its loss or gradient was not finite."""

    step: int
    tokens: int = 0
    """Tokens of its rows, which do not count as trained."""
    loss: float | None = None
    """Nats per token; None when it was not finite."""
    grad_norm: float | None = None
    """None when it was not finite."""
    rows: list[SkippedRow] = []
    """The rows whose own loss was not finite; without any, all rows of the step."""

    def list_rows(self, most: int = 4) -> str:
        """The first rows, as text: `new row 17, new row 40 and 6 more`."""
        names = ", ".join(f"{row.source} row {row.row}" for row in self.rows[:most])
        more = len(self.rows) - most
        return f"{names} and {more} more" if more > 0 else names


class TrainingTotals(RecordPart):
    """What the training consumed up to its last step."""

    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    tokens_per_second: float = 0.0
    metrics_lines: int | None = None
    """Lines of `metrics.jsonl`."""
    sources: list[TrainedSource] = []
    skipped_steps: list[SkippedStep] = []
    """Counted in `steps`, but not in `tokens`."""
    padding_share: float | None = None
    """Padding among the positions of unpacked rows; none for packed ones."""
    sampled_prompts: int | None = None
    """Of on-policy replay: the prompts that the model answered ..."""
    accepted_answers: int | None = None
    """... and those with an answer that was trained on."""


class PublishedCheckpoint(RecordPart):
    """The published step, and the rule that selected it (`save.choose`)."""

    set: str
    metric: str
    patience: int | None = None
    min_delta: float = 0.0
    stop_at: float | None = None
    first_step: int = 1
    """The first step that could be selected."""
    max_forgetting: float | None = None
    step: int
    trained_tokens: int
    value: float
    relative_high: float | None = None
    """Largest relative rise of a retained set's loss, upper end."""
    last_step: int
    evaluations: int
    """Candidate evaluations."""
    evaluations_since_best: int
    stopped_early: bool
    within_max_forgetting: bool


class MetricValue(RecordPart):
    """A metric with its 95 % interval."""

    value: float | None = None
    low: float | None = None
    high: float | None = None
    values_by_seed: list[float] | None = None
    """By prompt seed."""
    std: float | None = None
    """Standard deviation between prompt seeds."""


class ClassRecord(RecordPart):
    """How well a classifier tells one class from the others: scikit-learn's `precision_recall_fscore_support`."""

    name: str
    precision: float
    """The share of the predictions of this class that are right; 0 where there are none."""
    recall: float
    """The share of the items of this class that are found; 0 where there are none."""
    f1: float
    support: int
    """Items of this class."""
    predicted: int
    """Items that are taken for this class."""


class UnknownTokens(RecordPart):
    """Tokens of text that the vocabulary lacks, which no other figure of a set counts."""

    tokens: int
    share: float
    """Of all tokens of the set."""
    nats: float
    """Nats per unknown token: how well the model tells that such text is there."""


class SetScore(RecordPart):
    """One model's loss on a held-out set."""

    nats: float
    low: float | None = None
    high: float | None = None
    perplexity: float | None = None
    bits_per_byte: float | None = None
    tokens: int | None = None
    bytes: int | None = None
    documents: int | None = None
    metrics: dict[str, MetricValue] = {}
    """Of a classifier."""
    classes: list[ClassRecord] = []
    """Of a classifier: class by class."""
    unknown: UnknownTokens | None = None
    """Null where there are none."""
    confusion: list[list[int]] = []
    """Of a classifier of up to 50 classes: how often each class (row) is taken for each class (column), in the order of
    `classes`."""


class ScoresRecord(RecordPart):
    """Scores by held-out set, before and after."""

    before: dict[str, SetScore] = {}
    after: dict[str, SetScore] = {}


class Difference(RecordPart):
    """After minus before on the same items, with its 95 % interval (paired bootstrap)."""

    difference: float | None = None
    low: float | None = None
    high: float | None = None
    verdict: str | None = None
    """learnt, kept, forgot or no evidence."""


class SetChange(Difference):
    """The change of the loss on a held-out set."""

    role: str = ""
    """retained, learned or test."""
    relative_difference: float | None = None
    """Difference / loss before."""
    relative_high: float | None = None
    """Without an interval, the relative difference."""
    share_of_range: float | None = None
    """Difference / (uniform loss - loss before)."""
    bits_per_byte_difference: float | None = None
    units: str | None = None
    """What the bootstrap resamples: documents or windows."""
    unit_count: int | None = None
    metric: str | None = None
    """Of a classifier: the chance-corrected metric that the verdict is of. Null: the verdict is of the loss."""
    metric_change: Difference | None = None
    """The change of that metric."""


class ExpectedLossRecord(Interval):
    """A loss that short runs predicted, with its 95 % interval, and what was measured; nats per token."""

    measured: float
    inside: bool
    """The measured loss is in the interval."""


class BeforeAfter(RecordPart):
    """Scores on the held-out sets and their changes."""

    scores: ScoresRecord = ScoresRecord()
    changes: dict[str, SetChange] = {}


class ChangedWeights(RecordPart):
    """How many weights differ from the start model's."""

    count: int
    total: int


class SetDrift(RecordPart):
    """How the predictions on a held-out set moved."""

    role: str = ""
    tokens: int = 0
    documents: int = 0
    kl_divergence: Interval
    """KL(before || after), nats per token."""
    base_cross_entropy: Interval
    """Cross-entropy of the trained model under the start model's predictions."""
    accuracy_before: Interval
    """Top-1 accuracy of the start model."""
    correct_to_wrong: Interval
    wrong_to_correct: Interval
    relative_output_change: list[float | None] = []
    """By block."""
    output_cosines: list[float | None] = []
    """By block."""
    expert_load_before: list[list[float]] = []
    """Of a mixture of experts: the share of the tokens of each expert, by layer, in the start model."""
    expert_load_after: list[list[float]] = []
    """The same in the trained model."""


class DriftRecord(RecordPart):
    """How far the trained model moved from the start model."""

    sets: dict[str, SetDrift] = {}
    relative_weight_change: dict[str, float] = {}
    """By part of the model."""
    changed_weights: ChangedWeights


class SetRelearning(RecordPart):
    """What the relearning test recovered on a retained set, nats per token."""

    documents: int
    tokens: int
    forgotten: Interval
    remaining: Interval
    """Trained copy minus start copy, both after the relearning steps."""
    recovered: Interval
    start_model_change: Interval
    """Change of the start model in the same steps."""
    recovered_share: Interval | None = None


class Relearning(RecordPart):
    """The relearning test: copies trained on old text for a few steps."""

    steps: int
    learning_rate: float
    tokens: int
    sets: dict[str, SetRelearning]


class WorstSet(RecordPart):
    set: str
    relative_difference: float
    relative_high: float


class RetentionGate(RecordPart):
    """Whether the loss of every retained set rose by at most `max_forgetting`, at the interval's upper end."""

    max_forgetting: float
    loss_rise_limit: float | None = None
    """The strictest limit in nats per token."""
    worst: WorstSet
    passed: bool


class SparseUpdateRecord(RecordPart):
    """How many weights an optimizer step updates."""

    kind: str
    share: float
    updated_weights: int
    total_weights: int
    always_updated_weights: int
    bytes: int


class PenaltyImportance(RecordPart):
    kind: str
    unit: str
    tokens: int
    mean: float


class PenaltyRecord(RecordPart):
    """A weight penalty."""

    name: str
    strength: float | None = None
    weights: int | None = None
    tensors: int | None = None
    reference: dict[str, str | None] = {}
    importance: PenaltyImportance | None = None
    bytes: dict[str, int] = {}
    skipped: list[str] = []
    """Parameters without a counterpart in the reference."""
    notes: list[str] = []


class TaskExample(RecordPart):
    question: str = ""
    reference: str | None = None
    before: str | None = None
    after: str | None = None


class TaskRecord(RecordPart):
    """A task before and after."""

    name: str
    role: str = ""
    task_cluster: str | None = None
    kind: str = ""
    scoring: str = ""
    shots: int = 0
    seeds: int = 1
    items: int = 0
    skipped: dict[str, int] = {}
    """Items by the reason they were skipped."""
    truncated_prompts: int = 0
    """Prompts with fewer demonstrations than requested."""
    metrics: list[str] = []
    tokenizers: dict[str, list[str]] = {}
    """By metric: sacrebleu's names of the tokenizers that the references' scripts need."""
    without_words: dict[str, int] = {}
    """By metric: items whose references have no words to count, which are compared as a whole."""
    fingerprint: str = ""
    prompt: str = ""
    before: dict[str, MetricValue] = {}
    after: dict[str, MetricValue] = {}
    changes: dict[str, Difference] = {}
    examples: list[TaskExample] = []


class ClusterResult(Difference):
    """The mean over the tasks of a cluster."""

    task_cluster: str
    trained_on: bool
    tasks: list[str]
    metric: str
    before: float
    after: float


class AbilityGate(RecordPart):
    """Whether the mean score fell by at most `max_drop`, at the interval's upper end, and no ability certainly by more."""

    max_drop: float
    drop: float
    """Before minus after, of the mean over the abilities."""
    drop_high: float
    """Its upper end."""
    lost: list[str] = []
    """Abilities whose whole interval is beyond `max_drop`."""
    passed: bool


class AbilitiesRecord(RecordPart):
    """Generated probes before and after, scored from 0 to 1 by code."""

    form: str = ""
    """chat (turns of the chat template) or plain (text, after demonstrations)."""
    seed: int = 0
    before: float | None = None
    """Mean over the abilities of the first metric of each."""
    after: float | None = None
    change: Difference | None = None
    """After minus before; items are resampled within each ability."""
    tasks: list[TaskRecord] = []
    """By ability."""
    gate: AbilityGate | None = None


class Sample(RecordPart):
    """A prompt continued by the model before and after."""

    set: str = ""
    prompt: str = ""
    reference: str | None = None
    before: str | None = None
    after: str | None = None


class Record(RecordPart):
    """A run: inputs, parents, cost and results."""

    format: int = FORMAT
    """Version of this document."""
    id: RunId
    name: str
    status: Status
    created: Time
    finished: Time | None = None
    command: str = ""
    stage_yaml: str = ""
    stage: RecordedStage = {}
    """The stage as resolved."""
    stage_folder: str = ""
    """The folder that the paths of the stage are relative to."""
    model: ModelSummary
    fingerprints: Fingerprints = Fingerprints()
    parents: list[Parent] = []
    versions: dict[str, str] = {}
    machine: dict[str, Any] = {}
    execution: ExecutionSummary = ExecutionSummary()
    plan: PlanSummary
    token_ledger: dict[str, TokenLedger] = {}
    """By source."""
    notes: list[str] = []
    contamination: dict[str, Contamination] = {}
    """By held-out set."""
    schedule_curve: list[tuple[float, float]] = []
    """Step and learning rate."""
    held_out: list[HeldOutSummary] = []
    totals: TrainingTotals = TrainingTotals()
    published_checkpoint: PublishedCheckpoint | None = None
    """Null when the last step is published by rule."""
    consumed: dict[str, ConsumedSource] = {}
    """Everything the model has consumed, by data fingerprint; replays included."""
    scores: ScoresRecord = ScoresRecord()
    changes: dict[str, SetChange] = {}
    expected_losses: dict[str, ExpectedLossRecord] = {}
    """By held-out set: what `keep` or `advise` predicted."""
    pseudo_perplexity: BeforeAfter | None = None
    retention_gate: RetentionGate | None = None
    drift: DriftRecord | None = None
    relearning: Relearning | None = None
    sparse_update: SparseUpdateRecord | None = None
    penalties: list[PenaltyRecord] = []
    tasks: list[TaskRecord] = []
    task_clusters: list[ClusterResult] = []
    abilities: AbilitiesRecord | None = None
    samples: list[Sample] = []

    def _repr_html_(self) -> str:
        return notebook_html("record_html", self)

    @property
    def is_classifier(self) -> bool:
        """Whether the model predicts labels."""
        return self.model.task in ("classify", "tag")

    def set_fingerprint(self, name: str) -> str:
        """The fingerprint of a held-out set. Raises `StageError` when the record lacks it."""
        found = self.fingerprints.sets.get(name)
        if found is None:
            raise StageError(
                f"the record of {self.name} has no fingerprint of the set {name}",
                where=f"{RECORD}: fingerprints.sets",
                hint=f"restore {RECORD} from a backup, or {_DAMAGED_RECORD_HINT}",
            )
        return found

    def changes_with_role(self, role: str) -> dict[str, SetChange]:
        """The changes of the held-out sets of one role."""
        return {name: change for name, change in self.changes.items() if change.role == role}

    @property
    def published_tokens(self) -> int:
        """Trained tokens of the published model."""
        if self.published_checkpoint:
            return self.published_checkpoint.trained_tokens
        return self.totals.tokens


def write_record(run_folder: Path, record: Record) -> None:
    """Write a run's record atomically."""
    write_checked_json(run_folder / RECORD, record.as_json(), record.id, without_secrets=True)


def no_run_error(run_folder: Path) -> StageError:
    """The error of a folder that is not a run's."""
    known = sorted(p.parent for p in run_folder.parent.glob(f"*/{RECORD}"))
    return StageError(
        f"{run_folder} is not a run folder (it has no {RECORD})",
        expected="the output folder of `postgrad train`" + (f", such as {known[0]}" if known else ""),
        hint="" if run_folder.exists() else suggest_path(run_folder),
    )


def read_record(run_folder: Path) -> Record:
    """A run's record. Raises `StageError` when `run_folder` is not a run folder or its record cannot be read."""
    path = run_folder / RECORD
    if not path.exists():
        raise no_run_error(run_folder)
    record = parse_record(
        read_checked_json(path, dict[str, Any], error=StageError, hint=_DAMAGED_RECORD_HINT), str(path)
    )
    refuse_other_run(path, record.id, run_folder / PLAN)
    return record


def refuse_other_run(path: Path, run_id: str, other: Path) -> None:
    """Raise `StageError` when another file of the folder is of another run; a missing or damaged one says nothing."""
    document = read_cached_json(other, dict[str, Any]) or {}
    if document.get("id", run_id) != run_id:
        raise StageError(
            f"this file is of the run {run_id}, and {other.name} beside it of the run {document['id']}",
            where=str(path),
            expected="files of one run",
            hint=f"restore the folder from a backup, or move {RECORD} out of it to complete the run again",
        )


def parse_record(raw: Any, where: str) -> Record:
    """A record from JSON data of this format or the previous one."""
    version = raw.get("format") if isinstance(raw, dict) else None
    if version == PREVIOUS_FORMAT:
        raw = {**upgrade_record(raw), "format": FORMAT}
    elif version != FORMAT:
        newer = isinstance(version, int) and version > FORMAT
        raise StageError(
            f"record format {version!r}",
            where=where,
            expected=f"{FORMAT} (or {PREVIOUS_FORMAT}, which is converted)",
            hint="a newer postgrad wrote this record: upgrade postgrad" if newer else "train the stage again",
        )
    return validate_part(Record, raw, where)


def validate_part(kind: type[Document], raw: Any, where: str, hint: str = _DAMAGED_HINT) -> Document:
    """Parse JSON data. Raises `StageError` that names the first missing or malformed field."""
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "the document"
        raise StageError(
            f"{field}: {first['msg'][:1].lower()}{first['msg'][1:]}",
            where=where,
            hint=hint,
        ) from None


def record_schema() -> str:
    """The JSON Schema of `record.json`."""
    return json.dumps(Record.model_json_schema(), indent=2, ensure_ascii=False)


def add_consumed(
    consumed: Mapping[str, ConsumedSource], sources: Iterable[tuple[str, ConsumedSource]]
) -> dict[str, ConsumedSource]:
    """The consumed sources after one more stage; `sources` are its own with their data fingerprints."""
    total = dict(consumed)
    for key, source in sources:
        earlier = total.get(key)
        total[key] = earlier.model_copy(update={"tokens": earlier.tokens + source.tokens}) if earlier else source
    return total

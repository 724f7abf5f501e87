"""What is a stage? One answer to each of the six questions, as frozen data read from a YAML file.

The closed unions of schedules, objectives and tunings stand beside this file as types, so an editor can list them, the
published JSON Schema has them, and an unknown key is an error that names the nearest one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from postgrad.config.document_filters import AnySelection
from postgrad.config.mixing import AnyMixing, fill_shares
from postgrad.config.objectives import AnyObjective
from postgrad.config.penalties import AnyPenalty
from postgrad.config.quantities import (
    Beta,
    ConfigModel,
    Length,
    Patience,
    Positive,
    Share,
    TokenCount,
    TokenCountOrZero,
    reject_bool,
)
from postgrad.config.renamed_keys import with_fingerprint_names
from postgrad.config.row_format import TemplatedRowFormat
from postgrad.config.schedules import AnySchedule
from postgrad.config.sparse_updates import AnyUpdate, LossAdaptive
from postgrad.config.tasks import TaskConfig
from postgrad.config.tunings import AnyTuning, FullTuning
from postgrad.errors import suggest_nearest_or_all
from postgrad.storage.fingerprint import fingerprint


class Source(TemplatedRowFormat):
    """Text to read: files (`path`), a Hub data set (`hub`), or everything the start model has seen (`seen_so_far`)."""

    name: Annotated[str, Field(pattern=r"^[\w.\-]+$")]
    """Names the source in the plan, the metrics and the report."""
    path: str | None = None
    """A file, a folder or a glob; .txt .md .jsonl .json .csv .parquet, each also .gz and .zst."""
    hub: str | None = None
    """A data set on the Hugging Face Hub, `owner/name`."""
    subset: str | None = None
    """With `hub`: the subset (configuration) of the data set."""
    split: str = "train"
    """With `hub`: the split."""
    revision: str | None = None
    """With `hub`: a branch, tag or commit."""
    seen_so_far: bool = False
    """Replay the token-weighted mixture of everything earlier stages consumed, replays included."""
    share: Share | None = None
    """Share of the stage's trained tokens; one source may leave it out and takes what remains (several: see `data.mixing`)."""
    role: Literal["new", "replay"] = "new"
    """`replay` is old text: its held-out part is a retained set, and `new_tokens` does not count it."""
    held_out: Share | None = None
    """Share of documents (by content hash) kept for evaluation; left out: enough for about 200 documents when
    `evaluation` names no file of that role (learned; retained for replay), else none."""
    max_passes: Annotated[float, Field(gt=0), BeforeValidator(reject_bool)] = 4.0
    """How often the source may be read in this stage; see `data.on_exhausted`."""
    prior_tokens: TokenCount | None = None
    """Tokens of this distribution that the start model consumed before its first recorded stage; counts as seen."""
    cluster: str | None = None
    """The sort of task its rows are: tasks of other clusters (`evaluation.tasks`) were never seen."""
    select: list[AnySelection] = []
    """Which of its documents are read at all, before anything is held out: ways to select, one after the other."""

    @model_validator(mode="after")
    def _check_one_origin(self) -> Source:
        if sum([self.path is not None, self.hub is not None, self.seen_so_far]) != 1:
            raise ValueError("a source has exactly one of `path`, `hub` and `seen_so_far`")
        if self.seen_so_far:
            given = (*TemplatedRowFormat.model_fields, "held_out", "prior_tokens", "subset", "split", "select")
            fixed = sorted(name for name in given if getattr(self, name) != Source.model_fields[name].default)
            if fixed:
                raise ValueError(f"a replay of everything seen takes `{fixed[0]}` from the earlier stages")
        return self


class CurriculumPhase(ConfigModel):
    """From a point of the stage on, these shares hold."""

    at: Length | None = None
    """1%, 200 steps or 2M tokens."""
    at_rate: Share | None = None
    """... or when the learning rate has fallen to this share of its peak."""
    shares: dict[str, Share]
    """The share of each source from there on; a source that is not named gets none."""

    @model_validator(mode="after")
    def _check_one_point(self) -> CurriculumPhase:
        if (self.at is None) == (self.at_rate is None):
            raise ValueError("a change of shares has exactly one of `at` and `at_rate`")
        return self


class DataConfig(ConfigModel):
    """What is read."""

    sources: Annotated[list[Source], Field(min_length=1)]
    """What the rows are read from, and in which shares."""
    sequence_length: Annotated[int, Field(ge=2)] = 1024
    """Positions in a row."""
    mixing: AnyMixing | None = None
    """How the sources that name no `share` part what remains, when there are several."""
    curriculum: list[CurriculumPhase] = []
    """A curriculum: shares that change over the stage."""
    on_exhausted: Literal["refuse", "repeat", "stop", "renormalise"] = "refuse"
    """When a source would be read more than its `max_passes`: refuse before training, repeat it all the same, stop the
    stage there, or give its share to the others from there on."""
    skip_steps: Annotated[int, Field(ge=0)] = 0
    """Begin reading where this step of the same sources and seed would; an anneal branched from step N skips N."""
    max_document_tokens: Annotated[int, Field(ge=2)] | None = None
    """Longer documents are cut there; what is cut is counted."""
    eos: str | None = None
    """The token that ends a document; left out: the tokenizer's own."""
    overlap: Literal["report", "refuse", "off"] = "report"
    """Look for 13-grams of held-out documents in the training text."""
    workers: Positive | None = None
    """Processes or threads that tokenise; left out: one a core."""

    @model_validator(mode="after")
    def _check_names(self) -> DataConfig:
        names = [source.name for source in self.sources]
        doubled = {name for name in names if names.count(name) > 1}
        if doubled:
            raise ValueError(f"two sources are called {sorted(doubled)[0]!r}")
        for shift in self.curriculum:
            for name in shift.shares:
                if name not in names:
                    raise ValueError(
                        f"`curriculum` names a source {name!r} that is not there; {suggest_nearest_or_all(name, names)}"
                    )
        return self


class BatchConfig(ConfigModel):
    """How many rows make a step."""

    global_batch_size: Positive = 32
    """Rows in a global batch."""
    micro_batch_size: Positive | None = None
    """Rows a device holds at once; left out: as many as fit and help. Makes no difference to the result."""


class OptimizerConfig(ConfigModel):
    """AdamW. Matrices decay; vectors and tables do not."""

    kind: Literal["adamw"] = "adamw"
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    """Decay of the two moments."""
    eps: Annotated[float, Field(gt=0), BeforeValidator(reject_bool)] = 1e-8
    """Added to the root of the second moment."""
    weight_decay: Annotated[float, Field(ge=0), BeforeValidator(reject_bool)] = 0.1
    """Decoupled, times the rate."""
    decay_embeddings: bool = False
    """Let the input embedding and the output head decay too."""
    max_grad_norm: Annotated[float, Field(gt=0), BeforeValidator(reject_bool)] = 1.0
    """The largest 2-norm of the whole gradient."""
    moments: Literal["reset", "keep", "keep-second"] = "reset"
    """At the stage's start: from zero, or the start checkpoint's (both moments, or only the second)."""
    sparse_update: AnyUpdate | None = None
    """Which numbers an update moves; left out: all that the tuning lets move."""
    loss_adaptive: LossAdaptive | None = None
    """Lower the rate where the loss is high; left out: the schedule's rate."""


class HeldOutFile(TemplatedRowFormat):
    """Text, or rows of a task, to be scored."""

    name: Annotated[str, Field(pattern=r"^[\w.\-]+$")]
    """Names the set."""
    path: str
    """A file, a folder or a glob."""
    same_format_as: str | None = None
    """A source of this stage, whose kind, columns and words these rows have too."""


def expand_held_out_file(value: Any) -> Any:
    if isinstance(value, str):
        stem = re.sub(r"(\.(txt|md|jsonl|json|csv|parquet|gz|zst))+$", "", Path(value).name)
        return {"name": re.sub(r"[^\w.\-]+", "-", stem) or "held-out", "path": value}
    return value


AnyHeldOutFile = Annotated[HeldOutFile, BeforeValidator(expand_held_out_file, json_schema_input_type=str | HeldOutFile)]


class EvaluationConfig(ConfigModel):
    """What is measured: on the same documents before and after, and at chosen steps in between."""

    retained: list[AnyHeldOutFile] = []
    """Text the model must not forget."""
    learned: list[AnyHeldOutFile] = []
    """Text of the new kind."""
    test: list[AnyHeldOutFile] = []
    """Looked at once: when all is trained and chosen, on the start model and on the published one."""
    every: Length = "10%"
    """How often during training; denser in the first 2 %, where the stability gap is."""
    eval_tokens: TokenCount = 20_000
    """Tokens of each set that are scored during training; before and after, all are."""
    max_tokens: TokenCount = 1_000_000
    """Tokens of each set that are scored before and after (documents in the order of their content hash)."""
    pseudo_perplexity: TokenCountOrZero = 0
    """Of a masked language model: about so many tokens of each set are also masked one at a time (Salazar et al. 2020),
    before and after; each costs a row, 0: none."""
    drift_tokens: TokenCountOrZero = 10_000
    """Tokens of each set on which the start model and the trained one are held side by side: what they say, and their layers;
    both are in memory for it. 0: none."""
    relearning_steps: Annotated[int, Field(ge=0)] = 0
    """Steps on old text that copies of the trained model and of the start model take, at the stage's highest rate, to tell
    what is lost from what is only out of reach. Half of each retained set is trained on, or the rest of its source. 0: none."""
    samples: Annotated[int, Field(ge=0)] = 2
    """Texts of each set that are continued before and after, for the report."""
    tasks: list[TaskConfig] = []
    """Tasks that the model is asked in prompts, before and after."""

    @model_validator(mode="after")
    def _check_names(self) -> EvaluationConfig:
        names = [item.name for _, item in self.held_out_files()]
        doubled = {name for name in names if names.count(name) > 1}
        if doubled:
            raise ValueError(f"two held-out files are called {sorted(doubled)[0]!r}; give them a `name`")
        tasks = [task.name for task in self.tasks]
        if len(set(tasks)) < len(tasks):
            raise ValueError(f"two tasks are called {next(n for n in tasks if tasks.count(n) > 1)!r}")
        return self

    def held_out_files(self) -> list[tuple[str, HeldOutFile]]:
        """The held-out files with their roles."""
        by_role = {"retained": self.retained, "learned": self.learned, "test": self.test}
        return [(role, item) for role, items in by_role.items() for item in items]


class CheckpointSelectionConfig(ConfigModel):
    """The published model is the best checkpoint by a held-out set, all of which is scored at each look."""

    set: str
    """The held-out set that decides; a source's own held-out part has the source's name."""
    metric: str = "loss"
    """`loss`, or a metric of that set, such as `accuracy` or `macro F1`."""
    patience: Patience = None
    """Training ends after so many evaluations in a row without a gain, such as `3 evaluations`; none: the budget is used up."""
    min_delta: Annotated[float, Field(ge=0), BeforeValidator(reject_bool)] = 0.0
    """What the best so far must be surpassed by to count as a gain, in the unit of `metric`."""
    stop_at: float | None = None
    """Training ends when a look has reached this, in the unit of `metric`, and has forgotten no more than is allowed."""
    burn_in: Length = "0%"
    """Nothing is chosen before this, and training does not end; nor before the end of the warm-up, nor in the first 2 %."""
    max_forgetting: Share | None = None
    """Only a checkpoint is chosen at which no retained set's loss has risen by more, upper end of its interval; when there
    is none, the one that forgot least."""


class SaveConfig(ConfigModel):
    """When checkpoints are written, which stay, and which is published."""

    every: Length = "20%"
    """How often a checkpoint is written; there is always one at the last step."""
    keep: Positive | Literal["all"] = 2
    """How many of the newest checkpoints stay."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the final model; auto: as the start model is stored."""
    choose: CheckpointSelectionConfig | None = None
    """Left out: the last step's model is published."""


class ComputeConfig(ConfigModel):
    """How the arithmetic is done. `auto` is decided by a probe of this machine, said in the plan, and kept on resume."""

    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the forward and backward pass; master weights are fp32."""
    compile: Literal["auto"] | bool = "auto"
    """Compile each block."""
    attention: Literal["auto", "eager", "sdpa", "causal_blocks"] = "auto"
    """`causal_blocks` is this package's own, for CPUs. A prefix has its own way, whatever is said here."""
    activation_checkpointing: bool = False
    """Recompute activations instead of keeping them."""
    threads: Positive | None = None
    """Left out: the cores this process may use."""


def _union_tag(value: Any) -> str:
    return "by parts" if isinstance(value, dict | ConfigModel) else "by name"


class NewTokenizer(ConfigModel):
    """A tokenizer learnt from the training documents of the stage, in their shares; no held-out document is looked at."""

    kind: Literal["byte-bpe"] = "byte-bpe"
    """Byte-level BPE: every text can be written with it."""
    vocab_size: Annotated[int, Field(ge=300)] = 8000
    """Tokens, the family's special ones included; fewer where the text has no more pairs that occur twice."""


AnyTokenizer = Annotated[
    Annotated[str, Tag("by name")] | Annotated[NewTokenizer, Tag("by parts")], Discriminator(_union_tag)
]


class FreshModel(ConfigModel):
    """A model with random weights, drawn from the stage's seed."""

    from_scratch: str | None = None
    """A family and the number of its weights, such as `llama-15M`, `gpt2-15M`, `qwen3-60M`, `bert-10M` or `t5-20M`: all
    weights of the language model, embeddings included, those that are tied counted once. Width, depth and inner width are
    solved for it."""
    config: str | None = None
    """... or a `config.json`, a folder that has one, or a Hub name."""
    tokenizer: AnyTokenizer = NewTokenizer()
    """A new one, or the folder or Hub name of one that is there."""
    dropout: Annotated[Share, Field(lt=1)] | None = None
    """Left out: as the family (or the configuration) has it."""

    @model_validator(mode="after")
    def _check_one_origin(self) -> FreshModel:
        if (self.from_scratch is None) == (self.config is None):
            raise ValueError("a new model has exactly one of `from_scratch` (a family and a size) and `config`")
        return self


AnyModel = Annotated[Annotated[str, Tag("by name")] | Annotated[FreshModel, Tag("by parts")], Discriminator(_union_tag)]


class Stage(ConfigModel):
    """One stage of a lineage."""

    name: Annotated[str, Field(pattern=r"^[\w.\-]+$")]
    """Names the run and, without `output`, its folder."""
    model: AnyModel
    """A folder, a Hub name, an earlier stage's run folder or one of its checkpoints; or a new model, by parts."""
    base: str | None = None
    """The model that a tuning's folder sits on, when it is not where that folder says."""
    output: str | None = None
    """The run folder; left out: runs/<name>."""
    tokens: TokenCount | None = None
    """The budget in trained tokens, replay included (compute-equivalent)."""
    new_tokens: TokenCount | None = None
    """... or the budget in tokens of the new sources; replay comes on top."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Decides the order of the rows, what is drawn in them (masks, spans), fresh weights and dropout."""
    data: DataConfig
    """What is read."""
    batch: BatchConfig = BatchConfig()
    """How many rows make a step."""
    schedule: AnySchedule
    """The learning rate of each step."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """How the weights are moved."""
    objectives: list[AnyObjective] = []
    """What a token is worth; left out: what the start model was made with (a decoder: next-token)."""
    penalties: list[AnyPenalty] = []
    """What pulls the weights back to where they were."""
    tuning: AnyTuning = FullTuning(kind="full")
    """Which weights move."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """What is scored."""
    max_forgetting: Share | None = None
    """The retention gate: the largest allowed rise of loss on a retained set, upper end of its interval."""
    save: SaveConfig = SaveConfig()
    """When checkpoints are written, and which stay."""
    compute: ComputeConfig = ComputeConfig()
    """How the arithmetic is done."""

    @model_validator(mode="after")
    def _check_consistency(self) -> Stage:
        if (self.tokens is None) == (self.new_tokens is None):
            raise ValueError("a stage has exactly one of `tokens` (replay included) and `new_tokens` (replay on top)")
        if self.base is not None and isinstance(self.model, FreshModel):
            raise ValueError("`base` is what a tuning's folder sits on; a new model sits on nothing")
        shares = [s.share for s in self.data.sources]
        given = sum(s for s in shares if s is not None)
        if shares.count(None) > 1 and self.data.mixing is None:
            raise ValueError(
                "data.sources: at most one source may leave out its `share`; for several say how they are mixed, such as "
                "data.mixing: {kind: examples}"
            )
        if None not in shares and self.data.mixing is not None:
            raise ValueError("data.mixing is for sources that name no `share`, and each of them names one")
        if None in shares:
            if given >= 1:
                raise ValueError(
                    f"data.sources: the shares add up to {given:.4g} and leave nothing for the source without one"
                )
        elif abs(given - 1) > 1e-6:
            raise ValueError(f"data.sources: the shares add up to {given:.4g}, not to 1")
        names = [source.name for source in self.data.sources]
        for path, name in (
            *(("objectives", name) for o in self.objectives for name in o.on),
            *(("evaluation", h.same_format_as) for _, h in self.evaluation.held_out_files() if h.same_format_as),
        ):
            if name not in names:
                raise ValueError(
                    f"`{path}` names a source {name!r} that is not there; {suggest_nearest_or_all(name, names)}"
                )
        for shift in self.data.curriculum:
            total = sum(shift.shares.values())
            if abs(total - 1) > 1e-6:
                raise ValueError(f"data.curriculum: the shares of a change add up to {total:.4g}, not to 1")
        if self.new_tokens is not None and all(s.role == "replay" for s in self.data.sources):
            raise ValueError("`new_tokens` needs a source with role: new")
        return self

    def resolve_shares(self, examples: Mapping[str, int] = MappingProxyType({})) -> tuple[float, ...]:
        """The share of each source, those that were left out filled in; with `data.mixing` by the `examples` of each."""
        given = {source.name: source.share for source in self.data.sources}
        return tuple(fill_shares(given, self.data.mixing, examples).values())

    def fingerprint(self) -> str:
        """Of everything that decides the result: not of when checkpoints are written, nor of where."""
        decisive = self.model_dump(mode="json", exclude={"save": {"every", "keep"}, "output": True})
        return fingerprint(with_fingerprint_names(decisive))

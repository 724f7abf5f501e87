"""A stage as frozen data, read from a YAML file.

The closed unions of schedules, objectives, penalties and tunings are types in the files beside this one, so editors complete
them, the JSON Schema lists them, and an unknown key is an error that names the nearest one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Discriminator,
    Field,
    Tag,
    model_validator,
)

from postgrad.config.abilities import AnyAbilities
from postgrad.config.document_filters import AnySelection
from postgrad.config.experts_config import ExpertsConfig
from postgrad.config.mixing import AnyMixing, fill_shares
from postgrad.config.objectives import AnyObjective, GeneratingObjective
from postgrad.config.penalties import AnyPenalty
from postgrad.config.quantities import (
    MAX_COUNT,
    MAX_ROW,
    MAX_STEPS,
    MAX_TOKENS,
    Beta,
    ConfigModel,
    Count,
    Length,
    Name,
    Patience,
    Positive,
    Seed,
    Share,
    TokenCount,
    TokenCountOrZero,
    omit_unset,
    reject_bool,
)
from postgrad.config.renamed_keys import with_fingerprint_names
from postgrad.config.row_format import TemplatedRowFormat
from postgrad.config.schedules import AnySchedule
from postgrad.config.sparse_updates import AnyUpdate, LossAdaptive, MomentumUpdate
from postgrad.config.tasks import TaskConfig
from postgrad.config.trackers import AnyTracker
from postgrad.config.tunings import AnyTuning, FullTuning
from postgrad.errors import suggest_nearest_or_all
from postgrad.foreign_text import mask_secrets
from postgrad.storage.fingerprint import fingerprint


class Source(TemplatedRowFormat):
    """Training text: files (`path`), a Hub data set (`hub`), or everything the start model was trained on (`seen_so_far`)."""

    name: Name
    """Name of the source in the plan, the metrics and the report."""
    path: str | None = None
    """A file, a folder or a glob; .txt .md .jsonl .ndjson .json .csv .tsv .parquet .arrow, each also .gz and .zst."""
    hub: str | None = None
    """A data set on the Hugging Face Hub, `owner/name`."""
    subset: str | None = None
    """Subset (configuration) of the Hub data set. Default: its own default."""
    split: str = "train"
    """Split of the Hub data set, or of a folder that has splits."""
    revision: str | None = None
    """Branch, tag or commit of the Hub data set. Default: its main branch."""
    seen_so_far: bool = False
    """Replay the token-weighted mixture of everything that earlier stages consumed, replays included."""
    share: Share | None = None
    """Share of the stage's trained tokens. Default, for one source: the remainder (for several: see `data.mixing`)."""
    role: Literal["new", "replay"] = "new"
    """`replay` marks old text: its held-out part is a retained set, and `new_tokens` does not count it."""
    held_out: Share | None = None
    """Share of documents (by content hash) to hold out for evaluation. Default: about 200 documents if `evaluation` has no file
    of that role (learned; retained for replay), else none."""
    max_passes: Annotated[float, Field(gt=0, le=MAX_STEPS), BeforeValidator(reject_bool)] = 4.0
    """Limit of passes over the source in this stage; see `data.on_exhausted`."""
    prior_tokens: TokenCount | None = None
    """Tokens of this distribution that the start model was trained on before its first recorded stage. Default: unknown."""
    cluster: str | None = None
    """Task cluster of its rows; tasks in `evaluation.tasks` of a cluster that no source has are unseen. Default: none."""
    select: list[AnySelection] = []
    """Filters of its documents, applied one after another before anything is held out."""

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
    """The shares from a point of the stage on."""

    at: Length | None = None
    """The point: 1%, 200 steps or 2M tokens ..."""
    at_rate: Share | None = None
    """... or the step at which the learning rate has fallen to this share of its peak."""
    shares: dict[str, Share]
    """The share of each source from there on; 0 for a source that is not listed."""

    @model_validator(mode="after")
    def _check_one_point(self) -> CurriculumPhase:
        if (self.at is None) == (self.at_rate is None):
            raise ValueError("a curriculum phase has exactly one of `at` and `at_rate`")
        return self


class DataConfig(ConfigModel):
    """The training data."""

    sources: Annotated[list[Source], Field(min_length=1)]
    """The sources and their shares."""
    sequence_length: Annotated[int, Field(ge=2, le=MAX_ROW), BeforeValidator(reject_bool)] = 1024
    """Tokens in a row."""
    packing: Annotated[bool | None, omit_unset] = None
    """Whether documents share a row in the model; if not, each document, or what of it is in a row, is a row of its own, and
    rows of similar length are padded together. Default: where a probe shows that packed documents do not see each other."""
    mixing: AnyMixing | None = None
    """How several sources without a `share` divide the remainder."""
    curriculum: list[CurriculumPhase] = []
    """Shares that change over the stage."""
    on_exhausted: Literal["refuse", "repeat", "stop", "renormalise"] = "refuse"
    """When a source would exceed its `max_passes`: refuse before the training, repeat it anyway, stop the stage there, or give
    its share to the other sources from there on."""
    skip_steps: Annotated[int, Field(ge=0, le=MAX_STEPS), BeforeValidator(reject_bool)] = 0
    """Start at the data of this step of the same sources and seed; an anneal branched from step N skips N."""
    max_document_tokens: Annotated[int, Field(ge=2, le=MAX_TOKENS), BeforeValidator(reject_bool)] | None = None
    """Cut longer documents at this many tokens; the cut tokens are counted. Default: no limit."""
    eos: str | None = None
    """The token that ends a document. Default: that of the tokenizer."""
    overlap: Literal["report", "refuse", "off"] = "report"
    """Search the training text for 13-grams of held-out documents: report them, refuse to train, or skip the search."""
    workers: Annotated[Positive, Field(le=1024)] | None = None
    """Processes or threads for tokenisation. Default: one per core."""

    @model_validator(mode="after")
    def _check_names(self) -> DataConfig:
        names = [source.name for source in self.sources]
        doubled = {name for name in names if names.count(name) > 1}
        if doubled:
            raise ValueError(f"two sources have the name {sorted(doubled)[0]!r}")
        for shift in self.curriculum:
            for name in shift.shares:
                if name not in names:
                    raise ValueError(
                        f"`curriculum` names an unknown source {name!r}; {suggest_nearest_or_all(name, names)}"
                    )
        return self


class BatchConfig(ConfigModel):
    """The batch of a step."""

    global_batch_size: Positive = 32
    """Rows in a step, over all devices."""
    micro_batch_size: Positive | None = None
    """Rows per device at a time; does not change the result. Default: measured on this machine."""


class SharpnessAware(ConfigModel):
    """Sharpness-aware steps (SAM, Foret et al. 2021): the gradient is taken a small step uphill. Each costs two steps."""

    radius: Annotated[float, Field(gt=0), BeforeValidator(reject_bool)] = 0.05
    """2-norm of the step uphill, over all trained weights."""
    over: Literal["decay"] | Length = "decay"
    """The last part of the stage, which is sharpness-aware: the decay of the learning rate at its end, or a length."""


class OptimizerConfig(ConfigModel):
    """The optimizer, with weight decay on matrices, not on vectors and embeddings."""

    kind: Literal["adamw", "muon"] = "adamw"
    """adamw, or Muon for the matrices of the blocks and AdamW for all else, at the same rates (Liu et al. 2025)."""
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    """Decay rates of AdamW's two moments."""
    momentum: Annotated[Beta | None, omit_unset] = None
    """Decay rate of Muon's momentum. Default: 0.95."""
    eps: Annotated[float, Field(gt=0), BeforeValidator(reject_bool)] = 1e-8
    """Added to the square root of the second moment."""
    weight_decay: Annotated[float, Field(ge=0), BeforeValidator(reject_bool)] = 0.1
    """Decoupled weight decay, times the learning rate."""
    decay_embeddings: bool = False
    """Decay the input embedding and the output head too."""
    max_grad_norm: Annotated[Annotated[float, Field(gt=0)] | None, BeforeValidator(reject_bool)] = 1.0
    """Largest 2-norm of the whole gradient; larger ones are clipped. null: no clipping."""
    max_skipped_steps: Annotated[int, Field(ge=0), BeforeValidator(reject_bool)] = 10
    """How many steps, at most half of all, may be skipped because their loss or gradient is not finite; one more ends the run.
    A skipped step changes no weight and counts no trained token. May be changed on resume."""
    moment_dtype: Annotated[Literal["bfloat16", "float8"] | None, omit_unset] = None
    """How AdamW's moments are held between updates, rounded stochastically: in 4 bytes for each trained weight, or in 2 (float8
    with a scale for each block). Default: 8 bytes, fp32."""
    master_dtype: Annotated[Literal["bfloat16"] | None, omit_unset] = None
    """bfloat16: the weights of the blocks and their gradients are held in the dtype of the computation alone, and updates are
    rounded stochastically. Default: fp32 masters."""
    release_gradients: Annotated[bool, Field(exclude_if=lambda value: not value)] = False
    """Update each weight inside the backward pass, as soon as its gradient is complete, and drop the gradient: the whole one
    never exists. The steps are the same. It needs `max_grad_norm: null` and one micro-batch for each process and step."""
    moments: Literal["reset", "keep", "keep-second"] = "reset"
    """Initial moments: zero, or those of the start checkpoint (both, or only the second)."""
    sparse_update: AnyUpdate | None = None
    """Update only some entries of the weights at each step. Default: all trained weights."""
    loss_adaptive: LossAdaptive | None = None
    """Lower the learning rate where the loss is high. Default: the schedule's rate."""
    sharpness_aware: Annotated[SharpnessAware | None, omit_unset] = None
    """End the stage with sharpness-aware steps, so that later stages forget less of it. Default: plain steps."""

    @model_validator(mode="after")
    def _check_kind(self) -> OptimizerConfig:
        if self.kind == "adamw" and self.momentum is not None:
            raise ValueError("`momentum` is Muon's; AdamW has `betas`")
        if self.kind == "muon" and self.moments == "keep-second":
            raise ValueError("Muon has no second moment: `moments` is reset or keep")
        if self.kind == "muon" and (self.moment_dtype or self.master_dtype):
            raise ValueError("`moment_dtype` and `master_dtype` are AdamW's")
        if self.moment_dtype and isinstance(self.sparse_update, MomentumUpdate):
            raise ValueError("`sparse_update: mofo` selects by fp32 moments; it combines with no `moment_dtype`")
        if self.master_dtype and (self.sparse_update or self.sharpness_aware):
            raise ValueError("`master_dtype: bfloat16` combines with neither `sparse_update` nor `sharpness_aware`")
        if self.release_gradients and self.max_grad_norm is not None:
            raise ValueError(
                "`release_gradients` updates weights before the norm of the whole gradient is known; set `max_grad_norm: null`"
            )
        if self.release_gradients and (self.sparse_update or self.sharpness_aware):
            raise ValueError(
                "`release_gradients` combines with neither `sparse_update` nor `sharpness_aware`, which need the whole gradient"
            )
        if self.kind == "muon" and isinstance(self.sparse_update, MomentumUpdate):
            raise ValueError("`sparse_update: mofo` selects by AdamW's momentum; Muon combines with migu and ssu")
        return self


class HeldOutFile(TemplatedRowFormat):
    """Held-out text, or held-out rows of a task."""

    name: Name
    """Name of the set."""
    path: str
    """A file, a folder or a glob."""
    split: Annotated[str | None, omit_unset] = None
    """Split of a folder that has splits. Default: `test`, else `validation`."""
    same_format_as: str | None = None
    """A source of this stage with the same row kind, columns and templates. Default: the only source of its role whose kind is
    set."""


def expand_held_out_file(value: Any) -> Any:
    if isinstance(value, str):
        stem = re.sub(r"(\.(txt|md|jsonl|ndjson|json|csv|tsv|parquet|arrow|gz|zst))+$", "", Path(value).name)
        name = re.sub(r"[^\w.\-]+", "-", mask_secrets(stem))[:100]
        return {"name": name if re.search(r"\w", name) else "held-out", "path": value}
    return value


AnyHeldOutFile = Annotated[HeldOutFile, BeforeValidator(expand_held_out_file, json_schema_input_type=str | HeldOutFile)]


class ExpectedLoss(ConfigModel):
    """A loss that short runs predict, with its 95 % interval, in nats per token."""

    value: float
    """The predicted loss."""
    low: float
    """Lower end of the interval."""
    high: float
    """Upper end of the interval."""

    @model_validator(mode="after")
    def _check_order(self) -> ExpectedLoss:
        if not self.low <= self.value <= self.high:
            raise ValueError(f"the interval {self.low:g} to {self.high:g} does not contain the value {self.value:g}")
        return self


class EvaluationConfig(ConfigModel):
    """What is evaluated: on the same documents before and after the training, and at some steps in between."""

    retained: list[AnyHeldOutFile] = []
    """Old text: what the model must not forget."""
    learned: list[AnyHeldOutFile] = []
    """New text: what the model must learn."""
    test: list[AnyHeldOutFile] = []
    """Test sets, scored once after training and checkpoint selection, on the start model and on the published one."""
    every: Length = "10%"
    """Interval between evaluations during training; shorter in the first 2 %, where the stability gap is."""
    eval_tokens: TokenCount = 20_000
    """Tokens of each set to score at each evaluation during training."""
    max_tokens: TokenCount = 1_000_000
    """Tokens of each set to score before and after the training (documents in the order of their content hash)."""
    pseudo_perplexity: TokenCountOrZero = 0
    """Of a masked language model: tokens of each set to mask one at a time for the pseudo-perplexity (Salazar et al. 2020),
    before and after; each costs a row. 0 disables it."""
    drift_tokens: TokenCountOrZero = 10_000
    """Tokens of each set on which to compare outputs and layers of the start model and the trained one; both are in memory
    then. 0 disables it."""
    relearning_steps: Count = 0
    """Relearning test: fine-tune copies of the trained and of the start model for this many steps on old text, at the stage's
    highest rate, to separate lost knowledge from misalignment. Uses half of each retained set, or the rest of its source. 0
    disables it."""
    samples: Count = 2
    """Texts of each set to continue before and after, for the report."""
    tasks: list[TaskConfig] = []
    """Prompted tasks, before and after."""
    abilities: Annotated[AnyAbilities | None, omit_unset] = None
    """Generated probes of abilities (copying, format, instructions, refusals ...), before and after. Default: none."""
    expected_losses: Annotated[dict[str, ExpectedLoss], omit_unset] = {}
    """Of held-out sets: the loss after the run as `keep` or `advise` predicts it, compared with the measured one."""

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
    """Publish the best checkpoint by a held-out set, which is scored as a whole at each evaluation."""

    set: str
    """The held-out set; the held-out part of a source has the source's name."""
    metric: str = "loss"
    """`loss`, or a metric of the set, such as `accuracy` or `macro F1`."""
    patience: Patience = None
    """Stop after this many evaluations in a row without an improvement, such as `3 evaluations`; none: never."""
    min_delta: Annotated[float, Field(ge=0), BeforeValidator(reject_bool)] = 0.0
    """Smallest change that counts as an improvement, in the unit of `metric`."""
    stop_at: float | None = None
    """Stop when this value is reached within the allowed forgetting, in the unit of `metric`. Default: never."""
    burn_in: Length = "0%"
    """No checkpoint is selected, and training does not stop, before this, nor in the warm-up or the first 2 %."""
    max_forgetting: Share | None = None
    """Select only a checkpoint at which the loss of no retained set has risen by more (upper end of its interval); if there is
    none, the one with the least forgetting. Default: no limit."""


class SaveConfig(ConfigModel):
    """When checkpoints are written, which are kept, and which is published."""

    every: Length = "20%"
    """Interval between checkpoints; there is always one at the last step."""
    keep: Positive | Literal["all"] = 2
    """Number of the newest checkpoints to keep."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Data type of the published model; auto: that of the start model's files."""
    choose: CheckpointSelectionConfig | None = None
    """Checkpoint selection. Default: the last step is published."""


class ComputeConfig(ConfigModel):
    """How to compute. `auto` is decided by a probe of this machine, shown in the plan, and kept on resume."""

    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Data type of the forward and backward pass; master weights are fp32."""
    compile: Literal["auto"] | bool = "auto"
    """Compile each block with torch.compile."""
    attention: Literal["auto", "eager", "sdpa", "causal_blocks"] = "auto"
    """Attention implementation; `causal_blocks` is this package's own, for CPUs. Prefix tunings use their own."""
    activation_checkpointing: Literal["auto"] | bool = False
    """Recompute activations in the backward pass instead of storing them; auto: when a single row would not fit otherwise."""
    threads: Positive | None = None
    """CPU threads. Default: OMP_NUM_THREADS, or the cores that this process may use."""
    collective_timeout_seconds: Positive = 600
    """How long one of several processes waits for the others, also while one hashes its part of a checkpoint."""


class ParallelConfig(ConfigModel):
    """How the processes that `torchrun` starts share the model: replicas of it, each in shards (FSDP2, hybrid sharding).

    It decides no number of the result, and may change on resume.
    """

    replicate: Positive = 1
    """Replicas, such as one on each node: weights are gathered within a replica, and gradients are summed over all."""
    shard: Positive | None = None
    """Processes that hold a replica together. Default: as many as there are for each replica."""


def _union_tag(value: Any) -> str:
    return "by parts" if isinstance(value, dict | ConfigModel) else "by name"


class NewTokenizer(ConfigModel):
    """A tokenizer trained on the training documents of the stage, in their shares; held-out documents are excluded."""

    kind: Literal["byte-bpe"] = "byte-bpe"
    """Byte-level BPE, which can encode every text."""
    vocab_size: Annotated[int, Field(ge=300, le=MAX_COUNT), BeforeValidator(reject_bool)] = 8000
    """Size of the vocabulary, special tokens included; smaller if the text has no more pairs that occur twice."""


AnyTokenizer = Annotated[
    Annotated[str, Tag("by name")] | Annotated[NewTokenizer, Tag("by parts")], Discriminator(_union_tag)
]


class FreshModel(ConfigModel):
    """A model with random weights, initialised from the stage's seed."""

    from_scratch: str | None = None
    """Family and number of weights, such as `llama-15M`, `gpt2-15M`, `qwen3-60M`, `bert-10M` or `t5-20M`: all weights of the
    language model, embeddings included, tied ones counted once. Width, depth and inner width follow ..."""
    config: str | None = None
    """... or a `config.json`, its folder, or a Hub name."""
    tokenizer: AnyTokenizer = NewTokenizer()
    """A new tokenizer, or the folder or Hub name of an existing one."""
    dropout: Annotated[Share, Field(lt=1)] | None = None
    """Dropout of the model. Default: that of the family or configuration."""

    @model_validator(mode="after")
    def _check_one_origin(self) -> FreshModel:
        if (self.from_scratch is None) == (self.config is None):
            raise ValueError("a new model has exactly one of `from_scratch` (a family and a size) and `config`")
        return self


AnyModel = Annotated[Annotated[str, Tag("by name")] | Annotated[FreshModel, Tag("by parts")], Discriminator(_union_tag)]


class Stage(ConfigModel):
    """One stage of a lineage."""

    name: Name
    """Name of the run and, without `output`, of its folder."""
    model: AnyModel
    """The start model: a folder, a Hub name, a run folder or a checkpoint; or a mapping for a new model."""
    base: str | None = None
    """Base model of a tuning's folder. Default: the one recorded there."""
    output: str | None = None
    """The run folder. Default: runs/<name>."""
    tokens: TokenCount | None = None
    """The budget in trained tokens, replay included (compute-equivalent)."""
    new_tokens: TokenCount | None = None
    """... or the budget in tokens of the new sources; replay comes on top."""
    seed: Seed = 0
    """Seed of the row order, of masks and spans, of new weights and of dropout."""
    data: DataConfig
    """The training data."""
    batch: BatchConfig = BatchConfig()
    """The batch of a step."""
    schedule: AnySchedule
    """The learning rate of each step."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """The optimizer."""
    objectives: list[AnyObjective] = []
    """The objectives. Default: that of the start model (next-token for a decoder)."""
    penalties: list[AnyPenalty] = []
    """Penalties that pull the weights to a reference."""
    tuning: AnyTuning = FullTuning(kind="full")
    """Which weights are trained."""
    experts: Annotated[ExpertsConfig | None, omit_unset] = None
    """Routers and balancing loss of a mixture of experts. Default: as the model's configuration asks."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """What is evaluated."""
    max_forgetting: Share | None = None
    """Retention gate: the largest allowed relative rise of the loss on a retained set, upper end of its interval. Default:
    none."""
    max_ability_drop: Annotated[Share | None, omit_unset] = None
    """Retention gate on `evaluation.abilities`: the largest allowed drop of their mean score (0 to 1), upper end of its
    interval; nor may one of them have certainly dropped by more. Default: none."""
    save: SaveConfig = SaveConfig()
    """Checkpoints."""
    compute: ComputeConfig = ComputeConfig()
    """How to compute."""
    parallel: Annotated[ParallelConfig | None, omit_unset] = None
    """How several processes share the model. Default: all of them hold one replica in shards."""
    track: Annotated[list[AnyTracker], omit_unset] = []
    """Experiment trackers that get the metrics while the run goes on. Default: none."""

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
            raise ValueError(
                f"data.sources: the shares add up to {given:.4g}, not to 1; "
                "one source may leave out its `share`, and gets the rest"
            )
        names = [source.name for source in self.data.sources]
        for path, name in (
            *(("objectives", name) for o in self.objectives for name in o.on),
            *(("evaluation", h.same_format_as) for _, h in self.evaluation.held_out_files() if h.same_format_as),
        ):
            if name not in names:
                raise ValueError(f"`{path}` names an unknown source {name!r}; {suggest_nearest_or_all(name, names)}")
        for shift in self.data.curriculum:
            total = sum(shift.shares.values())
            if abs(total - 1) > 1e-6:
                raise ValueError(f"data.curriculum: the shares of a change add up to {total:.4g}, not to 1")
        if self.optimizer.master_dtype:
            if self.compute.dtype != "bfloat16":
                raise ValueError("optimizer.master_dtype: bfloat16 needs `compute: {dtype: bfloat16}`")
            if self.penalties:
                raise ValueError(
                    "penalties: distances from a reference are lost in bfloat16; leave out optimizer.master_dtype"
                )
            if not isinstance(self.tuning, FullTuning):
                raise ValueError("optimizer.master_dtype is for `tuning: {kind: full}`; other kinds train few weights")
        if self.optimizer.release_gradients:
            if self.penalties or getattr(self.tuning, "orthogonal", None) is not None:
                raise ValueError(
                    "penalties: each adds its gradient to the whole one before the update; leave out "
                    "optimizer.release_gradients"
                )
            if any(isinstance(objective, GeneratingObjective) for objective in self.objectives):
                raise ValueError(
                    "objectives: on-policy rows are batches of their own; leave out optimizer.release_gradients"
                )
        if self.max_ability_drop is not None and self.evaluation.abilities is None:
            raise ValueError("`max_ability_drop` is of measured abilities; add evaluation.abilities: all")
        if self.new_tokens is not None and all(s.role == "replay" for s in self.data.sources):
            raise ValueError("`new_tokens` needs a source with role: new")
        return self

    def resolve_shares(self, examples: Mapping[str, int] = MappingProxyType({})) -> tuple[float, ...]:
        """The share of each source, those that were left out filled in; with `data.mixing` by the `examples` of each."""
        given = {source.name: source.share for source in self.data.sources}
        return tuple(fill_shares(given, self.data.mixing, examples).values())

    def fingerprint(self) -> str:
        """Of everything that decides the result: not of when checkpoints are written, where, ranks, trackers, giving up."""
        harmless = {
            "save": {"every", "keep"},
            "optimizer": {"max_skipped_steps"},
            "output": True,
            "compute": {"collective_timeout_seconds"},
            "parallel": True,
            "track": True,
            "evaluation": {"expected_losses"},
        }
        decisive = self.model_dump(mode="json", exclude=harmless)
        return fingerprint(with_fingerprint_names(decisive))

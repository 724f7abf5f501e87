"""The rows of an objective: one layout for each objective and row kind."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from postgrad.config.objectives import (
    ClassifyObjective,
    GeneratingObjective,
    MaskedObjective,
    NextTokenObjective,
    OnPolicyReplayObjective,
    PrefixLMObjective,
    RowsObjective,
    SpanCorruptionObjective,
    TextToTextObjective,
)
from postgrad.config.quantities import load_function
from postgrad.data.layouts.classification import ClozeRows, LabelledRows, TaggedRows
from postgrad.data.layouts.generation_prompts import PromptRows
from postgrad.data.layouts.masked_lm import MaskedRows
from postgrad.data.layouts.packed_examples import PackedExampleRows
from postgrad.data.layouts.packed_text import PackedRows
from postgrad.data.layouts.prefix_lm import PrefixRows
from postgrad.data.layouts.rows import ContextOptions, RowOptions, Rows
from postgrad.data.layouts.seq2seq import Seq2SeqRows
from postgrad.data.layouts.span_corruption import SpanCorruptionRows
from postgrad.data.layouts.windows import TooLongPolicy
from postgrad.data.problem_type import ProblemType
from postgrad.data.read.files import RawSource
from postgrad.data.tokens.store import TokenStore
from postgrad.data.tokens.subset import Subset
from postgrad.errors import StageError, format_names
from postgrad.plan.model_inputs import ModelInputs


def make_rows(
    objective: RowsObjective,
    store: TokenStore | Subset,
    model_inputs: ModelInputs,
    *,
    held_out: float = 0.0,
    excluded: np.ndarray | None = None,
    max_document_tokens: int | None = None,
    problem: ProblemType = ProblemType.CLASS,
    pack: bool = True,
    words: Mapping[str, str] = MappingProxyType({}),
    context: ContextOptions | None = None,
) -> Rows:
    """The rows of a store for an objective, as a model reads them. `pack=False`: one document per row.

    `words`: words for the labels of cloze rows. `context`: what teachers read beside the rows.
    """
    options = RowOptions(
        model_inputs.length, model_inputs.frame, model_inputs.lead, held_out, excluded, max_document_tokens, context
    )
    request = RowsRequest(store, model_inputs, options, problem, pack, words)
    return load_function(objective.rows_function)(objective, request)


class RowsRequest(NamedTuple):
    """What rows are made from: documents, the model's inputs, and options of all layouts.

    `problem` is the problem of a classifier, `words` the label words of a cloze; `pack`: several documents may share a row.
    """

    store: TokenStore | Subset
    inputs: ModelInputs
    options: RowOptions
    problem: ProblemType
    pack: bool
    words: Mapping[str, str]

    @property
    def is_running_text(self) -> bool:
        """Whether the documents have no marks of prompts and answers."""
        return self.store.marks(0) is None


def make_next_token_rows(objective: NextTokenObjective, request: RowsRequest) -> Rows:
    """Packed text, or packed examples."""
    options = request.options
    is_plain = not request.inputs.has_soft_prompt and options.context is None
    if request.is_running_text and is_plain and request.pack:
        return PackedRows(request.store, options)
    if request.is_running_text:
        options = _without_separator(options)
    return PackedExampleRows(
        request.store, options, train_on=objective.train_on, too_long=objective.too_long, pack=request.pack
    )


def make_prefix_rows(objective: PrefixLMObjective, request: RowsRequest) -> Rows:
    """A prefix and its continuation."""
    options = _without_separator(request.options) if request.is_running_text else request.options
    return PrefixRows(request.store, options, seed=request.inputs.seed, too_long=objective.too_long, pack=request.pack)


def make_masked_rows(objective: MaskedObjective, request: RowsRequest) -> Rows:
    """Masked text, or a cloze template for labelled rows."""
    inputs = request.inputs
    if not request.is_running_text:
        label_ids = verbalisers(request.store, inputs, request.words)
        return ClozeRows(request.store, request.options, mask_id=inputs.mask_id, verbalisers=label_ids)
    return MaskedRows(
        request.store,
        request.options,
        mask_id=inputs.mask_id,
        vocabulary=inputs.encoder.vocabulary,
        special_ids=inputs.special_ids,
        seed=inputs.seed,
        mask_rate=objective.share,
        continues_V=inputs.continues_V if objective.whole_words else None,
    )


def make_span_corruption_rows(objective: SpanCorruptionObjective, request: RowsRequest) -> Rows:
    """Text with sentinels for removed spans, and the spans as targets."""
    inputs = request.inputs
    return SpanCorruptionRows(
        request.store,
        request.options,
        sentinels=inputs.sentinels,
        target=inputs.target_frame,
        decoder_start=inputs.decoder_start,
        seed=inputs.seed,
        density=objective.density,
        mean_span=objective.mean_span,
    )


def make_seq2seq_rows(objective: TextToTextObjective, request: RowsRequest) -> Rows:
    """Source and target."""
    inputs = request.inputs
    return Seq2SeqRows(
        request.store,
        request.options,
        target_length=objective.target_length,
        target=inputs.target_frame,
        decoder_start=inputs.decoder_start,
        seed=inputs.seed,
        too_long=_resolve_too_long(objective, request.store.kind),
    )


def make_prompt_rows(objective: GeneratingObjective, request: RowsRequest) -> Rows:
    """Prompts for the model to continue, with their own answers where its answers are compared with these."""
    return PromptRows(
        request.store,
        request.options,
        prompt_tokens=objective.prompt_tokens,
        new_tokens=objective.max_new_tokens,
        eos=request.inputs.encoder.eos,
        with_answers=isinstance(objective, OnPolicyReplayObjective) and objective.score != "variety",
    )


def make_classification_rows(objective: ClassifyObjective, request: RowsRequest) -> Rows:
    """A text and its label, or words and their tags."""
    if request.problem == ProblemType.TAGS:
        return TaggedRows(request.store, request.options)
    return LabelledRows(
        request.store, request.options, kind=request.problem, token_types=request.inputs.has_token_types
    )


def _resolve_too_long(objective: TextToTextObjective, kind: str) -> TooLongPolicy:
    """A conversation is cut at its beginning, because the question is at its end."""
    if objective.too_long == "auto":
        return "cut-context" if kind in ("chat", "instruction") else "cut-end"
    return objective.too_long


def describe_skipped(skipped: Mapping[str, int]) -> list[str]:
    """Notes on skipped rows, by reason."""
    return [f"{count:,} rows are skipped ({reason})" for reason, count in skipped.items() if count]


def describe_passed_over(source: RawSource) -> list[str]:
    """A note on the files of a source's folder that are not read, by the reason."""
    listing = source.list_files() if source.path is not None else None
    if listing is None or not listing.passed_over:
        return []
    parts = (f"{len(names):,} ({reason}): {format_names(names, 3)}" for reason, names in listing.passed_over.items())
    split = f" of split {listing.split}" if listing.split else ""
    return [f"{len(listing.files):,} files{split} are read; passed over: {'; '.join(parts)}"]


def describe_omitted(omitted: Mapping[str, int]) -> list[str]:
    """Notes on parts of rows that their text leaves out."""
    return [f"{count:,} times a row has what its rendered text leaves out: {part}" for part, count in omitted.items()]


def describe_dropped(rows: Rows) -> list[str]:
    """Notes on documents that are skipped or cut."""
    cut: Mapping[str, int] = getattr(rows, "truncations", {})
    return describe_skipped(getattr(rows, "skipped", {})) + [
        f"{count:,} rows are too long; {what} is cut" for what, count in cut.items() if count
    ]


def verbalisers(store: TokenStore | Subset, model_inputs: ModelInputs, words: Mapping[str, str]) -> list[int]:
    """The token that a masked language model predicts at the mask for each label.

    Raises `StageError` for a word of several tokens.
    """
    token_ids: list[int] = []
    for label in store.labels or ():
        word = words.get(str(label), str(label))
        ids = model_inputs.tokenizer(word, add_special_tokens=False)["input_ids"]
        if len(ids) != 1 or ids[0] == model_inputs.tokenizer.unk_token_id:
            raise StageError(
                f"the word '{word}' for the label '{label}' is not one token of this tokenizer",
                where="data.sources.label_words",
                expected="a word of one token for each label",
            )
        token_ids.append(int(ids[0]))
    return token_ids


def _without_separator(options: RowOptions) -> RowOptions:
    """Options for running text, which has no answer for a separator to precede."""
    return dataclasses.replace(options, frame=dataclasses.replace(options.frame, separator_ids=()))

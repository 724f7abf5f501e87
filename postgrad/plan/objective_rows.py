"""The rows of an objective: one layout for each objective and row kind."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

from postgrad.config.objectives import (
    ClassifyObjective,
    MaskedObjective,
    NextTokenObjective,
    OnPolicyObjective,
    PrefixLMObjective,
    RowsObjective,
    SpanCorruptionObjective,
    TextToTextObjective,
)
from postgrad.data.layouts.classification import ClozeRows, LabelledRows, TaggedRows
from postgrad.data.layouts.generation_prompts import PromptRows
from postgrad.data.layouts.masked_lm import MaskedRows
from postgrad.data.layouts.packed_examples import PackedExampleRows
from postgrad.data.layouts.packed_text import PackedRows
from postgrad.data.layouts.prefix_lm import PrefixRows
from postgrad.data.layouts.rows import Rows
from postgrad.data.layouts.seq2seq import Seq2SeqRows
from postgrad.data.layouts.span_corruption import SpanCorruptionRows
from postgrad.data.layouts.windows import TooLongPolicy
from postgrad.data.tokens.store import TokenStore
from postgrad.data.tokens.subset import Subset
from postgrad.errors import StageError
from postgrad.objectives.classification_loss import ProblemType
from postgrad.plan.model_inputs import ModelInputs


def make_rows(
    objective: RowsObjective,
    store: TokenStore | Subset,
    model_inputs: ModelInputs,
    *,
    held_out: float = 0.0,
    excluded: np.ndarray | None = None,
    max_document_tokens: int | None = None,
    problem: ProblemType = "class",
    pack: bool = True,
    words: Mapping[str, str] = MappingProxyType({}),
) -> Rows:
    """The rows of a store for an objective, as a model reads them. `together=False`: no two documents in a row.

    `words` say the labels of rows that are answered at the mask of a template.
    """
    common: dict[str, Any] = {"held_out": held_out, "excluded": excluded, "max_document_tokens": max_document_tokens}
    framed: dict[str, Any] = {**common, "frame": model_inputs.frame, "lead": model_inputs.lead}
    match objective:
        case NextTokenObjective():
            running = store.marks(0) is None
            if running and not model_inputs.has_soft_prompt and pack:
                return PackedRows(store, model_inputs.length, **common)
            if running:  # there is no answer before which anything could stand
                framed["frame"] = dataclasses.replace(model_inputs.frame, separator_ids=())
            return PackedExampleRows(
                store,
                model_inputs.length,
                train_on=objective.train_on,
                too_long=objective.too_long,
                pack=pack,
                **framed,
            )
        case PrefixLMObjective():
            if store.marks(0) is None:
                framed["frame"] = dataclasses.replace(model_inputs.frame, separator_ids=())
            return PrefixRows(
                store, model_inputs.length, seed=model_inputs.seed, too_long=objective.too_long, pack=pack, **framed
            )
        case MaskedObjective() if store.marks(0) is not None:
            return ClozeRows(
                store,
                model_inputs.length,
                mask_id=model_inputs.mask_id,
                verbalisers=verbalisers(store, model_inputs, words),
                **framed,
            )
        case MaskedObjective():
            return MaskedRows(
                store,
                model_inputs.length,
                mask_id=model_inputs.mask_id,
                vocabulary=model_inputs.encoder.vocabulary,
                special_ids=model_inputs.special_ids,
                seed=model_inputs.seed,
                mask_rate=objective.share,
                continues_V=model_inputs.continues_V if objective.whole_words else None,
                **framed,
            )
        case SpanCorruptionObjective():
            return SpanCorruptionRows(
                store,
                model_inputs.length,
                sentinels=model_inputs.sentinels,
                eos=model_inputs.encoder.eos,
                decoder_start=model_inputs.decoder_start,
                seed=model_inputs.seed,
                density=objective.density,
                mean_span=objective.mean_span,
                **{**framed, "frame": _frame_without_eos(model_inputs)},
            )
        case TextToTextObjective():
            return Seq2SeqRows(
                store,
                model_inputs.length,
                objective.target_length,
                eos=model_inputs.encoder.eos,
                decoder_start=model_inputs.decoder_start,
                seed=model_inputs.seed,
                too_long=_resolve_too_long(objective, store.kind),
                **{**framed, "frame": _frame_without_eos(model_inputs)},
            )
        case OnPolicyObjective():
            return PromptRows(
                store,
                model_inputs.length,
                prompt_tokens=objective.prompt_tokens,
                new_tokens=objective.new_tokens,
                eos=model_inputs.encoder.eos,
                **framed,
            )
        case ClassifyObjective():
            if problem == "tags":
                return TaggedRows(store, model_inputs.length, **framed)
            return LabelledRows(
                store, model_inputs.length, kind=problem, token_types=model_inputs.has_token_types, **framed
            )


def _resolve_too_long(objective: TextToTextObjective, kind: str) -> TooLongPolicy:
    """A conversation is cut at its beginning, because the question is at its end."""
    if objective.too_long == "auto":
        return "cut-context" if kind in ("chat", "instruction") else "cut-end"
    return objective.too_long


def describe_skipped(skipped: Mapping[str, int]) -> list[str]:
    """Notes on skipped rows, by reason."""
    return [f"{count:,} rows are skipped ({reason})" for reason, count in skipped.items() if count]


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
                where="data.sources.words",
                expected="a word of one token for each label",
            )
        token_ids.append(int(ids[0]))
    return token_ids


def _frame_without_eos(model_inputs: ModelInputs) -> Any:
    """The frame for rows that append an EOS of their own to the text."""
    after = model_inputs.frame.suffix_ids
    return dataclasses.replace(
        model_inputs.frame, suffix_ids=after[:-1] if after[-1:] == (model_inputs.encoder.eos,) else after
    )

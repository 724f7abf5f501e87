"""Held-out sets as a model reads them: running text, rows of a task, or text with every token masked in turn."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from postgrad.config.objectives import ClassifyObjective, MaskedObjective, NextTokenObjective
from postgrad.data.layouts.windows import locate_texts, max_text_tokens, split_windows
from postgrad.data.problem_type import ProblemType
from postgrad.data.read.row_kinds import RUNNING_TEXT_KINDS
from postgrad.data.render.frame import Frame
from postgrad.data.tokens.held_out_split import select_documents
from postgrad.data.tokens.subset import Subset
from postgrad.errors import DataError
from postgrad.evaluation.held_out import HeldOutRows, HeldOutSet, HeldOutText
from postgrad.evaluation.pseudo_perplexity import MaskedHeldOutText, MaskedWindow
from postgrad.plan.held_out_documents import HeldOutDocuments
from postgrad.plan.model_inputs import ModelInputs
from postgrad.plan.objective_rows import describe_dropped, make_rows, verbalisers
from postgrad.storage.fingerprint import fingerprint


def make_held_out_set(
    held_out: HeldOutDocuments,
    model_inputs: ModelInputs,
    limit: int,
    notes: list[str],
    *,
    reserved_positions: int = 0,
    problem: ProblemType = ProblemType.CLASS,
) -> HeldOutSet:
    """A set as a model reads it, in the order of the documents' content hash, up to about `limit` tokens.

    Windows of running text leave `reserved_positions` free. Raises `DataError` when nothing of it can be scored.
    """
    if held_out.store.kind in RUNNING_TEXT_KINDS and isinstance(held_out.objective, NextTokenObjective):
        text = make_held_out_text(held_out, model_inputs, limit, notes)
        return replace(text, reserved_positions=reserved_positions)
    return _make_held_out_rows(held_out, model_inputs, limit, notes, problem)


def make_held_out_text(
    held_out: HeldOutDocuments, model_inputs: ModelInputs, limit: int, notes: list[str]
) -> HeldOutText:
    """Running text to be scored by a decoder."""
    table, encoder, unknown_id = held_out.document_table, model_inputs.encoder, model_inputs.unknown_id
    order = np.argsort(table["digest"], kind="stable")
    documents: list[np.ndarray] = []
    positions: list[int] = []
    total = 0
    for position in order:
        ids = np.asarray(held_out.store.read(int(held_out.documents[position]))).astype(np.int64)
        ids = ids[:-1] if len(ids) and ids[-1] == encoder.eos else ids
        if (ids[max(1, model_inputs.lead) :] == unknown_id).all():  # also where there is nothing
            continue
        documents.append(ids)
        positions.append(position)
        total += len(ids)
        if total >= limit:
            break
    if not documents:
        raise DataError(
            f"no document of the held-out set '{held_out.name}' has two tokens", where=f"evaluation.{held_out.role}"
        )
    if len(documents) < len(order) and total >= limit:
        notes.append(_subset_note(held_out.name, len(documents), len(order), limit))
    text = HeldOutText(
        held_out.name,
        held_out.role,
        tuple(documents),
        table["bytes"][positions].astype(np.int64),
        fingerprint([_sorted_digests(table), limit, encoder.fingerprint]),
        table["digest"][positions].astype(np.uint64),
        prefix=model_inputs.text_prefix,
        unknown_id=unknown_id,
    ).take_tokens(limit)
    if text.unknown_tokens:
        share = text.unknown_tokens / (text.tokens + text.unknown_tokens)
        notes.append(
            f"{held_out.name}: {100 * share:.2g} % of its tokens are {model_inputs.tokenizer.unk_token}; they are scored apart"
        )
    return text


def _make_held_out_rows(
    held_out: HeldOutDocuments, model_inputs: ModelInputs, limit: int, notes: list[str], problem: ProblemType
) -> HeldOutRows:
    """Rows of a task, or text for an encoder or an encoder-decoder, in the objective's layout."""
    part, num_documents = _first_documents(held_out, limit)
    # Held-out text is masked or corrupted in the same way in every stage, whatever its seed.
    model_inputs = replace(model_inputs, seed=0)
    rows = make_rows(held_out.objective, part, model_inputs, problem=problem, pack=False, words=held_out.words)
    notes += [f"{held_out.name}: {note}" for note in describe_dropped(rows)]
    if not len(rows):
        raise DataError(
            f"no document of the held-out set '{held_out.name}' can be scored",
            where=f"evaluation.{held_out.role}",
            expected="documents that fit a row and have something to predict",
        )
    if num_documents < len(held_out.documents):
        notes.append(_subset_note(held_out.name, num_documents, len(held_out.documents), limit))
    # Documents without a row (too short, too long) are not in the set.
    scored, document_R = np.unique(np.asarray(rows.document_R), return_inverse=True)
    identity = [
        _sorted_digests(held_out.document_table),
        limit,
        model_inputs.encoder.fingerprint,
        held_out.objective.model_dump(mode="json"),
        held_out.renderer.fingerprint if held_out.renderer else None,
        model_inputs.length,
    ]
    is_cloze = isinstance(held_out.objective, MaskedObjective) and held_out.store.kind == "labelled"
    if not isinstance(held_out.objective, ClassifyObjective):
        set_problem = ProblemType.CLASS if is_cloze else None
    else:
        set_problem = problem
    return HeldOutRows(
        held_out.name,
        held_out.role,
        tuple(rows.get_row(i, i) for i in range(len(rows))),
        document_R,
        part.documents["bytes"][scored].astype(np.int64),
        fingerprint(identity),
        part.documents["digest"][scored].astype(np.uint64),
        part.documents["tokens"][scored].astype(np.int64),
        set_problem,
        tuple(str(label) for label in held_out.store.labels or ()),
        _frame_parts(model_inputs.frame),
        model_inputs.pad_id,
        tuple(verbalisers(part, model_inputs, held_out.words)) if is_cloze else (),
    )


def make_masked_held_out_text(held_out: HeldOutDocuments, model_inputs: ModelInputs, limit: int) -> MaskedHeldOutText:
    """Running text of which about `limit` tokens are masked one at a time: whole windows, up to the one that reaches it."""
    part, _ = _first_documents(held_out, 2 * limit)
    frame, special = model_inputs.frame, np.array(model_inputs.special_ids)
    cut = split_windows(
        locate_texts(part, select_documents(part), model_inputs.lead),
        max_text_tokens(model_inputs.length, frame.size(1), 1),
    )
    windows: list[MaskedWindow] = []
    num_masked = 0
    text_tokens: dict[int, int] = {}  # of each document that has a window, in the order of the windows
    for document, start, stop in zip(cut.document_R.tolist(), cut.start_R.tolist(), cut.stop_R.tolist(), strict=True):
        ids = part.read(document, start, stop).astype(np.int64)
        maskable = np.flatnonzero(~np.isin(ids, special))
        if not len(maskable):
            continue
        text_tokens[document] = text_tokens.get(document, 0) + len(ids)
        number = list(text_tokens).index(document)
        windows.append(MaskedWindow(number, frame.wrap(ids), maskable + len(frame.prefix_ids)))
        num_masked += len(maskable)
        if num_masked >= limit:
            break
    if not windows:
        raise DataError(
            f"no document of the held-out set '{held_out.name}' has a token to mask",
            where=f"evaluation.{held_out.role}",
        )
    table = part.documents[list(text_tokens)]
    share = np.array(list(text_tokens.values())) / np.maximum(table["tokens"] - 1 - model_inputs.lead, 1)
    identity = [
        [int(d) for d in table["digest"]],
        model_inputs.encoder.fingerprint,
        [list(ids) for ids in _frame_parts(frame)],
        model_inputs.length,
    ]
    return MaskedHeldOutText(
        held_out.name,
        held_out.role,
        tuple(windows),
        np.rint(table["bytes"] * np.minimum(1.0, share)).astype(np.int64),
        fingerprint(identity),
        model_inputs.mask_id,
    )


def _first_documents(held_out: HeldOutDocuments, limit: int) -> tuple[Subset, int]:
    """The first documents by content hash, up to the one that reaches `limit` tokens, and their number at most."""
    table = held_out.document_table
    order = np.argsort(table["digest"], kind="stable")
    count = int(np.searchsorted(np.cumsum(table["tokens"][order]), limit)) + 1
    return Subset(held_out.store, held_out.documents[order[:count]]), count


def _sorted_digests(table: np.ndarray) -> list[int]:
    return [int(d) for d in np.sort(table["digest"])]


def _frame_parts(frame: Frame) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    return (frame.prefix_ids, frame.separator_ids, frame.suffix_ids)


def _subset_note(name: str, scored: int, documents: int, limit: int) -> str:
    return f"{name}: {scored:,} of {documents:,} documents are scored (evaluation.max_tokens: {limit:,})"

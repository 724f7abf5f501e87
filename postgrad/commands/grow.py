"""Grow a model's vocabulary: learn tokens on new text, add a row for each, and publish a plain folder.

Compare models of two vocabularies in bits per byte: their tokens differ. Train in two stages: the embeddings alone, then all
weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from postgrad.analysis.domain_shift import fertility
from postgrad.commands.results import Result
from postgrad.commands.score_files import context_length, load_file_sets, score_model
from postgrad.data.read.documents import read_documents
from postgrad.data.read.files import RawSource as Files
from postgrad.data.tokens.extend_vocabulary import extend_vocabulary
from postgrad.errors import DataError, StageError
from postgrad.lineage.growth import GrowthCost, write_growth
from postgrad.models.grow_embeddings import grow_embeddings
from postgrad.models.layers import get_layer_stacks
from postgrad.models.location import ModelLocation, locate_model
from postgrad.models.pretrained import load_tokenizer, stored_dtype
from postgrad.models.published_vocabulary import Vocabulary, publish_pretrained
from postgrad.storage.cache_folder import cache_folder
from postgrad.tuning.open_model import open_model

_MAX_BYTES = 64 << 20
_MAX_SCORED_TOKENS = 50_000
"""Tokens of each old text that both models score."""


@dataclass(frozen=True)
class TokenizerFit(Result):
    """How finely a tokenizer splits a text."""

    bytes_per_token: float
    tokens_per_word: float


@dataclass(frozen=True)
class TokenizerChange(Result):
    """How finely a text is split before and after the vocabulary has grown."""

    before: TokenizerFit
    after: TokenizerFit


@dataclass(frozen=True)
class GrownModel(Result):
    """A model folder with a larger vocabulary."""

    model: str
    folder: Path
    added: int
    """Tokens that were added."""
    tokens: int
    """Size of the vocabulary."""
    blocks: int
    """Transformer blocks of the model."""
    first: tuple[str, ...]
    """The first tokens that were added, at most 20."""
    new: TokenizerChange
    old: TokenizerChange | None
    """None without old text."""
    old_bits: GrowthCost | None = None
    """What growing costs on the old text, before any training; None without old text."""


def grow_vocabulary(
    model: str,
    files: Sequence[str],
    out: Path | str,
    *,
    tokens: int = 1000,
    head: str = "mean",
    old: Sequence[str] = (),
    base: str | None = None,
    cache: Path | None = None,
) -> GrownModel:
    """Add up to `tokens` tokens that are frequent in files to a model, and publish it in the folder `out`.

    `head`: rows of an untied output head, the `mean` of the pieces' rows or `zero`. `old`: old text; both models are scored on
    it, as the new tokens cost some of its loss before any training, and the folder keeps the result. Raises `StageError` for
    options that cannot be used, `DataError` when no pair of tokens is frequent.
    """
    out = Path(out)
    if out.exists():
        raise StageError(f"{out} already exists", where="--out", hint="name a folder that does not exist")
    if head not in ("mean", "zero"):
        raise StageError(f"there is no head {head!r}", where="--head", expected="mean or zero")
    if tokens < 1:
        raise StageError(f"cannot add {tokens} tokens", where="--tokens", expected="at least 1")
    start = locate_model(str(model), Path.cwd(), base)
    tokenizer = load_tokenizer(start.full_model)
    new_texts, old_texts = _read_texts(files, "FILES"), _read_texts(old, "--old")
    opened = open_model(start)
    for tuning in opened.tunings:
        tuning.merge(tokenizer)
    before, kept = tokenizer.backend_tokenizer, Vocabulary.copy(opened.model, tokenizer)
    extension = extend_vocabulary(before.to_str(), new_texts, tokens)
    if not extension.old_ids:
        raise DataError(
            "no pair of adjacent tokens occurs twice", where="FILES", expected="more text, or text of another kind"
        )
    after = Tokenizer.from_str(extension.tokenizer_json)
    ids = after.get_vocab()
    grow_embeddings(opened.model, {ids[token]: pieces for token, pieces in extension.old_ids.items()}, head)
    tokenizer._tokenizer = after
    costs: list[GrowthCost] = []

    def add_cost(staged: Path) -> None:
        if old_texts:
            costs.append(_measure_cost(start, ModelLocation(out.name, staged), old, cache or cache_folder()))
            write_growth(staged, costs[0])

    publish_pretrained(out, opened.model, tokenizer, dtype=stored_dtype(start), before=kept, add=add_cost)
    return GrownModel(
        str(model),
        out,
        len(extension.old_ids),
        len(tokenizer),
        max(map(len, get_layer_stacks(opened.model))),
        tuple(list(extension.old_ids)[:20]),
        _compare_tokenizers(new_texts, before, after),
        _compare_tokenizers(old_texts, before, after) if old_texts else None,
        costs[0] if costs else None,
    )


def _measure_cost(model: ModelLocation, grown: ModelLocation, old: Sequence[str], cache: Path) -> GrowthCost:
    """The bits per byte of old text, of the model and of the grown one."""
    bits = []
    for start in (model, grown):
        context = context_length(start, None)
        text = load_file_sets(start, list(map(str, old)), "auto", None, context, cache, limit=_MAX_SCORED_TOKENS)
        scores = score_model(start, text.sets, context, cache).values()
        total = sum(float(each.nats_W.sum()) for each in scores) / math.log(2)
        bits.append(total / max(sum(int(each.bytes_N.sum()) for each in scores), 1))
    return GrowthCost(model=model.name, before=bits[0], after=bits[1])


def _read_texts(files: Sequence[str], where: str) -> list[str]:
    """The texts of files, up to about 64 MB."""
    texts: list[str] = []
    size = 0
    for path in files:
        for document in read_documents(Files("text", path, root=Path.cwd(), where=where)):
            if document.text and size < _MAX_BYTES:
                texts.append(document.text)
                size += len(document.text)
    return texts


def _compare_tokenizers(texts: Sequence[str], before: Tokenizer, after: Tokenizer) -> TokenizerChange:
    def fit(tokenizer: Tokenizer) -> TokenizerFit:
        measured = fertility(
            texts, lambda batch: [e.ids for e in tokenizer.encode_batch_fast(batch, add_special_tokens=False)], []
        )
        return TokenizerFit(measured.bytes_per_token, measured.tokens_per_word)

    return TokenizerChange(fit(before), fit(after))

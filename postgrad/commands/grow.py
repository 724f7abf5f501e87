"""Grow a model's vocabulary: learn tokens on new text, add a row for each, and publish a plain folder.

Compare models of two vocabularies in bits per byte: their tokens differ. Train in two stages: the embeddings alone, then all
weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from postgrad.analysis.domain_shift import fertility
from postgrad.commands.results import Result
from postgrad.data.read.documents import read_documents
from postgrad.data.read.files import RawSource as Files
from postgrad.data.tokens.extend_vocabulary import extend_vocabulary
from postgrad.errors import DataError, StageError
from postgrad.models.grow_embeddings import grow_embeddings
from postgrad.models.layers import get_layer_stacks
from postgrad.models.location import locate_model
from postgrad.models.pretrained import load_tokenizer, stored_dtype
from postgrad.models.published_vocabulary import Vocabulary, publish_pretrained
from postgrad.tuning.open_model import open_model

_MAX_BYTES = 64 << 20


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


def grow_vocabulary(
    model: str,
    files: Sequence[str],
    out: Path | str,
    *,
    tokens: int = 1000,
    head: str = "mean",
    old: Sequence[str] = (),
    base: str | None = None,
) -> GrownModel:
    """Add up to `tokens` tokens that are frequent in files to a model, and publish it in the folder `out`.

    `head`: rows of an untied output head, the `mean` of the pieces' rows or `zero`. `old`: old text, to verify that it is
    split as before. Raises `StageError` for options that cannot be used, `DataError` when no pair of tokens is frequent.
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
    publish_pretrained(out, opened.model, tokenizer, dtype=stored_dtype(start), before=kept)
    return GrownModel(
        str(model),
        out,
        len(extension.old_ids),
        len(tokenizer),
        max(map(len, get_layer_stacks(opened.model))),
        tuple(list(extension.old_ids)[:20]),
        _compare_tokenizers(new_texts, before, after),
        _compare_tokenizers(old_texts, before, after) if old_texts else None,
    )


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

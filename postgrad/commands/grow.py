"""How does a model get words for new text? Tokens learnt on it, a row for each, and a plain folder to go on from.

Afterwards models are compared in bits per byte alone: tokens of two vocabularies are not the same tokens. Training goes in two
stages: first the embeddings by themselves, then everything.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from postgrad.analysis.domain_shift import Fertility, fertility
from postgrad.data.read.documents import read_documents
from postgrad.data.read.files import RawSource as Files
from postgrad.data.tokens.extend_vocabulary import extend_vocabulary
from postgrad.errors import DataError, StageError
from postgrad.models.grow_embeddings import grow_embeddings
from postgrad.models.layers import get_layer_stacks
from postgrad.models.location import locate_model
from postgrad.models.pretrained import load_tokenizer, save_pretrained, stored_dtype
from postgrad.reports.html.notation import plain_text
from postgrad.storage.atomic import publish_folder
from postgrad.tuning.open_model import open_model

_MAX_BYTES = 64 << 20


def grow_vocabulary(
    model: str, files: Sequence[str], out: Path, *, tokens: int, head: str, old: Sequence[str], base: str | None
) -> dict[str, Any]:
    """Add tokens that are frequent in files to a model and publish it. Raises the error of whatever cannot be."""
    if out.exists():
        raise StageError(f"{out} is there already", where="--out", hint="name a folder that does not exist")
    if head not in ("mean", "zero"):
        raise StageError(f"there is no head {head!r}", where="--head", expected="mean or zero")
    if tokens < 1:
        raise StageError(f"{tokens} tokens", where="--tokens", expected="at least 1")
    start = locate_model(model, Path.cwd(), base)
    tokenizer = load_tokenizer(start.full_model)
    texts, kept = _read_texts(files, "FILES"), _read_texts(old, "--old") if old else []
    before = tokenizer.backend_tokenizer
    grown = extend_vocabulary(before.to_str(), texts, tokens)
    if not grown.old_ids:
        raise DataError(
            "no pair of tokens occurs twice side by side", where="FILES", expected="more text, or text of another kind"
        )
    after = Tokenizer.from_str(grown.tokenizer_json)
    opened = open_model(start)
    for tuning in opened.tunings:
        tuning.merge(tokenizer)
    ids = after.get_vocab()
    grow_embeddings(opened.model, {ids[token]: parts for token, parts in grown.old_ids.items()}, head)
    tokenizer._tokenizer = after
    publish_folder(out, lambda staged: save_pretrained(opened.model, tokenizer, staged, dtype=stored_dtype(start)))
    found = {
        "folder": str(out),
        "added": len(grown.old_ids),
        "tokens": len(tokenizer),
        "blocks": max(map(len, get_layer_stacks(opened.model))),
        "first": list(grown.old_ids)[:20],
        "new": _compare_tokenizers(texts, before, after),
        "old": _compare_tokenizers(kept, before, after) if kept else None,
    }
    return {"text": "\n".join(_lines(model, found)), **found}


def _read_texts(files: Sequence[str], where: str) -> list[str]:
    """The texts of files, up to about 64 MB."""
    out: list[str] = []
    size = 0
    for path in files:
        for document in islice(read_documents(Files("text", path, root=Path.cwd(), where=where)), None):
            if document.text and size < _MAX_BYTES:
                out.append(document.text)
                size += len(document.text)
    return out


def _compare_tokenizers(texts: Sequence[str], before: Tokenizer, after: Tokenizer) -> dict[str, dict[str, float]]:
    def measured(tokenizer: Tokenizer) -> Fertility:
        return fertility(
            texts, lambda some: [e.ids for e in tokenizer.encode_batch_fast(some, add_special_tokens=False)], []
        )

    return {
        name: {"bytes_per_token": m.bytes_per_token, "tokens_per_word": m.tokens_per_word}
        for name, m in (("before", measured(before)), ("after", measured(after)))
    }


def _lines(model: str, result: dict[str, Any]) -> list[str]:
    out = result["folder"]
    lines = [f"{out}: {model} with {result['added']:,} new tokens ({result['tokens']:,} in all)"]
    for name in ("new", "old"):
        if result[name]:
            before, after = result[name]["before"], result[name]["after"]
            fewer = 1 - before["bytes_per_token"] / after["bytes_per_token"]
            lines.append(
                f"  {name} text: {before['bytes_per_token']:.2f} -> {after['bytes_per_token']:.2f} bytes per token "
                f"({fewer:.0%} fewer tokens), {before['tokens_per_word']:.2f} -> {after['tokens_per_word']:.2f} tokens per word"
            )
    lines += [
        "  such as " + " ".join(plain_text(token) for token in result["first"][:12]),
        f"train it in two stages: first `tuning: {{kind: blocks, all_but_first: {result['blocks']}, embeddings: true}}`, "
        "then all weights;",
        "compare models of two vocabularies in bits per byte",
        f"next: {shlex.join(['postgrad', 'eval', out, 'NEW'])}",
    ]
    return lines

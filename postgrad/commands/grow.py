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
from postgrad.data.read.files import Source as Files
from postgrad.data.tokens.extend_vocabulary import grow
from postgrad.errors import DataError, StageError
from postgrad.models.grow_embeddings import grow_tables
from postgrad.models.pretrained import load_tokenizer, locate, save_pretrained, stacks_of, stored_dtype
from postgrad.reports.html.notation import plain
from postgrad.storage.atomic import publish
from postgrad.tuning.open_model import open_model

_MOST_BYTES = 64 << 20


def grow_vocabulary(
    model: str, files: Sequence[str], out: Path, *, tokens: int, head: str, old: Sequence[str], base: str | None
) -> dict[str, Any]:
    """Add tokens that are frequent in files to a model and publish it. Raises the error of whatever cannot be."""
    if out.exists():
        raise StageError(f"{out} is there already", where="--out", way_out="name a folder that does not exist")
    if head not in ("mean", "zero"):
        raise StageError(f"there is no head {head!r}", where="--head", expected="mean or zero")
    if tokens < 1:
        raise StageError(f"{tokens} tokens", where="--tokens", expected="at least 1")
    start = locate(model, Path.cwd(), base)
    tokenizer = load_tokenizer(start.plain)
    texts, kept = _texts(files, "FILES"), _texts(old, "--old") if old else []
    before = tokenizer.backend_tokenizer
    grown = grow(before.to_str(), texts, tokens)
    if not grown.parts:
        raise DataError(
            "no pair of tokens occurs twice side by side", where="FILES", expected="more text, or text of another kind"
        )
    after = Tokenizer.from_str(grown.json)
    opened = open_model(start)
    for tuning in opened.tunings:
        tuning.merge(tokenizer)
    ids = after.get_vocab()
    grow_tables(opened.model, {ids[token]: parts for token, parts in grown.parts.items()}, head)
    tokenizer._tokenizer = after
    publish(out, lambda staged: save_pretrained(opened.model, tokenizer, staged, dtype=stored_dtype(start)))
    found = {
        "folder": str(out),
        "added": len(grown.parts),
        "tokens": len(tokenizer),
        "blocks": max(map(len, stacks_of(opened.model))),
        "first": list(grown.parts)[:20],
        "new": _both(texts, before, after),
        "old": _both(kept, before, after) if kept else None,
    }
    return {"text": "\n".join(_lines(model, found)), **found}


def _texts(files: Sequence[str], where: str) -> list[str]:
    """The texts of files, up to about 64 MB."""
    out: list[str] = []
    size = 0
    for path in files:
        for document in islice(read_documents(Files("text", path, root=Path.cwd(), where=where)), None):
            if document.text and size < _MOST_BYTES:
                out.append(document.text)
                size += len(document.text)
    return out


def _both(texts: Sequence[str], before: Tokenizer, after: Tokenizer) -> dict[str, dict[str, float]]:
    def measured(tokenizer: Tokenizer) -> Fertility:
        return fertility(
            texts, lambda some: [e.ids for e in tokenizer.encode_batch_fast(some, add_special_tokens=False)], []
        )

    return {
        name: {"bytes_per_token": m.bytes_per_token, "tokens_per_word": m.tokens_per_word}
        for name, m in (("before", measured(before)), ("after", measured(after)))
    }


def _lines(model: str, found: dict[str, Any]) -> list[str]:
    out = found["folder"]
    lines = [f"{out}: {model} with {found['added']:,} new tokens ({found['tokens']:,} in all)"]
    for name in ("new", "old"):
        if found[name]:
            before, after = found[name]["before"], found[name]["after"]
            fewer = 1 - before["bytes_per_token"] / after["bytes_per_token"]
            lines.append(
                f"  {name} text: {before['bytes_per_token']:.2f} -> {after['bytes_per_token']:.2f} bytes per token "
                f"({fewer:.0%} fewer tokens), {before['tokens_per_word']:.2f} -> {after['tokens_per_word']:.2f} tokens per word"
            )
    lines += [
        "  such as " + " ".join(plain(token) for token in found["first"][:12]),
        f"train it in two stages: first `tuning: {{kind: blocks, all_but_first: {found['blocks']}, embeddings: true}}`, "
        "then all weights;",
        "compare models of two vocabularies in bits per byte",
        f"next: {shlex.join(['postgrad', 'eval', out, 'NEW'])}",
    ]
    return lines

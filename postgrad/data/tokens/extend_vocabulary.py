"""Which tokens does a tokenizer lack for new text? BPE, continued: new merges behind the old ones.

Byte-pair encoding goes on where it ended (Sennrich et al. 2016, arXiv 1508.07909): the new text is cut by the old vocabulary,
and the most frequent pair of neighbours becomes a token, again and again. Old merges come first, so a text is cut as before
wherever no new merge applies, and no token changes its id. Characters that the vocabulary lacks, and that it spells in bytes or
not at all, come before the merges.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from tokenizers import Tokenizer, models

from postgrad.errors import ModelError

_MIN_COUNT = 2
"""Occurrences of a pair, or of a character, that make it worth a token."""
_SPACE = "▁"


@dataclass(frozen=True)
class ExtendedTokenizer:
    """A tokenizer with more tokens: its JSON, and for each new token the old ids that stood for it."""

    tokenizer_json: str
    old_ids: dict[str, list[int]]


def extend_vocabulary(tokenizer_json: str, texts: Iterable[str], limit: int) -> ExtendedTokenizer:
    """Add at most `most` tokens that are frequent in `texts`. Raises `ModelError` for a tokenizer that is no BPE."""
    said: dict[str, Any] = json.loads(tokenizer_json)
    if said["model"]["type"] != "BPE":
        raise ModelError(
            f"the tokenizer is of the kind {said['model']['type']}, whose pieces are not made by merges",
            where="model",
            expected="a BPE tokenizer, as Llama, GPT-2, Qwen, Mistral or RoBERTa have",
        )
    old = Tokenizer.from_str(tokenizer_json)
    words = _count_words(old, texts)
    vocabulary: dict[str, int] = dict(said["model"]["vocab"])
    merges: list[Any] = [list(m) if not isinstance(m, str) else m.split(" ") for m in said["model"]["merges"]]
    after = max([*vocabulary.values(), *(token["id"] for token in said["added_tokens"])]) + 1
    parts: dict[str, list[int]] = {}

    def add(token: str, ids: list[int]) -> None:
        vocabulary[token] = after + len(parts)
        parts[token] = ids

    for character, count in _count_characters(words).most_common():
        if len(parts) < limit and count >= _MIN_COUNT and character not in vocabulary:
            add(character, _fallback_ids(character, said["model"], vocabulary))
    pieces = _tokenize_words(words, vocabulary, merges, said["model"])
    learnt = _PairCounts(pieces)
    known = dict(vocabulary)
    while len(parts) < limit:
        pair = learnt.most_frequent()
        if pair is None:
            break
        merges.append(list(pair))
        token = "".join(pair)
        if token not in known:
            ids = [i for piece in pair for i in parts.get(piece, [known[piece]])]
            add(token, ids)
            known[token] = vocabulary[token]
        learnt.merge(pair, token)
    said["model"]["vocab"], said["model"]["merges"] = vocabulary, merges
    return ExtendedTokenizer(json.dumps(said, ensure_ascii=False), parts)


def _count_words(tokenizer: Tokenizer, texts: Iterable[str]) -> Counter[str]:
    """What the model of the tokenizer is given to cut, and how often."""
    words: Counter[str] = Counter()
    for text in texts:
        text = tokenizer.normalizer.normalize_str(text) if tokenizer.normalizer else text
        if tokenizer.pre_tokenizer:
            words.update(word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text))
        else:  # the whole text is one word to it; tokens shall not reach over spaces all the same
            first, *others = text.split(_SPACE)
            words.update([*([first] if first else []), *(_SPACE + other for other in others)])
    return words


def _count_characters(words: Counter[str]) -> Counter[str]:
    found: Counter[str] = Counter()
    for word, count in words.items():
        for character in word:
            found[character] += count
    return found


def _fallback_ids(character: str, model: dict[str, Any], vocabulary: dict[str, int]) -> list[int]:
    """The old ids of a character that the vocabulary lacks: its bytes, or the unknown token."""
    bytes_ = [f"<0x{byte:02X}>" for byte in character.encode()]
    if model.get("byte_fallback") and all(byte in vocabulary for byte in bytes_):
        return [vocabulary[byte] for byte in bytes_]
    return [vocabulary[model["unk_token"]]] if model.get("unk_token") in vocabulary else []


def _tokenize_words(
    words: Counter[str], vocabulary: dict[str, int], merges: list[Any], model: dict[str, Any]
) -> list[tuple[list[str], int]]:
    """Each word as the tokens that it is cut into, and how often it occurs; what would cross an unknown is left out."""
    options = {"unk_token": model["unk_token"]} if model.get("unk_token") else {}
    cutter = models.BPE(vocabulary, [tuple(merge) for merge in merges], **options)
    unknown = model.get("unk_token")
    out: list[tuple[list[str], int]] = []
    for word, count in words.items():
        run: list[str] = []
        for token in cutter.tokenize(word):
            if token.value == unknown:
                out.append((run, count))
                run = []
            else:
                run.append(token.value)
        out.append((run, count))
    return [(run, count) for run, count in out if len(run) > 1]


class _PairCounts:
    """How often two tokens stand side by side, kept up to date as pairs become tokens."""

    def __init__(self, pieces: list[tuple[list[str], int]]) -> None:
        self.pieces = pieces
        self.counts: Counter[tuple[str, str]] = Counter()
        self.positions: dict[tuple[str, str], set[int]] = defaultdict(set)
        for number, (run, count) in enumerate(pieces):
            self._count(number, run, count)

    def most_frequent(self) -> tuple[str, str] | None:
        """The most frequent pair, ties by the alphabet; None when none is worth a token."""
        if not self.counts:
            return None
        pair, count = min(self.counts.items(), key=lambda item: (-item[1], item[0]))
        return pair if count >= _MIN_COUNT else None

    def merge(self, pair: tuple[str, str], token: str) -> None:
        """Let a pair be one token everywhere."""
        for number in sorted(self.positions[pair]):
            run, count = self.pieces[number]
            self._count(number, run, -count)
            merged: list[str] = []
            i = 0
            while i < len(run):
                if tuple(run[i : i + 2]) == pair:
                    merged.append(token)
                    i += 2
                else:
                    merged.append(run[i])
                    i += 1
            self.pieces[number] = (merged, count)
            self._count(number, merged, count)

    def _count(self, number: int, run: list[str], count: int) -> None:
        for pair in pairwise(run):
            self.counts[pair] += count
            if count > 0:
                self.positions[pair].add(number)
            else:
                self.positions[pair].discard(number)
                if self.counts[pair] <= 0:
                    del self.counts[pair]

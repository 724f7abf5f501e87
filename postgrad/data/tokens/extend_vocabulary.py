"""Vocabulary extension: BPE training on new text continues after the last merge of a tokenizer.

Byte-pair encoding (Sennrich et al. 2016, arXiv 1508.07909): new text is tokenised with the old vocabulary, and the most
frequent pair of neighbours becomes a token, repeatedly. Old merges have priority, so text is tokenised as before wherever no
new merge applies, and no token changes its id. Characters that the vocabulary lacks (spelt in bytes or unknown) are added
before the merges.
"""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from tokenizers import Tokenizer, models

from postgrad.errors import ModelError

_MIN_COUNT = 2
"""Occurrences from which a pair or a character becomes a token."""
_SPACE = "▁"


@dataclass(frozen=True)
class ExtendedTokenizer:
    """A tokenizer with more tokens: its JSON, and for each new token the old ids that encoded it."""

    tokenizer_json: str
    old_ids: dict[str, list[int]]


def extend_vocabulary(tokenizer_json: str, texts: Iterable[str], limit: int) -> ExtendedTokenizer:
    """Add up to `limit` tokens that are frequent in `texts`. Raises `ModelError` for a tokenizer that is no BPE."""
    config: dict[str, Any] = json.loads(tokenizer_json)
    if config["model"]["type"] != "BPE":
        raise ModelError(
            f"the tokenizer is of type {config['model']['type']}, which has no merges",
            where="model",
            expected="a BPE tokenizer, as in Llama, GPT-2, Qwen, Mistral or RoBERTa",
        )
    old = Tokenizer.from_str(tokenizer_json)
    words = _count_words(old, _split_added_tokens(texts, [token["content"] for token in config["added_tokens"]]))
    # `tokenizers` numbers added tokens from the end of the vocabulary, unless the vocabulary has them.
    added = {token["content"]: token["id"] for token in config["added_tokens"]}
    vocabulary: dict[str, int] = {**added, **config["model"]["vocab"]}
    merges: list[Any] = [list(m) if not isinstance(m, str) else m.split(" ") for m in config["model"]["merges"]]
    first_new = max(vocabulary.values()) + 1
    old_ids: dict[str, list[int]] = {}

    def add(token: str, ids: list[int]) -> None:
        vocabulary[token] = first_new + len(old_ids)
        old_ids[token] = ids

    for character, count in _count_characters(words).most_common():
        if len(old_ids) < limit and count >= _MIN_COUNT and character not in vocabulary:
            add(character, _fallback_ids(character, config["model"], vocabulary))
    pieces = _tokenize_words(words, vocabulary, merges, config["model"])
    pair_counts = _PairCounts(pieces)
    known = dict(vocabulary)
    while len(old_ids) < limit:
        pair = pair_counts.most_frequent()
        if pair is None:
            break
        merges.append(list(pair))
        token = "".join(pair)
        if token not in known:
            ids = [i for piece in pair for i in old_ids.get(piece, [known[piece]])]
            add(token, ids)
            known[token] = vocabulary[token]
        pair_counts.merge(pair, token)
    config["model"]["vocab"], config["model"]["merges"] = vocabulary, merges
    return ExtendedTokenizer(json.dumps(config, ensure_ascii=False), old_ids)


def _split_added_tokens(texts: Iterable[str], added: Sequence[str]) -> Iterator[str]:
    """The texts between added tokens, which are found before anything else and are never merged."""
    pattern = re.compile("|".join(map(re.escape, sorted(added, key=len, reverse=True))) or r"(?!)")
    for text in texts:
        yield from filter(None, pattern.split(text))


def _count_words(tokenizer: Tokenizer, texts: Iterable[str]) -> Counter[str]:
    """The pre-tokenised words of the texts, with their counts."""
    words: Counter[str] = Counter()
    for text in texts:
        text = tokenizer.normalizer.normalize_str(text) if tokenizer.normalizer else text
        if tokenizer.pre_tokenizer:
            words.update(word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text))
        else:  # without a pre-tokenizer, keep new tokens from crossing spaces
            first, *others = text.split(_SPACE)
            words.update([*([first] if first else []), *(_SPACE + other for other in others)])
    return words


def _count_characters(words: Counter[str]) -> Counter[str]:
    counts: Counter[str] = Counter()
    for word, count in words.items():
        for character in word:
            counts[character] += count
    return counts


def _fallback_ids(character: str, model: dict[str, Any], vocabulary: dict[str, int]) -> list[int]:
    """The old ids of a character that the vocabulary lacks: its bytes, or the unknown token."""
    bytes_ = [f"<0x{byte:02X}>" for byte in character.encode()]
    if model.get("byte_fallback") and all(byte in vocabulary for byte in bytes_):
        return [vocabulary[byte] for byte in bytes_]
    return [vocabulary[model["unk_token"]]] if model.get("unk_token") in vocabulary else []


def _tokenize_words(
    words: Counter[str], vocabulary: dict[str, int], merges: list[Any], model: dict[str, Any]
) -> list[tuple[list[str], int]]:
    """Each word as tokens of the vocabulary, split at unknown tokens, with its count; single tokens are left out."""
    options = {"unk_token": model["unk_token"]} if model.get("unk_token") else {}
    bpe = models.BPE(vocabulary, [tuple(merge) for merge in merges], **options)
    unknown = model.get("unk_token")
    out: list[tuple[list[str], int]] = []
    for word, count in words.items():
        run: list[str] = []
        for token in bpe.tokenize(word):
            if token.value == unknown:
                out.append((run, count))
                run = []
            else:
                run.append(token.value)
        out.append((run, count))
    return [(run, count) for run, count in out if len(run) > 1]


class _PairCounts:
    """Counts of adjacent token pairs, updated as pairs are merged."""

    def __init__(self, pieces: list[tuple[list[str], int]]) -> None:
        self.pieces = pieces
        self.counts: Counter[tuple[str, str]] = Counter()
        self.positions: dict[tuple[str, str], set[int]] = defaultdict(set)
        for number, (run, count) in enumerate(pieces):
            self._count(number, run, count)

    def most_frequent(self) -> tuple[str, str] | None:
        """The most frequent pair (ties in alphabetical order); None when none is frequent enough."""
        if not self.counts:
            return None
        pair, count = min(self.counts.items(), key=lambda item: (-item[1], item[0]))
        return pair if count >= _MIN_COUNT else None

    def merge(self, pair: tuple[str, str], token: str) -> None:
        """Replace a pair by one token everywhere."""
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

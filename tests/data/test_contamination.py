"""Is held-out text found where it was planted, and not found where it was not?"""

from __future__ import annotations

import random
import re
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from postgrad.data.filter import contamination as overlap_module
from postgrad.data.filter.contamination import OverlapReport, measure_overlap
from postgrad.data.read.documents import Document

# A small vocabulary, so that single words and short runs of them are everywhere.
VOCABULARY = [f"{a}{b}" for a in ("ba", "ko", "mi", "über", "x1") for b in ("", "n", "lo", "té", "42")]


def prose(draw: random.Random, words: int) -> str:
    return "".join(draw.choice(VOCABULARY) + draw.choice([" ", " ", ", ", ".\n"]) for _ in range(words))


def documents(texts: list[str], name: str = "f") -> list[Document]:
    return [Document(text, None, f"{name}:{number}") for number, text in enumerate(texts, 1)]


def slow_grams(text: str) -> set[tuple[str, ...]]:
    """What the hashes stand for, said plainly."""
    words = re.findall(r"[a-z0-9\x80-\U0010ffff]+", text.lower())
    if len(words) < 13:
        return {("whole", *words)} if words else set()
    return {tuple(words[n : n + 13]) for n in range(len(words) - 12)}


def planted(seed: int, kind: str) -> OverlapReport:
    """400 held-out documents, every second one planted in 2,000 training documents."""
    draw = random.Random(seed)
    held = [prose(draw, draw.randint(14, 60)) for _ in range(400)]
    training = [prose(draw, draw.randint(5, 80)) for _ in range(2000)]
    for number in range(0, 400, 2):
        text = held[number]
        if kind == "changed":
            text = re.sub(r"\s+", lambda _: draw.choice([" ", "\n", "  ", "\t"]), text)
            text = draw.choice([text.upper(), text.title(), text.swapcase()])
        elif kind == "gram":
            words = text.split()
            start = draw.randrange(len(words) - 13)
            text = f"{prose(draw, 30)} {' '.join(words[start : start + 13])} {prose(draw, 30)}"
        training[draw.randrange(2000)] += "" if kind == "exact" else " -- " + text
        if kind == "exact":
            training.append(text)
    return measure_overlap(documents(held, "held"), documents(training, "training"))


@pytest.mark.parametrize(("kind", "recall"), [("exact", 0.99), ("changed", 0.95), ("gram", 0.95)])
@pytest.mark.parametrize("seed", [1, 2])
def test_what_was_planted_is_found_and_nothing_else(kind: str, recall: float, seed: int) -> None:
    report = planted(seed, kind)
    met = report.shares > 0
    assert met[0::2].mean() >= recall
    assert met[1::2].mean() <= 0.01
    assert report.documents == 400
    assert report.overlapping == met.sum()
    if kind == "exact":
        assert report.duplicates == report.half_overlapping == 200
        assert np.all(report.shares[0::2] == 1)
    if kind == "changed":
        assert report.duplicates == 0
        assert np.all(report.shares[0::2] == 1)
    if kind == "gram":
        assert report.half_overlapping < report.overlapping


texts = st.lists(
    st.one_of(
        st.text(st.sampled_from("aAbB1 .\néÉ"), max_size=60),
        st.lists(st.sampled_from(["a", "b", "B", "é", "-"]), max_size=40).map(" ".join),
    ),
    max_size=12,
)


@settings(max_examples=150)
@given(held=texts, training=texts, block=st.sampled_from([32, 100, 2**20]))
def test_the_hashes_say_what_the_words_say(held: list[str], training: list[str], block: int) -> None:
    held = [text for text in held if text.strip()]
    before = overlap_module._BLOCK
    overlap_module._BLOCK = block
    try:
        report = measure_overlap(documents(held), documents(training))
    finally:
        overlap_module._BLOCK = before
    known = set().union(*map(slow_grams, training)) if training else set()
    assert report.duplicates == sum(text in training for text in held)
    for text, share in zip(held, report.shares, strict=True):
        words = re.findall(r"[a-z0-9\x80-\U0010ffff]+", text.lower())
        grams = [tuple(words[n : n + 13]) for n in range(len(words) - 12)] or list(slow_grams(text))
        expected = 1.0 if text in training else sum(gram in known for gram in grams) / max(1, len(grams))
        assert share == pytest.approx(expected)


def test_short_documents_are_compared_whole() -> None:
    held = documents(["the cat sat", "The  CAT, sat!", "the cat", "!!!"])
    report = measure_overlap(held, documents(["so the cat sat there", "the cat sat"]))
    assert report.shares.tolist() == [1, 1, 0, 0]
    assert report.duplicates == 1


def test_grams_do_not_reach_over_the_border_of_two_documents() -> None:
    words = [f"w{n}" for n in range(14)]
    report = measure_overlap(documents([" ".join(words)]), documents([" ".join(words[:7]), " ".join(words[7:])]))
    assert report.overlapping == 0


def test_examples_name_both_places() -> None:
    draw = random.Random(5)
    held = [prose(draw, 40) for _ in range(3)]
    training = [prose(draw, 40), prose(draw, 9) + held[2][: len(held[2]) // 2 + 20], held[1], held[1]]
    report = measure_overlap(documents(held, "held"), documents(training, "training"))
    assert [(example.heldout, example.training) for example in report.examples] == [
        ("held:2", "training:3"),
        ("held:3", "training:2"),
    ]
    assert report.examples[0].share == 1
    assert 0 < report.examples[1].share < 1
    assert (report.overlapping, report.duplicates) == (2, 1)


def test_a_document_longer_than_a_block_is_hashed_without_a_seam() -> None:
    draw = random.Random(6)
    training = prose(draw, 400_000)
    assert len(training) > 1.5 * 2**20
    at = training.index(" ", 2**20 - 40)
    assert measure_overlap(documents([training[at - 150 : at + 150]]), documents([training])).shares[0] >= 0.9
    assert measure_overlap(documents([training]), documents(["a", training.upper()])).shares[0] == 1


def test_token_ids_are_compared_as_words() -> None:
    draw = np.random.default_rng(7)
    rows = [Document(None, draw.integers(0, 1000, 50, np.uint32), f"f:{n}") for n in range(4)]
    part = Document(None, np.concatenate([rows[3].ids[:20], draw.integers(0, 1000, 30, np.uint32)]), "p")  # type: ignore[index]
    report = measure_overlap(rows, [rows[1], part])
    assert report.shares.tolist() == [0, 1, 0, pytest.approx(8 / 38)]
    assert report.duplicates == 1


def test_nothing_held_out_or_nothing_trained() -> None:
    assert measure_overlap([], documents(["a"])).documents == 0
    assert measure_overlap(documents(["a b"]), []).shares.tolist() == [0]


def test_word_hashes_do_not_collide() -> None:
    """100,000 near words: all words of up to three letters, their doubles, and numbers."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = {a + b + c for a in letters for b in letters for c in letters} | {w * 2 for w in letters}
    words |= {str(n) for n in range(80_000)} | {f"{a}{b}" for a, b in pairwise(letters)}
    hashes, counts = overlap_module._hash_words([" ".join(sorted(words)).encode()])
    assert len(np.unique(hashes)) == len(words) == counts[0]
    ones = np.unpackbits(hashes.view(np.uint8)).mean()
    assert abs(ones - 0.5) < 0.002


def test_mutant_a_finder_of_raw_text_misses_the_changed_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without lower-casing and word borders, changed case and spaces would go unseen."""
    whole = np.ones(256, np.bool_)
    whole[ord("\n")] = False
    monkeypatch.setattr(overlap_module, "_IS_WORD_BYTE", whole)
    with pytest.raises(AssertionError):
        test_what_was_planted_is_found_and_nothing_else("changed", 0.95, 1)

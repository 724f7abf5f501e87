"""Demonstrations: never what is asked, by the questions alone, the most alike last, as many as fit."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from postgrad.data.read.examples import Example, make_example
from postgrad.data.render import demonstrations
from postgrad.data.render.chat import ChatRenderer
from postgrad.data.render.demonstrations import SEPARATOR, Demonstrations, RetrievalMethod
from postgrad.data.render.renderers import PlainRenderer

EVERY: list[RetrievalMethod] = ["bm25", "embedding", "seed", "once", "balanced"]


def example(prompt: str, completion: str = " yes") -> Example:
    return make_example("completion", {"prompt": prompt, "completion": completion}, "test")


def size(text: str) -> int:
    return len(text.split())


def letters(text: str) -> np.ndarray:
    """How often each letter stands in a text."""
    return np.array([text.lower().count(chr(97 + i)) for i in range(26)], np.float32)


def showing(pool: list[Example], by: RetrievalMethod = "bm25", **changes: Any) -> Demonstrations:
    options: dict[str, Any] = {"count": 2, "max_tokens": 1000, "count_tokens": size, "embed": letters, **changes}
    return Demonstrations(PlainRenderer(), pool, method=by, **options)


def shown(demonstrated: Demonstrations, asked: Example) -> list[str]:
    """The texts before an example."""
    *before, last = "".join(text for text, _ in demonstrated.render(asked).pieces).split(SEPARATOR)
    assert last == asked.fields["prompt"] + asked.fields["completion"]
    return before


POOL = [
    example("the cat sat on the mat?"),
    example("the cat ate a mouse?", " no"),
    example("a train left at nine?", " maybe"),
    example("the dog sat on the rug?"),
    example("rain fell on the town?"),
]


def test_the_most_alike_stands_last_by_words() -> None:
    asked = example("the cat sat on the rug?")
    assert shown(showing(POOL), asked) == ["the cat sat on the mat? yes", "the dog sat on the rug? yes"]
    assert shown(showing(POOL, count=1), asked) == ["the dog sat on the rug? yes"]
    three = shown(showing(POOL, count=3), asked)
    assert three[1:] == shown(showing(POOL), asked)


def test_the_most_alike_stands_last_by_vectors() -> None:
    asked = example("zzzz cat")
    pool = [example("zz"), example("cats"), example("zzzz catt"), example("dog")]
    assert shown(showing(pool, "embedding"), asked) == ["zz yes", "zzzz catt yes"]
    # By the angle: a text that says the same twice is no less alike.
    assert shown(showing([*pool, example("zzzz cat zzzz cat")], "embedding", count=1), asked) == [
        "zzzz cat zzzz cat yes"
    ]


def test_what_is_asked_stands_as_it_did_and_alone_is_answered() -> None:
    asked = example("the cat sat on the rug?", " perhaps")
    own = PlainRenderer().render(asked)
    rendered = showing(POOL).render(asked)
    (before, mark), *rest = rendered.pieces
    assert mark == 0 and before.endswith(SEPARATOR) and tuple(rest) == own.pieces
    assert rendered._replace(pieces=own.pieces) == own


@pytest.mark.parametrize("by", EVERY)
@given(
    words=st.lists(st.lists(st.sampled_from("abcd"), min_size=1, max_size=3), min_size=1, max_size=12), which=st.data()
)
@settings(max_examples=60)
def test_what_is_asked_is_never_shown(by: RetrievalMethod, words: list[list[str]], which: st.DataObject) -> None:
    """Nor a copy of it, nor the same question with another answer; and nothing is lost by that."""
    pool = [example(" ".join(w), f" {i % 2}") for i, w in enumerate(words)]
    asked = which.draw(st.sampled_from(pool))
    found = showing(pool, by, count=3).select(asked)
    others = [e for e in pool if e.fields["prompt"] != asked.fields["prompt"]]
    assert all(e in others for e in found)
    assert len(found) == min(3, len(others))


@pytest.mark.parametrize("by", EVERY)
def test_the_answer_decides_nothing(by: RetrievalMethod) -> None:
    """Where a model is used, the answer is not known."""
    told = [example("the cat sat on the rug?", answer) for answer in (" yes", " a train left at nine", " maybe")]
    assert len({tuple(shown(showing(POOL, by), asked)) for asked in told}) == 1
    # Nor do the answers of the pool: only the questions are compared.
    other = [replace(POOL[2], fields={**POOL[2].fields, "completion": " the cat sat on the rug"}), *POOL[:2]]
    assert " the cat sat on the rug" not in shown(showing(other, by, count=1), told[0])[0] or by == "seed"


def test_the_least_alike_fall_out_when_there_is_no_room() -> None:
    asked = example("the cat sat on the rug?")
    every = shown(showing(POOL, count=5), asked)
    assert len(every) == 5
    for most in range(40):
        kept = shown(showing(POOL, count=5, max_tokens=most), asked)
        assert kept == every[len(every) - len(kept) :]
        assert sum(size(text) for text in kept) <= most
        more = every[len(every) - len(kept) - 1 :]
        assert len(kept) == 5 or sum(size(text) for text in more) > most


def test_without_room_or_others_the_question_stands_alone() -> None:
    asked = example("the cat sat on the rug?")
    assert showing(POOL, max_tokens=1).render(asked) == PlainRenderer().render(asked)
    assert showing([asked, asked]).render(asked) == PlainRenderer().render(asked)


def test_a_seed_decides_what_is_drawn() -> None:
    pool = [example(f"question {i}?") for i in range(30)]
    asked = example("and this one?")
    drawn = {seed: tuple(shown(showing(pool, "seed", seed=seed), asked)) for seed in range(8)}
    assert len(set(drawn.values())) > 6
    assert drawn[3] == tuple(shown(showing(pool, "seed", seed=3), asked))
    # Another question has another draw, whatever was asked before it.
    assert shown(showing(pool, "seed"), example("or that one?")) != list(drawn[0])
    # Every example has its turn.
    seen = {text for i in range(200) for text in shown(showing(pool, "seed"), example(f"asked {i}"))}
    assert len(seen) == 30


@pytest.mark.parametrize("by", ["once", "balanced"])
def test_one_draw_serves_every_question(by: RetrievalMethod) -> None:
    pool = [example(f"question {i}?", f" {i % 3}") for i in range(30)]
    found = {
        seed: {tuple(shown(showing(pool, by, seed=seed), example(f"{n}?"))) for n in range(5)} for seed in range(6)
    }
    assert all(len(draws) == 1 for draws in found.values())
    assert len(set().union(*found.values())) == 6
    # But for a question that is one of them: another takes its place.
    taken = next(iter(found[0]))[0]
    asked = next(e for e in pool if e.fields["prompt"] + e.fields["completion"] == taken)
    other = shown(showing(pool, by, seed=0), asked)
    assert taken not in other and len(other) == 2


@given(
    answers=st.lists(st.sampled_from("aabbbc"), min_size=4, max_size=20),
    count=st.integers(1, 6),
    seed=st.integers(0, 100),
)
@settings(max_examples=60)
def test_balanced_draws_have_as_many_of_each_answer_as_there_are(answers: list[str], count: int, seed: int) -> None:
    pool = [example(f"{i}?", f" {answer}") for i, answer in enumerate(answers)]
    chosen = showing(pool, "balanced", count=count, seed=seed).select(example("none?"))
    drawn = Counter(e.fields["completion"].strip() for e in chosen)
    there = Counter(answers)
    assert sum(drawn.values()) == min(count, len(pool)) and len({e.text for e in chosen}) == len(chosen)
    for answer in there:
        # None has two fewer than another, unless there are no more of it.
        assert drawn[answer] >= max(drawn.values()) - 1 or drawn[answer] == there[answer]


def test_what_is_balanced_is_the_label_or_the_place_of_the_choice() -> None:
    labelled = [make_example("labelled", {"text": f"{i}", "label": int(i > 1)}, "t") for i in range(20)]
    choices = [
        make_example("choices", {"question": f"{i}", "choices": [f"a{i}", f"b{i}"], "answer": int(i > 1)}, "t")
        for i in range(20)
    ]
    for pool, key in ((labelled, "label"), (choices, "answer")):
        for seed in range(5):
            chosen = showing(pool, "balanced", count=4, seed=seed).select(example("none?"))
            assert sorted(e.fields[key] for e in chosen) == [0, 0, 1, 1]
    # The mutant: draws that look at no answer.
    plain = [showing(labelled, "once", count=4, seed=seed).select(example("none?")) for seed in range(5)]
    assert any(sorted(e.fields["label"] for e in chosen) != [0, 0, 1, 1] for chosen in plain)


def test_a_chat_template_words_every_example() -> None:
    chat = ChatRenderer(None, {"eos_token": "<|end|>"})
    pool = [make_example("instruction", {"instruction": f"Count to {n}.", "output": f"{n}!"}, "test") for n in "123"]
    asked = make_example("instruction", {"instruction": "Count to 4.", "output": "4!"}, "test")
    rendered = Demonstrations(chat, pool, 1, "seed", 100, size).render(asked)
    (before, mark), *rest = rendered.pieces
    assert tuple(rest) == chat.render(asked).pieces and mark == 0
    one = next(e for e in pool if f"Count to {e.fields['instruction'][9]}." in before)
    assert before == "".join(text for text, _ in chat.render(one).pieces) + SEPARATOR


def test_a_fingerprint_is_of_all_that_decides_the_text() -> None:
    def made(pool: list[Example] = POOL, by: RetrievalMethod = "bm25", **changes: Any) -> str:
        return showing(pool, by, **changes).fingerprint

    answered = [*POOL[:-1], example(POOL[-1].fields["prompt"], " never")]
    different = [
        made(),
        made(count=3),
        made(max_tokens=7),
        made(seed=1),
        made(POOL[1:]),
        made(answered),
        made(by="seed"),
        made(by="embedding"),
        made(by="embedding", embed=lambda text: letters(text)[::-1].copy()),
        replace(showing(POOL), renderer=PlainRenderer(answer=" so: {completion}")).fingerprint,
    ]
    assert len(set(different)) == len(different)
    assert made() == made() and made(by="embedding") == made(by="embedding")


def test_a_pool_that_shows_the_question_would_be_met(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutant: no question is the same as another."""
    marks = iter(range(10**6))
    monkeypatch.setattr(demonstrations, "_digest", lambda text: next(marks))
    assert "the cat sat on the mat? yes" in shown(showing(POOL), POOL[0])

"""What can be replayed of a model that answers questions? Questions that it asks itself, and answers to them.

Self-synthesized rehearsal (SSR; Huang et al. 2024, arXiv 2403.01244) in its three steps. Questions are written by the start
model: as one more example behind a few that are given, or, where there are none, where the chat template would let a user speak
(Magpie; Xu et al. 2024, arXiv 2406.08464). The start model, or the latest one, answers them. Of all that were written those
nearest to the centres of k-means clusters are kept, so that what is replayed is as various as what was written.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from postgrad.commands.synthesize import (
    Author,
    Candidate,
    Wish,
    Written,
    asked_or_text,
    author,
    check_wish,
    grown,
    settle,
)
from postgrad.data.filter.near_duplicates import repeated
from postgrad.data.random_streams import Draws
from postgrad.data.read.documents import Document, read_documents
from postgrad.data.read.files import Source as Files
from postgrad.data.render.renderers import PlainRenderer
from postgrad.errors import DataError, ModelError, StageError
from postgrad.evaluation.continuations import text_of
from postgrad.evaluation.generate_documents import Drawn, drawn
from postgrad.evaluation.held_out import behind_bos
from postgrad.hardware import machine
from postgrad.storage.fingerprint import fingerprint

SHOWN = 3
"""Examples before a question, where none are asked for."""
CLUSTERS = 20
"""Clusters that questions are sorted into (as in SSR)."""
_MOST_EXAMPLES = 100_000
_FEWEST_WORDS = 2
_HERE = "\ufdd0"
"""Stands where a user speaks, to find that place in a template: no character of any text."""
_QUESTION, _ANSWER, _EXAMPLES = 0, 1, 2
"""Streams of random numbers of one row."""
FIRST, NEXT = (
    "Write a question or a task that someone could give to an assistant.",
    "Write another one, about something else.",
)
"""What is said before examples of questions."""


@dataclass(frozen=True)
class Rehearsal:
    """How questions and answers come to be."""

    examples: tuple[str, ...] = ()
    """Files with questions that are shown as examples; none: what a user says is drawn from the template alone."""
    shown: int = SHOWN
    """Examples that are shown before each question."""
    answering: str | None = None
    """The model that answers, when it is not the one that asks."""
    kept: float = 1.0
    """Share of what was written that is kept for being various."""


@dataclass(frozen=True)
class Turns:
    """A model's chat template, as ids and texts."""

    writer: Author

    def __post_init__(self) -> None:
        if not self.writer.tokenizer.chat_template:
            raise ModelError(
                f"{self.writer.name} has no chat template",
                where="model",
                expected="a model that was trained on conversations",
                way_out="leave out --chat, and let it write running text",
            )

    def _text(self, messages: Sequence[dict[str, str]], *, prompt: bool) -> str:
        try:
            return str(
                self.writer.tokenizer.apply_chat_template(list(messages), add_generation_prompt=prompt, tokenize=False)
            )
        except Exception as error:  # a template is a program: it may raise anything
            raise ModelError(f"the chat template fails: {error}", where="tokenizer") from None

    def ids(self, text: str) -> np.ndarray:
        """A rendered text as ids, behind the BOS when the tokenizer sets one."""
        bos = self.writer.encoder.bos
        ids = np.array(self.writer.tokenizer(text, add_special_tokens=False)["input_ids"], np.int64)
        ids = np.concatenate([[bos], ids]) if bos is not None and ids[:1].tolist() != [bos] else ids
        return behind_bos(ids, self.writer.before, bos).astype(np.int64)

    def asking(self, messages: Sequence[dict[str, str]]) -> np.ndarray:
        """A conversation up to where the next answer begins."""
        return self.ids(self._text(messages, prompt=True))

    @cached_property
    def around(self) -> tuple[str, str]:
        """What stands before and behind what a user says first."""
        before, found, behind = self._text([{"role": "user", "content": _HERE}], prompt=True).partition(_HERE)
        if not found or not before:
            raise ModelError(
                "the chat template does not show where a user speaks",
                where="tokenizer",
                expected="a template that sets something before a user's words",
                way_out="give examples of questions with --from",
            )
        return before, behind

    @cached_property
    def user_ends(self) -> set[int]:
        """The special token behind what a user says, where there is one."""
        first = self.ids(self.around[1].lstrip())[len(self.ids("")) :][:1].tolist()
        return {token for token in first if token in self.writer.tokenizer.all_special_ids}


@dataclass(frozen=True)
class _Room:
    """Tokens that a question and an answer may have."""

    question: int
    answer: int
    prompt: int
    """Tokens of a question with all that stands around it, at most."""


def converse(
    model: str, out: Path, wish: Wish, rehearsal: Rehearsal | None = None, *, base: str | None = None
) -> Iterator[Written]:
    """Write questions and answers to `out`, a JSONL file with `messages` and how each was made.

    Raises as `synthesize` does, and `ModelError` for a model without a chat template.
    """
    rehearsal = rehearsal or Rehearsal()
    check_wish(out, wish)
    _check(rehearsal, wish)
    machine.tune_allocator()
    asking = Turns(author(model, wish.longest, base))
    name = rehearsal.answering
    answering = asking if name is None else Turns(author(name, wish.longest, where="--answer"))
    examples = _examples(rehearsal)
    room = _room(asking, answering, wish)
    decides = [asdict(wish), asking.writer.fingerprint, answering.writer.fingerprint, examples, rehearsal.shown]
    draw = partial(_conversations, asking, answering, wish, rehearsal, examples, room)
    yield from grown(out, wish, fingerprint(decides), asking.writer, draw)
    settle(out, partial(various, share=rehearsal.kept, seed=wish.seed) if rehearsal.kept < 1 else None)


def _check(rehearsal: Rehearsal, wish: Wish) -> None:
    for option, value, fits, expected in (
        ("--shown", rehearsal.shown, rehearsal.shown > 0, "above 0"),
        ("--keep", rehearsal.kept, 0 < rehearsal.kept <= 1, "above 0, at most 100%"),
        ("--beginning", wish.beginning, not wish.beginning, "0: a conversation begins with a question"),
    ):
        if not fits:
            raise StageError(f"{value} is no such number", where=option, expected=expected)


def _room(asking: Turns, answering: Turns, wish: Wish) -> _Room:
    """A third of what is left beside the template is for the question."""
    empty = max(len(turns.asking([{"role": "user", "content": "?"}])) for turns in (asking, answering))
    question = (wish.longest - empty) // 3
    if question < 4:
        raise StageError(
            f"{wish.longest} tokens leave no room for a question beside the {empty} of the chat template",
            where="--longest",
            expected=f"at least {empty + 12}",
        )
    return _Room(question, wish.longest - empty - question, empty + question)


def _examples(rehearsal: Rehearsal) -> list[str]:
    """The questions of the given rows. Raises `DataError` when there are too few."""
    found: list[str] = []
    for path in rehearsal.examples:
        documents = read_documents(Files("examples", path, root=Path.cwd(), where="--from"))
        found += [asked for each in islice(documents, _MOST_EXAMPLES) if (asked := _asked(each))]
    if rehearsal.examples and len(found) < rehearsal.shown:
        raise DataError(
            f"{len(found)} questions",
            where="--from",
            expected=f"at least as many as are shown ({rehearsal.shown})",
            way_out="give more of them, show fewer with --shown, or give none",
        )
    return found


def _asked(document: Document) -> str:
    """What a row asks."""
    example = document.example
    if example is None:
        return (document.text or "").strip()
    if "messages" in example.fields:
        return next((str(m["content"]) for m in example.messages if m["role"] == "user"), "").strip()
    return PlainRenderer().turn(example)[0].strip()


def _conversations(
    asking: Turns,
    answering: Turns,
    wish: Wish,
    rehearsal: Rehearsal,
    examples: Sequence[str],
    room: _Room,
    numbers: range,
) -> Iterator[Candidate]:
    """A question and its answer for each number."""
    questions = _questions(asking, wish, rehearsal, examples, room, numbers)
    answers = _answers(answering, wish, room, numbers, [text for text, _ in questions])
    for (text, new), (said, answer) in zip(questions, answers, strict=True):
        messages = [{"role": "user", "content": text}, {"role": "assistant", "content": said}]
        made: dict[str, Any] = {"from": "examples" if examples else "template"}
        if answering is not asking:
            made |= {"answered_by": answering.writer.name, "answering_model": answering.writer.fingerprint}
        size = len(new.ids) + len(answer.ids)
        trouble = _trouble(text, new, said, answer, wish)
        yield Candidate({"messages": messages}, made, size, new.ended and answer.ended, trouble)


def _trouble(question: str, new: Drawn, said: str, answer: Drawn, wish: Wish) -> str | None:
    """Why a question with its answer is left out."""
    if not new.ended:
        return "questions without an end"
    if len(question.split()) < _FEWEST_WORDS:
        return "questions of less than two words"
    if not answer.ended:
        return "answers without an end"
    if not said:
        return "empty answers"
    loops = max(repeated(new.ids.tolist()), repeated(answer.ids.tolist()))
    return "repeating themselves" if loops > wish.most_repeated else None


def _questions(
    turns: Turns, wish: Wish, rehearsal: Rehearsal, examples: Sequence[str], room: _Room, numbers: range
) -> list[tuple[str, Drawn]]:
    """What a user might ask, with its ids."""
    prompts = [_prompt(turns, wish, rehearsal, examples, room, number) for number in numbers]
    stop = turns.writer.stop | (turns.user_ends if not examples else set())
    found = _drawn(turns, wish, prompts, numbers, room.question, stop, _QUESTION)
    behind = "" if examples else turns.around[1].strip()
    out: list[tuple[str, Drawn]] = []
    for new in found:
        text = text_of(turns.writer.tokenizer, new.ids)
        before, ended, _ = text.partition(behind) if behind else (text, "", "")
        out.append((before.strip(), Drawn(new.ids, new.ended or bool(ended))))
    return out


def _prompt(
    turns: Turns, wish: Wish, rehearsal: Rehearsal, examples: Sequence[str], room: _Room, number: int
) -> np.ndarray:
    """What a question is drawn behind: examples of questions, as many of those drawn as fit, or a user's turn."""
    if not examples:
        return turns.ids(turns.around[0])
    chosen = Draws(wish.seed).at(number, _EXAMPLES).permutation(len(examples))[: rehearsal.shown]
    for count in range(len(chosen), 0, -1):
        messages: list[dict[str, str]] = []
        for place, which in enumerate(chosen[:count].tolist()):
            messages.append({"role": "user", "content": NEXT if place else FIRST})
            messages.append({"role": "assistant", "content": examples[which]})
        ids = turns.asking([*messages, {"role": "user", "content": NEXT}])
        if turns.writer.limit is None or len(ids) + room.question <= turns.writer.limit:
            return ids
    raise DataError(
        "an example of a question does not fit the model's positions",
        where="--from",
        expected="shorter questions",
        way_out="give others, or none",
    )


def _answers(
    turns: Turns, wish: Wish, room: _Room, numbers: range, questions: Sequence[str]
) -> list[tuple[str, Drawn]]:
    """What is answered to each question; nothing to an empty one, or one that grew too long in the template."""
    nothing = ("", Drawn(np.zeros(0, np.int64), ended=False))
    prompts = [turns.asking([{"role": "user", "content": question or "?"}]) for question in questions]
    fits = [bool(question) and len(ids) <= room.prompt for question, ids in zip(questions, prompts, strict=True)]
    chosen = [i for i, fit in enumerate(fits) if fit]
    out = [nothing] * len(questions)
    if not chosen:
        return out
    found = _drawn(
        turns,
        wish,
        [prompts[i] for i in chosen],
        [numbers[i] for i in chosen],
        room.answer,
        turns.writer.stop,
        _ANSWER,
    )
    for i, new in zip(chosen, found, strict=True):
        out[i] = text_of(turns.writer.tokenizer, new.ids).strip(), new
    return out


def _drawn(
    turns: Turns,
    wish: Wish,
    prompts: Sequence[np.ndarray],
    numbers: Sequence[int],
    most: int,
    stop: set[int],
    stream: int,
) -> list[Drawn]:
    return drawn(
        turns.writer.view,
        prompts,
        numbers,
        seed=wish.seed,
        most=most,
        stop=stop,
        temperature=wish.temperature,
        top_p=wish.top_p,
        stream=stream,
    )


# --- what is kept -------------------------------------------------------------------------------------


def various(lines: list[str], *, share: float, seed: int) -> list[str]:
    """Of lines of JSON the share that stands nearest to the centres of clusters, in their order.

    Questions as TF-IDF of words and pairs of words, k-means of `CLUSTERS` clusters (scikit-learn); from each cluster as many as
    its size asks for, the nearest to its centre first.
    """
    count = max(1, round(share * len(lines)))
    if count >= len(lines):
        return lines
    from sklearn.cluster import KMeans
    from sklearn.feature_extraction.text import TfidfVectorizer

    questions = [asked_or_text(json.loads(line)) for line in lines]
    features = TfidfVectorizer(
        ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"(?u)\b\w+\b|[^\w\s]"
    ).fit_transform(questions)
    found = KMeans(min(CLUSTERS, count), n_init=4, random_state=seed).fit(features)
    distance_N = found.transform(features).min(1)
    return [lines[i] for i in nearest(found.labels_, distance_N, count)]


def nearest(cluster_N: np.ndarray, distance_N: np.ndarray, count: int) -> list[int]:
    """The numbers of `count` rows, in order: of each cluster in proportion to its size (largest remainders), nearest first."""
    sizes = np.bincount(cluster_N)
    due = count * sizes / sizes.sum()
    taken = np.floor(due).astype(int)
    taken[np.argsort(-(due - taken), kind="stable")[: count - int(taken.sum())]] += 1
    chosen: list[int] = []
    for cluster, many in enumerate(taken.tolist()):
        members = np.flatnonzero(cluster_N == cluster)
        chosen += members[np.argsort(distance_N[members], kind="stable")[:many]].tolist()
    return sorted(chosen)

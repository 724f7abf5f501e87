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
    Candidate,
    SynthesisProgress,
    SynthesisRequest,
    TextGenerator,
    check_request,
    dedup_text,
    finalize_output,
    generate_until_target,
    load_generator,
)
from postgrad.data.filter.near_duplicates import repetition_share
from postgrad.data.random_streams import RandomStreams
from postgrad.data.read.documents import Document, read_documents
from postgrad.data.read.files import RawSource as Files
from postgrad.data.render.renderers import PlainRenderer
from postgrad.errors import DataError, ModelError, StageError
from postgrad.evaluation.continuations import decode_ids
from postgrad.evaluation.generate_documents import GeneratedDocument, generate_documents
from postgrad.evaluation.held_out import insert_after_bos
from postgrad.hardware import machine
from postgrad.storage.fingerprint import fingerprint

DEFAULT_SHOTS = 3
"""Examples before a question, where none are asked for."""
CLUSTERS = 20
"""Clusters that questions are sorted into (as in SSR)."""
_MAX_EXAMPLES = 100_000
_MIN_WORDS = 2
_USER_PLACEHOLDER = "\ufdd0"
"""Stands where a user speaks, to find that place in a template: no character of any text."""
_QUESTION_STREAM, _ANSWER_STREAM, _EXAMPLES_STREAM = 0, 1, 2
"""Streams of random numbers of one row."""
FIRST_REQUEST, NEXT_REQUEST = (
    "Write a question or a task that someone could give to an assistant.",
    "Write another one, about something else.",
)
"""What is said before examples of questions."""


@dataclass(frozen=True)
class Rehearsal:
    """How questions and answers come to be."""

    examples: tuple[str, ...] = ()
    """Files with questions that are shown as examples; none: what a user says is drawn from the template alone."""
    shots: int = DEFAULT_SHOTS
    """Examples that are shown before each question."""
    answer_model: str | None = None
    """The model that answers, when it is not the one that asks."""
    diverse_share: float = 1.0
    """Share of what was written that is kept for being various."""


@dataclass(frozen=True)
class ChatTemplate:
    """A model's chat template, as ids and texts."""

    generator: TextGenerator

    def __post_init__(self) -> None:
        if not self.generator.tokenizer.chat_template:
            raise ModelError(
                f"{self.generator.name} has no chat template",
                where="model",
                expected="a model that was trained on conversations",
                hint="leave out --chat, and let it write running text",
            )

    def _render(self, messages: Sequence[dict[str, str]], *, prompt: bool) -> str:
        try:
            return str(
                self.generator.tokenizer.apply_chat_template(
                    list(messages), add_generation_prompt=prompt, tokenize=False
                )
            )
        except Exception as error:  # a template is a program: it may raise anything
            raise ModelError(f"the chat template fails: {error}", where="tokenizer") from None

    def encode(self, text: str) -> np.ndarray:
        """A rendered text as ids, behind the BOS when the tokenizer sets one."""
        bos = self.generator.encoder.bos
        ids = np.array(self.generator.tokenizer(text, add_special_tokens=False)["input_ids"], np.int64)
        ids = np.concatenate([[bos], ids]) if bos is not None and ids[:1].tolist() != [bos] else ids
        return insert_after_bos(ids, self.generator.virtual_tokens, bos).astype(np.int64)

    def prompt_ids(self, messages: Sequence[dict[str, str]]) -> np.ndarray:
        """A conversation up to where the next answer begins."""
        return self.encode(self._render(messages, prompt=True))

    @cached_property
    def user_turn_affixes(self) -> tuple[str, str]:
        """What stands before and behind what a user says first."""
        before, found, behind = self._render([{"role": "user", "content": _USER_PLACEHOLDER}], prompt=True).partition(
            _USER_PLACEHOLDER
        )
        if not found or not before:
            raise ModelError(
                "the chat template does not show where a user speaks",
                where="tokenizer",
                expected="a template that sets something before a user's words",
                hint="give examples of questions with --from",
            )
        return before, behind

    @cached_property
    def user_end_tokens(self) -> set[int]:
        """The special token behind what a user says, where there is one."""
        first = self.encode(self.user_turn_affixes[1].lstrip())[len(self.encode("")) :][:1].tolist()
        return {token for token in first if token in self.generator.tokenizer.all_special_ids}


@dataclass(frozen=True)
class _TokenBudget:
    """Tokens that a question and an answer may have."""

    question: int
    answer: int
    prompt: int
    """Tokens of a question with all that stands around it, at most."""


def synthesize_chat(
    model: str, out: Path, request: SynthesisRequest, rehearsal: Rehearsal | None = None, *, base: str | None = None
) -> Iterator[SynthesisProgress]:
    """Write questions and answers to `out`, a JSONL file with `messages` and how each was made.

    Raises as `synthesize` does, and `ModelError` for a model without a chat template.
    """
    rehearsal = rehearsal or Rehearsal()
    check_request(out, request)
    _check_options(rehearsal, request)
    machine.tune_allocator()
    asking = ChatTemplate(load_generator(model, request.max_document_tokens, base))
    name = rehearsal.answer_model
    answering = (
        asking if name is None else ChatTemplate(load_generator(name, request.max_document_tokens, where="--answer"))
    )
    examples = _read_questions(rehearsal)
    room = _token_budget(asking, answering, request)
    decides = [
        asdict(request),
        asking.generator.fingerprint,
        answering.generator.fingerprint,
        examples,
        rehearsal.shots,
    ]
    draw = partial(_generate_conversations, asking, answering, request, rehearsal, examples, room)
    yield from generate_until_target(out, request, fingerprint(decides), asking.generator, draw)
    finalize_output(
        out,
        partial(select_diverse, share=rehearsal.diverse_share, seed=request.seed)
        if rehearsal.diverse_share < 1
        else None,
    )


def _check_options(rehearsal: Rehearsal, request: SynthesisRequest) -> None:
    for option, value, fits, expected in (
        ("--shown", rehearsal.shots, rehearsal.shots > 0, "above 0"),
        ("--keep", rehearsal.diverse_share, 0 < rehearsal.diverse_share <= 1, "above 0, at most 100%"),
        ("--beginning", request.prompt_tokens, not request.prompt_tokens, "0: a conversation begins with a question"),
    ):
        if not fits:
            raise StageError(f"{value} is no such number", where=option, expected=expected)


def _token_budget(
    question_template: ChatTemplate, answer_template: ChatTemplate, request: SynthesisRequest
) -> _TokenBudget:
    """A third of what is left beside the template is for the question."""
    empty = max(
        len(turns.prompt_ids([{"role": "user", "content": "?"}])) for turns in (question_template, answer_template)
    )
    question = (request.max_document_tokens - empty) // 3
    if question < 4:
        raise StageError(
            f"{request.max_document_tokens} tokens leave no room for a question beside the {empty} of the chat template",
            where="--longest",
            expected=f"at least {empty + 12}",
        )
    return _TokenBudget(question, request.max_document_tokens - empty - question, empty + question)


def _read_questions(rehearsal: Rehearsal) -> list[str]:
    """The questions of the given rows. Raises `DataError` when there are too few."""
    found: list[str] = []
    for path in rehearsal.examples:
        documents = read_documents(Files("examples", path, root=Path.cwd(), where="--from"))
        found += [asked for each in islice(documents, _MAX_EXAMPLES) if (asked := _get_question(each))]
    if rehearsal.examples and len(found) < rehearsal.shots:
        raise DataError(
            f"{len(found)} questions",
            where="--from",
            expected=f"at least as many as are shown ({rehearsal.shots})",
            hint="give more of them, show fewer with --shown, or give none",
        )
    return found


def _get_question(document: Document) -> str:
    """What a row asks."""
    example = document.example
    if example is None:
        return (document.text or "").strip()
    if "messages" in example.fields:
        return next((str(m["content"]) for m in example.messages if m["role"] == "user"), "").strip()
    return PlainRenderer().render_turn(example)[0].strip()


def _generate_conversations(
    question_template: ChatTemplate,
    answer_template: ChatTemplate,
    request: SynthesisRequest,
    rehearsal: Rehearsal,
    examples: Sequence[str],
    budget: _TokenBudget,
    numbers: range,
) -> Iterator[Candidate]:
    """A question and its answer for each number."""
    questions = _generate_questions(question_template, request, rehearsal, examples, budget, numbers)
    answers = _generate_answers(answer_template, request, budget, numbers, [text for text, _ in questions])
    for (text, new), (said, answer) in zip(questions, answers, strict=True):
        messages = [{"role": "user", "content": text}, {"role": "assistant", "content": said}]
        made: dict[str, Any] = {"from": "examples" if examples else "template"}
        if answer_template is not question_template:
            made |= {
                "answered_by": answer_template.generator.name,
                "answering_model": answer_template.generator.fingerprint,
            }
        size = len(new.ids) + len(answer.ids)
        trouble = _rejection_reason(text, new, said, answer, request)
        yield Candidate({"messages": messages}, made, size, new.ended and answer.ended, trouble)


def _rejection_reason(
    question: str,
    generated_question: GeneratedDocument,
    answer_text: str,
    generated_answer: GeneratedDocument,
    request: SynthesisRequest,
) -> str | None:
    """Why a question with its answer is left out."""
    if not generated_question.ended:
        return "questions without an end"
    if len(question.split()) < _MIN_WORDS:
        return "questions of less than two words"
    if not generated_answer.ended:
        return "answers without an end"
    if not answer_text:
        return "empty answers"
    loops = max(repetition_share(generated_question.ids.tolist()), repetition_share(generated_answer.ids.tolist()))
    return "repeating themselves" if loops > request.max_repetition else None


def _generate_questions(
    template: ChatTemplate,
    request: SynthesisRequest,
    rehearsal: Rehearsal,
    examples: Sequence[str],
    budget: _TokenBudget,
    numbers: range,
) -> list[tuple[str, GeneratedDocument]]:
    """What a user might ask, with its ids."""
    prompts = [_question_prompt(template, request, rehearsal, examples, budget, number) for number in numbers]
    stop = template.generator.stop_tokens | (template.user_end_tokens if not examples else set())
    found = _generate(template, request, prompts, numbers, budget.question, stop, _QUESTION_STREAM)
    behind = "" if examples else template.user_turn_affixes[1].strip()
    out: list[tuple[str, GeneratedDocument]] = []
    for new in found:
        text = decode_ids(template.generator.tokenizer, new.ids)
        before, ended, _ = text.partition(behind) if behind else (text, "", "")
        out.append((before.strip(), GeneratedDocument(new.ids, new.ended or bool(ended))))
    return out


def _question_prompt(
    template: ChatTemplate,
    request: SynthesisRequest,
    rehearsal: Rehearsal,
    examples: Sequence[str],
    budget: _TokenBudget,
    number: int,
) -> np.ndarray:
    """What a question is drawn behind: examples of questions, as many of those drawn as fit, or a user's turn."""
    if not examples:
        return template.encode(template.user_turn_affixes[0])
    chosen = (
        RandomStreams(request.seed).generator(number, _EXAMPLES_STREAM).permutation(len(examples))[: rehearsal.shots]
    )
    for count in range(len(chosen), 0, -1):
        messages: list[dict[str, str]] = []
        for place, which in enumerate(chosen[:count].tolist()):
            messages.append({"role": "user", "content": NEXT_REQUEST if place else FIRST_REQUEST})
            messages.append({"role": "assistant", "content": examples[which]})
        ids = template.prompt_ids([*messages, {"role": "user", "content": NEXT_REQUEST}])
        if template.generator.max_positions is None or len(ids) + budget.question <= template.generator.max_positions:
            return ids
    raise DataError(
        "an example of a question does not fit the model's positions",
        where="--from",
        expected="shorter questions",
        hint="give others, or none",
    )


def _generate_answers(
    template: ChatTemplate, request: SynthesisRequest, budget: _TokenBudget, numbers: range, questions: Sequence[str]
) -> list[tuple[str, GeneratedDocument]]:
    """What is answered to each question; nothing to an empty one, or one that grew too long in the template."""
    nothing = ("", GeneratedDocument(np.zeros(0, np.int64), ended=False))
    prompts = [template.prompt_ids([{"role": "user", "content": question or "?"}]) for question in questions]
    fits = [bool(question) and len(ids) <= budget.prompt for question, ids in zip(questions, prompts, strict=True)]
    chosen = [i for i, fit in enumerate(fits) if fit]
    out = [nothing] * len(questions)
    if not chosen:
        return out
    found = _generate(
        template,
        request,
        [prompts[i] for i in chosen],
        [numbers[i] for i in chosen],
        budget.answer,
        template.generator.stop_tokens,
        _ANSWER_STREAM,
    )
    for i, new in zip(chosen, found, strict=True):
        out[i] = decode_ids(template.generator.tokenizer, new.ids).strip(), new
    return out


def _generate(
    template: ChatTemplate,
    request: SynthesisRequest,
    prompts: Sequence[np.ndarray],
    numbers: Sequence[int],
    max_tokens: int,
    stop: set[int],
    stream: int,
) -> list[GeneratedDocument]:
    return generate_documents(
        template.generator.model,
        prompts,
        numbers,
        seed=request.seed,
        max_new_tokens=max_tokens,
        stop_ids=stop,
        temperature=request.temperature,
        top_p=request.top_p,
        stream=stream,
    )


# --- what is kept -------------------------------------------------------------------------------------


def select_diverse(lines: list[str], *, share: float, seed: int) -> list[str]:
    """Of lines of JSON the share that stands nearest to the centres of clusters, in their order.

    Questions as TF-IDF of words and pairs of words, k-means of `CLUSTERS` clusters (scikit-learn); from each cluster as many as
    its size asks for, the nearest to its centre first.
    """
    count = max(1, round(share * len(lines)))
    if count >= len(lines):
        return lines
    from sklearn.cluster import KMeans
    from sklearn.feature_extraction.text import TfidfVectorizer

    questions = [dedup_text(json.loads(line)) for line in lines]
    features = TfidfVectorizer(
        ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"(?u)\b\w+\b|[^\w\s]"
    ).fit_transform(questions)
    found = KMeans(min(CLUSTERS, count), n_init=4, random_state=seed).fit(features)
    distance_N = found.transform(features).min(1)
    return [lines[i] for i in nearest_to_centers(found.labels_, distance_N, count)]


def nearest_to_centers(cluster_N: np.ndarray, distance_N: np.ndarray, count: int) -> list[int]:
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

"""Generate conversations with a chat model for replay: its own questions, and answers to them.

Self-synthesized rehearsal (SSR; Huang et al. 2024, arXiv 2403.01244) in three steps. The start model generates questions:
few-shot from given examples, or without any in the user turn of the chat template (Magpie; Xu et al. 2024, arXiv 2406.08464).
The start model, or the latest one, answers them. The conversations nearest to the centres of k-means clusters are kept for
their diversity.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from postgrad.commands.synthesize import (
    Candidate,
    SynthesisProgress,
    SynthesisRequest,
    SynthesizedText,
    TextGenerator,
    check_request,
    dedup_text,
    finalize_output,
    generate_until_target,
    is_complete,
    load_generator,
    read_synthesized,
)
from postgrad.data.filter.near_duplicates import repetition_share
from postgrad.data.random_streams import RandomStreams
from postgrad.data.read.documents import Document, read_documents
from postgrad.data.read.files import RawSource as Files
from postgrad.data.render.chat import apply_chat_template
from postgrad.data.render.frame import Frame
from postgrad.data.render.renderers import PlainRenderer
from postgrad.data.words import split_spaces, split_words_and_signs
from postgrad.errors import DataError, ModelError, StageError
from postgrad.evaluation.continuations import decode_ids
from postgrad.evaluation.generate_documents import GeneratedDocument, generate_documents
from postgrad.hardware import machine
from postgrad.models.sampling import count_token_ids
from postgrad.storage.fingerprint import fingerprint

DEFAULT_SHOTS = 3
"""Examples before a question, by default."""
CLUSTERS = 20
"""k-means clusters of questions (as in SSR)."""
_MAX_EXAMPLES = 100_000
_MIN_WORDS = 2
_USER_PLACEHOLDER = "\ufdd2"
"""A noncharacter that marks the user's content in a rendered template."""
_QUESTION_STREAM, _ANSWER_STREAM, _EXAMPLES_STREAM = 0, 1, 2
"""Random streams of one row."""
FIRST_REQUEST, NEXT_REQUEST = (
    "Write a question or a task that someone could give to an assistant.",
    "Write another one, about something else.",
)
"""The user turns before example questions."""


@dataclass(frozen=True)
class Rehearsal:
    """How questions and answers are generated."""

    examples: tuple[str, ...] = ()
    """Files with example questions; without any, questions are sampled from the chat template alone."""
    shots: int = DEFAULT_SHOTS
    """Examples before each question."""
    answer_model: str | None = None
    """The model that answers. Default: the one that asks."""
    diverse_share: float = 1.0
    """Fraction of the conversations that is kept, chosen for diversity."""


@dataclass(frozen=True)
class ChatTemplate:
    """A model's chat template, rendered as ids and texts."""

    generator: TextGenerator

    def __post_init__(self) -> None:
        if not self.generator.tokenizer.chat_template:
            raise ModelError(
                f"{self.generator.name} has no chat template",
                where="model",
                expected="a model that was trained on conversations",
                hint="without --chat it generates running text",
            )

    def _render(self, messages: Sequence[dict[str, str]], *, prompt: bool) -> str:
        tokenizer = self.generator.tokenizer
        assert tokenizer.chat_template is not None
        return apply_chat_template(
            tokenizer.chat_template, tokenizer.special_tokens_map, messages, add_generation_prompt=prompt
        )

    def encode(self, text: str) -> np.ndarray:
        """A rendered text as ids, after the special tokens that the tokenizer adds."""
        ids = self.generator.tokenizer(text, add_special_tokens=False)["input_ids"]
        framed = Frame(self.generator.encoder.prefix_ids).wrap_once(ids)
        return self.generator.prefix.insert(np.array(framed, np.int64))

    def prompt_ids(self, messages: Sequence[dict[str, str]]) -> np.ndarray:
        """A conversation up to where the next answer begins."""
        return self.encode(self._render(messages, prompt=True))

    @cached_property
    def user_turn_affixes(self) -> tuple[str, str]:
        """The template's text before and after the first user content."""
        before, marker, after = self._render([{"role": "user", "content": _USER_PLACEHOLDER}], prompt=True).partition(
            _USER_PLACEHOLDER
        )
        if not marker or not before:
            raise ModelError(
                "the chat template does not render the user's content",
                where="MODEL",
                expected="a template with a header before the user's content",
                hint="give example questions with --prompts",
            )
        return before, after

    @cached_property
    def user_end_tokens(self) -> set[int]:
        """The special token after the user's content, if there is one."""
        first = self.encode(self.user_turn_affixes[1].lstrip())[len(self.encode("")) :][:1].tolist()
        return {token for token in first if token in self.generator.tokenizer.all_special_ids}


@dataclass(frozen=True)
class _TokenBudget:
    """Limits on the tokens of a question, an answer and a prompt."""

    question: int
    answer: int
    prompt: int
    """Of a question within the chat template."""


def synthesize_chat(
    model: str, out: Path, request: SynthesisRequest, rehearsal: Rehearsal | None = None, *, base: str | None = None
) -> Iterator[SynthesisProgress | SynthesizedText]:
    """Generate conversations into `out`, a JSONL file with `messages` and the provenance of each; the last item is the result.

    Raises what `synthesize` raises, and `ModelError` for a model without a chat template.
    """
    rehearsal, out = rehearsal or Rehearsal(), Path(out)
    check_request(out, request)
    _check_options(rehearsal, request)
    machine.tune_allocator()
    question_template = ChatTemplate(load_generator(str(model), request.max_document_tokens, base))
    name = rehearsal.answer_model
    answer_template = (
        question_template
        if name is None
        else ChatTemplate(load_generator(name, request.max_document_tokens, where="--answer"))
    )
    examples = _read_questions(rehearsal)
    budget = _token_budget(question_template, answer_template, request)
    options = [
        request.decisive_options(),
        question_template.generator.fingerprint,
        answer_template.generator.fingerprint,
        examples,
        rehearsal.shots,
    ]
    draw = partial(_generate_conversations, question_template, answer_template, request, rehearsal, examples, budget)
    share = rehearsal.diverse_share
    if is_complete(out, fingerprint(options), diverse_share=share):
        yield read_synthesized(model, out, already_complete=True)
        return
    yield from generate_until_target(out, request, fingerprint(options), question_template.generator, draw)
    select = partial(select_diverse, share=share, seed=request.seed) if share < 1 else None
    finalize_output(out, select, diverse_share=share)
    yield read_synthesized(model, out)


def _check_options(rehearsal: Rehearsal, request: SynthesisRequest) -> None:
    for option, value, is_valid, expected in (
        ("--shots", rehearsal.shots, rehearsal.shots > 0, "above 0"),
        ("--diverse-share", rehearsal.diverse_share, 0 < rehearsal.diverse_share <= 1, "above 0, at most 100%"),
        (
            "--prompt-tokens",
            request.prompt_tokens,
            not request.prompt_tokens,
            "0: a conversation begins with a question",
        ),
    ):
        if not is_valid:
            raise StageError(f"{value} is out of range", where=option, expected=expected)


def _token_budget(
    question_template: ChatTemplate, answer_template: ChatTemplate, request: SynthesisRequest
) -> _TokenBudget:
    """A third of the tokens that the template leaves is for the question."""
    empty = max(
        len(turns.prompt_ids([{"role": "user", "content": "?"}])) for turns in (question_template, answer_template)
    )
    question = (request.max_document_tokens - empty) // 3
    if question < 4:
        raise StageError(
            f"{request.max_document_tokens} tokens leave no room for a question: the chat template takes {empty}",
            where="--max-tokens",
            expected=f"at least {empty + 12}",
        )
    return _TokenBudget(question, request.max_document_tokens - empty - question, empty + question)


def _read_questions(rehearsal: Rehearsal) -> list[str]:
    """The questions of the given rows. Raises `DataError` when there are too few."""
    questions: list[str] = []
    for path in rehearsal.examples:
        documents = read_documents(Files("examples", path, root=Path.cwd(), where="--prompts"))
        questions += [text for each in islice(documents, _MAX_EXAMPLES) if (text := _get_question(each))]
    if rehearsal.examples and len(questions) < rehearsal.shots:
        raise DataError(
            f"{len(questions)} questions",
            where="--prompts",
            expected=f"at least as many as --shots ({rehearsal.shots})",
            hint="give more of them, lower --shots, or give none",
        )
    return questions


def _get_question(document: Document) -> str:
    """The question of a row."""
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
    for (text, new), (answer_text, answer) in zip(questions, answers, strict=True):
        messages = [{"role": "user", "content": text}, {"role": "assistant", "content": answer_text}]
        provenance: dict[str, Any] = {"from": "examples" if examples else "template"}
        if answer_template is not question_template:
            provenance |= {
                "answered_by": answer_template.generator.name,
                "answering_model": answer_template.generator.fingerprint,
            }
        size = len(new.ids) + len(answer.ids)
        reason = _rejection_reason(text, new, answer_text, answer, request)
        yield Candidate({"messages": messages}, provenance, size, new.ended and answer.ended, reason)


def _rejection_reason(
    question: str,
    generated_question: GeneratedDocument,
    answer_text: str,
    generated_answer: GeneratedDocument,
    request: SynthesisRequest,
) -> str | None:
    """Why a conversation is rejected; None for an acceptable one."""
    if not generated_question.ended:
        return "questions without an end"
    if len(split_spaces(question)) < _MIN_WORDS:
        return "questions of fewer than two words"
    if not generated_answer.ended:
        return "answers without an end"
    if not answer_text:
        return "empty answers"
    repeats = max(repetition_share(generated_question.ids.tolist()), repetition_share(generated_answer.ids.tolist()))
    return "repetitive" if repeats > request.max_repetition else None


def _generate_questions(
    template: ChatTemplate,
    request: SynthesisRequest,
    rehearsal: Rehearsal,
    examples: Sequence[str],
    budget: _TokenBudget,
    numbers: range,
) -> list[tuple[str, GeneratedDocument]]:
    """Generated questions with their ids."""
    prompts = [_question_prompt(template, request, rehearsal, examples, budget, number) for number in numbers]
    stop = template.generator.stop_tokens | (template.user_end_tokens if not examples else set())
    documents = _generate(template, request, prompts, numbers, budget.question, stop, _QUESTION_STREAM)
    turn_end = "" if examples else template.user_turn_affixes[1].strip()
    questions: list[tuple[str, GeneratedDocument]] = []
    for new in documents:
        text = decode_ids(template.generator.tokenizer, new.ids)
        before, ended, _ = text.partition(turn_end) if turn_end else (text, "", "")
        questions.append((before.strip(), GeneratedDocument(new.ids, new.ended or bool(ended))))
    return questions


def _question_prompt(
    template: ChatTemplate,
    request: SynthesisRequest,
    rehearsal: Rehearsal,
    examples: Sequence[str],
    budget: _TokenBudget,
    number: int,
) -> np.ndarray:
    """The prompt of a question: as many sampled examples as fit, or the opening of a user turn."""
    if not examples:
        return template.encode(template.user_turn_affixes[0])
    chosen = (
        RandomStreams(request.seed).generator(number, _EXAMPLES_STREAM).permutation(len(examples))[: rehearsal.shots]
    )
    for count in range(len(chosen), 0, -1):
        messages: list[dict[str, str]] = []
        for position, index in enumerate(chosen[:count].tolist()):
            messages.append({"role": "user", "content": NEXT_REQUEST if position else FIRST_REQUEST})
            messages.append({"role": "assistant", "content": examples[index]})
        ids = template.prompt_ids([*messages, {"role": "user", "content": NEXT_REQUEST}])
        if template.generator.max_positions is None or len(ids) + budget.question <= template.generator.max_positions:
            return ids
    raise DataError(
        "an example question does not fit the model's positions",
        where="--prompts",
        expected="shorter questions",
        hint="give others, or none",
    )


def _generate_answers(
    template: ChatTemplate, request: SynthesisRequest, budget: _TokenBudget, numbers: range, questions: Sequence[str]
) -> list[tuple[str, GeneratedDocument]]:
    """The answer to each question; empty for an empty question, or one that is too long in the template."""
    no_answer = ("", GeneratedDocument(np.zeros(0, np.int64), ended=False))
    prompts = [template.prompt_ids([{"role": "user", "content": question or "?"}]) for question in questions]
    fits = [bool(question) and len(ids) <= budget.prompt for question, ids in zip(questions, prompts, strict=True)]
    chosen = [i for i, fit in enumerate(fits) if fit]
    answers = [no_answer] * len(questions)
    if not chosen:
        return answers
    documents = _generate(
        template,
        request,
        [prompts[i] for i in chosen],
        [numbers[i] for i in chosen],
        budget.answer,
        template.generator.stop_tokens,
        _ANSWER_STREAM,
    )
    for i, new in zip(chosen, documents, strict=True):
        answers[i] = decode_ids(template.generator.tokenizer, new.ids).strip(), new
    return answers


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
        token_ids=count_token_ids(template.generator.tokenizer),
    )


# --- diversity -------------------------------------------------------------------------------------


def select_diverse(lines: list[str], *, share: float, seed: int) -> list[str]:
    """The fraction of JSON lines nearest to the centres of clusters, in their order.

    k-means of `CLUSTERS` clusters (scikit-learn) on TF-IDF of unigrams and bigrams of the questions; each cluster gives lines
    in proportion to its size, those nearest to its centre first.
    """
    count = max(1, round(share * len(lines)))
    if count >= len(lines):
        return lines
    from sklearn.cluster import KMeans
    from sklearn.feature_extraction.text import TfidfVectorizer

    questions = [dedup_text(json.loads(line)) for line in lines]
    vectorizer = TfidfVectorizer(
        ngram_range=(1, 2),
        sublinear_tf=True,
        lowercase=False,
        tokenizer=split_words_and_signs,
        token_pattern=None,  # type: ignore[arg-type]
    )
    features = vectorizer.fit_transform(questions)
    clustering = KMeans(min(CLUSTERS, count), n_init=4, random_state=seed).fit(features)
    distance_N = clustering.transform(features).min(1)
    return [lines[i] for i in nearest_to_centers(clustering.labels_, distance_N, count)]


def nearest_to_centers(cluster_N: np.ndarray, distance_N: np.ndarray, count: int) -> list[int]:
    """Sorted indices of `count` rows: from each cluster in proportion to its size (largest remainders), nearest first."""
    sizes = np.bincount(cluster_N)
    quotas = count * sizes / sizes.sum()
    counts = np.floor(quotas).astype(int)
    counts[np.argsort(-(quotas - counts), kind="stable")[: count - int(counts.sum())]] += 1
    chosen: list[int] = []
    for cluster, cluster_count in enumerate(counts.tolist()):
        members = np.flatnonzero(cluster_N == cluster)
        chosen += members[np.argsort(distance_N[members], kind="stable")[:cluster_count]].tolist()
    return sorted(chosen)

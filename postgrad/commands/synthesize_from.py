"""Rewrite a corpus with a model, so that a small one can be learnt: restatements, questions with answers, and study notes.

A fact that stands once in one wording is hardly learnt by next-token prediction. Text that says it again in other ways is
(EntiGraph, Yang et al. 2024, arXiv 2409.07431; Active Reading, Lin et al. 2025, arXiv 2508.09494). The model reads a part of
a document and writes one of the forms. What is repetitive, copied from the document, not about it or not in the form is
rejected and counted.

A share of the documents is held out from the questions: their questions go into a file of their own, whose rows measure what
was learnt without the document in sight (closed book). Their restatements and notes are training text, so their facts can be
learnt, but never as these questions.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from postgrad.commands.synthesize import (
    Candidate,
    SynthesisProgress,
    SynthesisRequest,
    SynthesizedText,
    TextGenerator,
    check_request,
    finalize_output,
    generate_until_target,
    is_complete,
    load_generator,
    read_synthesized,
)
from postgrad.commands.synthesize_chat import ChatTemplate
from postgrad.data.filter.near_duplicates import repetition_share
from postgrad.data.read.documents import Document, read_documents
from postgrad.data.read.files import RawSource as Files
from postgrad.data.read.generated_text import GENERATED_COLUMN
from postgrad.data.words import split_words
from postgrad.errors import DataError, StageError, suggest_nearest
from postgrad.evaluation.continuations import decode_ids
from postgrad.evaluation.generate_documents import GeneratedDocument, generate_documents
from postgrad.evaluation.generation_metrics import normalize_answer
from postgrad.hardware import machine
from postgrad.models.sampling import count_token_ids
from postgrad.storage.atomic import disk_errors, write_atomically
from postgrad.storage.fingerprint import fingerprint
from postgrad.storage.read_json import MAX_BYTES, read_file

FORM_COLUMN = "form"
"""The column of generated rows that sources filter by."""
_ROUNDS = 3
"""Times that the questions of each held-out part are generated."""
_RUN_WORDS = 5
"""Length of the runs of words by which copies of a document are found."""
_MIN_SHARED_WORDS = 0.2
"""Share of a text's different words that its document has too; below it the text is about something else."""
_MIN_WORDS = 5
_MIN_PART_TOKENS = 16
_DEFAULT_PART_TOKENS = 1024
_PAIR = re.compile(r"Question:\s*(?P<question>[^\n]+?)\s*\n\s*Answer:\s*(?P<answer>[^\n]+)(?P<end>\n?)")


@dataclass(frozen=True)
class _Form:
    """How a form is asked for: the request to a chat model, and the words after the document for any other model."""

    request: str
    lead: str
    opening: str = ""
    """What the lead has begun, and the text begins with."""


FORMS: Mapping[str, _Form] = {
    "restatement": _Form(
        "Restate the following text in your own words. Keep every fact, name and number.", "The same in other words:\n"
    ),
    "questions": _Form(
        "Write questions about facts of the following text. Each question names what it is about, so that it can be answered "
        "without the text, and its answer is a few words of the text. Write each pair on two lines that begin with "
        "`Question:` and `Answer:`.",
        "Questions about facts of this text, which name what they are about, with short answers:\n\nQuestion:",
        "Question:",
    ),
    "notes": _Form(
        "Write study notes on the following text: what to remember, how its parts are related, and a comparison or an example "
        "that helps to remember it.",
        "Notes on this text: what to remember, and how its parts are related:\n-",
        "-",
    ),
}


@dataclass(frozen=True)
class Rewriting:
    """What is rewritten, in which forms, and which share of the documents is held out from the questions."""

    corpus: tuple[str, ...]
    forms: tuple[str, ...] = ("restatement", "questions", "notes")
    held_out: float = 0.1
    """0: no documents are held out, and there is no file of questions."""
    questions: Path | None = None
    """The file of closed-book questions. Default: beside the text, with `-questions` behind its name."""

    def questions_file(self, out: Path) -> Path | None:
        """The file of closed-book questions, if there is one."""
        return (self.questions or out.with_name(f"{out.stem}-questions.jsonl")) if self.held_out else None


@dataclass(frozen=True)
class _Part:
    """A part of a document that fits the model together with what it writes."""

    text: str
    location: str
    digest: int
    is_held_out: bool


class _Written(NamedTuple):
    """What the model wrote of a part, in a form."""

    part: _Part
    form: str
    text: str
    new: GeneratedDocument


def synthesize_from(
    model: str, out: Path, request: SynthesisRequest, rewriting: Rewriting, *, base: str | None = None
) -> Iterator[SynthesisProgress | SynthesizedText]:
    """Rewrite documents into `out`, a JSONL file with `text`, `form` and the provenance of each; the last item is the result.

    `request.max_document_tokens` limits a text. Raises what `synthesize` raises, and `DataError` for a corpus that is too small
    to hold out documents, or whose held-out documents give no question.
    """
    out = Path(out)
    check_request(out, request)
    _check_rewriting(rewriting, request)
    machine.tune_allocator()
    generator = load_generator(str(model), request.max_document_tokens, base)
    template = ChatTemplate(generator) if generator.tokenizer.chat_template else None
    parts = _read_parts(generator, template, request, rewriting)
    identity = [(part.digest, part.text, part.is_held_out) for part in parts]
    options = fingerprint([request.decisive_options(), generator.fingerprint, rewriting.forms, identity])
    complete = is_complete(out, options)
    draw = partial(_rewrite, generator, template, request)
    if questions_file := rewriting.questions_file(out):
        held_out = [(part, "questions") for part in parts if part.is_held_out]
        _write_questions(questions_file, options, generator, partial(draw, held_out), len(held_out), request.batch_size)
    if not complete:
        jobs = [
            (part, form) for part in parts for form in rewriting.forms if not (part.is_held_out and form == "questions")
        ]
        candidates = partial(_make_candidates, jobs, draw, request)
        yield from generate_until_target(out, request, options, generator, candidates)
        finalize_output(out)
    yield _add_counts(read_synthesized(model, out, already_complete=complete), questions_file)


def _check_rewriting(rewriting: Rewriting, request: SynthesisRequest) -> None:
    unknown = next((form for form in rewriting.forms if form not in FORMS), None)
    if unknown is not None or not rewriting.forms:
        raise StageError(
            f"'{unknown or ''}' is no form",
            where="--forms",
            expected=", ".join(FORMS),
            hint=suggest_nearest(unknown or "", FORMS),
        )
    if not 0 <= rewriting.held_out < 1:
        raise StageError(f"{rewriting.held_out} is out of range", where="--held-out", expected="0 to 99%")
    if request.prompt_tokens:
        raise StageError(
            "--from has documents to rewrite, and their first tokens are no prompts",
            where="--prompt-tokens",
            expected="0",
            hint="texts whose first tokens begin the documents are now given with --prompts",
        )


def _read_parts(
    generator: TextGenerator, template: ChatTemplate | None, request: SynthesisRequest, rewriting: Rewriting
) -> list[_Part]:
    """The documents in parts; those with the smallest content hashes are held out."""
    documents: list[Document] = []
    for path in rewriting.corpus:
        read = read_documents(Files("corpus", str(path), root=Path.cwd(), where="--from"))
        documents += [document for document in read if document.text is not None and not document.is_empty]
    unique = {document.digest: document for document in documents}
    count = round(rewriting.held_out * len(unique))
    if rewriting.held_out and not 0 < count < len(unique):
        raise DataError(
            f"a corpus of {len(unique):,} documents is too small to hold out {rewriting.held_out:.0%} of them",
            where="--from",
            expected=f"at least {max(2, int(np.ceil(0.5 / rewriting.held_out)))} documents",
            hint="split files into documents, hold out more (--held-out 50%), or none: --held-out 0",
        )
    held_out = set(sorted(unique)[:count])
    longest = max(len(_encode_prompt(generator, template, form, "")) for form in FORMS)
    limit = generator.max_positions or longest + request.max_document_tokens + _DEFAULT_PART_TOKENS
    room = limit - longest - request.max_document_tokens
    if room < _MIN_PART_TOKENS:
        raise StageError(
            f"texts of {request.max_document_tokens:,} tokens leave {max(room, 0):,} of {limit:,} positions for a document",
            where="--max-tokens",
            expected=f"at most {max(limit - longest - _MIN_PART_TOKENS, 1):,}",
        )
    return [
        _Part(text, document.location, digest, digest in held_out)
        for digest, document in unique.items()
        for text in _split_text(generator, str(document.text), room)
    ]


def _split_text(generator: TextGenerator, text: str, max_tokens: int) -> list[str]:
    """A text in parts of at most `max_tokens` (tokens of a part encode to no more, give or take a few), by paragraphs."""
    parts: list[str] = []
    size = 0
    for piece in re.split(r"(?<=\n\n)", text):
        ids = generator.tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]
        if parts and size + len(ids) <= max_tokens:
            parts[-1] += piece
            size += len(ids)
            continue
        windows = [ids[i : i + max_tokens] for i in range(0, len(ids), max_tokens)]
        parts += [piece] if len(windows) == 1 else [decode_ids(generator.tokenizer, np.array(w)) for w in windows]
        size = len(windows[-1]) if windows else 0
    return [part.strip() for part in parts if part.strip()]


def _encode_prompt(generator: TextGenerator, template: ChatTemplate | None, form: str, text: str) -> np.ndarray:
    """The ids after which a model writes a form of a document."""
    asked = FORMS[form]
    if template is not None:
        return template.prompt_ids([{"role": "user", "content": f"{asked.request}\n\n{text}"}])
    ids = generator.tokenizer(f"{text}\n\n{asked.lead}", add_special_tokens=False, verbose=False)["input_ids"]
    return generator.prefix.insert(np.array([*generator.encoder.prefix_ids, *ids], np.int64))


def _rewrite(
    generator: TextGenerator,
    template: ChatTemplate | None,
    request: SynthesisRequest,
    jobs: Sequence[tuple[_Part, str]],
    numbers: range,
) -> list[_Written]:
    """What the model writes for each number: the jobs in turn, and again with other random numbers."""
    chosen = [jobs[number % len(jobs)] for number in numbers]
    prompts = [_encode_prompt(generator, template, form, part.text) for part, form in chosen]
    documents = generate_documents(
        generator.model,
        prompts,
        numbers,
        seed=request.seed,
        max_new_tokens=request.max_document_tokens,
        stop_ids=generator.stop_tokens,
        temperature=request.temperature,
        top_p=request.top_p,
        token_ids=count_token_ids(generator.tokenizer),
    )
    out: list[_Written] = []
    for (part, form), new in zip(chosen, documents, strict=True):
        opening = "" if template else FORMS[form].opening
        out.append(_Written(part, form, (opening + decode_ids(generator.tokenizer, new.ids)).strip(), new))
    return out


def _make_candidates(
    jobs: Sequence[tuple[_Part, str]],
    draw: Callable[[Sequence[tuple[_Part, str]], range], list[_Written]],
    request: SynthesisRequest,
    numbers: range,
) -> Iterator[Candidate]:
    """The rows of training text."""
    for part, form, text, new in draw(jobs, numbers):
        reason = "repetitive" if repetition_share(new.ids.tolist()) > request.max_repetition else None
        if form == "questions":
            pairs = extract_pairs(text, part.text, ended=new.ended)
            text = "\n\n".join(f"Question: {question}\nAnswer: {answer}" for question, answer in pairs)
            reason = reason or (None if pairs else "no question whose answer is in the document")
        else:
            reason = reason or find_mismatch(text, part.text, request.dedup_threshold)
        yield Candidate({"text": text, FORM_COLUMN: form}, {"from": part.location}, len(new.ids), new.ended, reason)


def find_mismatch(text: str, document: str, copy_threshold: float) -> str | None:
    """Why a text is no rewriting of a document: it is too short, a copy, or about something else."""
    words, own = split_words(text), split_words(document)
    if len(words) < _MIN_WORDS:
        return "too short"
    runs, own_runs = _runs(words), _runs(own)
    if len(runs & own_runs) > copy_threshold * len(runs):
        return "copies of the document"
    shared = len(set(words) & set(own)) / len(set(words))
    return "not about the document" if shared < _MIN_SHARED_WORDS else None


def _runs(words: Sequence[str]) -> set[tuple[str, ...]]:
    return {tuple(words[i : i + _RUN_WORDS]) for i in range(len(words) - _RUN_WORDS + 1)}


def extract_pairs(text: str, document: str, *, ended: bool) -> list[tuple[str, str]]:
    """Questions and answers of a text: those whose answer is in the document, and not in the question.

    The last line of a text that did not end may be cut.
    """
    has_words = f" {' '.join(split_words(document))} "
    pairs: dict[str, str] = {}
    for match in _PAIR.finditer(text):
        question, answer = match["question"], match["answer"].strip()
        words = " ".join(split_words(answer))
        is_cut = not ended and not match["end"]
        if (
            words
            and not is_cut
            and f" {words} " in has_words
            and f" {words} " not in f" {' '.join(split_words(question))} "
        ):
            pairs.setdefault(question, answer)
    return list(pairs.items())


def _write_questions(
    file: Path,
    options: str,
    generator: TextGenerator,
    draw: Callable[[range], list[_Written]],
    part_count: int,
    batch_size: int,
) -> None:
    """The questions of held-out documents as rows of `prompt` and `completion`.

    Raises `StageError` for a file that another command wrote, `DataError` for documents that give no question.
    """
    if file.exists():
        content = read_file(file, MAX_BYTES, error=StageError)
        first = content.decode(errors="replace").partition("\n")[0]
        if f'"options": "{options}"' not in first:
            raise StageError(
                f"{file} already exists, and was not written by this command with these options",
                where="--questions",
                hint="name another file, or remove it",
            )
        return
    rows: dict[str, dict[str, Any]] = {}
    total = _ROUNDS * part_count
    batches = (range(start, min(start + batch_size, total)) for start in range(0, total, batch_size))
    for number, written in (
        (number, each) for batch in batches for number, each in zip(batch, draw(batch), strict=True)
    ):
        for question, answer in extract_pairs(written.text, written.part.text, ended=written.new.ended):
            provenance = {"by": generator.name, "options": options, "from": written.part.location, "number": number}
            row = {"prompt": f"Question: {question}\nAnswer:", "completion": f" {answer}", GENERATED_COLUMN: provenance}
            rows.setdefault(normalize_answer(question), row)
    if not rows:
        raise DataError(
            f"{generator.name} writes no question about {part_count:,} parts of held-out documents whose answer is in them",
            where="--from",
            expected="a model that can ask questions about a text, such as an instructed one",
            hint="name another model, or use --held-out 0 --forms restatement,notes",
        )
    with disk_errors(file):
        write_atomically(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows.values()))


def _add_counts(result: SynthesizedText, questions_file: Path | None) -> SynthesizedText:
    """The result with the number of texts in each form, and of closed-book questions."""
    with result.file.open(encoding="utf-8") as lines:
        forms = Counter(str(json.loads(line)[FORM_COLUMN]) for line in lines)
    if questions_file is None:
        return replace(result, forms=dict(forms))
    with questions_file.open(encoding="utf-8") as lines:
        return replace(result, forms=dict(forms), questions_file=questions_file, questions=sum(1 for _ in lines))

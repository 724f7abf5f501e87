"""Generate replay text with the start model itself, for when the old text is gone.

Documents are sampled at temperature 1 without truncation, from the BOS or from the first tokens of given texts, so that they
follow the model's own distribution (self-generated replay; LAMOL, Sun et al. 2020, arXiv 1909.03329). Repetitive documents
and near-duplicates are rejected and counted. Interrupted anywhere, the same command resumes after the last whole batch and
ends with the same file.
"""

from __future__ import annotations

import json
import math
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from postgrad.commands.results import Result
from postgrad.config.document_filters import MIN_THRESHOLD
from postgrad.data.filter.near_duplicates import NearDuplicateIndex, repetition_share
from postgrad.data.read.documents import read_documents
from postgrad.data.read.files import RawSource as Files
from postgrad.data.read.generated_text import GENERATED_COLUMN
from postgrad.data.render.frame import TextPrefix
from postgrad.data.tokens.encoder import Encoder
from postgrad.data.words import split_spaces
from postgrad.errors import DataError, ModelError, StageError
from postgrad.evaluation.continuations import decode_ids
from postgrad.evaluation.generate_documents import generate_documents
from postgrad.hardware import machine
from postgrad.hardware.memory import memory_errors
from postgrad.models.location import locate_model
from postgrad.models.model import CausalModel, wrap_model
from postgrad.models.model_sizes import load_model_sizes
from postgrad.models.pretrained import load_tokenizer
from postgrad.models.sampling import count_token_ids
from postgrad.models.task import Task
from postgrad.plan.model_inputs import make_encoder
from postgrad.storage.atomic import disk_errors, write_all, write_atomically
from postgrad.storage.checked_files import read_checked_json, write_checked_json
from postgrad.storage.fingerprint import fingerprint
from postgrad.tuning.open_model import get_task, open_model, start_fingerprint

_MAX_PROMPTS = 100_000
_MIN_WORDS = 5
_MAX_ATTEMPTS = 10
"""Documents sampled for each accepted one, before giving up."""


@dataclass(frozen=True)
class SynthesisRequest:
    """How much text is generated, and how."""

    tokens: int
    """Tokens of accepted text in all."""
    max_document_tokens: int = 512
    """Tokens of a document, its prompt included."""
    seed: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    prompt_tokens: int = 0
    """Tokens of a given text that a document begins with; 0: the model's BOS alone."""
    batch_size: int = 32
    max_repetition: float = 0.3
    """Documents with a larger share of repeated runs of eight tokens are rejected."""
    dedup_threshold: float = 0.8
    """Documents that share so much of their five-word runs with an earlier one are rejected."""

    def decisive_options(self) -> dict[str, Any]:
        """The options that decide the text: not how many documents are generated in parallel."""
        return {name: value for name, value in asdict(self).items() if name != "batch_size"}


@dataclass(frozen=True)
class SynthesisProgress:
    """How much has been generated."""

    documents: int
    tokens: int
    target_tokens: int


@dataclass
class _SynthesisState:
    """Saved after each batch: everything that resuming needs, apart from the file itself."""

    options_fingerprint: str
    next: int = 0
    size: int = 0
    documents: int = 0
    tokens: int = 0
    ended: int = 0
    left_out: dict[str, int] | None = None
    crc32: int | None = None
    """Of the file so far; None in files of earlier versions."""
    chosen: int | None = None
    """Of conversations: how many were kept for their diversity ..."""
    diverse_share: float = 1.0
    """... and which share that is."""


@dataclass(frozen=True)
class Candidate:
    """A sampled document, before deduplication."""

    row: dict[str, Any]
    """The row to write, without its provenance."""
    provenance: dict[str, Any]
    """How it was generated, apart from what all rows of a file share."""
    tokens: int
    ended: bool
    rejection_reason: str | None = None
    """None for an acceptable document."""


DrawCandidates = Callable[[range], Iterable[Candidate]]
"""Samples the candidates of these numbers; each is a function of its own number."""


@dataclass(frozen=True)
class TextGenerator:
    """A decoder that generates documents."""

    name: str
    fingerprint: str
    model: CausalModel
    tokenizer: PreTrainedTokenizerBase
    encoder: Encoder
    prefix: TextPrefix
    """Special tokens and soft prompts before every text."""
    max_positions: int | None

    @property
    def stop_tokens(self) -> set[int]:
        """Token ids that end a document."""
        named = getattr(self.model.pretrained.generation_config, "eos_token_id", None)
        own = [self.encoder.eos, *self.encoder.prefix_ids, *(named if isinstance(named, list) else [named])]
        return {token for token in own if token is not None}


def load_generator(
    model: str, max_document_tokens: int, base: str | None = None, where: str = "model"
) -> TextGenerator:
    """Load a decoder; `where` is the option that names it, for errors.

    Raises `StageError` for documents longer than its positions, `ModelError` for a model that is no decoder or is missing.
    """
    try:
        start = locate_model(model, Path.cwd(), base)
    except ModelError as error:
        option = where if error.where == "model" else error.where
        raise ModelError(error.problem, where=option, expected=error.expected, hint=error.hint) from None
    if get_task(start) != Task.CAUSAL:
        raise ModelError(
            f"{model} is not a decoder",
            where=where,
            expected="a causal language model",
        )
    tokenizer = load_tokenizer(start)
    sizes = load_model_sizes(start)
    encoder = make_encoder(tokenizer, sizes.vocab_size)
    limit = sizes.positions
    if limit and max_document_tokens > limit:
        raise StageError(
            f"documents of {max_document_tokens:,} tokens do not fit {model}, which has {limit:,} positions",
            where="--max-tokens",
            expected=f"at most {limit:,}",
        )
    opened = open_model(start)
    view = wrap_model(opened.model, Task.CAUSAL).to(machine.default_device())
    assert isinstance(view, CausalModel)
    prefix = TextPrefix(opened.frame.outer_ids, encoder.prefix_ids, opened.frame.prefix_ids)
    return TextGenerator(model, start_fingerprint(start) or model, view, tokenizer, encoder, prefix, limit)


def synthesize(
    model: str, out: Path, request: SynthesisRequest, prompts: Sequence[str] = (), *, base: str | None = None
) -> Iterator[SynthesisProgress | SynthesizedText]:
    """Generate documents into `out`, a JSONL file with `text` and the provenance of each; the last item is the result.

    Raises `StageError` for a file that exists or was begun with other options, `ModelError` for a model that is no decoder,
    `DataError` when nearly every document is rejected.
    """
    out = Path(out)
    check_request(out, request)
    if bool(prompts) != bool(request.prompt_tokens):
        raise StageError(
            "prompts need a text and a length",
            where="--prompts",
            expected="--prompts FILE --prompt-tokens 16, or neither",
        )
    machine.tune_allocator()
    generator = load_generator(str(model), request.max_document_tokens, base)
    prompt_ids = _read_prompts(prompts, request, generator.tokenizer, generator.encoder)
    prompt_lists = [ids.tolist() for ids, _ in prompt_ids]
    options = fingerprint([request.decisive_options(), generator.fingerprint, prompt_lists])
    if is_complete(out, options):
        yield read_synthesized(model, out, already_complete=True)
        return
    draw = partial(_generate_documents, generator, request, prompt_ids)
    yield from generate_until_target(out, request, options, generator, draw)
    finalize_output(out)
    yield read_synthesized(model, out)


def _generate_documents(
    generator: TextGenerator, request: SynthesisRequest, prompts: Sequence[tuple[np.ndarray, str]], numbers: range
) -> Iterator[Candidate]:
    """Documents of running text after their prompts."""
    batch_prompts = [prompts[number % len(prompts)] for number in numbers]
    documents = generate_documents(
        generator.model,
        [generator.prefix.insert(ids) for ids, _ in batch_prompts],
        numbers,
        seed=request.seed,
        max_new_tokens=request.max_document_tokens - len(batch_prompts[0][0]) - len(generator.prefix.virtual_tokens),
        stop_ids=generator.stop_tokens,
        temperature=request.temperature,
        top_p=request.top_p,
        token_ids=count_token_ids(generator.tokenizer),
    )
    for (ids, origin), new in zip(batch_prompts, documents, strict=True):
        prompt = ids[len(generator.encoder.prefix_ids) :] if request.prompt_tokens else ids[:0]
        text = decode_ids(generator.tokenizer, np.concatenate([prompt, new.ids])).strip()
        short = "too short" if len(split_spaces(text)) < _MIN_WORDS else None
        repeats = "repetitive" if repetition_share(new.ids.tolist()) > request.max_repetition else None
        yield Candidate({"text": text}, {"from": origin}, len(prompt) + len(new.ids), new.ended, short or repeats)


def dedup_text(row: Mapping[str, Any]) -> str:
    """The text by which near-duplicates are found: the question, or all of a running text."""
    return str(row["messages"][0]["content"] if "messages" in row else row["text"])


def finalize_output(
    out: Path, select: Callable[[list[str]], list[str]] | None = None, *, diverse_share: float = 1.0
) -> None:
    """Give the partial file its final name, with the lines that `select` keeps: a share of `diverse_share`."""
    state = _read_state(out, _state_file(out))
    with disk_errors(out):
        if select is None:
            write_checked_json(summary_file(out), asdict(state))
            partial_file(out).rename(out)
        else:
            chosen = select(partial_file(out).read_text("utf-8").splitlines(keepends=True))
            state.chosen, state.diverse_share = len(chosen), diverse_share
            write_checked_json(summary_file(out), asdict(state))
            write_atomically(out, "".join(chosen))  # the partial file stays until everything else is written
            partial_file(out).unlink()
        _state_file(out).unlink()


def is_complete(out: Path, options_fingerprint: str, *, diverse_share: float = 1.0) -> bool:
    """Whether the same command has written `out` already; removes what a kill at its end has left.

    Raises `StageError` for a file of another command.
    """
    if not out.exists():
        return False
    summary = _read_state(out, summary_file(out)) if summary_file(out).exists() else None
    if summary is None or (summary.options_fingerprint, summary.diverse_share) != (options_fingerprint, diverse_share):
        raise StageError(
            f"{out} already exists, and was not written by this command with these options",
            where="--out",
            hint="name another file, or remove it",
        )
    if summary.chosen is None and out.stat().st_size != summary.size:
        raise StageError(
            f"{out} has been changed since it was written", where="--out", hint="name another file, or remove it"
        )
    for leftover in (partial_file(out), _state_file(out)):
        leftover.unlink(missing_ok=True)
    return True


def generate_until_target(
    out: Path, request: SynthesisRequest, options_fingerprint: str, generator: TextGenerator, draw: DrawCandidates
) -> Iterator[SynthesisProgress]:
    """Append accepted candidates to the partial file of `out`, batch after batch, until it has the tokens requested.

    `options_fingerprint` is that of everything that decides the text. Raises `StageError` for a file begun with another,
    `DataError` when nearly every candidate is rejected.
    """
    part = partial_file(out)
    state = _load_state(out, options_fingerprint)
    seen, left_out = NearDuplicateIndex(request.dedup_threshold), Counter(state.left_out or {})
    common = {"by": generator.name, "model": generator.fingerprint, "seed": request.seed}
    common |= {"temperature": request.temperature, "top_p": request.top_p}
    with disk_errors(part):
        file = part.open("ab", buffering=0)
        file.truncate(state.size)
    with file:
        for text in _read_accepted(state, part):
            seen.find_or_add(text)
        while state.tokens < request.tokens:
            accepted: list[bytes] = []
            numbers = range(state.next, state.next + request.batch_size)
            with memory_errors("synthesize", f"--batch-size {max(1, request.batch_size // 2)}: the command resumes"):
                candidates = list(draw(numbers))
            for number, candidate in zip(numbers, candidates, strict=True):
                if state.tokens >= request.tokens:
                    break
                reason = candidate.rejection_reason
                if reason is None and seen.find_or_add(dedup_text(candidate.row)) is not None:
                    reason = "near-duplicates"
                if reason:
                    left_out[reason] += 1
                    continue
                provenance = {**common, "number": number, "ended": candidate.ended, **candidate.provenance}
                row = {**candidate.row, GENERATED_COLUMN: provenance}
                accepted.append(json.dumps(row, ensure_ascii=False).encode() + b"\n")
                state.documents += 1
                state.ended += candidate.ended
                state.tokens += candidate.tokens
            with disk_errors(part):
                write_all(file, b"".join(accepted))
            state.next, state.left_out = numbers.stop, dict(left_out)
            state.size += sum(map(len, accepted))
            state.crc32 = zlib.crc32(b"".join(accepted), state.crc32 or 0)
            write_checked_json(_state_file(out), asdict(state))
            yield SynthesisProgress(state.documents, state.tokens, request.tokens)
            if state.next >= _MAX_ATTEMPTS * max(state.documents, request.batch_size):
                raise DataError(
                    f"of {state.next:,} documents {state.documents:,} were accepted ("
                    + ", ".join(f"{count:,} {reason}" for reason, count in left_out.most_common())
                    + ")",
                    where="synthesize",
                    expected="a model that generates text",
                    hint="raise --max-tokens for documents without an end, --max-repetition or --dedup-threshold for the rest,"
                    " or give --prompts",
                )


def _read_accepted(state: _SynthesisState, part: Path) -> list[str]:
    """The texts accepted so far. Raises `StageError` when the file is not what was written."""
    content = part.read_bytes()
    found = zlib.crc32(content)
    try:
        rows = [json.loads(line) for line in content.splitlines()]
        texts = [dedup_text(row) for row in rows]
    except (ValueError, KeyError, TypeError, IndexError):
        texts = None
    if texts is None or state.crc32 not in (None, found):
        raise StageError(
            f"{part} has changed since it was written, so it cannot be resumed",
            where="--out",
            hint=f"remove {part.name} and {part.name}.json",
        )
    state.crc32 = found
    return texts


def summary_file(out: Path) -> Path:
    """The summary beside a file of generated text."""
    return out.with_name(f"{out.name}.made.json")


@dataclass(frozen=True)
class SynthesizedText(Result):
    """A file of generated text."""

    model: str
    file: Path
    documents: int
    tokens: int
    ended: int
    """Documents that ended by themselves, with a stop token."""
    left_out: Mapping[str, int]
    """Rejected documents by reason."""
    chosen: int | None = None
    """Of conversations: how many were kept for their diversity."""
    already_complete: bool = False
    """An earlier process wrote it, nothing was done."""
    forms: Mapping[str, int] = field(default_factory=dict)
    """Of a rewritten corpus: the number of texts in each form ..."""
    questions_file: Path | None = None
    """... the file of closed-book questions on held-out documents ..."""
    questions: int | None = None
    """... and their number."""


def read_synthesized(model: str, out: Path, *, already_complete: bool = False) -> SynthesizedText:
    """The summary of a file of generated text."""
    state = _read_state(out, summary_file(out))
    return SynthesizedText(
        str(model),
        out,
        state.documents,
        state.tokens,
        state.ended,
        state.left_out or {},
        state.chosen,
        already_complete,
    )


def check_request(out: Path, request: SynthesisRequest) -> None:
    """Raise `StageError` for a file that another command wrote, or numbers out of range."""
    if out.exists() and not summary_file(out).exists():
        raise StageError(f"{out} already exists", where="--out", hint="name another file, or remove it")
    if out.suffix != ".jsonl":
        raise StageError(f"{out.name} is not a JSONL file", where="--out", expected="a name that ends in .jsonl")
    if not out.parent.is_dir():
        raise StageError(f"there is no folder {out.parent}", where="--out", hint="create it, or name a file elsewhere")
    for option, value, is_valid, expected in (
        ("--tokens", request.tokens, request.tokens > 0, "above 0"),
        (
            "--max-tokens",
            request.max_document_tokens,
            request.max_document_tokens > 1,
            "at least 2: the BOS, and a token to generate",
        ),
        ("--temperature", request.temperature, 0 < request.temperature < math.inf, "above 0"),
        ("--top-p", request.top_p, 0 < request.top_p <= 1, "above 0, at most 1"),
        (
            "--prompt-tokens",
            request.prompt_tokens,
            0 <= request.prompt_tokens < request.max_document_tokens - 1,
            "fewer tokens than --max-tokens, not below 0",
        ),
        ("--batch-size", request.batch_size, request.batch_size > 0, "above 0"),
        ("--max-repetition", request.max_repetition, 0 <= request.max_repetition <= 1, "a share of a document: 0 to 1"),
        (
            "--dedup-threshold",
            request.dedup_threshold,
            MIN_THRESHOLD <= request.dedup_threshold <= 1,
            f"{MIN_THRESHOLD:g} to 1: near-duplicates that share less are not found",
        ),
    ):
        if not is_valid:
            raise StageError(f"{value} is out of range", where=option, expected=expected)


def _read_prompts(
    files: Sequence[str], request: SynthesisRequest, tokenizer: PreTrainedTokenizerBase, encoder: Encoder
) -> list[tuple[np.ndarray, str]]:
    """The prompts with their origins: the first tokens of given texts, or the special tokens before a text alone."""
    if not request.prompt_tokens:
        # A model without a BOS has learnt that a text begins after the EOS of another.
        return [(np.array(encoder.prefix_ids or (encoder.eos,)), "bos")]
    prompts: list[tuple[np.ndarray, str]] = []
    for path in files:
        documents = read_documents(Files("prompts", str(path), root=Path.cwd(), where="--prompts"))
        for document in islice(documents, _MAX_PROMPTS):
            if document.text is None or document.is_empty:
                continue
            ids = tokenizer(document.text[: 32 * request.prompt_tokens], add_special_tokens=False)["input_ids"]
            if len(ids) >= request.prompt_tokens:
                prompts.append((np.array([*encoder.prefix_ids, *ids[: request.prompt_tokens]]), document.location))
    if not prompts:
        raise DataError(
            f"no text of {request.prompt_tokens} tokens",
            where="--prompts",
            expected="texts of at least --prompt-tokens tokens",
        )
    return prompts


def partial_file(out: Path) -> Path:
    """The file that grows until it is complete."""
    return out.with_name(f"{out.name}.part")


def _state_file(out: Path) -> Path:
    return out.with_name(f"{out.name}.part.json")


def _load_state(out: Path, options_fingerprint: str) -> _SynthesisState:
    """The saved state. Raises `StageError` when it is of other options, or cannot be read."""
    if not _state_file(out).exists():
        return _SynthesisState(options_fingerprint)
    state = _read_state(out, _state_file(out))
    if state.options_fingerprint != options_fingerprint:
        raise StageError(
            f"{partial_file(out)} was begun with another model or other options",
            where="--out",
            hint=f"use the same ones, or remove {partial_file(out).name} and {_state_file(out).name}",
        )
    return state


def _read_state(out: Path, path: Path) -> _SynthesisState:
    """The state in a file beside `out`. Raises `StageError` when it cannot be read."""
    text = out if path == summary_file(out) else partial_file(out)
    return read_checked_json(path, _SynthesisState, error=StageError, hint=f"remove {text.name} and {path.name}")

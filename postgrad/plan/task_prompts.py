"""What does a model read when it is asked a task? Rows of a task as prompts of ids, with as many demonstrations as fit.

Legend: K prompt seeds, I items.

Everything is settled before a model is loaded: which rows are asked, which are shown, how both are worded, what does not
fit. So the start model and the trained one are asked the same; only the places of a soft prompt around it may differ.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from string import ascii_uppercase
from typing import Any, NamedTuple, Protocol

import numpy as np

from postgrad.config.tasks import TaskConfig
from postgrad.data.problem_type import ProblemType
from postgrad.data.read.documents import detect_kind, read_examples
from postgrad.data.read.examples import RUNNING_TEXT_KINDS, Example
from postgrad.data.read.files import RawSource
from postgrad.data.read.labels import collect_labels
from postgrad.data.render.chat import ChatRenderer
from postgrad.data.render.demonstrations import SEPARATOR, Demonstrations, RetrievalMethod
from postgrad.data.render.renderer import Renderer
from postgrad.data.render.renderers import PlainRenderer
from postgrad.data.tokens.store import digest
from postgrad.errors import DataError, ModelError, StageError, suggest_nearest
from postgrad.evaluation.choices.loglikelihood import ChoiceItem, encode_item
from postgrad.evaluation.choices.normalization import CONTENT_FREE
from postgrad.evaluation.generate_answers import StoppingRule
from postgrad.evaluation.generation_metrics import MetricName
from postgrad.plan.model_inputs import ModelInputs
from postgrad.plan.objective_rows import make_text_renderer
from postgrad.plan.sources import make_row_template, make_text_files
from postgrad.storage.fingerprint import fingerprint

ANSWER_CUE = "Answer:"
"""What stands before an answer alone, for `by: answer-only`."""
_DEFAULT_CONTEXT_LENGTH = 1024
"""Positions that a model without a limit is asked within."""
_DEMONSTRATION_METHODS: Mapping[str, RetrievalMethod] = {"random": "once", "balanced": "balanced", "bm25": "bm25"}
_CHOICE_METRICS: tuple[MetricName, ...] = ("accuracy", "macro-F1", "MCC")

LocatedExample = tuple[Example, str]
"""An example, and where it stands."""


class TaskPrompt(NamedTuple):
    """One question under one draw of demonstrations."""

    text: str
    """What is read, in words."""
    question: str
    """... without the demonstrations."""
    num_demonstrations: int
    """Demonstrations that fit."""
    item: ChoiceItem
    """The ids that are read, and those of each choice; no choices where the answer is written."""
    calibration_items: tuple[ChoiceItem, ...] = ()
    """The same choices behind a bare question, or behind questions without content."""


@dataclass(frozen=True)
class PromptedTask:
    """A task as a model is asked it."""

    task: TaskConfig
    kind: str
    is_multiple_choice: bool
    """Answered by choosing; else by writing."""
    metrics: tuple[MetricName, ...]
    """The first one is the headline."""
    prompts_KI: tuple[tuple[TaskPrompt, ...], ...]
    choice_names_I: tuple[tuple[str, ...], ...]
    """The names of each item's choices."""
    choice_texts_I: tuple[tuple[str, ...], ...]
    """The choices in words."""
    references_I: tuple[tuple[str, ...], ...]
    """What may be said: the name of the right choice, or answers in words."""
    digests_I: tuple[int, ...]
    """Content hash of each item."""
    test_digests_N: np.ndarray
    """... and of every test row, asked or not."""
    stopping: StoppingRule
    context_length: int
    """Positions that a prompt and its answer may take."""
    skipped: Mapping[str, int] = field(default_factory=dict)
    """Test rows that are not asked, by the reason."""
    notes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Names the task."""
        return self.task.name

    def __len__(self) -> int:
        return len(self.references_I)

    @property
    def num_shortened_prompts(self) -> int:
        """Prompts with fewer demonstrations than were asked for."""
        return sum(prompt.num_demonstrations < self.task.shots for prompts in self.prompts_KI for prompt in prompts)

    @property
    def fingerprint(self) -> str:
        """Of all that decides the answers, beside the model: the ids, and how choices are compared."""
        asked = [
            [
                [_item_as_list(prompt.item), [_item_as_list(item) for item in prompt.calibration_items]]
                for prompt in prompts
            ]
            for prompts in self.prompts_KI
        ]
        how = [
            self.task.normalization,
            self.task.calibrate,
            self.stopping.max_new_tokens,
            list(self.stopping.stop_strings),
        ]
        said = [
            [list(names) for names in part] for part in (self.choice_names_I, self.choice_texts_I, self.references_I)
        ]
        return fingerprint([asked, how, said])

    @property
    def rows_fingerprint(self) -> str:
        """A fingerprint of the rows and of what may be said to them: models of any tokenizer are paired by it."""
        return fingerprint([[str(mark) for mark in self.digests_I], [list(those) for those in self.references_I]])


def _item_as_list(item: ChoiceItem) -> list[Any]:
    return [list(item.context), [list(choice) for choice in item.choices]]


def add_soft_prompts(task: PromptedTask, model_inputs: ModelInputs) -> PromptedTask:
    """The task with the places of soft prompts around each question, as the model of `reading` has them."""
    if not model_inputs.has_soft_prompt:
        return task

    def inside(item: ChoiceItem) -> ChoiceItem:
        return ChoiceItem(model_inputs.frame_prompt(item.context), item.choices)

    prompts_KI = tuple(
        tuple(
            p._replace(item=inside(p.item), calibration_items=tuple(map(inside, p.calibration_items))) for p in prompts
        )
        for prompts in task.prompts_KI
    )
    return replace(task, prompts_KI=prompts_KI)


# --- words -----------------------------------------------------------------------------------------------


class PromptFormat(Protocol):
    """How a question, its demonstrations and its answer are worded."""

    def question(self, example: Example, demonstrations: Sequence[Example] = ()) -> str:
        """All that is read before the answer."""
        ...

    def answer(self, example: Example) -> str:
        """The answer of the row."""
        ...


@dataclass(frozen=True)
class PlainPromptFormat:
    """A prompt and an answer for each demonstration, an empty line between two.

    `apart`: the answer is written elsewhere, so nothing stands between the question and it.
    """

    renderer: PlainRenderer
    separate: bool

    def question(self, example: Example, demonstrations: Sequence[Example] = ()) -> str:
        before = "".join("".join(self.renderer.render_turn(each)) + SEPARATOR for each in demonstrations)
        prompt, between, _ = self.renderer.render_turn(example)
        return before + prompt + ("" if self.separate else between)

    def answer(self, example: Example) -> str:
        return self.renderer.render_turn(example)[2]


@dataclass(frozen=True)
class ChatPromptFormat:
    """A conversation in the model's chat template, in which each demonstration is an earlier turn."""

    renderer: ChatRenderer

    def question(self, example: Example, demonstrations: Sequence[Example] = ()) -> str:
        *own, _ = self._messages(example)
        lead = int(own[0]["role"] == "system")
        before = [message for each in demonstrations for message in self._messages(each) if message["role"] != "system"]
        return self.renderer.render_text(
            [*own[:lead], *before, *own[lead:]], example.fields.get("tools"), add_generation_prompt=True
        )

    def answer(self, example: Example) -> str:
        return str(self._messages(example)[-1]["content"])

    def _messages(self, example: Example) -> Sequence[Mapping[str, Any]]:
        if "messages" in example.fields:
            return example.messages
        prompt, _, answer = self.renderer.turn_renderer.render_turn(example)
        return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


# --- from rows to prompts --------------------------------------------------------------------------------


def make_prompted_task(task: TaskConfig, model_inputs: ModelInputs, root: Path, where: str) -> PromptedTask:
    """A task as the model of `reading` is asked it, soft prompts left out (`framed` puts them in) but given their room.

    Paths are relative to `root`; `where` is the key path that errors name. Raises `ModelError` for a model that does not
    write, `DataError` and `StageError` for rows that cannot be asked.
    """
    _refuse_encoder(model_inputs, where)
    given = task.model_dump()
    files = make_text_files(task.name, {**given, "hub": None}, root, where)
    if task.kind == "auto" and detect_kind(files) in RUNNING_TEXT_KINDS:  # text that has a label besides
        files = replace(files, kind="labelled")
    kind = detect_kind(files)
    every = _read_rows(files, where)
    renderer = make_text_renderer(kind, model_inputs, make_row_template(given), "last")
    words = (
        ChatPromptFormat(renderer)
        if isinstance(renderer, ChatRenderer)
        else PlainPromptFormat(renderer, separate=model_inputs.task.is_encoder_decoder)
    )
    pool, notes = _demonstration_pool(task, files, every, words, f"{where}.few_shot")
    labels = _labels(task, every, pool, where) if kind == "labelled" else ()
    chosen = _is_multiple_choice(task, kind, labels, where)
    form = _PromptBuilder(task, model_inputs, words, labels, chosen, _get_context_length(model_inputs))
    for row in every:
        form.check_row(*row)
    asked = sorted(every, key=lambda row: digest(row[0].text.encode()))[: task.items]
    if len(asked) < len(every):
        notes.append(f"{task.name}: {len(asked):,} of {len(every):,} rows are asked (items: {task.items:,})")
    tried_KI = [
        [form.build_prompt(row, shown(row[0])) for row in asked]
        for shown in _demonstration_samplers(task, renderer, pool)
    ]
    fits_I = [all(tried) for tried in zip(*tried_KI, strict=True)]
    kept = [example for (example, _), fits in zip(asked, fits_I, strict=True) if fits]
    if not kept:
        raise DataError(
            f"none of the {len(asked):,} rows fits into {form.context_length:,} positions, even without demonstrations",
            where=where,
            expected="shorter questions, or a smaller `max_new_tokens`",
        )
    references_I = tuple(form.references(example) for example in kept)
    answers = [words.answer(example) for example, _ in (*every, *pool)]
    return PromptedTask(
        task,
        kind,
        chosen,
        _resolve_metrics(task, kind, chosen, references_I, where),
        tuple(tuple(p for p, fits in zip(tried, fits_I, strict=True) if fits and p) for tried in tried_KI),
        tuple(form.choice_names(example) for example in kept) if chosen else (),
        tuple(form.choices(example) for example in kept) if chosen else (),
        references_I,
        tuple(digest(example.text.encode()) for example in kept),
        np.array([digest(example.text.encode()) for example, _ in every], np.uint64),
        StoppingRule(
            task.max_new_tokens, tuple(task.stop) if task.stop is not None else _default_stop_strings(words, answers)
        ),
        form.context_length,
        {"too long for the context": n} if (n := fits_I.count(False)) else {},
        tuple(notes),
    )


@dataclass(frozen=True)
class _PromptBuilder:
    """How the rows of a task are asked, whatever is shown before them."""

    task: TaskConfig
    reading: ModelInputs
    prompt_format: PromptFormat
    labels: tuple[str, ...]
    is_multiple_choice: bool
    context_length: int

    @property
    def separate(self) -> bool:
        """Whether the answer is read and written apart from the question."""
        return self.reading.task.is_encoder_decoder

    def check_row(self, example: Example, place: str) -> None:
        """Raises `DataError` with its place for a row that cannot be worded, or whose question tells the answer."""
        try:
            self.prompt_format.answer(example)
            if (
                len({self.prompt_format.question(variant) for variant in (example, *self._choice_variants(example))})
                > 1
            ):
                raise DataError(
                    "the question tells which choice is right: it is worded otherwise with another one",
                    expected="a `prompt` without the field that is the answer",
                )
        except DataError as error:
            raise _with_place(error, place) from None

    def choice_names(self, example: Example) -> tuple[str, ...]:
        """What the choices of a row are called: its labels, or letters."""
        return self.labels or tuple(ascii_uppercase[: len(example.fields["choices"])])

    def choices(self, example: Example) -> tuple[str, ...]:
        """The choices of a row in words."""
        return tuple(self.prompt_format.answer(variant) for variant in self._choice_variants(example))

    def references(self, example: Example) -> tuple[str, ...]:
        """What may be said."""
        if not self.is_multiple_choice:
            return tuple(
                text.strip() for text in (self.prompt_format.answer(example), *example.fields.get("references", ()))
            )
        if self.labels:
            return (str(example.fields["label"]),)
        return (ascii_uppercase[example.fields["answer"]],)

    def build_prompt(self, row: LocatedExample, demonstrations: Sequence[Example]) -> TaskPrompt | None:
        """The question behind as many of the demonstrations as fit, the first ones left out; None where it does not fit."""
        example, place = row
        for begin in range(len(demonstrations) + 1):
            text = self.prompt_format.question(example, demonstrations[begin:])
            try:
                item = self._encode_item(text, example)
                against = tuple(self._calibration_items(example, demonstrations[begin:]))
            except DataError as error:
                raise _with_place(error, place) from None
            if all(map(self._fits, (item, *against))):
                return TaskPrompt(
                    text, self.prompt_format.question(example), len(demonstrations) - begin, item, against
                )
        return None

    def _choice_variants(self, example: Example) -> list[Example]:
        """The row with each of its choices for the right one; none where the answer is written."""
        if not self.is_multiple_choice:
            return []
        key, values = ("label", self.labels) if self.labels else ("answer", range(len(example.fields["choices"])))
        return [replace(example, fields={**example.fields, key: value}) for value in values]

    def _calibration_items(self, example: Example, demonstrations: Sequence[Example]) -> Iterator[ChoiceItem]:
        if self.task.normalization == "answer-only":
            yield self._encode_item(ANSWER_CUE + ("" if self.separate else " "), example)
        if self.task.calibrate:
            for nothing in CONTENT_FREE:
                empty = dict.fromkeys(example.texts if self.labels else ["question"], nothing)
                asked = replace(example, fields={**example.fields, **empty})
                yield self._encode_item(self.prompt_format.question(asked, demonstrations), example)

    def _encode_item(self, text: str, example: Example) -> ChoiceItem:
        if self.is_multiple_choice:
            return encode_item(self.reading.tokenizer, text, self.choices(example), separate=self.separate)
        tokenizer, encoder = self.reading.tokenizer, self.reading.encoder
        # A template may write the BOS itself; a space at the end belongs to the answer's first word.
        given = bool(tokenizer.bos_token) and text.startswith(tokenizer.bos_token)
        ids = tokenizer(text.rstrip(" "), add_special_tokens=not given, verbose=False)["input_ids"]
        return ChoiceItem(tuple(ids) or (encoder.eos if encoder.bos is None else encoder.bos,), ())

    def _fits(self, item: ChoiceItem) -> bool:
        around = max(_count_soft_prompt_ids(self.reading), _count_soft_prompt_ids(self.reading.without_tuning))
        longest = max(map(len, item.choices)) - 1 if item.choices else self.task.max_new_tokens
        together = 0 if self.separate else longest
        return len(item.context) + around + together <= self.context_length and longest <= self.context_length


def _count_soft_prompt_ids(model_inputs: ModelInputs) -> int:
    """Places that soft prompts take around a question."""
    around = model_inputs.soft_prompt_frame
    return len(around.prefix_ids) + len(around.separator_ids) + len(around.suffix_ids)


def _with_place(error: DataError, place: str) -> DataError:
    return DataError(error.problem, where=error.where or place, expected=error.expected, hint=error.hint)


def _refuse_encoder(model_inputs: ModelInputs, where: str) -> None:
    if not model_inputs.task.generates:
        raise ModelError(
            f"a task is asked in prompts, and {model_inputs.start_model.name} does not write",
            where=where,
            expected="a decoder or an encoder-decoder language model",
            hint="score an encoder on labelled rows as held-out sets, under the objective masked (a cloze) or classify",
        )


def _read_rows(files: RawSource, where: str) -> list[LocatedExample]:
    rows = list(read_examples(files))
    if not rows:
        raise DataError("no row asks anything", where=where, expected="rows with answers, labels or choices")
    return rows


def _demonstration_pool(
    task: TaskConfig,
    test_files: RawSource,
    test_rows: Sequence[LocatedExample],
    prompt_format: PromptFormat,
    where: str,
) -> tuple[list[LocatedExample], list[str]]:
    """The rows that may be shown: training rows, each once, none that asks what a test row asks."""
    if task.few_shot is None or not task.shots:
        return [], []
    files = replace(test_files, name=f"{task.name}.shown", path=task.few_shot.path, where=where)
    kind = detect_kind(test_files)
    if (met := detect_kind(files)) != kind:
        raise DataError(
            f"rows of kind `{met}` are to be shown before rows of kind `{kind}`",
            where=where,
            expected="rows of the same kind",
        )
    tested = {mark for example, _ in test_rows for mark in _row_digests(example, prompt_format)}
    pool, copies, known = [], 0, set()
    for example, place in _read_rows(files, where):
        try:
            marks = _row_digests(example, prompt_format)
        except DataError as error:
            raise _with_place(error, place) from None
        if tested & marks:
            copies += 1
        elif not known & marks:
            pool.append((example, place))
            known |= marks
    if len(pool) < task.shots:
        raise DataError(
            f"{task.shots} shots from {len(pool):,} rows"
            + (f" ({copies:,} more ask what a test row asks, and are never shown)" if copies else ""),
            where=where,
            expected="at least as many different training rows as shots",
            hint="show rows of another file than the one that is tested" if copies else "",
        )
    notes = [f"{task.name}: {copies:,} rows that ask what a test row asks are not shown"] if copies else []
    return pool, notes


def _row_digests(example: Example, prompt_format: PromptFormat) -> set[int]:
    """What makes two rows copies: all words of the row, or the question as it is worded."""
    return {digest(example.text.encode()), digest(prompt_format.question(example).encode())}


def _demonstration_samplers(
    task: TaskConfig, renderer: Renderer, pool: Sequence[LocatedExample]
) -> list[Callable[[Example], Sequence[Example]]]:
    """What is shown before a row, under each prompt seed."""
    if task.few_shot is None or not task.shots:
        return [lambda _: ()]
    examples, by = [example for example, _ in pool], _DEMONSTRATION_METHODS[task.few_shot.sampler]
    return [Demonstrations(renderer, examples, task.shots, by, 0, len, seed=seed).select for seed in range(task.seeds)]


def _labels(
    task: TaskConfig, test_rows: Sequence[LocatedExample], pool: Sequence[LocatedExample], where: str
) -> tuple[str, ...]:
    """What labelled rows can be answered with, as text; nothing where a row may have several, or a fraction."""
    found = collect_labels((*test_rows, *pool), where)
    if found.problem != ProblemType.CLASS:
        return ()
    for example, place in (*test_rows, *pool):
        label = str(example.fields["label"])
        if task.label_words and label not in task.label_words:
            raise DataError(
                f"no word is given for the label '{label[:60]}'",
                where=place,
                expected=f"a label among {', '.join(list(task.label_words)[:12])}",
                hint=suggest_nearest(label, task.label_words),
            )
    return tuple(task.label_words) if task.label_words else tuple(str(name) for name in found.names)


def _is_multiple_choice(task: TaskConfig, kind: str, labels: tuple[str, ...], where: str) -> bool:
    """Whether the answers are chosen. Raises `StageError` for rows that have nothing to choose from."""
    choices = kind == "choices" or len(labels) > 1
    chosen = choices if task.scoring == "auto" else task.scoring == "multiple-choice"
    if chosen and not choices:
        met = "one label alone" if labels else f"rows of kind `{kind}` have no choices"
        raise StageError(met, where=f"{where}.scoring", expected="labels or choices, or scoring: generate")
    if not chosen:
        for key, value in (("normalization", task.normalization != "sum"), ("calibrate", task.calibrate)):
            if value:
                raise StageError(
                    f"`{key}` compares choices, and here answers are written",
                    where=f"{where}.{key}",
                    expected="rows with labels or choices, and scoring: multiple-choice",
                )
    return chosen


def _get_context_length(model_inputs: ModelInputs) -> int:
    """Positions that the model has; one without a limit is asked within those of a row, or 1,024."""
    limit = getattr(model_inputs.config, "max_position_embeddings", None)
    return int(limit) if limit else max(_DEFAULT_CONTEXT_LENGTH, model_inputs.length)


def _default_stop_strings(prompt_format: PromptFormat, answers: Sequence[str]) -> tuple[str, ...]:
    """What ends an answer in running text: a line end, or an empty line, if no answer has one inside."""
    if not isinstance(prompt_format, PlainPromptFormat) or prompt_format.separate:
        return ()
    for stop in ("\n", SEPARATOR):
        if not any(stop in answer.strip() for answer in answers):
            return (stop,)
    return ()


def _resolve_metrics(
    task: TaskConfig, kind: str, is_multiple_choice: bool, references_I: Sequence[Sequence[str]], where: str
) -> tuple[MetricName, ...]:
    """The metrics that are asked for, or those that the answers suggest."""
    if is_multiple_choice:
        unfit = [name for name in task.metrics if name not in _CHOICE_METRICS]
        if unfit:
            raise StageError(
                f"`{unfit[0]}` is a metric of written answers, and here one of several is chosen",
                where=f"{where}.metrics",
                expected=", ".join(_CHOICE_METRICS),
                hint="answered: write",
            )
        return tuple(task.metrics) or (_CHOICE_METRICS if kind == "labelled" else _CHOICE_METRICS[:1])
    if task.metrics:
        return tuple(task.metrics)
    answers = [those[0] for those in references_I]
    if all("####" in answer for answer in answers):
        return ("numeric",)
    numbers = [_parse_number(answer) for answer in answers]
    if all(number is not None for number in numbers):
        return ("Pearson", "Spearman") if any("." in answer for answer in answers) else ("numeric",)
    return ("exact-match", "F1", "ROUGE-L")


def _parse_number(text: str) -> float | None:
    try:
        value = float(text.replace(",", ""))
    except ValueError:
        return None
    return value if np.isfinite(value) else None

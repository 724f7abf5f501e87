"""Prompts of a task: its test rows with as many demonstrations as fit, as ids.

Legend: K prompt seeds, I items.

Everything is settled before a model is loaded: items, demonstrations, prompts, and what does not fit. So the start model and
the trained one get the same prompts, except for the positions of soft prompts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from string import ascii_uppercase

import numpy as np

from postgrad.config.tasks import TaskConfig
from postgrad.data.problem_type import ProblemType
from postgrad.data.read.documents import detect_kind
from postgrad.data.read.examples import Example
from postgrad.data.read.labels import collect_labels
from postgrad.data.read.row_kinds import RUNNING_TEXT_KINDS
from postgrad.data.render.chat import ChatRenderer
from postgrad.data.render.demonstrations import SEPARATOR
from postgrad.data.render.renderers import PlainRenderer
from postgrad.data.tokens.store import digest
from postgrad.errors import DataError, ModelError, StageError, suggest_nearest
from postgrad.evaluation.choices.loglikelihood import ChoiceItem, encode_item
from postgrad.evaluation.choices.normalization import CONTENT_FREE
from postgrad.evaluation.generate_answers import StoppingRule
from postgrad.evaluation.generation_metrics import METRICS, MetricName
from postgrad.models.model_sizes import get_model_sizes
from postgrad.plan.model_inputs import ModelInputs
from postgrad.plan.prompt_format import ChatPromptFormat, PlainPromptFormat, PromptFormat
from postgrad.plan.prompted_task import PromptedTask, TaskPrompt
from postgrad.plan.row_renderers import make_row_template, make_text_renderer
from postgrad.plan.sources import make_text_files
from postgrad.plan.task_demonstrations import (
    LocatedExample,
    add_location,
    make_demonstration_pool,
    make_demonstration_samplers,
    read_task_rows,
)

ANSWER_CUE = "Answer:"
"""The context of an answer alone, for `normalization: answer-only`."""
_DEFAULT_CONTEXT_LENGTH = 1024
"""Positions of a model without a limit."""
_LABEL_METRICS: tuple[MetricName, ...] = ("accuracy", "macro-F1", "MCC")
_CHOICE_METRICS: tuple[MetricName, ...] = (*_LABEL_METRICS, "1-Brier", "1-ECE")


def make_prompted_task(task: TaskConfig, model_inputs: ModelInputs, root: Path, where: str) -> PromptedTask:
    """The prompts of a task without soft prompts, but with room for them; `add_soft_prompts` adds them.

    Paths are relative to `root`; `where` is the key path that errors name. Raises `ModelError` for a model that does not
    generate text, `DataError` and `StageError` for rows without a prompt.
    """
    refuse_encoder(model_inputs, where)
    config = task.model_dump()
    files = make_text_files(task.name, {**config, "hub": None}, root, where)
    if task.kind == "auto" and detect_kind(files) in RUNNING_TEXT_KINDS:  # text in rows that also have a label
        files = replace(files, kind="labelled")
    kind = detect_kind(files)
    rows = read_task_rows(files, where)
    renderer = make_text_renderer(kind, model_inputs, make_row_template(config), "last")
    prompt_format = make_prompt_format(renderer, model_inputs)
    pool, notes = make_demonstration_pool(task, files, rows, prompt_format, f"{where}.few_shot")
    return prompt_rows(task, kind, rows, pool, renderer, prompt_format, model_inputs, where, notes)


def make_prompt_format(renderer: PlainRenderer | ChatRenderer, model_inputs: ModelInputs) -> PromptFormat:
    """The prompt format of rows with a renderer."""
    if isinstance(renderer, ChatRenderer):
        return ChatPromptFormat(renderer)
    return PlainPromptFormat(renderer, separate=model_inputs.task.is_encoder_decoder)


def prompt_rows(
    task: TaskConfig,
    kind: str,
    rows: Sequence[LocatedExample],
    pool: Sequence[LocatedExample],
    renderer: PlainRenderer | ChatRenderer,
    prompt_format: PromptFormat,
    model_inputs: ModelInputs,
    where: str,
    notes: Sequence[str] = (),
) -> PromptedTask:
    """The prompts of rows, with demonstrations from a pool. Raises `DataError` and `StageError` for rows without a prompt."""
    notes = list(notes)
    labels = _resolve_labels(task, rows, pool, where) if kind == "labelled" else ()
    is_multiple_choice = _is_multiple_choice(task, kind, labels, where)
    context_length = _get_context_length(model_inputs)
    builder = _PromptBuilder(task, model_inputs, prompt_format, labels, is_multiple_choice, context_length)
    for row in rows:
        builder.check_row(*row)
    selected = sorted(rows, key=lambda row: digest(row[0].text.encode()))[: task.items]
    if len(selected) < len(rows):
        notes.append(f"{task.name}: {len(selected):,} of {len(rows):,} rows are evaluated (items: {task.items:,})")
    all_prompts_KI = [
        [builder.build_prompt(row, sample(row[0])) for row in selected]
        for sample in make_demonstration_samplers(task, renderer, pool)
    ]
    fits_I = [all(prompts) for prompts in zip(*all_prompts_KI, strict=True)]
    items = [example for (example, _), fits in zip(selected, fits_I, strict=True) if fits]
    if not items:
        raise DataError(
            f"none of the {len(selected):,} rows fits into {context_length:,} positions, even without demonstrations",
            where=where,
            expected="shorter questions, or a smaller `max_new_tokens`",
        )
    references_I = tuple(builder.references(example) for example in items)
    answers = [prompt_format.answer(example) for example, _ in (*rows, *pool)]
    stop = tuple(task.stop) if task.stop is not None else _default_stop_strings(prompt_format, answers)
    return PromptedTask(
        task=task,
        kind=kind,
        is_multiple_choice=is_multiple_choice,
        metrics=_resolve_metrics(task, kind, is_multiple_choice, references_I, where),
        prompts_KI=tuple(
            tuple(p for p, fits in zip(prompts, fits_I, strict=True) if fits and p) for prompts in all_prompts_KI
        ),
        choice_names_I=tuple(map(builder.choice_names, items)) if is_multiple_choice else (),
        choice_texts_I=tuple(map(builder.choices, items)) if is_multiple_choice else (),
        references_I=references_I,
        digests_I=tuple(digest(example.text.encode()) for example in items),
        test_digests_N=np.array([digest(example.text.encode()) for example, _ in rows], np.uint64),
        stopping=StoppingRule(task.max_new_tokens, stop),
        context_length=context_length,
        skipped={"too long for the context": n} if (n := fits_I.count(False)) else {},
        notes=tuple(notes),
    )


@dataclass(frozen=True)
class _PromptBuilder:
    """Builds the prompts of a task's rows, whatever their demonstrations."""

    task: TaskConfig
    model_inputs: ModelInputs
    prompt_format: PromptFormat
    labels: tuple[str, ...]
    is_multiple_choice: bool
    context_length: int

    @property
    def separate(self) -> bool:
        """Whether question and answer go to an encoder and a decoder."""
        return self.model_inputs.task.is_encoder_decoder

    def check_row(self, example: Example, location: str) -> None:
        """Raise `DataError` with its location for a row that cannot be rendered, or whose question leaks the answer."""
        try:
            self.prompt_format.answer(example)
            variants = (example, *self._choice_variants(example))
            if len({self.prompt_format.question(variant) for variant in variants}) > 1:
                raise DataError(
                    "the question leaks the right choice: it changes with it",
                    expected="a `prompt` without the field that is the answer",
                )
        except DataError as error:
            raise add_location(error, location) from None

    def choice_names(self, example: Example) -> tuple[str, ...]:
        """Names of a row's choices: labels, or letters."""
        return self.labels or tuple(ascii_uppercase[: len(example.fields["choices"])])

    def choices(self, example: Example) -> tuple[str, ...]:
        """Texts of a row's choices."""
        return tuple(self.prompt_format.answer(variant) for variant in self._choice_variants(example))

    def references(self, example: Example) -> tuple[str, ...]:
        """The name of the right choice, or the reference answers."""
        if not self.is_multiple_choice:
            answers = (self.prompt_format.answer(example), *example.fields.get("references", ()))
            return tuple(text.strip() for text in answers)
        if self.labels:
            return (str(example.fields["label"]),)
        return (ascii_uppercase[example.fields["answer"]],)

    def build_prompt(self, row: LocatedExample, demonstrations: Sequence[Example]) -> TaskPrompt | None:
        """The prompt with as many of the last demonstrations as fit; None if it does not fit without any."""
        example, location = row
        for begin in range(len(demonstrations) + 1):
            shots = demonstrations[begin:]
            text = self.prompt_format.question(example, shots)
            try:
                item = self._encode_item(text, example)
                calibration_items = tuple(self._calibration_items(example, shots))
            except DataError as error:
                raise add_location(error, location) from None
            if all(map(self._fits, (item, *calibration_items))):
                return TaskPrompt(text, self.prompt_format.question(example), len(shots), item, calibration_items)
        return None

    def _choice_variants(self, example: Example) -> list[Example]:
        """The row once with each choice as the right one; none for generated answers."""
        if not self.is_multiple_choice:
            return []
        key, values = ("label", self.labels) if self.labels else ("answer", range(len(example.fields["choices"])))
        return [replace(example, fields={**example.fields, key: value}) for value in values]

    def _calibration_items(self, example: Example, demonstrations: Sequence[Example]) -> Iterator[ChoiceItem]:
        if self.task.normalization == "answer-only":
            yield self._encode_item(ANSWER_CUE + ("" if self.separate else " "), example)
        if self.task.calibrate:
            for text in CONTENT_FREE:
                content_free = dict.fromkeys(example.texts if self.labels else ["question"], text)
                variant = replace(example, fields={**example.fields, **content_free})
                yield self._encode_item(self.prompt_format.question(variant, demonstrations), example)

    def _encode_item(self, text: str, example: Example) -> ChoiceItem:
        inputs = self.model_inputs
        if self.is_multiple_choice:
            choices, empty = self.choices(example), inputs.empty_prompt
            return encode_item(
                inputs.tokenizer, inputs.special_frame, text, choices, empty=empty, separate=self.separate
            )
        # A space at the end belongs to the answer's first word.
        return ChoiceItem(inputs.encode_prompt(text.rstrip(" "), soft_prompts=False), ())

    def _fits(self, item: ChoiceItem) -> bool:
        soft_prompt = max(map(_count_soft_prompt_ids, (self.model_inputs, self.model_inputs.without_tuning)))
        longest = max(map(len, item.choices)) - 1 if item.choices else self.task.max_new_tokens
        answer = 0 if self.separate else longest
        return len(item.context) + soft_prompt + answer <= self.context_length and longest <= self.context_length


def _count_soft_prompt_ids(model_inputs: ModelInputs) -> int:
    frame = model_inputs.soft_prompt_frame
    return len(frame.prefix_ids) + len(frame.separator_ids) + len(frame.suffix_ids)


def refuse_encoder(model_inputs: ModelInputs, where: str) -> None:
    """Raise `ModelError` for a model that cannot answer."""
    if not model_inputs.task.generates:
        raise ModelError(
            f"tasks in prompts need a model that generates text, and {model_inputs.start_model.name} does not",
            where=where,
            expected="a decoder or an encoder-decoder language model",
            hint="score an encoder on labelled rows as held-out sets, under the objective masked (a cloze) or classify",
        )


def _resolve_labels(
    task: TaskConfig, test_rows: Sequence[LocatedExample], pool: Sequence[LocatedExample], where: str
) -> tuple[str, ...]:
    """The labels to choose from, as text; none for multi-label rows and numbers."""
    labels = collect_labels((*test_rows, *pool), where)
    if labels.problem != ProblemType.CLASS:
        return ()
    for example, location in (*test_rows, *pool):
        label = str(example.fields["label"])
        if task.label_words and label not in task.label_words:
            raise DataError(
                f"no word for the label '{label[:60]}'",
                where=location,
                expected=f"a label among {', '.join(list(task.label_words)[:12])}",
                hint=suggest_nearest(label, task.label_words),
            )
    return tuple(task.label_words) if task.label_words else tuple(str(name) for name in labels.names)


def _is_multiple_choice(task: TaskConfig, kind: str, labels: tuple[str, ...], where: str) -> bool:
    """Whether choices are scored. Raises `StageError` for rows without choices, and for choice keys without scoring."""
    has_choices = kind == "choices" or len(labels) > 1
    is_multiple_choice = has_choices if task.scoring == "auto" else task.scoring == "multiple-choice"
    if is_multiple_choice and not has_choices:
        problem = "there is only one label" if labels else f"rows of kind `{kind}` have no choices"
        raise StageError(problem, where=f"{where}.scoring", expected="labels or choices, or scoring: generate")
    if not is_multiple_choice:
        for key, is_set in (("normalization", task.normalization != "sum"), ("calibrate", task.calibrate)):
            if is_set:
                raise StageError(
                    f"`{key}` compares choices, and these answers are generated",
                    where=f"{where}.{key}",
                    expected="rows with labels or choices, and scoring: multiple-choice",
                )
    return is_multiple_choice


def _get_context_length(model_inputs: ModelInputs) -> int:
    """Positions of the model; without a limit, those of a row but at least 1,024."""
    return get_model_sizes(model_inputs.config).positions or max(_DEFAULT_CONTEXT_LENGTH, model_inputs.length)


def _default_stop_strings(prompt_format: PromptFormat, answers: Sequence[str]) -> tuple[str, ...]:
    """A line end, or an empty line, unless an answer contains it; none for chat templates and encoder-decoders."""
    if not isinstance(prompt_format, PlainPromptFormat) or prompt_format.separate:
        return ()
    for stop in ("\n", SEPARATOR):
        if not any(stop in answer.strip() for answer in answers):
            return (stop,)
    return ()


def _resolve_metrics(
    task: TaskConfig, kind: str, is_multiple_choice: bool, references_I: Sequence[Sequence[str]], where: str
) -> tuple[MetricName, ...]:
    """The metrics of the task, or the default ones for such answers."""
    if is_multiple_choice:
        generative = [name for name in task.metrics if name not in _CHOICE_METRICS]
        if generative:
            raise StageError(
                f"`{generative[0]}` is a metric of generated answers, and this task is multiple choice",
                where=f"{where}.metrics",
                expected=", ".join(_CHOICE_METRICS),
                hint="scoring: generate",
            )
        return tuple(task.metrics) or (_LABEL_METRICS if kind == "labelled" else _LABEL_METRICS[:1])
    if of_choices := [name for name in task.metrics if METRICS[name].of_probabilities]:
        raise StageError(
            f"`{of_choices[0]}` is a metric of choices, and these answers are generated",
            where=f"{where}.metrics",
            expected="rows with labels or choices, and scoring: multiple-choice",
        )
    if task.metrics:
        return tuple(task.metrics)
    answers = [references[0] for references in references_I]
    if all("####" in answer for answer in answers):  # GSM8K
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

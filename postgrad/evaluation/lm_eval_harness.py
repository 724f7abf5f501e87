"""Tasks of EleutherAI's lm-evaluation-harness (lm-eval), run on a model in memory.

Tasks, prompts and metrics are lm-eval's; only the two calls of the model are replaced. Log-likelihoods come from
`choices.loglikelihood`, which encodes shared prefixes once and equals lm-eval's numbers; and soft prompts and templates are put
around each prompt.
"""

from __future__ import annotations

import logging
import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from postgrad.errors import DataError, MissingExtra, ModelError, PostgradError, StageError, first_line, suggest_nearest
from postgrad.evaluation.choices.loglikelihood import ChoiceItem, score_choices
from postgrad.models.decoding import takes_left_padding
from postgrad.models.model import CausalModel, Model
from postgrad.models.prefix_lm_attention import is_prefix_lm
from postgrad.stats import bootstrap

FramePrompt = Callable[[Sequence[int]], tuple[int, ...]]
"""Ids of a prompt to the model's input: with soft prompt and template around them."""
_BATCH = 16


@dataclass(frozen=True)
class TaskResult:
    """One metric of one task."""

    task: str
    shots: int | None
    items: int | None
    metric: str
    value: float
    stderr: float | None


@dataclass(frozen=True)
class HarnessResults:
    """All results in the order of the tasks."""

    results: tuple[TaskResult, ...]
    version: str
    truncated_prompts: int
    """Prompts longer than the context, which lm-eval cuts on the left."""
    requests: int
    """Log-likelihoods and generated texts that the tasks requested."""


def run_harness(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    pad: int,
    context: int | None = None,
    frame_prompt: FramePrompt = tuple,
    folder: Path | None = None,
    shots: int | None = None,
    limit: int | None = None,
) -> HarnessResults:
    """Run tasks of lm-eval on a decoder or an encoder-decoder.

    `tasks`: names of tasks, groups or tags. `folder`: YAML files of further tasks, and Python files that they name, which
    lm-eval runs. `shots`: demonstrations, instead of each task's own number. `limit`: items of each task. `context`: tokens of
    a model input, including what `frame_prompt` adds. Default: what lm-eval reads from the model's configuration.

    Raises `MissingExtra` without lm-eval, `StageError` for an unknown task, `DataError` when lm-eval cannot run one.
    """
    with _suppress_output():
        lm_eval, evaluator, task_manager, huggingface = _import_lm_eval()
        manager = _make_task_manager(task_manager, tasks, folder)
        lm = _make_lm(huggingface, model, tokenizer, context, pad, frame_prompt)
        try:
            output = evaluator.simple_evaluate(
                model=lm,
                tasks=list(tasks),
                task_manager=manager,
                num_fewshot=shots,
                limit=limit,
                log_samples=False,
                bootstrap_iters=bootstrap.DRAWS,
            )
        except PostgradError:
            raise
        except Exception as error:
            raise DataError(
                f"lm-eval could not run {', '.join(tasks)}: {first_line(error)} ({type(error).__name__})",
                where="--harness",
                expected="tasks whose data is there: local files, or a connection to the Hub",
            ) from error
    return HarnessResults(
        tuple(_iter_results(output)), str(lm_eval.__version__), lm.truncated_prompts, lm.request_count
    )


def _import_lm_eval() -> tuple[Any, Any, Any, Any]:
    """Raises `MissingExtra` when lm-eval, or a package that it needs, is not installed."""
    try:
        import lm_eval
        from lm_eval import evaluator
        from lm_eval.models import huggingface
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise MissingExtra(
            f"tasks of lm-eval need the package lm-eval ({error})",
            where="--harness",
            hint="pip install 'postgrad[harness]'",
        ) from None
    return lm_eval, evaluator, TaskManager, huggingface


@contextmanager
def _suppress_output() -> Iterator[None]:
    """Inside, lm-eval and its libraries log only errors; afterwards the global random states are restored."""
    states = random.getstate(), np.random.get_state()
    loggers = [logging.getLogger(name) for name in ("lm_eval", "lm-eval", "datasets", "evaluate", "transformers")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _make_task_manager(manager_class: Any, tasks: Sequence[str], folder: Path | None) -> Any:
    """The index of tasks. lm-eval's own has thousands of files, so it is read only for tasks that the folder lacks."""
    if folder is not None:
        manager = manager_class(include_path=str(folder), include_defaults=False)
        if all(manager.match_tasks([task]) for task in tasks):
            return manager
    manager = manager_class(include_path=str(folder) if folder else None)
    for task in tasks:
        if not manager.match_tasks([task]):
            raise StageError(
                f"lm-eval has no task '{task}'" + (f", and {folder} has none" if folder else ""),
                where="--harness",
                expected="names of tasks, groups or tags, with commas between them",
                hint=suggest_nearest(task, manager.all_tasks)
                or "name a folder of task files: --harness-include FOLDER",
            )
    return manager


def _make_lm(
    huggingface: Any,
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    context: int | None,
    pad: int,
    frame_prompt: FramePrompt,
) -> Any:
    """lm-eval's wrapper of a Hugging Face model, around our model."""
    added = len(frame_prompt(()))

    class HarnessModel(huggingface.HFLM):
        """lm-eval's requests, answered by `score_choices` and with framed prompts."""

        def __init__(self) -> None:
            super().__init__(
                model.pretrained,
                tokenizer=tokenizer,
                batch_size=_BATCH,
                max_length=context,
                trust_remote_code=False,
            )
            self.total_length = self.max_length
            self._max_length = self.total_length - added
            self.truncated_prompts = self.request_count = 0

        def _loglikelihood_tokens(
            self,
            requests: Sequence[tuple[Any, list[int], list[int]]],
            disable_tqdm: bool = False,
            override_bs: int | None = None,
        ) -> list[tuple[float, bool]]:
            items: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
            indices: list[tuple[tuple[int, ...], int]] = []
            for _, prompt_ids, answer in requests:
                prompt = frame_prompt(self._truncate_prompt(prompt_ids, answer))
                choices = items.setdefault(prompt, [])
                indices.append((prompt, len(choices)))
                choices.append(tuple(answer))
            scores = score_choices(
                model, [ChoiceItem(c, tuple(a)) for c, a in items.items()], context=self.total_length, pad=pad
            )
            numbers = {prompt: i for i, prompt in enumerate(items)}
            self.request_count += len(indices)
            return [
                (float(scores.log_likelihoods[numbers[prompt]][j]), bool(scores.greedy[numbers[prompt]][j]))
                for prompt, j in indices
            ]

        def _truncate_prompt(self, prompt: list[int], answer: list[int]) -> list[int]:
            """The end of a prompt that fits the context, as lm-eval cuts it: the last token of an answer is not an input."""
            room = self.max_length + 1 - len(answer) if self.backend == "causal" else self.max_length
            if room < 1:
                raise DataError(
                    f"an answer of {len(answer):,} tokens does not fit {self.max_length:,}",
                    where="--harness",
                    expected="answers that leave room for a prompt",
                )
            self.truncated_prompts += len(prompt) > room
            return prompt[-room:]

        def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **options: Any) -> Tensor:
            if is_prefix_lm(model.pretrained.config):
                raise ModelError(
                    "this prefix language model needs bidirectional attention over the prompt, and lm-eval generates causally",
                    where="--harness",
                    expected="multiple-choice tasks",
                )
            mask_BK = options.get("attention_mask")
            is_ragged = mask_BK is not None and not bool(mask_BK.bool().all())
            if is_ragged and isinstance(model, CausalModel) and not takes_left_padding(model):
                return self._generate_one_by_one(context, mask_BK, max_length, stop, **options)
            self.request_count += len(context)
            if not added:
                return super()._model_generate(context, max_length, stop, **options)
            real = options.pop("attention_mask").bool()
            rows = [frame_prompt(row[mask].tolist()) for row, mask in zip(context.cpu(), real.cpu(), strict=True)]
            width = max(map(len, rows))
            ids = torch.tensor([[pad] * (width - len(row)) + list(row) for row in rows], device=context.device)
            mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=context.device)
            more = width - context.shape[1]
            out = super()._model_generate(ids, max_length + more, stop, attention_mask=mask, **options)
            # lm-eval strips as many positions as it passed.
            return out[:, more:] if self.backend == "causal" else out

        def _generate_one_by_one(
            self, context: Tensor, mask_BK: Tensor, max_length: int, stop: list[str], **options: Any
        ) -> Tensor:
            """The output for prompts that are padded on the left, each read without its padding."""
            rows: list[Tensor] = []
            for ids_K, mask_K in zip(context, mask_BK.bool(), strict=True):
                size = int((~mask_K).sum())
                own = {**options, "attention_mask": torch.ones_like(ids_K[mask_K])[None]}
                out = self._model_generate(ids_K[mask_K][None], max_length - size, stop, **own)
                rows.append(torch.cat([ids_K[:size], out[0]]))
            return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad)

    return HarnessModel()


def _iter_results(output: Any) -> Iterator[TaskResult]:
    """Metrics of tasks, then those of groups. Their keys are `metric,filter`."""
    for task, values in {**output["results"], **output.get("groups", {})}.items():
        items = output.get("n-samples", {}).get(task, {}).get("effective")
        for key, value in values.items():
            metric, _, kind = key.partition(",")
            if not kind or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            stderr = values.get(f"{metric}_stderr,{kind}")
            name = metric if kind == "none" else f"{metric} ({kind})"
            yield TaskResult(
                task,
                output.get("n-shot", {}).get(task),
                items,
                name,
                float(value),
                float(stderr) if isinstance(stderr, int | float) else None,
            )

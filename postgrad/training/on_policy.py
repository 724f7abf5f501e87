"""On-policy steps: the model samples continuations of prompts, and trains on those.

It is `train_step` on other rows, so objectives, penalties and tunings are unchanged. With a teacher and the reverse KL per
token of the student's own text, without credit for later tokens, this is on-policy distillation (Agarwal et al. 2024, arXiv
2306.13649; Thinking Machines 2025). With a filter and the next-token loss it is on-policy replay (Chen et al. 2026, arXiv
2605.29495): the newest model answers old prompts, and the best answer to each is trained on, if its score is high enough. The
samples are a pure function of seed, step and weights: there is no state to restore.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from postgrad.data.layouts.rows import IGNORED
from postgrad.data.loading.batch import Batch
from postgrad.data.random_streams import RandomStreams, derive_key
from postgrad.errors import DataError
from postgrad.models.decoding import takes_left_padding
from postgrad.models.model import CausalModel
from postgrad.models.sampling import sample_continuations
from postgrad.training.step import Run, StepFunction, StepReport, StepWithoutUpdate, train_step

AnswerScore = Callable[[list[int], list[int]], float]
"""The score of sampled ids, given those of the row's own answer, both up to an EOS."""


@dataclass(frozen=True)
class AnswerFilter:
    """Of `samples` answers to a prompt, the best is kept, if its score is at least `min_score`."""

    score: AnswerScore
    samples: int
    min_score: float

    def choose(self, answers: Sequence[list[int]], reference: list[int]) -> int | None:
        """The index of the best answer, the first among equals; None when all are rejected."""
        scores = [self.score(answer, reference) for answer in answers]
        best = int(np.argmax(scores))
        return best if scores[best] >= self.min_score else None


@dataclass(frozen=True)
class OnPolicySampler:
    """Replaces the labels of rows by sampled continuations. The random numbers of a row follow from its mixture position."""

    model: CausalModel
    temperature: float
    eos: int
    seed: int
    token_ids: int | None = None
    """Only ids below it are sampled."""
    filter: AnswerFilter | None = None

    def __call__(self, batch: Batch) -> Batch:
        """The batch with sampled tokens as inputs and labels, up to the first `eos` of each row.

        Rows whose answers are rejected have no labels.
        """
        draws = RandomStreams(derive_key(self.seed, 0x0F11))
        ids_BT, labels_BT = batch.inputs["input_ids"].clone(), batch.labels.clone()
        is_label_BT = (labels_BT != IGNORED).numpy()
        first_B, count_B = is_label_BT.argmax(1), is_label_BT.sum(1)
        labels_BT[:] = IGNORED
        label_count_B = np.zeros_like(batch.label_count_B)
        samples = 1 if self.filter is None else self.filter.samples
        for rows in self._groups(first_B, count_B):
            uniform_BN = np.stack(
                [
                    draws.generator(int(batch.position_B[i]), sample).random(int(count_B[i]))
                    for i in rows
                    for sample in range(samples)
                ]
            )
            prompts = [ids_BT[i, : first_B[i] + 1] for i in rows for _ in range(samples)]
            sampled_BN, size_B = self._sample(prompts, uniform_BN)
            answers = [sampled_N[:size] for sampled_N, size in zip(sampled_BN.cpu(), size_B.tolist(), strict=True)]
            for number, row in enumerate(rows):
                own = answers[number * samples : (number + 1) * samples]
                begin, chosen = int(first_B[row]), self._choose(own, batch.labels[row])
                if chosen is None:
                    continue
                answer_N = own[chosen]
                size = len(answer_N)
                labels_BT[row, begin : begin + size] = answer_N
                ids_BT[row, begin + 1 : begin + size] = answer_N[:-1]
                label_count_B[row] = size
        return replace(
            batch, inputs={**batch.inputs, "input_ids": ids_BT}, labels=labels_BT, label_count_B=label_count_B
        )

    def _groups(self, first_B: np.ndarray, count_B: np.ndarray) -> Iterator[list[int]]:
        """Rows that are sampled together: with a filter all, where the model takes padding; else those of one length."""
        has_prompt_B = count_B > 0
        if self.filter is not None and takes_left_padding(self.model):
            # Without room for the same number of tokens, rows are grouped by it.
            for count in np.unique(count_B[has_prompt_B]):
                yield np.flatnonzero(has_prompt_B & (count_B == count)).tolist()
            return
        for length in np.unique(first_B[has_prompt_B]):
            yield np.flatnonzero((first_B == length) & has_prompt_B).tolist()

    def _sample(self, prompts: Sequence[Tensor], uniform_BN: np.ndarray) -> tuple[Tensor, Tensor]:
        device = next(self.model.parameters()).device
        longest = max(map(len, prompts))
        prompt_BP = torch.full((len(prompts), longest), self.eos)
        mask_BP = torch.zeros_like(prompt_BP)
        for row, ids_P in enumerate(prompts):
            prompt_BP[row, longest - len(ids_P) :] = ids_P
            mask_BP[row, longest - len(ids_P) :] = 1
        return sample_continuations(
            self.model,
            prompt_BP.to(device),
            uniform_BN,
            temperature=self.temperature,
            eos=self.eos,
            mask_BP=None if bool(mask_BP.all()) else mask_BP.to(device),
            token_ids=self.token_ids,
        )

    def _choose(self, answers: Sequence[Tensor], labels_T: Tensor) -> int | None:
        """The index of the answer to train on."""
        if self.filter is None:
            return 0
        reference = labels_T[labels_T != IGNORED].tolist()
        return self.filter.choose([self._text_ids(answer.tolist()) for answer in answers], self._text_ids(reference))

    def _text_ids(self, ids: list[int]) -> list[int]:
        return ids[: ids.index(self.eos)] if self.eos in ids else ids


def make_on_policy_step(samplers: Mapping[int, OnPolicySampler], train_step: StepFunction = train_step) -> StepFunction:
    """A step that first samples the rows of some objectives; `samplers` by objective number.

    A step in which all answers are rejected and nothing else is trained is skipped. Raises `DataError` for more of them than
    the run may skip.
    """

    def step(run: Run, micro_batches: Sequence[Batch]) -> StepReport | StepWithoutUpdate:
        batches = []
        prompts = accepted = 0
        for batch in micro_batches:
            sampler = next((samplers[number] for number in batch.objectives if number in samplers), None)
            batches.append(batch if sampler is None else sampler(batch))
            if sampler is not None and sampler.filter is not None:
                prompts += int((batch.label_count_B > 0).sum())
                accepted += int((batches[-1].label_count_B > 0).sum())
        if prompts and not any(batch.label_count for batch in batches):
            return _skip_step(run, prompts)
        report = train_step(run, batches)
        if prompts and isinstance(report, StepReport):
            return replace(report, sampled_prompts=prompts, accepted_answers=accepted)
        return report

    return step


def _skip_step(run: Run, prompts: int) -> StepWithoutUpdate:
    """A step without a token to train on, whose answers the filter has rejected."""
    if run.skipped_steps >= run.max_skipped_steps:
        raise DataError(
            f"the filter rejects all answers to the {prompts:,} prompts of this step, which trains on nothing else, after "
            f"{run.skipped_steps:,} skipped steps",
            where=f"step {run.step + 1}",
            expected=f"at most {run.max_skipped_steps:,} skipped steps (optimizer.max_skipped_steps)",
            hint="lower objectives.min_score or raise objectives.samples, in a stage with another `output`",
        )
    run.step, run.skipped_steps = run.step + 1, run.skipped_steps + 1
    return StepWithoutUpdate(run.step, 0, run.trained_tokens, math.nan, math.nan, ())

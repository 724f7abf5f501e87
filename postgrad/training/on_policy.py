"""On-policy steps: the model samples continuations of prompts, and trains on those.

It is `train_step` on other rows, so objectives, penalties and tunings are unchanged. With a teacher and the reverse KL per
token of the student's own text, without credit for later tokens, this is on-policy distillation (Agarwal et al. 2024, arXiv
2306.13649; Thinking Machines 2025). The samples are a pure function of seed, step and weights: there is no state to restore.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from postgrad.data.layouts.rows import IGNORED
from postgrad.data.loading.batch import Batch
from postgrad.data.random_streams import RandomStreams, derive_key
from postgrad.models.model import CausalModel
from postgrad.models.sampling import sample_continuations
from postgrad.training.step import Run, StepFunction, StepReport, StepWithoutUpdate, train_step


@dataclass(frozen=True)
class OnPolicySampler:
    """Replaces the labels of rows by sampled continuations. The random numbers of a row follow from its mixture position."""

    model: CausalModel
    temperature: float
    eos: int
    seed: int

    def __call__(self, batch: Batch) -> Batch:
        """The batch with sampled tokens as inputs and labels, up to the first `eos` of each row."""
        draws = RandomStreams(derive_key(self.seed, 0x0F11))
        device = next(self.model.parameters()).device
        ids_BT, labels_BT = batch.inputs["input_ids"].clone(), batch.labels.clone()
        is_label_BT = (labels_BT != IGNORED).numpy()
        first_B, count_B = is_label_BT.argmax(1), is_label_BT.sum(1)
        labels_BT[:] = IGNORED
        label_count_B = np.zeros_like(batch.label_count_B)
        # Rows whose prompts have equal lengths are sampled together.
        for length in np.unique(first_B[count_B > 0]):
            rows = np.flatnonzero((first_B == length) & (count_B > 0))
            uniform_BN = np.stack([draws.generator(int(batch.position_B[i]), 0).random(int(count_B[i])) for i in rows])
            sampled_BN, size_B = sample_continuations(
                self.model,
                ids_BT[torch.from_numpy(rows), : length + 1].to(device),
                uniform_BN,
                temperature=self.temperature,
                eos=self.eos,
            )
            for row, sampled_N, size in zip(rows.tolist(), sampled_BN.cpu(), size_B.tolist(), strict=True):
                begin = int(length)
                labels_BT[row, begin : begin + size] = sampled_N[:size]
                ids_BT[row, begin + 1 : begin + len(sampled_N)] = sampled_N[:-1]
                label_count_B[row] = size
        return replace(
            batch, inputs={**batch.inputs, "input_ids": ids_BT}, labels=labels_BT, label_count_B=label_count_B
        )


def make_on_policy_step(samplers: Mapping[int, OnPolicySampler], train_step: StepFunction = train_step) -> StepFunction:
    """A step that first samples the rows of some objectives; `samplers` by objective number."""

    def step(run: Run, micro_batches: Sequence[Batch]) -> StepReport | StepWithoutUpdate:
        batches = []
        for batch in micro_batches:
            sampler = next((samplers[number] for number in batch.objectives if number in samplers), None)
            batches.append(batch if sampler is None else sampler(batch))
        return train_step(run, batches)

    return step

"""A step on what the model itself writes: prompts are read, continuations drawn, and the step is taken on those.

It is `train_step` on other rows, so objectives, penalties and tunings are what they always are. A teacher that judges each
token of the student's own text by the reverse divergence, with no credit for what comes after, is on-policy distillation
(Agarwal et al. 2024, arXiv 2306.13649; Thinking Machines 2025). What is drawn is a pure function of the seed, the step and
the weights: nothing is to be restored.
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
from postgrad.training.step import Run, StepFunction, StepReport, train_step


@dataclass(frozen=True)
class OnPolicySampler:
    """Writes the places behind prompts. `eos` ends a text; draws belong to a row's position in the mixture."""

    model: CausalModel
    temperature: float
    eos: int
    seed: int

    def __call__(self, batch: Batch) -> Batch:
        """The batch with what the model writes, and as many labels as there are written tokens."""
        draws = RandomStreams(derive_key(self.seed, 0x0F11))
        device = next(self.model.parameters()).device
        ids_BT, labels_BT = batch.inputs["input_ids"].clone(), batch.labels.clone()
        places_BT = (labels_BT != IGNORED).numpy()
        first_B, count_B = places_BT.argmax(1), places_BT.sum(1)
        labels_BT[:] = IGNORED
        counted_B = np.zeros_like(batch.label_count_B)
        for length in np.unique(first_B[count_B > 0]):
            rows = np.flatnonzero((first_B == length) & (count_B > 0))
            uniform_BN = np.stack([draws.generator(int(batch.position_B[i]), 0).random(int(count_B[i])) for i in rows])
            written_BN, size_B = sample_continuations(
                self.model,
                ids_BT[torch.from_numpy(rows), : length + 1].to(device),
                uniform_BN,
                temperature=self.temperature,
                eos=self.eos,
            )
            for row, written_N, size in zip(rows.tolist(), written_BN.cpu(), size_B.tolist(), strict=True):
                begin = int(length)
                labels_BT[row, begin : begin + size] = written_N[:size]
                ids_BT[row, begin + 1 : begin + len(written_N)] = written_N[:-1]
                counted_B[row] = size
        return replace(batch, inputs={**batch.inputs, "input_ids": ids_BT}, labels=labels_BT, label_count_B=counted_B)


def make_on_policy_step(samplers: Mapping[int, OnPolicySampler]) -> StepFunction:
    """The step that lets the model write the rows of some objectives, by their number, before it is trained on them."""

    def step(run: Run, micro_batches: Sequence[Batch]) -> StepReport:
        written = []
        for batch in micro_batches:
            writer = next((samplers[number] for number in batch.objectives if number in samplers), None)
            written.append(batch if writer is None else writer(batch))
        return train_step(run, written)

    return step

"""Classification loss of a task layer's logits: one class, several classes, tags of tokens, or a number.

Legend: B batch, T time, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from postgrad.data.layouts.rows import IGNORED
from postgrad.data.loading.batch import Batch
from postgrad.data.problem_type import ProblemType
from postgrad.models.model import Output


@dataclass(frozen=True)
class ClassificationLoss:
    """The loss of transformers' own task layers, as a sum over examples (over tokens for tags).

    `class` and `tags`: cross-entropy; `multi`: the mean over classes of the binary cross-entropies (an example has the same
    weight as with one class); `number`: the squared error.
    """

    problem_type: ProblemType
    name: str = "classify"
    weight: float = 1.0

    def __call__(self, output: Output, batch: Batch) -> tuple[Tensor, Tensor]:
        """The summed loss and each row's part of it."""
        logits, labels = output.logits().float(), batch.labels
        match self.problem_type:
            case ProblemType.MULTI_LABEL:
                losses_B = functional.binary_cross_entropy_with_logits(logits, labels, reduction="none").mean(1)
            case ProblemType.NUMBER:
                losses_B = (logits[:, 0] - labels).square()
            case _:
                losses = functional.cross_entropy(
                    logits.flatten(0, -2), labels.flatten(), ignore_index=IGNORED, reduction="none"
                )
                losses_B = losses.view(len(labels), -1).sum(1)
        # Padding rows: a number has no label value that means "ignored".
        losses_B = losses_B * torch.from_numpy(batch.label_count_B > 0).to(losses_B.device)
        return self.weight * losses_B.sum(), losses_B.detach()

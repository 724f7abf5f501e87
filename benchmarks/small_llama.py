"""A small random Llama, a batch for it, and a run, for benchmarks of training steps."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from postgrad.data.loading.batch import Batch
from postgrad.distributed.world import World
from postgrad.models.model import CausalModel
from postgrad.objectives.objective import Objective
from postgrad.optim import lr_schedules
from postgrad.optim.optimizer import AdamW, Weights
from postgrad.training.step import Run


def make_llama(options: argparse.Namespace, seed: int = 0, extra_positions: int = 0) -> LlamaForCausalLM:
    """The same Llama for the same seed; `extra_positions`: positions in addition to those of a row."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=options.hidden,
            num_hidden_layers=options.layers,
            num_attention_heads=options.hidden // 64,
            num_key_value_heads=options.hidden // 64,
            intermediate_size=options.inner,
            vocab_size=options.vocabulary,
            max_position_embeddings=options.time + extra_positions,
            tie_word_embeddings=True,
            attn_implementation="sdpa",
        )
    )


def random_batch(options: argparse.Namespace) -> Batch:
    """Rows of random ids, the same every time."""
    shape = (options.rows, options.time)
    return make_batch(torch.randint(0, options.vocabulary, shape, generator=torch.Generator().manual_seed(0)))


def make_batch(ids_BT: Tensor, positions_BT: Tensor | None = None, labels_BT: Tensor | None = None) -> Batch:
    """A batch of next tokens; left out, each row is one document and every id a label. Labels are aligned with the ids."""
    labels_BT = ids_BT if labels_BT is None else labels_BT
    positions_BT = torch.arange(ids_BT.shape[1]).expand_as(ids_BT) if positions_BT is None else positions_BT
    ahead_BT = torch.cat([labels_BT[:, 1:], labels_BT.new_full((len(labels_BT), 1), -100)], 1)
    counted_B = (ahead_BT != -100).sum(1).numpy()
    return Batch(
        {"input_ids": ids_BT, "position_ids": positions_BT}, ahead_BT, np.zeros(len(ids_BT), np.int64), counted_B
    )


def make_run(
    model: CausalModel,
    weights: Weights,
    objectives: Sequence[Objective],
    *,
    rate: float = 1e-4,
    betas: tuple[float, float] = (0.9, 0.95),
    weight_decay: float = 0.1,
) -> Run:
    """A run on one source at a constant rate, clipped at 1."""
    return Run(
        model=model,
        weights=weights,
        optimizer=AdamW(weights, betas=betas, eps=1e-8, weight_decay=weight_decay),
        objectives=objectives,
        penalties=[],
        schedule=lr_schedules.chain((lr_schedules.constant(rate), 1)),
        world=World(torch.device("cpu")),
        sources=["text"],
        max_grad_norm=1.0,
        seed=0,
        trained_tokens_by_source=np.zeros(1, np.int64),
    )

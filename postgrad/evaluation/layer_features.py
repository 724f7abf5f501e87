"""Hidden states of every layer of a frozen backbone for each item, computed in one pass and cached on disk.

Legend: S states (L blocks and the embeddings), I items, D width, B batch, T time.

An item is whatever has a label: a text (its tokens, pooled) or a word (its first token).
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from postgrad.data.layouts.rows import IGNORED, Row
from postgrad.data.loading.batch import collate
from postgrad.errors import DiskError
from postgrad.evaluation.length_batches import length_batches
from postgrad.models.task_head import Pooling, pool_tokens
from postgrad.storage.atomic import publish_folder, remove_folder
from postgrad.storage.verification import is_intact

FEATURES = "features.npy"
_TOKENS_AT_ONCE = 8192

ComputeStates = Callable[[dict[str, Tensor]], Sequence[Tensor]]
"""The inputs of a batch to S states of shape (B, T, D)."""


def layer_features(
    compute_states: ComputeStates,
    rows: Sequence[Row],
    folder: Path,
    *,
    cache: Path,
    pooling: Pooling | None,
    pad: int,
    device: torch.device,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> np.ndarray:
    """Every state of every item, of shape (S, I, D) and float32, memory-mapped from a published folder.

    An intact folder is not computed again. `pooling` None: an item is a word, else a row. `progress` gets the rows done and
    all rows. Raises `DiskError` when the disk is too small.
    """
    if not is_intact(folder, cache):
        if folder.exists():
            remove_folder(folder)
        publish_folder(
            folder,
            lambda staged: _compute_features(compute_states, rows, staged / FEATURES, pooling, pad, device, progress),
        )
    return np.load(folder / FEATURES, mmap_mode="r", allow_pickle=False)


@torch.no_grad()
def _compute_features(
    compute_states: ComputeStates,
    rows: Sequence[Row],
    path: Path,
    pooling: Pooling | None,
    pad: int,
    device: torch.device,
    progress: Callable[[int, int], None],
) -> None:
    """Write the features of all items to a file."""
    items_R = np.array([row.label_count if pooling is None else 1 for row in rows], np.int64)
    first_R = np.concatenate([[0], np.cumsum(items_R)])
    out_SID: np.memmap | None = None
    done = 0
    for group in length_batches([len(row.inputs["input_ids"]) for row in rows], _TOKENS_AT_ONCE):
        batch = collate([rows[i] for i in group], [0] * len(group), pad_token_id=pad).to(device)
        states = compute_states(batch.inputs)
        if out_SID is None:
            out_SID = _open_memmap(path, (len(states), int(first_R[-1]), states[0].shape[-1]))
        items = np.concatenate([np.arange(first_R[i], first_R[i + 1]) for i in group])
        for state, hidden_BTD in enumerate(states):
            out_SID[state, items] = _item_vectors(hidden_BTD.float(), batch.inputs, batch.labels, pooling).cpu().numpy()
        done += len(group)
        progress(done, len(rows))
    assert out_SID is not None, "there are rows"
    out_SID.flush()


def _item_vectors(hidden_BTD: Tensor, inputs: dict[str, Tensor], labels: Tensor, pooling: Pooling | None) -> Tensor:
    """The vectors of a batch's items, row by row, of shape (items, D)."""
    if pooling is None:
        return hidden_BTD[labels != IGNORED]
    return pool_tokens(hidden_BTD, inputs["attention_mask"], pooling)


def _open_memmap(file: Path, shape: tuple[int, int, int]) -> np.memmap:
    need = 4 * int(np.prod(shape))
    free = shutil.disk_usage(file.parent).free
    if free < need:
        raise DiskError(
            f"features of {shape[1]:,} items take {need:,} bytes, and {free:,} are free",
            where=str(file.parent),
            hint="make room, score fewer rows, or set $POSTGRAD_CACHE to a larger disk",
        )
    return np.lib.format.open_memmap(file, "w+", np.float32, shape)

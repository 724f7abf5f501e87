"""Features on the disk are what a forward pass of each layer gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from postgrad.data.layouts.rows import IGNORED, Row
from postgrad.errors import DiskError
from postgrad.evaluation import layer_features as features
from postgrad.evaluation.layer_features import layer_features
from postgrad.models.task_head_model import compute_hidden_states
from tests.tuning import families

CPU = torch.device("cpu")


def rows_of(tags: bool) -> list[Row]:
    """Rows of different lengths; of tags with a label at every second token."""
    rng = np.random.default_rng(0)
    out = []
    for length in (7, 3, 9, 5, 3):
        ids = rng.integers(families.REAL, families.VOCABULARY, length)
        labels = np.where(np.arange(length) % 2, IGNORED, ids % 3) if tags else np.array(length % 2)
        counted = int((labels != IGNORED).sum()) if tags else 1
        out.append(Row({"input_ids": ids, "attention_mask": np.ones(length, np.int64)}, labels, counted))
    return out


def states(inputs: dict[str, torch.Tensor]) -> Any:
    return compute_hidden_states(families.build_model("bert", "lm").base_model, stack=None, **inputs)


def by_hand(row: Row) -> np.ndarray:
    """The states of a row alone, by plain transformers: (S, T, D)."""
    model = families.build_model("bert", "lm").base_model
    with torch.no_grad():
        found = model(torch.from_numpy(row.inputs["input_ids"])[None], output_hidden_states=True).hidden_states
    return torch.stack(found)[:, 0].numpy()


@pytest.mark.parametrize("at_once", [8, 8192])
def test_words_have_the_states_of_their_first_token(
    tmp_path: Path, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(features, "_TOKENS_AT_ONCE", at_once)
    rows = rows_of(tags=True)
    found = layer_features(states, rows, tmp_path / "a" / "f", pooling=None, cache=tmp_path, pad=0, device=CPU)
    wanted = np.concatenate([by_hand(row)[:, row.labels != IGNORED] for row in rows], 1)
    assert isinstance(found, np.memmap) and found.shape == (3, 16, 32)
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    assert not np.allclose(found, wanted[:, ::-1], atol=1e-2)  # the mutant: in another order


@pytest.mark.parametrize("pooling", ["first", "last", "mean", "max"])
def test_texts_have_the_states_of_their_tokens_pooled(tmp_path: Path, pooling: Any) -> None:
    rows = rows_of(tags=False)
    found = layer_features(states, rows, tmp_path / "f", pooling=pooling, cache=tmp_path, pad=0, device=CPU)
    how = {
        "first": lambda s: s[:, 0],
        "last": lambda s: s[:, -1],
        "mean": lambda s: s.mean(1),
        "max": lambda s: s.max(1),
    }
    wanted = np.stack([how[pooling](by_hand(row)) for row in rows], 1)
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_what_is_there_is_not_computed_again_and_nothing_half_done_stays(tmp_path: Path) -> None:
    rows, calls = rows_of(tags=False), []

    def counted(inputs: dict[str, torch.Tensor]) -> Any:
        calls.append(len(inputs["input_ids"]))
        if len(calls) > 1:
            raise KeyboardInterrupt
        return states(inputs)

    place = tmp_path / "f"
    first = layer_features(counted, rows, place, pooling="mean", cache=tmp_path, pad=0, device=CPU)
    again = layer_features(counted, rows, place, pooling="mean", cache=tmp_path, pad=0, device=CPU)
    assert calls == [5] and np.array_equal(first, again)
    with pytest.raises(KeyboardInterrupt):
        layer_features(counted, rows, tmp_path / "other", pooling="mean", cache=tmp_path, pad=0, device=CPU)
    assert [path.name for path in tmp_path.iterdir()] == ["f"]


def test_a_disk_without_room_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 100})())
    with pytest.raises(DiskError, match="features of 5 items take 1,920 bytes, and 100 are free"):
        layer_features(states, rows_of(tags=False), tmp_path / "f", pooling="mean", cache=tmp_path, pad=0, device=CPU)

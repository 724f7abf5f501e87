"""NaN and infinite values in a file of weights are an error that names the tensor, and finite ones never are."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from postgrad.errors import DataError, ModelError, PostgradError, TuningError
from postgrad.models import finite, pretrained
from postgrad.models.finite import has_non_finite, sampling_errors
from postgrad.models.location import locate_model
from postgrad.models.pretrained import load_model
from postgrad.penalties import importance_file
from postgrad.penalties.importance_file import ImportanceFile, ImportanceMetadata, write_importance
from postgrad.tuning import adapter_folder
from postgrad.tuning.adapter_folder import read_export, write_tuning

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_non_finite_values_are_found_anywhere(dtype: torch.dtype) -> None:
    values = torch.linspace(-2, 2, 1000)
    assert not has_non_finite(values.to(dtype)) and not has_non_finite(torch.empty(0, dtype=dtype))
    for place in (0, 500, 999):
        changed = values.clone()
        changed[place] = NAN
        assert has_non_finite(changed.to(dtype))
    assert not has_non_finite(torch.arange(3)) and not has_non_finite(torch.tensor([True]))


def test_a_sum_that_overflows_is_not_taken_for_an_infinite_value() -> None:
    """The mutant, the sum alone, takes it for one."""
    large = torch.full((4,), 3e38)
    assert not large.sum().isfinite() and not has_non_finite(large)
    assert has_non_finite(torch.tensor([INF, -INF])) and has_non_finite(torch.tensor([3e38, 3e38, INF]))


def change(path: Path, value: float) -> None:
    tensors = load_file(path)
    tensors[sorted(tensors)[-1]].flatten()[-1] = value
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("kind", ["model", "tuning", "importance"])
def test_a_file_with_values_that_are_none_is_refused(
    kind: str, value: float, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not so the mutant, which does not look."""
    weight = {"weight": torch.ones(2, 3)}
    if kind == "model":
        shutil.copytree(base / "base", tmp_path / "model")
        (tmp_path / "model" / "manifest.json").unlink(missing_ok=True)
        path, module, error = tmp_path / "model" / "model.safetensors", pretrained, ModelError
        read = lambda: load_model(locate_model(str(path.parent), tmp_path))  # noqa: E731
    elif kind == "tuning":
        write_tuning(tmp_path, {"kind": "full"}, weight, {})
        path, module, error = tmp_path / "tuning.safetensors", adapter_folder, TuningError
        read = lambda: read_export(tmp_path)  # noqa: E731
    else:
        path, module, error = tmp_path / "i.safetensors", importance_file, DataError
        write_importance(path, weight, ImportanceMetadata("fisher", "token", 1, "m", None, 1.0), torch.float32)
        kept = path.read_bytes()
        path.write_bytes(kept.replace(weight["weight"].numpy().tobytes(), torch.full((2, 3), value).numpy().tobytes()))
        read = lambda: ImportanceFile(path)["weight"]  # noqa: E731
    if kind != "importance":
        read()
        change(path, value)
    with pytest.raises(error, match=r"weight.* has NaN or infinite values"):
        read()
    monkeypatch.setattr(module, "refuse_non_finite", lambda *_, **__: None)
    read()


def test_negative_importance_is_refused(tmp_path: Path) -> None:
    """A penalty of it would push the weights away."""
    path = tmp_path / "i.safetensors"
    metadata = ImportanceMetadata("fisher", "token", 1, "m", None, 1.0)
    write_importance(path, {"weight": torch.tensor([0.0, 1.0])}, metadata, torch.float32)
    assert ImportanceFile(path)["weight"].tolist() == [0.0, 1.0]
    write_importance(path, {"weight": torch.tensor([-1e-3, 1.0])}, metadata, torch.float32)
    with pytest.raises(DataError, match="weight has negative importance"):
        ImportanceFile(path)["weight"]


def test_predictions_that_are_none_are_an_error_of_ours() -> None:
    with pytest.raises(ModelError, match="predictions are NaN or infinite"), sampling_errors("generate"):
        torch.multinomial(torch.tensor([NAN, 1.0]), 1)
    with pytest.raises(RuntimeError, match="another"), sampling_errors("generate"):
        raise RuntimeError("another")
    assert issubclass(ModelError, PostgradError) and finite.has_non_finite(torch.tensor([NAN]))

"""Models without their numbers: each rank reads its rows and no others, and what was computed from placeholders shows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from postgrad.models import unread_weights
from postgrad.models.auto_classes import find_weight_files
from postgrad.models.location import ModelLocation
from postgrad.models.pretrained import load_pretrained
from postgrad.models.task import Task
from postgrad.models.unread_weights import UnreadModel, load_unread
from postgrad.models.weight_files import SafetensorsWriter, StoredTensors
from tests.model_families import make_tiny_model, tiny_config
from tests.tiny_models import make_tokenizer

FAMILIES = {
    "llama": Task.CAUSAL,
    "gpt2": Task.CAUSAL,
    "gemma3_text": Task.CAUSAL,
    "bert": Task.MASKED,
    "t5": Task.TEXT_TO_TEXT,
    "bart": Task.TEXT_TO_TEXT,
}


def save(family: str, task: Task, folder: Path) -> ModelLocation:
    make_tiny_model(tiny_config(family), task).to(torch.bfloat16).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return ModelLocation(family, folder)


def load(start: ModelLocation, task: Task) -> UnreadModel:
    unread = load_unread(start, task)
    assert unread is not None
    return unread


def rows_of(model: PreTrainedModel, rank: int, ranks: int) -> dict[str, Tensor]:
    """This rank's rows of each weight, as FSDP divides them."""
    chunks = {name: p.detach().chunk(ranks) for name, p in model.named_parameters()}
    return {name: each[rank] if rank < len(each) else each[0][:0] for name, each in chunks.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_each_rank_reads_its_rows(family: str, tmp_path: Path) -> None:
    task = FAMILIES[family]
    start = save(family, task, tmp_path)
    whole = load_pretrained(start, task).model
    for rank in range(3):
        unread = load(start, task)
        model = unread.loaded.model
        assert sum(p.untyped_storage().nbytes() for p in model.parameters()) < 0.2 * 4 * model.num_parameters()
        unread.weights.read(model, rank, 3, torch.float32)
        mine, wanted = rows_of(model, rank, 3), rows_of(whole, rank, 3)
        assert mine.keys() == wanted.keys()  # ties, too
        assert all(torch.equal(mine[name], wanted[name]) for name in mine)
        for (name, buffer), (_, computed) in zip(model.named_buffers(), whole.named_buffers(), strict=True):
            assert torch.equal(buffer, computed), name
        assert not model.can_generate() or model.generation_config.to_dict() == whole.generation_config.to_dict()


def test_rows_of_another_rank_are_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutant: rows are divided as evenly as possible, and not as FSDP does."""
    start = save("llama", Task.CAUSAL, tmp_path)
    unread, whole = load(start, Task.CAUSAL), load_pretrained(start, Task.CAUSAL).model
    monkeypatch.setattr(unread_weights, "len", lambda t: len(t) // 3 * 3 - 2, raising=False)
    unread.weights.read(unread.loaded.model, 1, 3, torch.float32)
    mine, wanted = rows_of(unread.loaded.model, 1, 3), rows_of(whole, 1, 3)
    assert not all(torch.equal(mine[name], wanted[name]) for name in mine)


def test_what_is_computed_from_placeholders_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unread = load(save("llama", Task.CAUSAL, tmp_path / "llama"), Task.CAUSAL)
    layer = unread.loaded.model.get_submodule("model.layers.0.mlp.up_proj")
    assert unread.weights.find_computed(unread.loaded.model) is None
    layer.register_parameter("norm", torch.nn.Parameter(layer.weight.norm(dim=1)))  # type: ignore[union-attr]
    assert unread.weights.find_computed(unread.loaded.model) == "model.layers.0.mlp.up_proj.norm"
    # Experts that transformers stacks are computed.
    stacked = save("mixtral", Task.CAUSAL, tmp_path / "mixtral")
    assert load_unread(stacked, Task.CAUSAL) is None
    monkeypatch.setattr(unread_weights, "_has_nan", lambda tensor: False)  # the mutant
    assert load_unread(stacked, Task.CAUSAL) is not None


def test_a_file_that_is_written_tensor_by_tensor_reads_back(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "odd": torch.randn(3, 5, generator=generator).bfloat16(),
        "wide": torch.arange(4),
        "number": torch.tensor(2.5),
        "empty": torch.zeros(0, 4),
        "whole": torch.randn(7, 2, generator=generator),
    }
    with SafetensorsWriter(tmp_path / "model.safetensors", tensors) as writer:
        for name in reversed(tensors):
            writer.write(name, tensors[name])
    stored = StoredTensors([tmp_path / "model.safetensors"])
    assert stored.keys() == tensors.keys() and find_weight_files(str(tmp_path)) == [tmp_path / "model.safetensors"]
    for name, tensor in stored.items():
        assert tensor.dtype == tensors[name].dtype and torch.equal(tensor, tensors[name])
    with (
        pytest.raises(AssertionError, match="odd"),
        SafetensorsWriter(tmp_path / "lacking.safetensors", tensors) as writer,
    ):
        writer.write("whole", tensors["whole"])

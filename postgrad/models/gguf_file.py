"""Write a model with its tokenizer as a GGUF file, and read it back by transformers' own loader."""

from __future__ import annotations

from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path

import numpy as np
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from postgrad.errors import MissingExtra, ModelError
from postgrad.models.auto_classes import load_model_files
from postgrad.models.gguf_tensors import add_hyperparameters, find_architecture, iter_tensors
from postgrad.models.task import Task
from postgrad.storage.atomic import publish_file

GGUF_SUFFIX = ".gguf"


def require_gguf() -> None:
    """Raise `MissingExtra` when the `gguf` package is not installed."""
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise MissingExtra(
            "GGUF files need the package gguf", where="export", hint="pip install 'postgrad[gguf]'"
        ) from None


def write_gguf(
    path: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task, dtype: torch.dtype
) -> list[str]:
    """Write a GGUF file, matrices in `dtype`; returns notes on what llama.cpp does differently.

    Raises `ModelError` for an architecture, tensor or tokenizer that llama.cpp does not have.
    """
    from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType

    from postgrad.models.gguf_vocabulary import add_vocabulary

    if task is not Task.CAUSAL:
        raise ModelError(f"a GGUF file holds a decoder, not {task.description}", where="export")
    architecture = find_architecture(model.config)
    types = {
        torch.float32: (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
        torch.float16: (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
        torch.bfloat16: (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
    }
    writer = GGUFWriter(None, architecture.name)
    writer.add_name(path.stem)
    writer.add_file_type(types[dtype][1])
    add_hyperparameters(writer, architecture, model.config)
    notes = add_vocabulary(writer, tokenizer, model)
    for key, tensor in iter_tensors(model, architecture, dtype):
        data = tensor.view(torch.uint8)
        writer.add_tensor_info(key, data.shape, np.dtype("uint8"), data.nbytes, types[tensor.dtype][0])

    def write(staged: Path) -> None:
        writer.write_header_to_file(staged)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for _, tensor in iter_tensors(model, architecture, dtype):  # again, so that one tensor is held at a time
            writer.write_tensor_data(tensor.view(torch.uint8).numpy())
        writer.close()

    publish_file(path, write)
    return notes


def read_gguf(path: Path, like: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """The model of a GGUF file by transformers' own loader, which knows the names of llama.cpp's architectures alone."""
    name = find_architecture(like.config).name
    config = CONFIG_MAPPING[name].from_dict({**like.config.to_dict(), "model_type": name})
    with redirect_stderr(StringIO()):  # a progress bar
        model, _ = load_model_files(AutoModelForCausalLM, str(path.parent), config, gguf_file=path.name, dtype=dtype)
    return model.eval()

"""How does a Hugging Face model come in, and what does it answer?

Legend: B batch, T time, D model width, V vocabulary.

A causal model is seen as a *body* (ids to hidden states) and a *head* (hidden states to logits), so that a loss can be
computed without ever holding all logits. Whether that view is right for an architecture is probed, not assumed.
"""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from postgrad.errors import ModelError

transformers_logging.disable_progress_bar()

WEIGHT_SUFFIXES = (".safetensors", ".safetensors.index.json")


@dataclass(frozen=True)
class Start:
    """Where a model comes from: its folder (or Hub name), and the run that made it, when one did."""

    name: str
    folder: Path | None
    run: Path | None = None

    @property
    def source(self) -> str:
        """What `from_pretrained` is given."""
        return str(self.folder) if self.folder else self.name


def locate(name: str, root: Path) -> Start:
    """Resolve a folder, a run folder (its final model), a checkpoint of a run, or a Hub name, relative to `root`.

    Raises `ModelError` when the name looks like a path and nothing is there.
    """
    folder = (root / Path(name).expanduser()).resolve()
    if folder.is_dir():
        if (folder / "stage.yaml").exists():  # a run folder
            if not (folder / "model" / "config.json").exists():
                raise ModelError(
                    f"the run {name} has not finished, so it has no model yet",
                    where="model",
                    way_out=f"finish it, or name one of its checkpoints: {name}/checkpoints/step-...",
                )
            return Start(name, folder / "model", folder)
        if not (folder / "config.json").exists():
            raise ModelError(
                f"{name} is a folder without a config.json",
                where="model",
                expected="a Hugging Face model folder, a run folder or a checkpoint",
            )
        run = folder.parent.parent if folder.parent.name == "checkpoints" else None
        return Start(name, folder, run if run and (run / "stage.yaml").exists() else None)
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or ((root / name).parent.is_dir() and "/" not in name):
        raise ModelError(
            f"there is no folder {name}",
            where="model",
            expected="a folder with config.json and safetensors weights, a run folder, or a Hub name (owner/name)",
        )
    return Start(name, None)


def load_tokenizer(start: Start) -> PreTrainedTokenizerBase:
    """The model's own tokenizer. Raises `ModelError` when there is none that is fast."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tokenizer = AutoTokenizer.from_pretrained(start.source)
    except Exception as error:
        raise ModelError(
            f"no tokenizer could be loaded from {start.name}: {_first_line(error)}",
            where="model",
            expected="tokenizer.json beside the model",
        ) from error
    if not isinstance(tokenizer, PreTrainedTokenizerBase) or not tokenizer.is_fast:
        raise ModelError(f"{start.name} has no fast tokenizer", where="model", expected="a tokenizer.json")
    return tokenizer


def load_model(start: Start, *, attention: str | None = None, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The causal model in `dtype`, in eval mode. No code of a foreign repository runs.

    Without `attention`, transformers picks what the architecture supports: SDPA where it can.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = AutoConfig.from_pretrained(start.source)
            _harmless(config, start.name)
            model, loading = AutoModelForCausalLM.from_pretrained(
                start.source,
                config=config,
                dtype=dtype,
                attn_implementation=attention,
                use_safetensors=True,
                output_loading_info=True,
            )
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(
            f"{start.name} could not be loaded as a causal language model: {_first_line(error)}", where="model"
        ) from error
    missing = sorted(loading["missing_keys"])
    if missing:
        raise ModelError(
            f"{start.name} lacks {len(missing)} weights ({missing[0]}, ...); they would have been random",
            where="model",
            expected="weights for every parameter of the architecture in its config.json",
        )
    return model.eval()


def stored_dtype(start: Start) -> torch.dtype:
    """The dtype the start model's weights are stored in, as its config says (float32 when it does not)."""
    dtype = getattr(AutoConfig.from_pretrained(start.source), "dtype", None)
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def _harmless(config: object, name: str) -> None:
    """Refuse what would run code of a foreign repository."""
    if getattr(config, "auto_map", None):
        raise ModelError(
            f"{name} brings its own modelling code (auto_map), which is never run",
            where="model",
            expected="an architecture that transformers itself has",
        )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@dataclass(frozen=True)
class Head:
    """Hidden states to logits: `softcap(scale (h W^T + b))`."""

    weight_VD: Tensor
    bias_V: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits of shape (..., V) for hidden states of shape (..., D)."""
        bias = None if self.bias_V is None else self.bias_V.to(hidden.dtype)
        out = nn.functional.linear(hidden, self.weight_VD.to(hidden.dtype), bias) * self.scale
        return out if self.softcap is None else torch.tanh(out / self.softcap) * self.softcap


@dataclass(frozen=True)
class Output:
    """What a model says about a batch: hidden states and the head that turns them into logits."""

    hidden_BTD: Tensor
    head: Head

    def logits_BTV(self) -> Tensor:
        """All logits at once; an objective that can should work in chunks instead."""
        return self.head.logits(self.hidden_BTD)


class CausalModel(nn.Module):
    """A Hugging Face causal model as a body and a head."""

    def __init__(self, pretrained: PreTrainedModel) -> None:
        super().__init__()
        self.pretrained = pretrained
        self.body: nn.Module = pretrained.base_model
        config = pretrained.config
        # Granite divides its logits, Cohere multiplies them, Gemma caps them; `fits` tells whether this covers a model.
        scaling = getattr(config, "logits_scaling", None)
        self.scale: float = 1.0 / scaling if scaling else float(getattr(config, "logit_scale", None) or 1.0)
        self.softcap: float | None = getattr(config, "final_logit_softcapping", None)

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Output:
        """Hidden states of packed rows: positions that restart part the documents from one another.

        The cache stays off and no attention mask is given: with either, transformers lets documents see each other.
        """
        hidden = self.body(input_ids=input_ids, position_ids=position_ids, use_cache=False).last_hidden_state
        return Output(hidden, self.head())

    def head(self) -> Head:
        """The head as it is now."""
        layer = self.pretrained.get_output_embeddings()
        if layer is None:
            raise ModelError(f"{type(self.pretrained).__name__} has no output embedding", where="model")
        return Head(layer.weight, getattr(layer, "bias", None), self.scale, self.softcap)


def probe(model: CausalModel, *, length: int = 24, tolerance: float = 1e-4) -> None:
    """Check on random ids that the body-and-head view is right and that packed documents do not see each other.

    Raises `ModelError` for an architecture that does not keep documents apart (recurrent and hybrid ones carry state
    across), or whose logits are not what body and head give.
    """
    vocabulary = table_of(model.pretrained).shape[0]
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocabulary, (1, 2 * length), generator=generator).to(device)
    other = ids.clone()
    other[:, :length] = torch.randint(0, vocabulary, (1, length), generator=generator).to(device)
    positions = torch.arange(length, device=device).repeat(2)[None]
    was_training = model.training
    model.eval()
    with torch.no_grad():
        ours = model(ids, positions).logits_BTV().float()
        plain = model.pretrained(input_ids=ids, position_ids=positions, use_cache=False).logits.float()
        leak = (model(other, positions).logits_BTV().float() - ours)[:, length:].abs().max().item()
        alone = (
            (model(ids[:, length:], positions[:, length:]).logits_BTV().float() - ours[:, length:]).abs().max().item()
        )
    model.train(was_training)
    size = max(1.0, plain.abs().max().item())
    kind = model.pretrained.config.model_type
    if (ours - plain).abs().max().item() > tolerance * size:
        raise ModelError(
            f"the logits of this architecture ({kind}) are not its output embedding applied to its last hidden state",
            where="model",
            expected="a causal model with a plain, scaled or soft-capped head",
        )
    if max(leak, alone) > tolerance * size:
        raise ModelError(
            f"packed documents see each other in this architecture ({kind}): logits of the second change by "
            f"{max(leak, alone):.2g} with the first",
            where="model",
            expected="attention that stays within a document (recurrent and hybrid models carry state across)",
            way_out="use a model with plain attention layers",
        )


def table_of(model: PreTrainedModel) -> Tensor:
    """The input embedding's weight, of shape (V, D)."""
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, Tensor)
    return weight


def parameters_of(model: nn.Module) -> int:
    """Weights of a model, tied ones counted once."""
    return sum(p.numel() for p in model.parameters())


def layers_of(model: PreTrainedModel) -> nn.ModuleList:
    """The stack of blocks: the longest module list of the body. Raises `ModelError` when there is none."""
    lists = [m for m in model.base_model.modules() if isinstance(m, nn.ModuleList) and len(m)]
    if not lists:
        raise ModelError(f"no stack of layers was found in {type(model).__name__}", where="model")
    return max(lists, key=len)


def save_pretrained(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    dtype: torch.dtype,
    state: dict[str, Tensor] | None = None,
) -> None:
    """A plain Hugging Face folder: safetensors weights in `dtype`, config, generation config and tokenizer."""
    weights = model.state_dict() if state is None else state
    # Tied weights are one storage; cast once, they still are, and are written once.
    once: dict[int, Tensor] = {}
    cast = {
        name: once.setdefault(tensor.data_ptr(), tensor.to(dtype)) if tensor.is_floating_point() else tensor
        for name, tensor in weights.items()
    }
    model.save_pretrained(folder, state_dict=cast)
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    # The config says what is in the file, whatever dtype the model computed in.
    config["dtype"] = str(dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")

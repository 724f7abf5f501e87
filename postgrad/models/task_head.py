"""The task head of a classifier: which layers of the backbone it uses, how they are joined and pooled, and its layers.

Legend: B batch, T time, D width of the backbone, R width of the joined states, H hidden width, C classes.

A backbone of L blocks has L + 1 states, transformers' `hidden_states`: 0 is the output of the embeddings, L that of the last
block (after the final norm, where there is one).

    layers     one state, several concatenated, their sum, or their mix `gamma * sum_l softmax(s)_l h_l`
               (Peters et al. 2018, arXiv 1802.05365, equation 1)
    pooling    a text's vector from its real tokens: the first, the last, their mean or maximum; tags have none
    head       a linear layer; with tanh layers before it; or with a BiLSTM before it (Devlin et al. 2019, arXiv 1810.04805,
               section 5.3)
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from transformers import PreTrainedConfig

from postgrad.errors import ModelError
from postgrad.storage.read_json import read_json

DESCRIPTION, TENSORS = "task_layer.json", "task_layer.safetensors"
FORMAT = 1
TASK_LAYER = "task_layer"

Pooling = Literal["first", "mean", "max", "last"]
HeadKind = Literal["linear", "mlp", "bilstm"]
Join = Literal["concat", "sum", "mix"]


@dataclass(frozen=True)
class TaskHeadConfig:
    """The resolved options of a task head.

    `pooling` is None for tags, which are predicted word by word. `stack` is the half of an encoder-decoder that is used; with
    the encoder, the model has no decoder. `width` and `depth` are of the tanh layers or the BiLSTM.
    """

    layers: Annotated[tuple[int, ...], Field(min_length=1, max_length=1024)]
    join: Join = "concat"
    pooling: Pooling | None = None
    head: HeadKind = "linear"
    width: Annotated[int, Field(ge=0, le=1 << 20)] = 0
    depth: Annotated[int, Field(ge=0, le=64)] = 0
    dropout: Annotated[float, Field(ge=0, le=1)] = 0.0
    stack: Literal["encoder", "decoder"] | None = None

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> TaskHeadConfig:
        """From plain data."""
        values: dict[str, Any] = {**data, "layers": tuple(data["layers"])}
        return cls(**values)

    def as_dict(self) -> dict[str, Any]:
        """As plain data."""
        return {**asdict(self), "layers": list(self.layers)}

    def describe(self) -> str:
        """Layers, tokens and head in words."""
        numbers, joined = ", ".join(map(str, self.layers)), {"concat": "concatenated", "sum": "summed", "mix": "mixed"}
        layers = f"layer {numbers}" if len(self.layers) == 1 else f"layers {numbers} {joined[self.join]}"
        half = f" of the {self.stack}" if self.stack else ""
        tokens = (
            "at each word's first token" if self.pooling is None else f"pooled over a text's tokens ({self.pooling})"
        )
        size = f" ({self.depth} x {self.width})" if self.width else ""
        return f"{layers}{half}, {tokens}, with a head of the kind {self.head}{size}"


def count_blocks(config: PreTrainedConfig, stack: str | None) -> int:
    """The number of blocks of a backbone, or of one stack of an encoder-decoder."""
    text = config.get_text_config(decoder=stack == "decoder")
    names = ("num_decoder_layers", "decoder_layers") if stack == "decoder" else ()
    found = [getattr(text, name, None) for name in (*names, "num_hidden_layers")]
    return int(next(depth for depth in found if depth is not None))


def load_task_head_config(folder: Path | None) -> TaskHeadConfig | None:
    """The options of the task head in a folder, or None. Raises `ModelError` for an invalid description."""
    if folder is None or not (folder / DESCRIPTION).exists():
        return None
    file, expected = folder / DESCRIPTION, f"a {DESCRIPTION} of format {FORMAT}"
    description = read_json(file, _TaskLayerFile, error=ModelError, expected=expected)
    if description.format != FORMAT:
        raise ModelError(f"its format is {description.format}", where=str(file), expected=expected)
    return description.reads


@dataclass(frozen=True)
class _TaskLayerFile:
    """The part of `task_layer.json` that a model is made from."""

    format: int
    reads: TaskHeadConfig


# --- the task layer ---------------------------------------------------------------------------------------------------


class TaskHead(nn.Module):
    """Joins states, pools tokens and computes the logits of the classes."""

    def __init__(self, form: TaskHeadConfig, width: int, classes: int) -> None:
        super().__init__()
        self.form = form
        read = width * (len(form.layers) if form.join == "concat" else 1)
        if form.join == "mix":
            self.mix = nn.Parameter(torch.zeros(len(form.layers)))
            self.gamma = nn.Parameter(torch.ones(1))
        self.dropout = nn.Dropout(form.dropout)
        if form.head == "bilstm":
            between = form.dropout if form.depth > 1 else 0.0
            self.lstm = nn.LSTM(read, form.width, form.depth, batch_first=True, bidirectional=True, dropout=between)
            read = 2 * form.width
        if form.head == "mlp":
            widths = [read, *[form.width] * form.depth]
            self.dense = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(widths))
            read = form.width
        self.out = nn.Linear(read, classes)

    def draw_weights(self, std: float) -> None:
        """Initialise: normal weights of standard deviation `std`, an even mix, and PyTorch's own for the BiLSTM."""
        with torch.no_grad():
            for module in self.modules():
                if isinstance(module, nn.Linear):
                    module.weight.normal_(0.0, std)
                    module.bias.zero_()
                elif isinstance(module, nn.LSTM):
                    module.reset_parameters()
            if self.form.join == "mix":
                self.mix.zero_()
                self.gamma.fill_(1.0)

    def forward(self, states: Sequence[Tensor], mask_BT: Tensor) -> Tensor:
        """Logits of shape (B, C), or (B, T, C) for tags, from all states (B, T, D) and the attention mask."""
        hidden_BTR = self.dropout(self.join_states(states))
        if self.form.head == "bilstm":
            hidden_BTR = self.dropout(self._run_bilstm(hidden_BTR, mask_BT))
        hidden = hidden_BTR if self.form.pooling is None else pool_tokens(hidden_BTR, mask_BT, self.form.pooling)
        for dense in self.dense if self.form.head == "mlp" else ():
            hidden = self.dropout(torch.tanh(dense(hidden)))
        return self.out(hidden)

    def join_states(self, states: Sequence[Tensor]) -> Tensor:
        """The states of the configured layers, joined, of shape (B, T, R)."""
        read = [states[layer].to(self.out.weight.dtype) for layer in self.form.layers]
        match self.form.join:
            case "concat":
                return torch.cat(read, -1)
            case "sum":
                return torch.stack(read).sum(0)
            case "mix":
                share_L = torch.softmax(self.mix.float(), 0).to(read[0].dtype)
                return self.gamma * torch.einsum("l,lbtd->btd", share_L, torch.stack(read))

    def _run_bilstm(self, hidden_BTR: Tensor, mask_BT: Tensor) -> Tensor:
        """The BiLSTM's outputs at the real tokens, of shape (B, T, 2H); padding on either side is skipped."""
        size_B = mask_BT.sum(1)
        # The real tokens are moved to the front for packing, and back afterwards.
        order_BT = torch.argsort((mask_BT == 0).int(), dim=1, stable=True)
        real_BTR = hidden_BTR.gather(1, order_BT[..., None].expand_as(hidden_BTR))
        packed = pack_padded_sequence(real_BTR, size_B.clamp(min=1).cpu(), batch_first=True, enforce_sorted=False)
        out_BTH, _ = pad_packed_sequence(self.lstm(packed)[0], batch_first=True, total_length=mask_BT.shape[1])
        return torch.zeros_like(out_BTH).scatter(1, order_BT[..., None].expand_as(out_BTH), out_BTH)


def pool_tokens(hidden_BTR: Tensor, mask_BT: Tensor, pooling: Pooling) -> Tensor:
    """One vector of each row's real tokens, of shape (B, R); padding may stand on either side."""
    real_BT1 = mask_BT.bool()[..., None]
    match pooling:
        case "mean":
            return torch.where(real_BT1, hidden_BTR, 0).sum(1) / real_BT1.sum(1).clamp(min=1)
        case "max":
            return torch.where(real_BT1, hidden_BTR, torch.finfo(hidden_BTR.dtype).min).amax(1)
    rows_B = torch.arange(len(mask_BT), device=mask_BT.device)
    return hidden_BTR[rows_B, edge_position(mask_BT, pooling)]


def edge_position(mask_BT: Tensor, side: Literal["first", "last"]) -> Tensor:
    """The index of each row's first or last real token, of shape (B,)."""
    if side == "first":
        return mask_BT.int().argmax(1)
    return mask_BT.shape[1] - 1 - mask_BT.int().flip(1).argmax(1)

"""What does a task layer read of a backbone? Which layers, joined how, gathered from which tokens, and what decides on them.

Legend: B batch, T time, D width of the backbone, R width of what is read, H hidden width, C classes.

A backbone of L blocks has L + 1 states: 0 is what its embeddings give, L what the last block gives (behind the final norm,
where there is one); they are transformers' `hidden_states`.

    layers     one state, several side by side, their sum, or their mix `gamma * sum_l softmax(s)_l h_l`
               (Peters et al. 2018, arXiv 1802.05365, equation 1)
    pooling    a text's vector from its real tokens: the first, the last, their mean or their greatest values; tags have none
    head       a linear layer; with tanh layers before it; or with a BiLSTM before it (Devlin et al. 2019, arXiv 1810.04805,
               section 5.3)

A model is made of a family's own base class and its plain backbone, so weights, attention and saving are transformers' own.
On the disk it is the backbone (config.json, model.safetensors: `AutoModel` reads them), with the task layer beside it
(task_layer.json, task_layer.safetensors).
"""

from __future__ import annotations

import functools
import inspect
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from transformers import AutoModel, AutoModelForTextEncoding, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, SequenceClassifierOutput, TokenClassifierOutput

from postgrad.errors import ModelError

DESCRIPTION, TENSORS = "task_layer.json", "task_layer.safetensors"
_FORMAT = 1
_NAME = "task_layer"

Pooling = Literal["first", "mean", "max", "last"]
HeadKind = Literal["linear", "mlp", "bilstm"]
Join = Literal["concat", "sum", "mix"]


@dataclass(frozen=True)
class TaskHeadConfig:
    """What is read, with every choice made.

    `pooling` is None for tags, which are decided word by word. `stack` says which half of an encoder-decoder is read; of
    its encoder the decoder is no part of the model. `width` and `depth` are of the tanh layers or the BiLSTM.
    """

    layers: tuple[int, ...]
    join: Join = "concat"
    pooling: Pooling | None = None
    head: HeadKind = "linear"
    width: int = 0
    depth: int = 0
    dropout: float = 0.0
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
        """In words: what is read, of which tokens, and by what."""
        numbers, joined = ", ".join(map(str, self.layers)), {"concat": "side by side", "sum": "summed", "mix": "mixed"}
        layers = f"layer {numbers}" if len(self.layers) == 1 else f"layers {numbers} {joined[self.join]}"
        half = f" of the {self.stack}" if self.stack else ""
        tokens = (
            "at each word's first token" if self.pooling is None else f"pooled over a text's tokens ({self.pooling})"
        )
        size = f" ({self.depth} x {self.width})" if self.width else ""
        return f"{layers}{half}, {tokens}, with a head of the kind {self.head}{size}"


def count_blocks(config: PreTrainedConfig, stack: str | None) -> int:
    """How many blocks a backbone has; of an encoder-decoder, that half of it."""
    text = config.get_text_config(decoder=stack == "decoder")
    names = ("num_decoder_layers", "decoder_layers") if stack == "decoder" else ()
    found = [getattr(text, name, None) for name in (*names, "num_hidden_layers")]
    return int(next(depth for depth in found if depth is not None))


def load_task_head_config(folder: Path | None) -> TaskHeadConfig | None:
    """What the task layer in a folder reads; None when the folder has no such task layer.

    Raises `ModelError` for a description that cannot be read.
    """
    if folder is None or not (folder / DESCRIPTION).exists():
        return None
    try:
        said = json.loads((folder / DESCRIPTION).read_text())
        if said["format"] != _FORMAT:
            raise ValueError(f"its format is {said['format']!r}")
        return TaskHeadConfig.from_dict(said["reads"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"the description of the task layer cannot be read ({error})",
            where=str(folder / DESCRIPTION),
            expected=f"what was saved with it, of format {_FORMAT}",
        ) from None


# --- the task layer ---------------------------------------------------------------------------------------------------


class TaskHead(nn.Module):
    """The task layer: it joins the states that it reads, pools them, and decides."""

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
        """Fresh weights: normal ones of standard deviation `size`, an even mix, and PyTorch's own for the BiLSTM."""
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
        """Logits of shape (B, C), or (B, T, C) for tags, from all states (B, T, D) and which tokens are real."""
        hidden_BTR = self.dropout(self.join_states(states))
        if self.form.head == "bilstm":
            hidden_BTR = self.dropout(self._run_bilstm(hidden_BTR, mask_BT))
        hidden = hidden_BTR if self.form.pooling is None else pool_tokens(hidden_BTR, mask_BT, self.form.pooling)
        for dense in self.dense if self.form.head == "mlp" else ():
            hidden = self.dropout(torch.tanh(dense(hidden)))
        return self.out(hidden)

    def join_states(self, states: Sequence[Tensor]) -> Tensor:
        """The states that are read, as one of shape (B, T, R)."""
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
        """What the BiLSTM makes of the real tokens, of shape (B, T, 2H); padding, wherever it stands, is not read."""
        size_B = mask_BT.sum(1)
        # The real tokens first, in their order, and back.
        place_BT = torch.argsort((mask_BT == 0).int(), dim=1, stable=True)
        real_BTR = hidden_BTR.gather(1, place_BT[..., None].expand_as(hidden_BTR))
        packed = pack_padded_sequence(real_BTR, size_B.clamp(min=1).cpu(), batch_first=True, enforce_sorted=False)
        out_BTH, _ = pad_packed_sequence(self.lstm(packed)[0], batch_first=True, total_length=mask_BT.shape[1])
        return torch.zeros_like(out_BTH).scatter(1, place_BT[..., None].expand_as(out_BTH), out_BTH)


def pool_tokens(hidden_BTR: Tensor, mask_BT: Tensor, pooling: Pooling) -> Tensor:
    """One vector of each row's real tokens, of shape (B, R); padding may stand on either side."""
    real_BT1 = mask_BT.bool()[..., None]
    match pooling:
        case "mean":
            return torch.where(real_BT1, hidden_BTR, 0).sum(1) / real_BT1.sum(1).clamp(min=1)
        case "max":
            return torch.where(real_BT1, hidden_BTR, torch.finfo(hidden_BTR.dtype).min).amax(1)
    rows_B = torch.arange(len(mask_BT), device=mask_BT.device)
    return hidden_BTR[rows_B, _edge_position(mask_BT, pooling)]


def _edge_position(mask_BT: Tensor, side: Literal["first", "last"]) -> Tensor:
    """Where each row's first or last real token is, of shape (B,)."""
    if side == "first":
        return mask_BT.int().argmax(1)
    return mask_BT.shape[1] - 1 - mask_BT.int().flip(1).argmax(1)


# --- the model --------------------------------------------------------------------------------------------------------


class TaskHeadModel(PreTrainedModel):
    """A backbone of any family under a `Reader`; `model_class` makes the class of a family and a choice."""

    form: ClassVar[TaskHeadConfig]
    body_class: ClassVar[type[PreTrainedModel]]

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        if self.form.stack == "encoder":
            config.is_encoder_decoder = False
        # Nothing here reads the pooler that some families set behind their last block.
        bare = "add_pooling_layer" in inspect.signature(self.body_class.__init__).parameters
        body = self.body_class(config, **({"add_pooling_layer": False} if bare else {}))
        setattr(self, self.base_model_prefix, body)
        self.num_labels = len(_label_names(config))
        self.task_layer = TaskHead(self.form, config.get_text_config().hidden_size, self.num_labels)
        self.post_init()

    @property
    def body(self) -> PreTrainedModel:
        """The backbone."""
        body = self.base_model
        assert isinstance(body, PreTrainedModel)
        return body

    def train(self, mode: bool = True) -> TaskHeadModel:
        """Features of a backbone that is held fast are the same at every step: it has no dropout then."""
        super().train(mode)
        if mode and all(name.startswith(f"{_NAME}.") for name, p in self.named_parameters() if p.requires_grad):
            self.body.eval()
        return self

    def states(self, input_ids: Tensor, attention_mask: Tensor, **inputs: Tensor) -> tuple[Tensor, ...]:
        """All states of the stack that is read, each of shape (B, T, D)."""
        decoder = self.form.stack == "decoder"
        return compute_hidden_states(self.body, input_ids, attention_mask, "decoder" if decoder else None, **inputs)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **inputs: Tensor,
    ) -> SequenceClassifierOutput | TokenClassifierOutput:
        """Logits of shape (B, C) or (B, T, C) and, with labels, the loss that transformers' own classifiers have."""
        mask_BT = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        logits = self.task_layer(self.states(input_ids, mask_BT, **inputs), mask_BT)
        if self.form.pooling is None:
            loss = None if labels is None else self.loss_function(logits=logits, labels=labels, config=self.config)
            return TokenClassifierOutput(loss=loss, logits=logits)
        if labels is not None:
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config)
            return SequenceClassifierOutput(loss=loss, logits=logits)
        return SequenceClassifierOutput(logits=logits)

    @classmethod
    def from_pretrained(cls, where: Any, *args: Any, **options: Any) -> Any:
        """As transformers' own; the task layer's weights are those of the folder, where they fit, and else drawn anew.

        The random numbers are those of torch's generator as the caller left it.
        """
        state = torch.random.get_rng_state()
        told = options.pop("output_loading_info", False)
        made: Any = super().from_pretrained(where, *args, output_loading_info=True, **options)
        model, loading = made
        own = dict(model.task_layer.named_parameters())
        new = {*loading["missing_keys"], *(key for key, *_ in loading.get("mismatched_keys", ()))}
        kept = {name: p.detach().clone() for name, p in own.items() if f"{_NAME}.{name}" not in new}
        if where is not None and load_task_head_config(Path(where)) == cls.form:
            kept |= _load_tensors(Path(where) / TENSORS)
        kept = {name: tensor for name, tensor in kept.items() if name in own and own[name].shape == tensor.shape}
        if len(kept) < len(own):
            torch.random.set_rng_state(state)
            model.task_layer.draw_weights(getattr(model.config, "initializer_range", None) or 0.02)
        with torch.no_grad():
            for name, tensor in kept.items():
                own[name].copy_(tensor)
        loading["missing_keys"] = {key for key in new if not key.startswith(f"{_NAME}.")} | {
            f"{_NAME}.{name}" for name in own.keys() - kept.keys()
        }
        loading["mismatched_keys"] = []
        return (model, loading) if told else model

    def save_pretrained(self, save_directory: Any, *args: Any, **options: Any) -> None:
        """The backbone as a plain folder, the task layer beside it, and a page that says how both are read."""
        folder = Path(save_directory)
        state = options.pop("state_dict", None) or self.state_dict()
        mine = {name: tensor for name, tensor in state.items() if name.startswith(f"{_NAME}.")}
        rest = {name: tensor for name, tensor in state.items() if name not in mine}
        super().save_pretrained(folder, *args, state_dict=rest, **options)
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in mine.items()}, folder / TENSORS)
        config = json.loads((folder / "config.json").read_text())
        config["architectures"] = [self.body_class.__name__]
        (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        said = {
            "format": _FORMAT,
            "reads": self.form.as_dict(),
            "labels": _label_names(self.config),
            "problem": self.config.problem_type,
        }
        (folder / DESCRIPTION).write_text(json.dumps(said, indent=2) + "\n")
        (folder / "README.md").write_text(_readme_text(self))


def compute_hidden_states(
    model: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor,
    stack: Literal["encoder", "decoder"] | None,
    **inputs: Tensor,
) -> tuple[Tensor, ...]:
    """All states of a backbone, or of a half of an encoder-decoder, each of shape (B, T, D).

    A decoder behind an encoder is given the text that the encoder reads, behind the token that it begins with.
    """
    body: Any = model.get_encoder() if stack == "encoder" else model
    takes = inspect.signature(body.forward).parameters
    more: dict[str, Any] = {"use_cache": False} if "use_cache" in takes else {}
    if stack == "decoder":
        more |= {
            "decoder_input_ids": _shift_right(input_ids, attention_mask, decoder_start_token(model.config)),
            "decoder_attention_mask": attention_mask,
        }
    elif is_decoder(model.config) and "position_ids" in takes and "position_ids" not in inputs:
        # A decoder counts its positions from the first real token, wherever padding stands.
        more["position_ids"] = (attention_mask.cumsum(1) - 1).clamp(min=0)
    output = body(input_ids=input_ids, attention_mask=attention_mask, output_hidden_states=True, **inputs, **more)
    return output.decoder_hidden_states if stack == "decoder" else output.hidden_states


def _label_names(config: Any) -> list[str]:
    """The names of what a configuration's classifier decides between, in the order of its outputs."""
    return [str(config.id2label[i]) for i in range(config.num_labels)]


def _load_tensors(file: Path) -> dict[str, Tensor]:
    """The task layer's tensors by their names in it."""
    try:
        return {name.removeprefix(f"{_NAME}."): tensor for name, tensor in load_file(file).items()}
    except (OSError, SafetensorError) as error:
        raise ModelError(
            f"the task layer's weights cannot be read: {error}", where=str(file), expected="safetensors"
        ) from error


def make_model_class(config: PreTrainedConfig, form: TaskHeadConfig) -> type[TaskHeadModel]:
    """The class of a configuration's family that reads its backbone in this way. Raises `ModelError` when there is none."""
    try:
        body = AutoModel._model_mapping[type(config)]
    except KeyError:
        raise ModelError(f"transformers has no backbone for {config.model_type}", where="model") from None
    body = body[0] if isinstance(body, tuple) else body
    if form.stack == "encoder":
        body = _make_encoder_class(type(config), body)
    return _make_class(body, form)


@functools.cache
def _make_class(body: type[PreTrainedModel], form: TaskHeadConfig) -> type[TaskHeadModel]:
    family = _family_base_class(getattr(body, "whole", body))
    # Transformers tells by the end of a class's name which loss is its own.
    ending = "ForTokenClassification" if form.pooling is None else "ForSequenceClassification"
    return type(
        f"{family.__name__.removesuffix('PreTrainedModel')}Representation{ending}",
        (TaskHeadModel, family),
        {
            "form": form,
            "body_class": body,
            "config_class": body.config_class,
            "base_model_prefix": family.base_model_prefix or "model",
            "__doc__": f"{body.__name__} under a task layer.",
        },
    )


def _family_base_class(body: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The base class that all models of a family have."""
    return next(base for base in body.__mro__[1:] if issubclass(base, PreTrainedModel))


@functools.cache
def _make_encoder_class(config: type[PreTrainedConfig], full_class: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The encoder of an encoder-decoder as a model of its own: transformers' where it has one."""
    if config in AutoModelForTextEncoding._model_mapping:
        found: Any = AutoModelForTextEncoding._model_mapping[config]
        return found
    family = _family_base_class(full_class)
    tied = {a: b for a, b in (full_class._tied_weights_keys or {}).items() if a.startswith("encoder.")}
    return type(
        f"{full_class.__name__}Encoder",
        (_Encoder, family),
        {"whole": full_class, "_tied_weights_keys": tied, "_keys_to_ignore_on_load_unexpected": [r"decoder"]},
    )


class _Encoder(PreTrainedModel):
    """The encoder of a model that transformers only has whole, under the names that its weights have there."""

    whole: ClassVar[type[PreTrainedModel]]

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        both = self.whole(config)
        self.shared = both.get_input_embeddings()
        self.encoder = both.get_encoder()
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The embeddings of its words."""
        return self.shared

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Read words by other embeddings."""
        self.shared = value
        self.encoder.embed_tokens = value

    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> BaseModelOutput:
        """What the encoder gives."""
        return self.encoder(input_ids=input_ids, attention_mask=attention_mask, **kwargs)


def is_decoder(config: PreTrainedConfig) -> bool:
    """Whether a configuration is that of a decoder alone: it writes, and no family of masked language models has it."""
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

    if config.is_encoder_decoder or type(config) not in AutoModelForCausalLM._model_mapping:
        return False
    return type(config) not in AutoModelForMaskedLM._model_mapping or bool(getattr(config, "is_decoder", False))


def decoder_start_token(config: PreTrainedConfig) -> int:
    """What a decoder begins with."""
    for name in ("decoder_start_token_id", "bos_token_id", "pad_token_id"):
        token = getattr(config, name, None)
        if token is not None:
            return int(token)
    raise ModelError("the configuration names no decoder_start_token_id", where="model")


def _shift_right(ids_BT: Tensor, mask_BT: Tensor, start_token: int) -> Tensor:
    """What a decoder is given of the text that its encoder reads: the text behind the token that it begins with."""
    behind_BT = ids_BT.roll(1, 1)
    behind_BT[torch.arange(len(ids_BT), device=ids_BT.device), _edge_position(mask_BT, "first")] = start_token
    return behind_BT


def _readme_text(model: TaskHeadModel) -> str:
    """What the folder says to who opens it."""
    form, names = model.form, _label_names(model.config)
    labels = ", ".join(names[:20]) + (" ..." if len(names) > 20 else "")
    example = '[["Words", "of", "a", "text"]]' if form.pooling is None else '["A text."]'
    return f"""\
# A classifier on {model.body_class.__name__}

It decides between {labels}.
It reads {form.describe()} (layer 0 is what the embeddings give).

```python
import postgrad

classifier = postgrad.load("THIS FOLDER")
classifier.predict({example})
```

`config.json` and `model.safetensors` are the backbone alone: `transformers.AutoModel.from_pretrained` reads it.
The task layer is `{TENSORS}`, described by `{DESCRIPTION}`; plain transformers has no class for it.
"""

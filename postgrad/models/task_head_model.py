"""Models with a task head: the plain backbone of any family under a `TaskHead`.

Legend: B batch, T time, D width of the backbone, C classes.

A model class is made of a family's own base class and its plain backbone, so weights, attention and saving are transformers'
own. On disk a model is the backbone (config.json, model.safetensors: `AutoModel` loads them), with the task layer beside it
(task_layer.json, task_layer.safetensors).
"""

from __future__ import annotations

import functools
import inspect
import json
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForTextEncoding, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, SequenceClassifierOutput, TokenClassifierOutput

from postgrad.errors import ModelError
from postgrad.models.task_head import (
    DESCRIPTION,
    FORMAT,
    TASK_LAYER,
    TENSORS,
    TaskHead,
    TaskHeadConfig,
    count_blocks,
    edge_position,
    load_task_head_config,
)


class TaskHeadModel(PreTrainedModel):
    """A backbone of any family under a `TaskHead`; `make_model_class` makes the class of a family and a configuration."""

    form: ClassVar[TaskHeadConfig]
    body_class: ClassVar[type[PreTrainedModel]]

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        if self.form.stack == "encoder":
            config.is_encoder_decoder = False
        # The pooler that some families have after their last block is not used.
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
        """A frozen backbone stays in eval mode, without dropout: its features are the same at every step."""
        super().train(mode)
        if mode and all(name.startswith(f"{TASK_LAYER}.") for name, p in self.named_parameters() if p.requires_grad):
            self.body.eval()
        return self

    def states(self, input_ids: Tensor, attention_mask: Tensor, **inputs: Tensor) -> tuple[Tensor, ...]:
        """All hidden states of the stack, each of shape (B, T, D)."""
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
        """As transformers' own; the task layer's weights are loaded where they fit, and else initialised.

        Random numbers are those of torch's generator in the state at the call.
        """
        state = torch.random.get_rng_state()
        with_info = options.pop("output_loading_info", False)
        result: Any = super().from_pretrained(where, *args, output_loading_info=True, **options)
        model, loading = result
        own = dict(model.task_layer.named_parameters())
        new = {*loading["missing_keys"], *(key for key, *_ in loading.get("mismatched_keys", ()))}
        loaded = {name: p.detach().clone() for name, p in own.items() if f"{TASK_LAYER}.{name}" not in new}
        if where is not None and load_task_head_config(Path(where)) == cls.form:
            loaded |= _load_tensors(Path(where) / TENSORS)
        loaded = {name: tensor for name, tensor in loaded.items() if name in own and own[name].shape == tensor.shape}
        if len(loaded) < len(own):
            torch.random.set_rng_state(state)
            model.task_layer.draw_weights(getattr(model.config, "initializer_range", None) or 0.02)
        with torch.no_grad():
            for name, tensor in loaded.items():
                own[name].copy_(tensor)
        loading["missing_keys"] = {key for key in new if not key.startswith(f"{TASK_LAYER}.")} | {
            f"{TASK_LAYER}.{name}" for name in own.keys() - loaded.keys()
        }
        loading["mismatched_keys"] = []
        return (model, loading) if with_info else model

    def save_pretrained(self, save_directory: Any, *args: Any, **options: Any) -> None:
        """The backbone as a plain folder, the task layer beside it, and a README on how to load both."""
        folder = Path(save_directory)
        state = options.pop("state_dict", None) or self.state_dict()
        own = {name: tensor for name, tensor in state.items() if name.startswith(f"{TASK_LAYER}.")}
        rest = {name: tensor for name, tensor in state.items() if name not in own}
        super().save_pretrained(folder, *args, state_dict=rest, **options)
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in own.items()}, folder / TENSORS)
        config = json.loads((folder / "config.json").read_text())
        config["architectures"] = [self.body_class.__name__]
        (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        description = {
            "format": FORMAT,
            "reads": self.form.as_dict(),
            "labels": _label_names(self.config),
            "problem": self.config.problem_type,
        }
        (folder / DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n")
        (folder / "README.md").write_text(_readme_text(self))


def compute_hidden_states(
    model: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor,
    stack: Literal["encoder", "decoder"] | None,
    **inputs: Tensor,
) -> tuple[Tensor, ...]:
    """All hidden states of a backbone, or of one stack of an encoder-decoder, each of shape (B, T, D).

    The decoder of an encoder-decoder gets the encoder's text, shifted right by its start token.
    """
    body: Any = model.get_encoder() if stack == "encoder" else model
    parameters = inspect.signature(body.forward).parameters
    more: dict[str, Any] = {"use_cache": False} if "use_cache" in parameters else {}
    if stack == "decoder":
        more |= {
            "decoder_input_ids": _shift_right(input_ids, attention_mask, decoder_start_token(model.config)),
            "decoder_attention_mask": attention_mask,
        }
    elif is_decoder(model.config) and "position_ids" in parameters and "position_ids" not in inputs:
        # A decoder counts positions from the first real token, on whichever side padding is.
        more["position_ids"] = (attention_mask.cumsum(1) - 1).clamp(min=0)
    output = body(input_ids=input_ids, attention_mask=attention_mask, output_hidden_states=True, **inputs, **more)
    return output.decoder_hidden_states if stack == "decoder" else output.hidden_states


def _label_names(config: Any) -> list[str]:
    """The label names of a configuration, in the order of the outputs."""
    return [str(config.id2label[i]) for i in range(config.num_labels)]


def _load_tensors(file: Path) -> dict[str, Tensor]:
    """The task layer's tensors by parameter name."""
    try:
        return {name.removeprefix(f"{TASK_LAYER}."): tensor for name, tensor in load_file(file).items()}
    except (OSError, SafetensorError) as error:
        raise ModelError(
            f"the task layer's weights cannot be read: {error}", where=str(file), expected="safetensors"
        ) from error


def make_model_class(config: PreTrainedConfig, form: TaskHeadConfig) -> type[TaskHeadModel]:
    """The class of a configuration's family with this task head. Raises `ModelError` for a family without a backbone."""
    try:
        body = AutoModel._model_mapping[type(config)]
    except KeyError:
        raise ModelError(f"transformers has no backbone for {config.model_type}", where="model") from None
    depth = count_blocks(config, form.stack)
    if not all(0 <= layer <= depth for layer in form.layers):
        raise ModelError(
            f"the task layer reads the states {form.layers} of {depth} blocks",
            where="model",
            expected=f"states from 0 to {depth}",
        )
    body = body[0] if isinstance(body, tuple) else body
    if form.stack == "encoder":
        body = _make_encoder_class(type(config), body)
    return _make_class(body, form)


@functools.cache
def _make_class(body: type[PreTrainedModel], form: TaskHeadConfig) -> type[TaskHeadModel]:
    family = _family_base_class(getattr(body, "full_class", body))
    # Transformers selects the loss by the end of the class name.
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
    """The base class of all models of a family."""
    return next(base for base in body.__mro__[1:] if issubclass(base, PreTrainedModel))


@functools.cache
def _make_encoder_class(config: type[PreTrainedConfig], full_class: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The encoder of an encoder-decoder as a model: transformers' own where it exists."""
    if config in AutoModelForTextEncoding._model_mapping:
        found: Any = AutoModelForTextEncoding._model_mapping[config]
        return found
    family = _family_base_class(full_class)
    tied = {a: b for a, b in (full_class._tied_weights_keys or {}).items() if a.startswith("encoder.")}
    return type(
        f"{full_class.__name__}Encoder",
        (_Encoder, family),
        {"full_class": full_class, "_tied_weights_keys": tied, "_keys_to_ignore_on_load_unexpected": [r"decoder"]},
    )


class _Encoder(PreTrainedModel):
    """The encoder of a model of which transformers has no encoder class, with the weight names of the full model."""

    full_class: ClassVar[type[PreTrainedModel]]

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        full = self.full_class(config)
        self.shared = full.get_input_embeddings()
        self.encoder = full.get_encoder()
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.shared

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.shared = value
        self.encoder.embed_tokens = value

    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> BaseModelOutput:
        return self.encoder(input_ids=input_ids, attention_mask=attention_mask, **kwargs)


def is_decoder(config: PreTrainedConfig) -> bool:
    """Whether a configuration is that of a decoder-only model: it generates, and has no masked language model class."""
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

    if config.is_encoder_decoder or type(config) not in AutoModelForCausalLM._model_mapping:
        return False
    return type(config) not in AutoModelForMaskedLM._model_mapping or bool(getattr(config, "is_decoder", False))


def decoder_start_token(*configs: PreTrainedConfig | GenerationConfig) -> int:
    """The start token of a decoder, as `generate` has it. Raises `ModelError` for configurations without one."""
    for name in ("decoder_start_token_id", "bos_token_id", "pad_token_id"):
        for config in configs:
            text_config = config.get_text_config() if isinstance(config, PreTrainedConfig) else config
            for part in (config, text_config):
                if isinstance(token := getattr(part, name, None), int):
                    return token
    raise ModelError("the configuration names no decoder_start_token_id", where="model")


def _shift_right(ids_BT: Tensor, mask_BT: Tensor, start_token: int) -> Tensor:
    """The decoder's inputs for the encoder's text: the text after the start token."""
    shifted_BT = ids_BT.roll(1, 1)
    shifted_BT[torch.arange(len(ids_BT), device=ids_BT.device), edge_position(mask_BT, "first")] = start_token
    return shifted_BT


def _readme_text(model: TaskHeadModel) -> str:
    form, names = model.form, _label_names(model.config)
    labels = ", ".join(names[:20]) + (" ..." if len(names) > 20 else "")
    example = '[["Words", "of", "a", "text"]]' if form.pooling is None else '["A text."]'
    return f"""\
# A classifier on {model.body_class.__name__}

Labels: {labels}.
Input of the task layer: {form.describe()} (layer 0 is the output of the embeddings).

```python
import postgrad

classifier = postgrad.load_classifier("THIS FOLDER")
classifier.predict({example})
```

`config.json` and `model.safetensors` are the backbone alone: `transformers.AutoModel.from_pretrained` reads it.
The task layer is `{TENSORS}`, described by `{DESCRIPTION}`; plain transformers has no class for it.
"""

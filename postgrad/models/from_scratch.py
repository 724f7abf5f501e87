"""New models: special tokens and tokenizer, dropout, and weights drawn by transformers' own initialisation."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, processors
from transformers import (
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from postgrad.errors import ModelError
from postgrad.models.families import FAMILIES, Family, SpecialTokens
from postgrad.models.pretrained import detect_config_task, make_random_model
from postgrad.models.task import Task

_TASK_FAMILIES: dict[Task, str] = {
    Task.CAUSAL: "llama",
    Task.MASKED: "bert",
    Task.TEXT_TO_TEXT: "t5",
    Task.CLASSIFY: "bert",
    Task.TAG: "bert",
}


def select_special_tokens(config: PreTrainedConfig | None, family: Family | None) -> SpecialTokens:
    """The special tokens of a new tokenizer: the family's, or those of the default family of the configuration's task."""
    if family is not None:
        return family.special_tokens
    assert config is not None
    known = FAMILIES.get(config.model_type.lower())
    return (known or FAMILIES[_TASK_FAMILIES[detect_config_task(config)]]).special_tokens


_DROPOUTS = (
    "attn_pdrop", "embd_pdrop", "resid_pdrop", "hidden_dropout_prob", "attention_probs_dropout_prob", "dropout_rate",
    "attention_dropout", "hidden_dropout", "embedding_dropout", "mlp_dropout", "dropout", "activation_dropout",
)  # fmt: skip


def set_dropout(config: PreTrainedConfig, dropout: float) -> None:
    """Set all dropout rates of a configuration. Raises `ModelError` when it has none."""
    own = [name for name in _DROPOUTS if isinstance(getattr(config, name, None), int | float)]
    if not own:
        raise ModelError(f"a {config.model_type} has no dropout", where="model.dropout", hint="remove the key")
    for name in own:
        setattr(config, name, dropout)


def make_tokenizer(vocabulary_json: str, special_tokens: SpecialTokens) -> PreTrainedTokenizerBase:
    """A tokenizer from the JSON of a vocabulary, with its special tokens around a text."""
    tokenizer = Tokenizer.from_str(vocabulary_json)
    if special_tokens.single != "$A":
        around = {
            token for part in f"{special_tokens.single} {special_tokens.pair}".split() for token in [part.split(":")[0]]
        }
        tokenizer.post_processor = processors.TemplateProcessing(
            single=special_tokens.single,
            pair=special_tokens.pair,
            special_tokens=[(token, tokenizer.token_to_id(token)) for token in sorted(around - {"$A", "$B"})],
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_input_names=list(special_tokens.inputs),
        extra_special_tokens=list(special_tokens.extra) or None,
        **{f"{name}_token": token for name, token in special_tokens.named_tokens},
    )


def set_token_ids(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Set the tokenizer's special token ids in a configuration."""
    for name in ("bos", "eos", "pad", "sep", "cls", "mask"):
        token = getattr(tokenizer, f"{name}_token_id", None)
        if hasattr(config, f"{name}_token_id") or token is not None:
            setattr(config, f"{name}_token_id", token)
    if config.is_encoder_decoder:
        config.decoder_start_token_id = tokenizer.pad_token_id
    if getattr(config, "eos_token_id", None) is None:
        config.eos_token_id = tokenizer.sep_token_id


def init_model(config: PreTrainedConfig, seed: int) -> PreTrainedModel:
    """The model of a configuration, initialised from `seed`; the global random state is preserved."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make_random_model(config, detect_config_task(config))

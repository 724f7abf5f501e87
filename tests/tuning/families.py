"""Which models is every tuning tried on, and what does a right batch for each look like?

Legend: B rows, T time. `Inputs` are keyword arguments for the model's `forward`, labels included.

Real tokens are ids from `REAL` on; the ids below are special. A batch's rows differ in length: decoders are padded on the
left and told their positions, encoders and T5 are padded on the right.
"""

from __future__ import annotations

import copy
import functools
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BartConfig,
    BertConfig,
    DistilBertConfig,
    ElectraConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    ModernBertConfig,
    MT5Config,
    Olmo2Config,
    OPTConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    RobertaConfig,
    T5Config,
)

Task = Literal["lm", "classify", "tags"]
Inputs = dict[str, Tensor]

VOCABULARY = 120
PAD, END, CLS, SEP, MASK, REAL = 0, 1, 2, 3, 4, 5
LABELS = 3
IGNORED = -100
TASK_LAYERS = ("score.*", "classifier.*", "pre_classifier.*", "classification_head.*", "head.*")
"""Patterns of what stands on the bodies of these families for a task."""


@dataclass(frozen=True)
class Family:
    """One architecture in the small: its configuration, its shape, and the tasks that it has a class for."""

    name: str
    shape: Literal["decoder", "encoder", "seq2seq"]
    config: Callable[[], PreTrainedConfig]
    tasks: tuple[Task, ...] = ("lm", "classify", "tags")

    @property
    def classes(self) -> dict[Task, Any]:
        """The auto class of each task."""
        lm = {"decoder": AutoModelForCausalLM, "encoder": AutoModelForMaskedLM, "seq2seq": AutoModelForSeq2SeqLM}
        return {
            "lm": lm[self.shape],
            "classify": AutoModelForSequenceClassification,
            "tags": AutoModelForTokenClassification,
        }


def _llama_like(kind: type[PreTrainedConfig], **more: Any) -> Callable[[], PreTrainedConfig]:
    """A decoder of the Llama line: rotary positions, grouped queries, a head of its own."""
    values = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
        "pad_token_id": PAD,
        "bos_token_id": None,
        "eos_token_id": END,
        "num_labels": LABELS,
        "attention_dropout": 0.0,
        "classifier_dropout": 0.0,
        **more,
    }
    return functools.partial(kind, **values)


def _bert_like(kind: type[PreTrainedConfig], **more: Any) -> Callable[[], PreTrainedConfig]:
    """An encoder of the BERT line."""
    values = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "pad_token_id": PAD,
        "num_labels": LABELS,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        **more,
    }
    return functools.partial(kind, **values)


def _t5(kind: type[PreTrainedConfig]) -> Callable[[], PreTrainedConfig]:
    return functools.partial(
        kind,
        vocab_size=VOCABULARY,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        classifier_dropout=0.0,
        pad_token_id=PAD,
        eos_token_id=END,
        decoder_start_token_id=PAD,
        num_labels=LABELS,
    )


_gpt2 = functools.partial(
    GPT2Config,
    vocab_size=VOCABULARY,
    n_embd=32,
    n_layer=2,
    n_head=4,
    n_positions=64,
    embd_pdrop=0.0,
    attn_pdrop=0.0,
    resid_pdrop=0.0,
    classifier_dropout=0.0,
    pad_token_id=PAD,
    bos_token_id=None,
    eos_token_id=END,
    num_labels=LABELS,
)

FAMILIES = {
    family.name: family
    for family in (
        Family("llama", "decoder", _llama_like(LlamaConfig)),
        Family("gpt2", "decoder", _gpt2),
        Family("qwen3", "decoder", _llama_like(Qwen3Config, head_dim=8)),
        Family("bert", "encoder", _bert_like(BertConfig)),
        Family("t5", "seq2seq", _t5(T5Config)),
    )
}

MORE_FAMILIES = {
    family.name: family
    for family in (
        Family("qwen2", "decoder", _llama_like(Qwen2Config)),
        Family("mistral", "decoder", _llama_like(MistralConfig, sliding_window=6)),
        Family("phi3", "decoder", _llama_like(Phi3Config, resid_pdrop=0.0, embd_pdrop=0.0)),
        Family("gemma2", "decoder", _llama_like(Gemma2Config, head_dim=8, sliding_window=6, query_pre_attn_scalar=8)),
        Family(
            "gemma3",
            "decoder",
            _llama_like(Gemma3TextConfig, head_dim=8, sliding_window=6, query_pre_attn_scalar=8),
            ("lm", "classify"),
        ),
        Family("olmo2", "decoder", _llama_like(Olmo2Config), ("lm", "classify")),
        Family("gpt-neox", "decoder", _llama_like(GPTNeoXConfig, hidden_dropout=0.0)),
        Family(
            "opt",
            "decoder",
            _llama_like(OPTConfig, ffn_dim=48, word_embed_proj_dim=32, dropout=0.0, activation_dropout=0.0),
            ("lm", "classify"),
        ),
        Family("roberta", "encoder", _bert_like(RobertaConfig, max_position_embeddings=70)),
        Family(
            "distilbert",
            "encoder",
            functools.partial(
                DistilBertConfig,
                vocab_size=VOCABULARY,
                dim=32,
                hidden_dim=48,
                n_layers=2,
                n_heads=4,
                max_position_embeddings=64,
                dropout=0.0,
                attention_dropout=0.0,
                seq_classif_dropout=0.0,
                pad_token_id=PAD,
                num_labels=LABELS,
            ),
        ),
        Family(
            "modernbert",
            "encoder",
            _bert_like(
                ModernBertConfig,
                cls_token_id=CLS,
                sep_token_id=SEP,
                bos_token_id=CLS,
                eos_token_id=SEP,
                local_attention=8,
                global_attn_every_n_layers=2,
            ),
        ),
        Family("electra", "encoder", _bert_like(ElectraConfig, embedding_size=32)),
        Family(
            "bart",
            "seq2seq",
            functools.partial(
                BartConfig,
                vocab_size=VOCABULARY,
                d_model=32,
                encoder_layers=2,
                decoder_layers=2,
                encoder_attention_heads=4,
                decoder_attention_heads=4,
                encoder_ffn_dim=48,
                decoder_ffn_dim=48,
                max_position_embeddings=64,
                dropout=0.0,
                pad_token_id=PAD,
                bos_token_id=CLS,
                eos_token_id=END,
                decoder_start_token_id=PAD,
                forced_eos_token_id=None,
                num_labels=LABELS,
            ),
            ("lm", "classify"),
        ),
        Family("mt5", "seq2seq", _t5(MT5Config)),
    )
}

ALL_FAMILIES = {**FAMILIES, **MORE_FAMILIES}


@functools.cache
def _cached_model(family: str, task: Task) -> PreTrainedModel:
    torch.manual_seed(0)
    made = ALL_FAMILIES[family]
    model = made.classes[task].from_config(made.config(), dtype=torch.float32)
    # As they come, the weights are so small that attention is nearly uniform, and gains and biases are all one or zero:
    # a position that is wrong, or a weight that is left out, would hardly show.
    for name, parameter in model.named_parameters():
        size = (
            0.1
            if parameter.ndim < 2
            else 0.5
            if "embed" in name or name.endswith(("wte.weight", "wpe.weight"))
            else 0.25
        )
        start = parameter.data if parameter.ndim < 2 else 0.0
        parameter.data.copy_(start + size * torch.randn(parameter.shape))
    if task == "classify":
        # Else the first loss would write it into the configuration.
        model.config.problem_type = "single_label_classification"
    return model.eval()


def build_model(family: str, task: Task) -> PreTrainedModel:
    """A fresh model, the same one every time, in eval mode, with two layers and random weights."""
    return copy.deepcopy(_cached_model(family, task))


def first_virtual(model: PreTrainedModel) -> int:
    """The id of a soft prompt's first vector: the one after the vocabulary's last."""
    table = model.get_input_embeddings().weight
    assert isinstance(table, Tensor)
    return table.shape[0]


def batch(family: str, task: Task, rows: int = 3, seed: int = 0, *, virtual: range = range(0)) -> Inputs:
    """Rows of different lengths with labels; `virtual` ids stand before the real tokens, after [CLS] where there is one."""
    rng = random.Random(seed)
    shape = ALL_FAMILIES[family].shape
    bodies = [[rng.randrange(REAL, VOCABULARY) for _ in range(4 + 2 * (i % 3))] for i in range(rows)]
    before = {"decoder": [], "encoder": [CLS], "seq2seq": []}[shape]
    after = {"decoder": [], "encoder": [SEP], "seq2seq": [END]}[shape]
    lead = [*before, *virtual]
    ids = [lead + body + after for body in bodies]
    length = max(map(len, ids))
    left = shape == "decoder"
    inputs: Inputs = {
        "input_ids": _padded(ids, length, PAD, left=left),
        "attention_mask": _padded([[1] * len(row) for row in ids], length, 0, left=left),
    }
    if left:
        inputs["position_ids"] = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)

    def about(bodies: list[list[int]]) -> Tensor:
        """What is said of each real token; nothing of the others."""
        marked = [[IGNORED] * len(lead) + b + [IGNORED] * len(after) for b in bodies]
        return _padded(marked, length, IGNORED, left=left)

    if task == "classify":
        inputs["labels"] = torch.tensor([i % LABELS for i in range(rows)])
    elif task == "tags":
        inputs["labels"] = about([[t % LABELS for t in body] for body in bodies])
    elif shape == "decoder":
        inputs["labels"] = about(bodies)
    elif shape == "encoder":
        # Every third real token is hidden and asked for.
        inputs["labels"] = about([[t if i % 3 == 0 else IGNORED for i, t in enumerate(body)] for body in bodies])
        inputs["input_ids"] = inputs["input_ids"].masked_fill(inputs["labels"] != IGNORED, MASK)
    else:
        answers = [[rng.randrange(REAL, VOCABULARY) for _ in range(3 + i % 3)] + [END] for i in range(rows)]
        inputs["labels"] = _padded(answers, max(map(len, answers)), IGNORED, left=False)
    return inputs


def single_row(inputs: Inputs, row: int) -> Inputs:
    """One row of a batch without its padding."""
    real = inputs["attention_mask"][row].bool()
    length = real.shape[0]
    out: Inputs = {}
    for name, value in inputs.items():
        if value.ndim == 1:
            out[name] = value[row : row + 1]
        elif name == "labels" and value.shape[1] != length:
            out[name] = value[row][value[row] != IGNORED][None]
        else:
            out[name] = value[row][real][None]
    return out


def logits(model: PreTrainedModel, inputs: Inputs) -> Tensor:
    """What the model answers to a batch, detached."""
    with torch.no_grad():
        answer = model(**inputs).logits
    assert isinstance(answer, Tensor)
    return answer


def real_logits(model: PreTrainedModel, inputs: Inputs) -> list[Tensor]:
    """Row by row what the model answers, padded positions left out."""
    answer = logits(model, inputs)
    if answer.ndim == 2:  # one answer to a row
        return list(answer)
    if answer.shape[1] == inputs["input_ids"].shape[1] and inputs["labels"].shape[1] == answer.shape[1]:
        return [row[mask.bool()] for row, mask in zip(answer, inputs["attention_mask"], strict=True)]
    return [row[labels != IGNORED] for row, labels in zip(answer, inputs["labels"], strict=True)]


def loss(model: PreTrainedModel, inputs: Inputs) -> Tensor:
    """The model's own loss on a batch."""
    value = model(**inputs).loss
    assert isinstance(value, Tensor)
    return value


def _padded(rows: list[list[int]], length: int, fill: int, *, left: bool) -> Tensor:
    """(B, T) from rows of different lengths."""
    padding = [[fill] * (length - len(row)) for row in rows]
    return torch.tensor([p + r if left else r + p for p, r in zip(padding, rows, strict=True)])

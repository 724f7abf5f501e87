"""The head of every family: losses, scores and choices are those of the own logits, with scales, caps, sinks and windows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from postgrad.data.loading.batch import Batch
from postgrad.errors import ModelError
from postgrad.evaluation.choices.loglikelihood import ChoiceItem, score_choices
from postgrad.evaluation.held_out import HeldOutText
from postgrad.evaluation.perplexity import score_held_out
from postgrad.models.model import CausalModel, HeadedModel, LanguageModel, verify_model
from postgrad.models.output_head import HeadFunction, find_head_function
from postgrad.models.task import Task
from postgrad.objectives.next_token import TokenLoss
from tests.model_families import VOCABULARY, make_tiny_model, tiny_config

FAMILIES: dict[str, tuple[HeadFunction, dict[str, Any]]] = {
    "gemma2": (HeadFunction(1.0, 3.0), {"final_logit_softcapping": 3.0}),
    "gemma3_text": (HeadFunction(1.0, 2.5), {"final_logit_softcapping": 2.5}),
    "gemma3n_text": (HeadFunction(1.0, 2.0), {"final_logit_softcapping": 2.0}),  # layers share keys and values
    "nanochat": (HeadFunction(1.0, 2.0), {"final_logit_softcapping": 2.0}),
    "cohere2": (HeadFunction(0.0625, None), {}),  # parallel residuals
    "granite": (HeadFunction(1 / 6, None), {"logits_scaling": 6.0, "embedding_multiplier": 3.0}),
    "minicpm3": (HeadFunction(1.0, None), {"dim_model_base": 16}),  # scales the states before the head
    "hyperclovax": (HeadFunction(0.7, None), {"logits_scaling": 0.7}),
    "gpt_oss": (HeadFunction(1.0, None), {"sliding_window": 8}),  # sinks
    "mistral": (HeadFunction(1.0, None), {"sliding_window": 8}),
    "deepseek_v3": (HeadFunction(1.0, None), {}),  # latent attention
    "llama4_text": (HeadFunction(1.0, None), {"attention_chunk_size": 8}),
    "stablelm": (HeadFunction(1.0, None), {"use_parallel_residual": True}),
}
TEXT = 24


def make(family: str) -> PreTrainedModel:
    return make_tiny_model(tiny_config(family, **FAMILIES[family][1]), Task.CAUSAL)


def texts() -> list[np.ndarray]:
    rng = np.random.default_rng(3)
    return [rng.integers(5, VOCABULARY, TEXT).astype(np.int64) for _ in range(3)]


def differences(model: LanguageModel) -> dict[str, float]:
    """How far training, evaluation and few-shot scoring are from the model's own loss and logits, in nats per token."""
    ids = torch.from_numpy(np.stack(texts()))
    with torch.no_grad():
        own = model.pretrained(input_ids=ids, labels=ids, use_cache=False)
        log_p = own.logits.double().log_softmax(-1)[:, :-1].gather(2, ids[:, 1:, None])[..., 0].numpy()
        inputs = {"input_ids": ids[:, :-1]}
        batch = Batch(inputs, ids[:, 1:], np.zeros(3, np.int64), np.full(3, TEXT - 1))
        loss = TokenLoss()(model(**inputs), batch)[0] / batch.label_count
    held_out = HeldOutText("text", "learned", tuple(texts()), np.full(3, 60), "f")
    nats = score_held_out(model, held_out, context=64).nats_W
    items = [ChoiceItem(tuple(text[:16]), (tuple(text[16:]), tuple(text[16:20]))) for text in texts()]
    chosen = score_choices(model, items, context=64, pad=0, batch_tokens=512).log_likelihoods
    return {
        "loss": abs(float(loss) - float(own.loss)),
        "logits": abs(float(own.loss) + log_p.mean()),
        "evaluation": np.abs(nats + log_p.sum(1)).max() / TEXT,
        "choices": max(abs(found[0] - row[15:].sum()) for found, row in zip(chosen, log_p, strict=True)) / TEXT,
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_scores_and_choices_are_those_of_the_own_logits(family: str) -> None:
    model = CausalModel(make(family))
    assert model.head_function == FAMILIES[family][0]
    assert max(differences(model).values()) < 2e-5
    # The mutant: a head without the scale and the cap.
    if model.head_function != (plain := HeadFunction(1.0, None)):
        model.head_function = plain
        assert min(differences(model)[what] for what in ("loss", "evaluation", "choices")) > 1e-3


@pytest.mark.parametrize(("family", "changes"), [("t5", {}), ("t5gemma", {"cap": 5.0}), ("mbart", {}), ("umt5", {})])
def test_the_heads_of_encoder_decoders(family: str, changes: dict[str, float]) -> None:
    config = tiny_config(family)
    if changes:
        config.decoder.final_logit_softcapping = changes["cap"]
    model = HeadedModel(make_tiny_model(config, Task.TEXT_TO_TEXT))
    assert model.head_function == HeadFunction(1.0, changes.get("cap"))
    verify_model(model)


@pytest.mark.parametrize(
    ("family", "changes"), [("deberta-v2", {}), ("modernbert", {}), ("electra", {}), ("roberta", {})]
)
def test_the_heads_of_encoders(family: str, changes: dict[str, Any]) -> None:
    verify_model(HeadedModel(make_tiny_model(tiny_config(family, **changes), Task.MASKED)))


def test_a_head_that_is_no_function_of_its_products_is_refused() -> None:
    pretrained = make("mistral")
    forward = pretrained.forward

    def squared(**inputs: Any) -> Any:
        output = forward(**inputs)
        output.logits = output.logits.square()
        return output

    pretrained.forward = squared  # type: ignore[method-assign]
    with pytest.raises(ModelError, match="not its output embedding"):
        find_head_function(pretrained)


def test_a_forward_pass_that_fails_in_transformers_is_an_error_of_the_model() -> None:
    """A configuration that transformers can build and not compute with: latent attention with fewer key heads."""
    pretrained = make_tiny_model(tiny_config("deepseek_v3", num_key_value_heads=2), Task.CAUSAL)
    with pytest.raises(ModelError, match="fails in transformers, in DeepseekV3Attention"):
        CausalModel(pretrained)

"""Records of tied weights: which of a model's weights transformers ties when it loads, resizes or saves the model."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager

from torch import Tensor
from transformers import PreTrainedModel


def untied_state(model: PreTrainedModel) -> dict[str, Tensor]:
    """The state dict with one name for each weight: the one that transformers reads the tied ones from."""
    names: dict[int, list[str]] = {}
    state = model.state_dict(keep_vars=True)
    for name in state.keys() - {*(model._keys_to_ignore_on_save or ())}:
        names.setdefault(id(state[name]), []).append(name)
    tied = {*(model.all_tied_weights_keys or ())}
    kept = sorted(min(each, key=lambda name: (name in tied, name)) for each in names.values())
    return {name: state[name].detach() for name in kept}


def output_is_tied(model: PreTrainedModel) -> bool:
    """Whether the output embedding is the input embedding under a second name; False without an output embedding."""
    output = model.get_output_embeddings()
    return output is not None and output.weight is model.get_input_embeddings().weight


def remove_ties(model: PreTrainedModel, untied: Collection[str]) -> str:
    """Remove weights from transformers' records of ties; returns a note on the configuration."""
    for attribute in ("all_tied_weights_keys", "_tied_weights_keys"):
        keys = getattr(model, attribute, None) or {}
        setattr(model, attribute, {k: v for k, v in keys.items() if k not in untied and v not in untied})
    if model.all_tied_weights_keys:
        # The key also ties other weights, such as the two input embeddings of T5 and BART. With both weights in a folder,
        # transformers ties them only where they are equal.
        return "the configuration still has tie_word_embeddings: true, and the saved folder holds both weights"
    model.config.get_text_config().tie_word_embeddings = model.config.tie_word_embeddings = False
    return "the configuration has tie_word_embeddings: false now"


def record_separate_output(model: PreTrainedModel) -> None:
    """Correct the records of a model whose folder has two different embeddings, whatever its configuration says.

    Otherwise resizing the model would tie the two, and its output embedding would be lost.
    """
    output = model.get_output_embeddings()
    if (
        output is None
        or output_is_tied(model)
        or not getattr(model.config.get_text_config(), "tie_word_embeddings", False)
    ):
        return
    prefix = next(name for name, module in model.named_modules() if module is output)
    if f"{prefix}.weight" in {*(model.all_tied_weights_keys or ()), *(model._tied_weights_keys or ())}:
        remove_ties(model, {f"{prefix}.weight"})


@contextmanager
def separate_output(model: PreTrainedModel) -> Iterator[None]:
    """Inside, an output embedding of its own stays one when the model is resized, also where the key ties other weights."""
    config = model.config.get_text_config()
    before = getattr(config, "tie_word_embeddings", False)
    if before and not output_is_tied(model):
        config.tie_word_embeddings = False
    try:
        yield
    finally:
        if before:
            config.tie_word_embeddings = before

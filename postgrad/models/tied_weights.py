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
    for name in state.keys() - unsaved_names(model):
        names.setdefault(id(state[name]), []).append(name)
    tied = {*(model.all_tied_weights_keys or ())}
    kept = sorted(min(each, key=lambda name: (name in tied, name)) for each in names.values())
    return {name: state[name].detach() for name in kept}


def unsaved_names(model: PreTrainedModel) -> set[str]:
    """The weights that transformers computes anew whenever it loads the model, such as sinusoidal positions."""
    return {*(model._keys_to_ignore_on_save or ())}


def output_is_tied(model: PreTrainedModel) -> bool:
    """Whether the output embedding is the input embedding under a second name; False without an output embedding."""
    output = model.get_output_embeddings()
    return output is not None and output.weight is model.get_input_embeddings().weight


def _output_is_separate(model: PreTrainedModel) -> bool:
    """Whether the output embedding is no other weight of the model, such as an embedding of the encoder or of the decoder."""
    weight = getattr(model.get_output_embeddings(), "weight", None)
    return sum(parameter is weight for _, parameter in model.named_parameters(remove_duplicate=False)) == 1


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
    if not getattr(model.config.get_text_config(), "tie_word_embeddings", False) or not _output_is_separate(model):
        return
    output = model.get_output_embeddings()
    prefix = next(name for name, module in model.named_modules() if module is output)
    if f"{prefix}.weight" in {*(model.all_tied_weights_keys or ()), *(model._tied_weights_keys or ())}:
        remove_ties(model, {f"{prefix}.weight"})


@contextmanager
def separate_output(model: PreTrainedModel) -> Iterator[None]:
    """Inside, an output embedding of its own stays one when the model is resized, also where the key ties other weights."""
    config = model.config.get_text_config()
    before = getattr(config, "tie_word_embeddings", False)
    if before and _output_is_separate(model):
        config.tie_word_embeddings = False
    try:
        yield
    finally:
        if before:
            config.tie_word_embeddings = before

"""Tied weights: the records by which transformers ties two names to one weight when a model is resized, saved or loaded."""

from __future__ import annotations

from collections.abc import Collection

from transformers import PreTrainedModel


def remove_ties(model: PreTrainedModel, names: Collection[str]) -> bool:
    """Remove weights from transformers' records of ties; returns whether other ties remain, for which the configuration
    still says `tie_word_embeddings: true`.

    With both weights in a folder, transformers ties them only where they are equal.
    """
    for attribute in ("all_tied_weights_keys", "_tied_weights_keys"):
        keys = getattr(model, attribute, None) or {}
        setattr(model, attribute, {k: v for k, v in keys.items() if k not in names and v not in names})
    if model.all_tied_weights_keys:
        return True
    model.config.get_text_config().tie_word_embeddings = False
    model.config.tie_word_embeddings = False
    return False


def match_ties_to_weights(model: PreTrainedModel) -> None:
    """Correct a configuration that ties an output embedding to the input's, where the loaded file has two tables.

    Else the next resize would replace the head by the input embedding.
    """
    output, table = model.get_output_embeddings(), model.get_input_embeddings().weight
    if output is None or not model.config.get_text_config().tie_word_embeddings or output.weight is table:
        return
    names = {f"{name}.weight" for name, module in model.named_modules() if module is output}
    if names & {*(model.all_tied_weights_keys or {}), *(model._tied_weights_keys or {})}:
        remove_ties(model, names)

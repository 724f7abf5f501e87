"""Embeddings of new tokens, initialised as the mean of the old tokens that they replace.

Rows of the input embedding, and of an output head of its own, are means over the old tokens (Fujii et al. 2024, Swallow,
arXiv 2404.17790); with `head_init="zero"` the head's are zero, so that at first a new token is as likely as an average one (Liu
et al. 2023, ChipNeMo, arXiv 2311.00176).

Legend: V rows, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from postgrad.errors import ModelError
from postgrad.models.layers import get_embedding_weight
from postgrad.models.tied_weights import output_is_tied, separate_output

HeadInit = Literal["mean", "zero"]


@torch.no_grad()
def grow_embeddings(
    model: PreTrainedModel, token_parts: Mapping[int, Sequence[int]], head_init: HeadInit = "mean"
) -> None:
    """Add a row to the embeddings for each new id of `token_parts`, from the rows of its old ids."""
    before = get_embedding_weight(model).shape[0]
    size = max(before, max(token_parts, default=-1) + 1)
    output, tied = model.get_output_embeddings(), output_is_tied(model)
    if output is not None and not isinstance(output, nn.Linear):
        raise ModelError(f"{type(model).__name__} has no plain output embedding", where="model")
    head = None if output is None or tied else output.weight.clone()
    with separate_output(model):
        model.resize_token_embeddings(size, mean_resizing=False)
    _fill_rows(get_embedding_weight(model), token_parts)
    grown = model.get_output_embeddings()
    if grown is None or tied:
        return
    assert isinstance(grown, nn.Linear)
    if head is None or not torch.equal(grown.weight[:before], head[:before]):
        raise ModelError(f"resizing {type(model).__name__} would replace its output embedding", where="model")
    _fill_rows(grown.weight, token_parts, zero=head_init == "zero")
    if grown.bias is not None:
        _fill_rows(grown.bias[:, None], token_parts)


def _fill_rows(table_VD: Tensor, token_parts: Mapping[int, Sequence[int]], *, zero: bool = False) -> None:
    old = {new: table_VD[list(ids)].mean(0) if ids and not zero else None for new, ids in token_parts.items()}
    for new, row in old.items():
        table_VD[new] = 0.0 if row is None else row

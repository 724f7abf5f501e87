"""Sampling of documents from a decoder, each with a random stream of its own.

Legend: B documents of a batch, K tokens of a prompt, T tokens sampled, V vocabulary, D width.

The random numbers of a document are a function of (seed, its number) alone, so batching and interruptions change nothing but
rounding. Prompts are padded on the left, and the padding is masked; where a model does not support that, prompts of one length
go together. A document that has ended leaves the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from postgrad.data.random_streams import RandomStreams
from postgrad.models.decoding import Decoder, find_decoding_way, takes_left_padding
from postgrad.models.model import CausalModel


class GeneratedDocument(NamedTuple):
    """The sampled ids after a prompt, without the stop token, and whether there was one."""

    ids: np.ndarray
    ended: bool


@torch.no_grad()
def generate_documents(
    model: CausalModel,
    prompts: Sequence[np.ndarray] | np.ndarray,
    document_numbers: Collection[int],
    *,
    seed: int,
    max_new_tokens: int,
    stop_ids: Collection[int],
    temperature: float = 1.0,
    top_p: float = 1.0,
    stream: int = 0,
    token_ids: int | None = None,
) -> list[GeneratedDocument]:
    """Continue each prompt until a token of `stop_ids`, or for `max_new_tokens`.

    `document_numbers` select the random streams, `stream` one of several for a document. `temperature` divides the logits;
    `top_p` below one is nucleus sampling (Holtzman et al. 2020, arXiv 1904.09751), which never samples the tail. Only ids
    below `token_ids` are sampled.
    """
    numbers = list(document_numbers)
    draws, device = RandomStreams(seed), next(model.parameters()).device
    uniforms_BT = torch.from_numpy(
        np.stack([draws.generator(number, stream).random(max_new_tokens) for number in numbers])
    ).to(device)
    was_training = model.training
    model.eval()
    out: dict[int, GeneratedDocument] = {}
    with torch.compiler.set_stance("force_eager"):
        for group in _group_prompts(model, prompts):
            decoder = Decoder(model, find_decoding_way(model, padded=len({len(prompts[i]) for i in group}) > 1))
            generated = _generate_group(
                lambda hidden_BD: model.head().logits(hidden_BD)[:, :token_ids].float(),
                decoder,
                [prompts[i] for i in group],
                uniforms_BT[group],
                stop_ids,
                temperature,
                top_p,
            )
            out.update(zip(group, generated, strict=True))
    model.train(was_training)
    return [out[i] for i in range(len(numbers))]


def _group_prompts(model: CausalModel, prompts: Sequence[np.ndarray] | np.ndarray) -> list[list[int]]:
    """Prompts that are read together: all of them, or those of each length where a model takes no padding on the left."""
    by_length: dict[int, list[int]] = {}
    for i, prompt in enumerate(prompts):
        by_length.setdefault(len(prompt), []).append(i)
    if len(by_length) == 1 or takes_left_padding(model):
        return [list(range(len(prompts)))]
    return list(by_length.values())


def _generate_group(
    compute_logits: Callable[[Tensor], Tensor],
    decoder: Decoder,
    prompts: Sequence[np.ndarray],
    uniforms_BT: Tensor,
    stop_ids: Collection[int],
    temperature: float,
    top_p: float,
) -> list[GeneratedDocument]:
    max_new_tokens = uniforms_BT.shape[1]
    out_BT = np.zeros((len(prompts), max_new_tokens), np.int64)
    size_B = np.full(len(prompts), max_new_tokens, np.int64)
    ended_B = np.zeros(len(prompts), bool)
    alive_B = np.arange(len(prompts))
    ids, mask_BK = (table.to(uniforms_BT.device) for table in _pad_left(prompts))
    ragged = not bool(mask_BK.all())
    for step in range(max_new_tokens):
        # Without padding no mask is passed: most attention kernels are faster so.
        logits_BV = compute_logits(decoder(ids, mask_BK if ragged else None))
        chosen_B = sample_tokens(logits_BV, uniforms_BT[:, step], temperature, top_p)
        tokens_B = chosen_B.cpu().numpy()
        over = np.isin(tokens_B, list(stop_ids))
        size_B[alive_B[over]], ended_B[alive_B[over]] = step, True
        out_BT[alive_B[~over], step] = tokens_B[~over]
        if over.any():
            stay = torch.from_numpy(np.flatnonzero(~over)).to(uniforms_BT.device)
            alive_B = alive_B[~over]
            if not len(alive_B):
                break
            decoder.select(stay)
            chosen_B, uniforms_BT, mask_BK = chosen_B[stay], uniforms_BT[stay], mask_BK[stay]
        ids = chosen_B[:, None]
        mask_BK = torch.cat([mask_BK, torch.ones_like(ids)], 1)
    return [
        GeneratedDocument(row[:size], bool(ended)) for row, size, ended in zip(out_BT, size_B, ended_B, strict=True)
    ]


def _pad_left(prompts: Sequence[np.ndarray] | np.ndarray) -> tuple[Tensor, Tensor]:
    """Ids and attention mask of shape (B, K)."""
    longest = max(len(ids) for ids in prompts)
    ids_BK = torch.zeros((len(prompts), longest), dtype=torch.long)
    mask_BK = torch.zeros_like(ids_BK)
    for row, ids in enumerate(prompts):
        ids_BK[row, longest - len(ids) :] = torch.from_numpy(np.asarray(ids, np.int64))
        mask_BK[row, longest - len(ids) :] = 1
    return ids_BK, mask_BK


def sample_tokens(logits_BV: Tensor, uniforms_B: Tensor, temperature: float, top_p: float = 1.0) -> Tensor:
    """Tokens by inverse transform sampling, of shape (B,): where the cumulated probability passes a uniform number.

    Tokens are cumulated in the order of their ids; with `top_p` in the order of their probability.
    """
    shares_BV = torch.softmax(logits_BV.double() / temperature, -1)
    if top_p >= 1.0:
        return _inverse_cdf(shares_BV.cumsum(-1), uniforms_B)
    shares_BV, order_BV = torch.sort(shares_BV, dim=-1, descending=True, stable=True)
    before_BV = shares_BV.cumsum(-1) - shares_BV
    nucleus_BV = shares_BV * (before_BV < top_p)
    return order_BV.gather(1, _inverse_cdf(nucleus_BV.cumsum(-1), uniforms_B)[:, None])[:, 0]


def _inverse_cdf(cumulated_BV: Tensor, uniforms_B: Tensor) -> Tensor:
    """The first index at which each row exceeds a uniform number times the row's last value."""
    level_B1 = uniforms_B[:, None] * cumulated_BV[:, -1:]
    # Strictly above: a token of probability zero is never drawn.
    return torch.searchsorted(cumulated_BV, level_B1, right=True)[:, 0].clamp(max=cumulated_BV.shape[1] - 1)

"""Attention in blocks on CPUs: outputs and gradients are those of plain attention, and compiling changes neither."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from postgrad.models.cpu_attention import BLOCK, causal_blocks


def plain(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    scores = query @ key.transpose(2, 3) * query.shape[-1] ** -0.5 + mask
    return (scores.softmax(-1) @ value).transpose(1, 2)


def blocks(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    return causal_blocks(nn.Identity(), query, key, value, mask)[0]


def outputs_and_gradients(
    attention: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor], dtype: torch.dtype, length: int, width: int
) -> list[Tensor]:
    """Of three documents in a row: the output, and the gradients of query, key and value."""
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(2, 4, length, width, generator=generator).to(dtype).requires_grad_() for _ in range(3)]
    document = torch.arange(length) * 3 // length
    sees = (document[:, None] == document) & torch.ones(length, length).tril().bool()
    mask = torch.zeros(2, 1, length, length, dtype=dtype).masked_fill(~sees, torch.finfo(dtype).min)
    out = attention(*inputs, mask)
    out.float().square().sum().backward()
    return [out.detach().float(), *(each.grad.float() for each in inputs if each.grad is not None)]


@pytest.mark.parametrize("length", [BLOCK - 1, BLOCK, 3 * BLOCK + 5])
@pytest.mark.parametrize("width", [8, 32])
def test_it_is_plain_attention(length: int, width: int) -> None:
    ours = outputs_and_gradients(blocks, torch.float32, length, width)
    for mine, expected in zip(ours, outputs_and_gradients(plain, torch.float32, length, width), strict=True):
        torch.testing.assert_close(mine, expected, atol=2e-5, rtol=1e-4)


def test_a_gradient_without_later_blocks_is_caught() -> None:
    """The mutant: keys that get nothing from later blocks of queries."""

    def forgetful(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        parts = [
            blocks(
                query[:, :, begin : begin + BLOCK],
                torch.cat([key[:, :, :begin].detach(), key[:, :, begin : begin + BLOCK]], 2),
                torch.cat([value[:, :, :begin].detach(), value[:, :, begin : begin + BLOCK]], 2),
                mask[:, :, begin : begin + BLOCK, : begin + BLOCK],
            )
            for begin in range(0, query.shape[2], BLOCK)
        ]
        return torch.cat(parts, 1)

    ours = outputs_and_gradients(forgetful, torch.float32, 2 * BLOCK, 8)
    expected = outputs_and_gradients(plain, torch.float32, 2 * BLOCK, 8)
    torch.testing.assert_close(ours[0], expected[0], atol=2e-5, rtol=1e-4)
    assert not torch.allclose(ours[2], expected[2], atol=1e-3)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, while it compiles
@pytest.mark.parametrize(("length", "width"), [(3 * BLOCK, 32), (4 * BLOCK, 8)])
def test_compiled_it_has_the_gradients_of_bf16(length: int, width: int) -> None:
    """Transposing copies of bf16 that torch compiles for AVX-512 wrote NaN into the gradient of the values."""
    torch._dynamo.reset()
    ours = outputs_and_gradients(torch.compile(blocks), torch.bfloat16, length, width)
    for mine, expected in zip(ours, outputs_and_gradients(blocks, torch.bfloat16, length, width), strict=True):
        torch.testing.assert_close(mine, expected, atol=0.05, rtol=0.05)

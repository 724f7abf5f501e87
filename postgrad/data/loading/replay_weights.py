"""Weights of a replay of everything seen: the share of each text that earlier stages trained on."""

from __future__ import annotations

from collections.abc import Mapping


def seen_weights(seen_tokens: Mapping[str, float], share: float) -> dict[str, float]:
    """Replay weights of all text seen so far, replays included: tokens of each origin over all tokens, times `share`.

    This reproduces the data weights of the multi-stage runs of Ibrahim et al. 2024: at a share of 5 %, after 300B of one
    corpus and a 100B stage of 95 % new text, 3.8125 % and 1.1875 %; one such stage later 3.088125 %, .961875 % and .95 %.
    """
    total = sum(seen_tokens.values())
    return {origin: share * tokens / total for origin, tokens in seen_tokens.items()}

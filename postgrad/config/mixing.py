"""Shares of the sources that set none: proportional to their examples, with a temperature, or equal.

The rules are T5's (Raffel et al. 2020, section 3.5.2). With `n` examples in a source and the limit `K`:

    examples       min(n, K)
    temperature    min(n, K) ^ (1 / T)      T = 1 is `examples`; the higher T, the nearer to `equal`
    equal          1

each divided by their sum. In T5 the result is a rate of examples; here it is a share of the trained tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

from pydantic import Field

from postgrad.config.quantities import ConfigModel, TokenCount


class ProportionalMixing(ConfigModel):
    """In proportion to the examples of each source, up to a limit (Raffel et al. 2020)."""

    kind: Literal["examples"]
    cap: TokenCount | None = None
    """Limit K of the examples that count of a source. Default: no limit."""

    def weight(self, examples: int) -> float:
        """The weight of a source with this many examples."""
        return float(examples if self.cap is None else min(examples, self.cap))


class TemperatureMixing(ConfigModel):
    """Examples up to a limit, to the power of 1 / temperature, which favours small sources (Raffel et al. 2020)."""

    kind: Literal["temperature"]
    temperature: Annotated[float, Field(ge=1)]
    """1: proportional to the examples; the higher, the more equal."""
    cap: TokenCount | None = None
    """Limit K of the examples that count of a source. Default: no limit."""

    def weight(self, examples: int) -> float:
        """The weight of a source with this many examples."""
        return float(examples if self.cap is None else min(examples, self.cap)) ** (1 / self.temperature)


class EqualMixing(ConfigModel):
    """The same share for every source."""

    kind: Literal["equal"]

    def weight(self, examples: int) -> float:
        """The same weight for every number of examples."""
        return 1.0


AnyMixing = Annotated[ProportionalMixing | TemperatureMixing | EqualMixing, Field(discriminator="kind")]


def fill_shares(
    shares: Mapping[str, float | None], mixing: AnyMixing | None, examples: Mapping[str, int]
) -> dict[str, float]:
    """The share of each source: those given, and what remains parted among the others by `mixing`.

    `examples` are those of each source; without a `mixing` they are not looked at (then at most one share is left out).
    """
    rest = 1 - sum(share for share in shares.values() if share is not None)
    left_out = [name for name, share in shares.items() if share is None]
    weights = {name: mixing.weight(examples[name]) if mixing else 1.0 for name in left_out}
    total = sum(weights.values())
    return {name: rest * weights[name] / total if share is None else share for name, share in shares.items()}


def describe_shares(
    mixing: AnyMixing, shares: Mapping[str, float], examples: Mapping[str, int], names: Sequence[str]
) -> str:
    """The shares that came out for the sources `names`, in words."""
    cap = getattr(mixing, "cap", None)

    def of(name: str) -> str:
        counted = f", counted as {cap:,}" if cap is not None and examples[name] > cap else ""
        return f"{name} {shares[name]:.2%} ({examples[name]:,} examples{counted})"

    how = f"temperature {mixing.temperature:g}" if isinstance(mixing, TemperatureMixing) else mixing.kind
    return f"shares by {how}: " + ", ".join(map(of, names))

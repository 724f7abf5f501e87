"""Which shares do sources get that name none? By how many examples each has, by that and a temperature, or all the same.

The rules are T5's (Raffel et al. 2020, section 3.5.2). With `n` examples in a source and the limit `K`:

    examples       min(n, K)
    temperature    min(n, K) ^ (1 / T)      T = 1 is `examples`; the higher T, the nearer to `equal`
    equal          1

each over the sum of all. There a rate is of the examples that are read; here, as everywhere, it becomes a share of the
trained tokens.
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
    """A source counts as having at most so many examples; left out: as many as it has."""

    def weight(self, examples: int) -> float:
        """What a source of so many examples weighs."""
        return float(examples if self.cap is None else min(examples, self.cap))


class TemperatureMixing(ConfigModel):
    """Examples up to a limit, raised to 1 / temperature: small sources get more than their part (Raffel et al. 2020)."""

    kind: Literal["temperature"]
    temperature: Annotated[float, Field(ge=1)]
    """1: in proportion to the examples; the higher, the more alike the shares are."""
    cap: TokenCount | None = None
    """A source counts as having at most so many examples; left out: as many as it has."""

    def weight(self, examples: int) -> float:
        """What a source of so many examples weighs."""
        return float(examples if self.cap is None else min(examples, self.cap)) ** (1 / self.temperature)


class EqualMixing(ConfigModel):
    """The same share for every source."""

    kind: Literal["equal"]

    def weight(self, examples: int) -> float:
        """What a source weighs, however many examples it has."""
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

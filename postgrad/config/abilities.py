"""Generated probes of abilities, as frozen data."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

from postgrad.config.quantities import ConfigModel, Count, Positive, Seed

Ability = Literal[
    "copying",
    "arithmetic",
    "format",
    "instructions",
    "refusal",
    "compliance",
    "language",
    "calibration",
]


class AbilitiesConfig(ConfigModel):
    """Generated probes of abilities, answered before and after and scored by code."""

    only: list[Ability] = []
    """Which abilities. Default: all."""
    items: Positive = 100
    """Probes of each ability."""
    seed: Seed = 0
    """Seed of the probes; those of one seed are the same for every model."""
    shots: Count | None = None
    """Demonstrations before each probe. Default: none in a chat template, 4 in plain text."""
    max_new_tokens: Positive | None = None
    """Largest number of tokens of an answer. Default: 24 to 64, by ability; a model that reasons first needs more."""


def expand_abilities(value: Any) -> Any:
    """`all`, a name, or a list of names."""
    if value == "all":
        return {}
    if isinstance(value, str):
        return {"only": [value]}
    return {"only": value} if isinstance(value, list) else value


AnyAbilities = Annotated[
    AbilitiesConfig, BeforeValidator(expand_abilities, json_schema_input_type=str | list[Ability] | AbilitiesConfig)
]

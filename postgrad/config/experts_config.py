"""What a stage does with a mixture of experts."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag

from postgrad.config.penalties import number_or_word
from postgrad.config.quantities import ConfigModel, reject_bool

AnyBalancing = Annotated[
    Annotated[Annotated[float, Field(ge=0, le=1e6), BeforeValidator(reject_bool)], Tag("number")]
    | Annotated[Literal["auto", "config"], Tag("word")],
    Discriminator(number_or_word),
]


class ExpertsConfig(ConfigModel):
    """Routers of a mixture of experts."""

    balancing_loss: AnyBalancing = "auto"
    """Coefficient of the loss that spreads the tokens over the experts; 0: none. config: `router_aux_loss_coef` of the model's
    configuration. auto: that, if the configuration asks for it with `output_router_logits: true`."""
    router: Literal["trained", "frozen"] | None = None
    """Train the routers, or leave them as they are. Default: as `tuning` does with any other weight."""

"""Quantities of a stage file: `20M` tokens, `5%`, `200 steps`, and their values."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Annotated, Any, ClassVar, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from postgrad.errors import StageError

MAX_TOKENS, MAX_STEPS, MAX_COUNT, MAX_WIDTH, MAX_ROW = 10**15, 10**9, 10**6, 2**16, 2**20
"""Limits, beyond which a number is a mistake: tokens; steps; batch sizes, rows and other counts; ranks and widths; tokens in a
row."""

_UNITS = {"": 1, "k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9, "t": 1e12}


_NUMBER = r"\d[\d_,]*(?:\.\d*)?(?:e[+-]?\d+)?|\.\d+(?:e[+-]?\d+)?"


def _parse_number(text: str) -> float:
    return float(text.replace("_", "").replace(",", ""))


def reject_bool(value: Any) -> Any:
    """YAML reads yes and no as truth values, which Python counts as 1 and 0."""
    if isinstance(value, bool):
        raise ValueError(f"a number is expected, not {str(value).lower()}")
    return value


def _validate_token_count(value: Any) -> Any:
    if isinstance(value, str):
        match = re.fullmatch(rf"\s*({_NUMBER})\s*([kmbgt]?)\s*(?:tokens?)?\s*", value, re.IGNORECASE)
        if not match:
            raise ValueError(f"a number of tokens such as 500k, 20M or 1.5B is expected, not {value!r}")
        value = _parse_number(match[1]) * _UNITS[match[2].lower()]
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"a number of tokens such as 500k, 20M or 1.5B is expected, not {value}")
        return round(value)
    return reject_bool(value)


def _validate_share(value: Any) -> Any:
    if isinstance(value, str):
        match = re.fullmatch(rf"\s*({_NUMBER})\s*(%?)\s*", value, re.IGNORECASE)
        if not match:
            raise ValueError(f"a share such as 5% or 0.05 is expected, not {value!r}")
        return _parse_number(match[1]) / (100 if match[2] else 1)
    return reject_bool(value)


def _validate_length(value: Any) -> Any:
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_TOKENS:
        return f"{value} steps"
    if isinstance(value, str) and (
        match := re.fullmatch(rf"\s*({_NUMBER})\s*(%|steps?|[kmbgt]?\s*tokens?|)\s*", value, re.IGNORECASE)
    ):
        if _parse_number(match[1]) > MAX_TOKENS:
            raise ValueError(f"a length of at most {MAX_TOKENS:.0e} is expected, not {value!r}")
        return f"{value.strip()} steps" if re.fullmatch(r"[\d_]+", value.strip()) else value.strip()
    raise ValueError(f"a length such as 1%, 200 steps or 2M tokens is expected, not {value!r}")


def _validate_patience(value: Any) -> Any:
    if isinstance(value, str):
        if value.strip().lower() == "none":
            return None
        match = re.fullmatch(r"\s*(\d+)\s*(looks?|evaluations?)?\s*", value)
        if not match:
            raise ValueError(f"a number of evaluations such as `3 evaluations`, or none, is expected, not {value!r}")
        if match[2] and match[2].startswith("look"):
            unit = match[2].replace("look", "evaluation")
            raise ValueError(f"`looks` was renamed to `evaluations`: write `{match[1]} {unit}`")
        return int(match[1])
    return reject_bool(value)


# Each of these may be text in a file, and the schema allows it, since editors validate against it.
TokenCount = Annotated[
    int,
    Field(gt=0, le=MAX_TOKENS, description="tokens: 500k, 20M, 1.5B"),
    BeforeValidator(_validate_token_count, json_schema_input_type=int | float | str),
]
TokenCountOrZero = Annotated[
    int,
    Field(ge=0, le=MAX_TOKENS, description="tokens: 500k, 20M, 1.5B; 0: none"),
    BeforeValidator(_validate_token_count, json_schema_input_type=int | float | str),
]
Share = Annotated[
    float,
    Field(ge=0, le=1, description="5% or 0.05"),
    BeforeValidator(_validate_share, json_schema_input_type=float | str),
]
Length = Annotated[
    str,
    Field(description="1%, 200 steps or 2M tokens"),
    BeforeValidator(_validate_length, json_schema_input_type=int | str),
]
Patience = Annotated[
    Annotated[int, Field(gt=0, le=MAX_COUNT)] | None,
    Field(description="3 evaluations, or none"),
    BeforeValidator(_validate_patience, json_schema_input_type=int | str | None),
]
Rate = Annotated[float, Field(gt=0, description="a learning rate"), BeforeValidator(reject_bool)]
Positive = Annotated[int, Field(gt=0, le=MAX_COUNT), BeforeValidator(reject_bool)]
Count = Annotated[int, Field(ge=0, le=MAX_COUNT), BeforeValidator(reject_bool)]
Width = Annotated[
    int, Field(gt=0, le=MAX_WIDTH, description="a rank, width or number of vectors"), BeforeValidator(reject_bool)
]
Seed = Annotated[int, Field(ge=0, lt=2**63, strict=True)]
Name = Annotated[str, Field(pattern=r"^[\w.\-]*\w[\w.\-]*$", max_length=100)]
Beta = Annotated[float, Field(ge=0, lt=1), BeforeValidator(reject_bool)]


def length_in_steps(length: str, steps: int, tokens: int) -> float:
    """A length in steps, for a stage of so many steps and tokens."""
    match = re.fullmatch(rf"({_NUMBER})\s*(.*)", length, re.IGNORECASE)
    assert match, length
    unit = match[2].lower().strip()
    number = _parse_number(match[1])
    if unit == "%":
        return number / 100 * steps
    if unit.endswith(("token", "tokens")):
        return number * _UNITS[unit.split("token")[0].strip()] / tokens * steps
    return number


def _find_nul(value: Any) -> str | None:
    """The path below `value` of a text with a NUL character."""
    if isinstance(value, str):
        return "" if "\0" in value else None
    if isinstance(value, Mapping):
        items = [(f".{key}", item) for key, item in value.items()]
    else:
        items = [(f"[{i}]", item) for i, item in enumerate(value)] if isinstance(value, list | tuple) else []
    for key, item in items:
        rest = "" if "\0" in key else _find_nul(item)
        if rest is not None:
            return key.replace("\0", "?") + rest
    return None


class ConfigModel(BaseModel):
    """A frozen piece of a stage; every key is known."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _refuse_nul(cls, value: Any) -> Any:
        """No path, name or prompt has a NUL character, which would end it in the middle."""
        if (path := _find_nul(value)) is not None:
            raise ValueError(f"`{path.strip('.')}` holds a NUL character")
        return value


omit_unset = Field(exclude_if=lambda value: value is None or value in ([], {}))
"""Annotates a key that came after fingerprints were recorded: unset, it is in no dump, so earlier fingerprints still hold."""


class Method(ConfigModel):
    """A member of a union of methods, which names the function that makes it.

    The function is named and not imported, since it belongs to a layer above and may need torch. A new method is a class like
    this, its function, and a line in the union.
    """

    implementation: ClassVar[str]
    """`module:function`."""

    def load(self) -> Callable[..., Any]:
        """The function that makes the method; its module is imported."""
        return load_function(self.implementation)


def load_function(path: str) -> Callable[..., Any]:
    """The function `module:function`."""
    module, _, name = path.partition(":")
    return getattr(import_module(module), name)


def get_kinds(union: Any) -> tuple[str, ...]:
    """The values of `kind` in a union of mappings."""
    if isinstance(union, type):
        return get_args(union.model_fields["kind"].annotation) if issubclass(union, ConfigModel) else ()
    return tuple(kind for part in get_args(union) for kind in get_kinds(part))


def parse_token_count(text: str, where: str) -> int:
    """A number of tokens of the command-line option `where`. Raises `StageError`."""
    return _parse_option(TokenCount, text, where, "a number of tokens: 500k, 2M")


def parse_share(text: str, where: str) -> float:
    """A share of the command-line option `where`. Raises `StageError`."""
    return _parse_option(Share, text, where, "5%, or 0.05")


def parse_multiple(text: str, where: str) -> float:
    """A share of the command-line option `where` that may be larger than the whole. Raises `StageError`."""
    return _parse_option(Annotated[float, Field(gt=0), BeforeValidator(_validate_share)], text, where, "25%, or 150%")


def _parse_option(value_type: Any, text: str, where: str, expected: str) -> Any:
    try:
        return TypeAdapter(value_type).validate_python(text)
    except ValidationError:
        raise StageError(f"{text!r} cannot be read", where=where, expected=expected) from None

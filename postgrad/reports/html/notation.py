"""Numbers and foreign texts in a report.

Names, prompts and paths may hold anything, and a number may be missing or not finite. Everything that reaches a page passes
through a `format_*` function or `escape_html`, so that no other file has to handle it.
"""

from __future__ import annotations

import html
import unicodedata
from collections.abc import Callable
from typing import Protocol

from postgrad.foreign_text import plain_text


class HasEnds(Protocol):
    """The ends of an interval; None without one."""

    @property
    def low(self) -> float | None: ...

    @property
    def high(self) -> float | None: ...


MINUS, ABSENT = "\u2212", "\u2013"
MAX_MAGNITUDE = 1e300  # differences and squares of what a report draws stay finite


def finite(value: float | None) -> float | None:
    """The value, or None when it is missing, not finite or too large to draw."""
    return value if value is not None and abs(value) <= MAX_MAGNITUDE else None  # a NaN compares false


def escape_html(value: object, limit: int = 0) -> str:
    """Plain text with the five characters of HTML escaped: safe between tags and inside quotes."""
    return html.escape(plain_text(value, limit), quote=True)


def format_fixed(value: float | None, decimals: int = 3) -> str:
    """`2.310`, with a true minus sign; a dash where there is no number."""
    known = finite(value)
    if known is None:
        return ABSENT
    text = f"{known:,.{decimals}f}" if abs(known) < 1e15 else f"{known:.3e}"
    if not any(digit in text for digit in "123456789"):
        text = text.lstrip("-")
    return text.replace("-", MINUS)


def format_signed(value: float | None, decimals: int = 3) -> str:
    """`+0.012` or `-0.330`; an exact zero, or what rounds to it, carries no sign."""
    known = finite(value)
    text = format_fixed(known, decimals)
    return f"+{text}" if known is not None and known > 0 and any(d in text for d in "123456789") else text


def format_interval(
    low: float | None,
    high: float | None,
    write: Callable[[float | None], str] = format_signed,
    to: str = " to ",
    unit: str = "document",
) -> str:
    """`+0.110 to +0.130`; of a single unit, which has no interval, that it has none."""
    ends = finite(low), finite(high)
    return no_interval(unit) if None in ends else f"{write(ends[0])}{to}{write(ends[1])}"


def no_interval(unit: str = "document") -> str:
    """Why a number has no interval."""
    return f"no interval (one {unit})"


def format_percent(value: float | None, decimals: int = 1) -> str:
    """A share in 0..1 as `90.0 %`."""
    known = finite(value)
    return ABSENT if known is None else f"{format_fixed(known * 100, decimals)} %"


def format_count(value: float | None) -> str:
    """A whole number with separators, `20,000,000`."""
    known = finite(value)
    if known is None:
        return ABSENT
    whole = value if isinstance(value, int) else round(known)
    return (f"{whole:,}" if abs(known) < 1e15 else f"{known:.3e}").replace("-", MINUS)


def format_compact(value: float | None) -> str:
    """A count in three digits, `20.0M`, for sentences and axes."""
    known = finite(value)
    if known is None:
        return ABSENT
    if abs(known) >= 1e15:
        return f"{known:.0e}".replace("-", MINUS).replace("e+", "e")
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(known) >= size * 0.9995:
            scaled = known / size
            decimals = 0 if abs(scaled) >= 99.95 else 1 if abs(scaled) >= 9.995 else 2
            text = f"{scaled:.{decimals}f}"
            return (text.rstrip("0").rstrip(".") if "." in text else text).replace("-", MINUS) + letter
    return f"{known:.3g}".replace("-", MINUS)


def format_duration(seconds: float | None) -> str:
    """`2 h 05 min`, `3 min 20 s`, `4.2 s`."""
    known = finite(seconds)
    if known is None or not 0 <= known < 1e12:
        return ABSENT
    if known < 60:
        return f"{known:.1f} s"
    minutes, rest = divmod(round(known), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes:02d} min"


def display_width(text: str) -> int:
    """Width in terminal cells: wide characters take two, combining marks none."""
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)

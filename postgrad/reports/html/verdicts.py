"""Verdicts on a change, with their symbols and colours."""

from __future__ import annotations

from typing import Protocol

from postgrad.reports.html.notation import ABSENT
from postgrad.reports.html.table import Cell, text_cell

VERDICTS = {  # verdict of the record: (tone, symbol, word of the page)
    "learnt": ("good", "\u2713", "learned"),
    "kept": ("even", "=", "kept"),
    "forgot": ("bad", "\u25b2", "forgot"),
    "no evidence": ("open", "?", "no evidence"),
}


class HasVerdict(Protocol):
    @property
    def verdict(self) -> str | None: ...


def verdict_of(change: HasVerdict | None) -> str:
    """The recorded verdict; empty when it is unknown."""
    return change.verdict if change and change.verdict in VERDICTS else ""  # type: ignore[return-value]


def tone_of(change: HasVerdict | None, default: str = "") -> str:
    """The colour of a change."""
    return VERDICTS.get(verdict_of(change), (default,))[0]


def verdict_cell(change: HasVerdict | None) -> Cell:
    """The verdict with its symbol, coloured."""
    tone, symbol, word = VERDICTS.get(verdict_of(change), ("", "", ABSENT))
    return text_cell(f"{symbol} {word}".strip(), tone)

"""Tokenizers that grow a text without end, take seconds for a short one or fail on it are refused when they are opened."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from postgrad.errors import ModelError
from postgrad.models import tokenizer_limits
from postgrad.models.location import ModelLocation
from postgrad.models.pretrained import load_tokenizer, save_pretrained
from tests.conftest import make_llama, make_tokenizer

DOUBLE = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
SPACES = {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}


def sequence(*steps: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "normalizers": list(steps)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_pretrained(make_llama(), make_tokenizer(), tmp_path / "m", dtype=torch.float32)
    return tmp_path / "m"


def set_part(folder: Path, part: str, value: Any) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps({**content, part: value}))


REFUSED: dict[str, tuple[str, Any, str]] = {
    "doubling forty times": ("normalizer", sequence(*[DOUBLE] * 40), "times as long"),
    "doubling in nested sequences": ("normalizer", sequence(*[sequence(*[DOUBLE] * 10)] * 4), "times as long"),
    "a long text for any character": (
        "normalizer",
        {"type": "Replace", "pattern": {"Regex": ""}, "content": "a" * 1000},
        "times as long",
    ),
    "a decoder that doubles": ("decoder", {"type": "Sequence", "decoders": [DOUBLE] * 40}, "times as long"),
    "an expression that fails": (
        "normalizer",
        {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": "a"},
        "fails on short texts",
    ),
    "a normalizer that is a number": ("normalizer", 7, "normalizer"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_hostile_tokenizer_is_refused(name: str, folder: Path) -> None:
    part, value, message = REFUSED[name]
    set_part(folder, part, value)
    with pytest.raises(ModelError, match=message):
        load_tokenizer(ModelLocation("m", folder))


def test_usual_normalizers_are_not(folder: Path) -> None:
    usual = sequence({"type": "Prepend", "prepend": "▁"}, {"type": "NFKC"}, SPACES)
    set_part(folder, "normalizer", usual)
    assert len(load_tokenizer(ModelLocation("m", folder))("a  b")["input_ids"]) > 1


def test_a_slow_tokenizer_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_limits, "_MAX_SECONDS", 0.0)
    monkeypatch.setattr(tokenizer_limits, "_HARD_TEXTS", ("one two " * 50_000,))
    with pytest.raises(ModelError, match="takes more than"):
        load_tokenizer(ModelLocation("m", folder))


def test_without_the_limit_the_text_grows(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutant, at a harmless size."""
    set_part(folder, "normalizer", sequence(*[DOUBLE] * 7))
    with pytest.raises(ModelError, match="128 times as long"):
        load_tokenizer(ModelLocation("m", folder))
    monkeypatch.setattr(tokenizer_limits, "_MAX_GROWTH", 1000)
    tokenizer = load_tokenizer(ModelLocation("m", folder))
    assert len(tokenizer.backend_tokenizer.normalizer.normalize_str("a")) == 128

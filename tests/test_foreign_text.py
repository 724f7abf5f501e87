"""What files, models and users wrote does nothing on a terminal, and no secret is passed on."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from postgrad.errors import DataError
from postgrad.foreign_text import mask_secrets, multiline_text, plain_text, visible_text

SECRETS = ["hf_" + "a1B2" * 8, "sk-" + "Z9" * 20, "ghp_" + "q" * 36, "AKIA" + "A1" * 8, "glpat-" + "x" * 20]
REORDERING = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"


def is_harmless(text: str) -> bool:
    """Nothing that a terminal obeys, and nothing that ends or reorders a line but a line feed."""
    return not any(
        (unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") and c not in "\n\t") or c in REORDERING for c in text
    )


@given(st.text(st.characters(codec=None)))
def test_no_control_character_is_left(text: str) -> None:
    for shown in (
        visible_text(text),
        plain_text(text),
        multiline_text(text),
        str(DataError(text, where=text, hint=text)),
    ):
        assert is_harmless(shown)
        shown.encode()
    assert not set("\n\t") & set(plain_text(text))


@given(st.text(st.characters(codec="utf-8", exclude_categories=["C", "Zl", "Zp"])))
def test_printable_text_is_kept(text: str) -> None:
    assert visible_text(text) == text
    assert visible_text(f"{text}\n\t{text}\r\n{text}") == f"{text}\n\t{text}\n{text}"


def test_symbols_show_what_was_there() -> None:
    assert (
        visible_text("\x1b[31mred\x1b[0m \x07\x7f \x9b1A a\rb")
        == "\u241b[31mred\u241b[0m \u2407\u2421 \ufffd1A a\u240db"
    )
    assert not is_harmless("\x1b[31m") and not is_harmless("\u202e")  # the mutant: text as it is


@pytest.mark.parametrize("secret", SECRETS)
def test_secrets_are_masked(secret: str) -> None:
    assert secret not in mask_secrets(f"HF_TOKEN={secret} postgrad train x --key {secret}")
    assert mask_secrets(f"a {secret} b") == "a [secret] b"


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("https://me:hunter22@host/x password=hunter22", "https://[secret]@host/x password=[secret]"),
        ("https://hunter22@host/x.jsonl", "https://[secret]@host/x.jsonl"),
        ("https://h/x?X-Amz-Signature=ab12&part=3#a", "https://h/x?X-Amz-Signature=[secret]&part=3#a"),
        ("https://h/x?se=2030&amp;sig=ab%3D", "https://h/x?se=2030&amp;sig=[secret]"),
        ("s3://k:s@bucket/x", "s3://[secret]@bucket/x"),
        ('{"a": "x://b", "c": "d@e"}', '{"a": "x://b", "c": "d@e"}'),
        ("Authorization: Bearer abcdef0123456789abcdef", "Authorization: Bearer [secret]"),
        ("runs/base 9f2c61a0d7b84e55", "runs/base 9f2c61a0d7b84e55"),
        ("expected: key.sub=value, the token: <|endoftext|>", "expected: key.sub=value, the token: <|endoftext|>"),
        ("sk-learn-compatible-estimators", "sk-learn-compatible-estimators"),
    ],
)
def test_secrets_of_urls_are_masked_and_nothing_else(text: str, masked: str) -> None:
    assert mask_secrets(text) == masked
    assert str(DataError(text, where=text)) == f"{masked}: {masked}"


def test_secrets_of_the_environment_are_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_HOST_TOKEN", "correct-horse-42")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    assert mask_secrets("the key correct-horse-42 is false") == "the key [secret] is false"
    monkeypatch.delenv("SOME_HOST_TOKEN")
    assert mask_secrets("correct-horse-42") == "correct-horse-42"

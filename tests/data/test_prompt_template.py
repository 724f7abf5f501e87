"""Templates: what each sign means, where spaces count, how rows are shortened, and what is refused."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from postgrad.data.render.prompt_template import LiteralText, SpecialToken, Template, TemplateField, VirtualTokens
from postgrad.errors import DataError, PostgradError, StageError

SPECIAL = {"cls": 101, "sep": 102, "mask": 103}


def letters(text: str) -> list[int]:
    """One token a character."""
    return [ord(c) for c in text]


def rendered(text: str, fields: dict[str, list[int]], **more: object) -> list[int]:
    return Template.parse(text).render(fields, SPECIAL, 1000, letters, **more).ids  # type: ignore[arg-type]


def test_the_signs() -> None:
    template = Template.parse("[CLS] {3} {x} {2} [MASK] {1}")
    assert template.parts == (
        SpecialToken("cls"),
        VirtualTokens(0, 3),
        TemplateField("x"),
        VirtualTokens(3, 2),
        SpecialToken("mask"),
        VirtualTokens(5, 1),
    )
    assert template.fields == ("x",) and template.virtual_token_count == 6
    found = template.render({"x": [7, 8], "unread": [1]}, SPECIAL, 1000, letters)
    assert found.ids == [101, 1000, 1001, 1002, 7, 8, 1003, 1004, 103, 1005]
    assert found.field_names == [None] * 4 + ["x", "x"] + [None] * 4


def test_the_form_that_p_tuning_published() -> None:
    """Three, the mask, three, the subject, three: nine virtual tokens, numbered through."""
    found = rendered("[CLS] {3} [MASK] {3} {x} {3} [SEP]", {"x": [7]})
    assert found == [101, 1000, 1001, 1002, 103, 1003, 1004, 1005, 7, 1006, 1007, 1008, 102]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("{x} {y}", (TemplateField("x"), LiteralText(" "), TemplateField("y"))),
        ("Q: {x}\nA:", (LiteralText("Q: "), TemplateField("x"), LiteralText("\nA:"))),
        ("[CLS]  Q: {x} {2}", (SpecialToken("cls"), LiteralText("Q: "), TemplateField("x"), VirtualTokens(0, 2))),
        ("{2}\nQ {x}", (VirtualTokens(0, 2), LiteralText("\nQ "), TemplateField("x"))),
        ("{x}\n [SEP]", (TemplateField("x"), LiteralText("\n"), SpecialToken("sep"))),
        (" {x} ", (LiteralText(" "), TemplateField("x"), LiteralText(" "))),
        ("a {{x}} {x}}}", (LiteralText("a {x} "), TemplateField("x"), LiteralText("}"))),
        ("[[MASK]] is [MASK] [1] [note]", (LiteralText("[MASK] is"), SpecialToken("mask"), LiteralText("[1] [note]"))),
        ("{first name} {a.b}", (TemplateField("first name"), LiteralText(" "), TemplateField("a.b"))),
        ("", ()),
    ],
)
def test_what_is_text(text: str, parts: tuple[object, ...]) -> None:
    assert Template.parse(text).parts == parts


def test_text_around_an_escape_is_tokenised_in_one_piece() -> None:
    asked: list[str] = []

    def tokens(text: str) -> list[int]:
        asked.append(text)
        return [1]

    Template.parse("a{{b}}c{x}d").render({"x": []}, SPECIAL, 0, tokens)
    assert asked == ["a{b}c", "d"]


def test_its_own_tokens_by_where_they_stand() -> None:
    """What a row of two texts needs: before the first, between, after the second."""
    template = Template.parse("[CLS] {2} {first} [SEP] {second} {1} [SEP]")
    assert template.segments(SPECIAL, 500, letters) == [[101, 500, 501], [102], [502, 102]]
    assert template.fields == ("first", "second")
    assert Template.parse("{x}{y}{x}").fields == ("x", "y")


def test_rows_are_shortened_where_it_is_said() -> None:
    text, fields = "[CLS] {x} {1} {y}", {"x": [1, 2, 3, 4], "y": [5, 6]}
    assert rendered(text, fields, max_tokens=8, cut_field="x") == [101, 1, 2, 3, 4, 1000, 5, 6]
    assert rendered(text, fields, max_tokens=6, cut_field="x") == [101, 1, 2, 1000, 5, 6]
    assert rendered(text, fields, max_tokens=6, cut_field="x", cut_side="beginning") == [101, 3, 4, 1000, 5, 6]
    assert rendered("{x}[SEP]{x}", fields, max_tokens=6, cut_field="x") == [1, 2, 102, 1, 2]
    assert rendered("[CLS] {y}", fields, max_tokens=3) == [101, 5, 6]
    assert rendered("[CLS] {y}", {"y": []}, max_tokens=1, cut_field="y") == [101]


@given(
    marks=st.lists(st.sampled_from(["[CLS]", "{2}", "{x}", "{y}", "word"]), max_size=7),
    x=st.lists(st.integers(1, 9), max_size=9),
    y=st.lists(st.integers(11, 19), max_size=9),
    limit=st.integers(1, 25),
    cut_at=st.sampled_from(["end", "beginning"]),
)
def test_a_row_fits_and_only_the_field_was_cut(
    marks: list[str], x: list[int], y: list[int], limit: int, cut_at: str
) -> None:
    text = "".join([*marks, "{x}"])
    whole = rendered(text, {"x": x, "y": y})
    try:
        found = Template.parse(text).render({"x": x, "y": y}, SPECIAL, 1000, letters, limit, "x", cut_side=cut_at)
    except PostgradError:
        times = text.count("{x}")
        assert len(whole) > limit and len(whole) - times * len(x) + times > limit  # not one token of x would fit
        return
    ids, sources = found
    assert len(ids) == len(sources) <= limit
    if len(whole) <= limit:
        assert ids == whole
        return
    pieces = re.findall("x+", "".join("x" if s == "x" else "-" for s in sources))
    kept = sum(s == "x" for s in sources) // text.count("{x}")
    part = x[:kept] if cut_at == "end" else x[-kept:]
    assert sum(map(len, pieces)) == kept * text.count("{x}") and kept > 0
    assert ids == rendered(text, {"x": part, "y": y})
    assert len(ids) + text.count("{x}") > limit


@pytest.mark.parametrize(
    ("text", "met"),
    [
        ("{x", r"'\{' at character 1 has no partner"),
        ("a } b", r"'\}' at character 3 has no partner.*"),
        ("{a{b}}", r"'\{' at character 1 has no partner"),
        ("{0} {x}", r"\{0\} at character 1 is neither"),
        ("{x} {}", r"\{\} at character 5 is neither"),
        ("{-3}", "neither"),
        ("{3x}", "neither"),
    ],
)
def test_what_cannot_be_read(text: str, met: str) -> None:
    with pytest.raises(StageError, match=met):
        Template.parse(text)


@pytest.mark.parametrize(
    ("call", "kind", "met"),
    [
        (lambda: rendered("[MSK] {x}", {"x": [1]}), StageError, r"no special token \[MSK\](.|\n)*did you mean 'mask'"),
        (lambda: rendered("[INST] {x}", {"x": [1]}), StageError, r"write \[\[INST\]\]"),
        (lambda: rendered("{sentense}", {"sentence": [1]}), StageError, "did you mean 'sentence'"),
        (lambda: rendered("{text}", {"text": [1]}, cut_field="test"), StageError, "did you mean 'text'"),
        (
            lambda: rendered("{5}{x}", {"x": [1, 2]}, max_tokens=5, cut_field="x"),
            StageError,
            "template alone has 5 tokens",
        ),
        (
            lambda: rendered("{x}", {"x": [1, 2, 3]}, max_tokens=2),
            DataError,
            "3 tokens, more than 2(.|\n)*may be cut: x",
        ),
        (
            lambda: rendered("{x}{y}", {"x": [1], "y": [1] * 9}, max_tokens=9, cut_field="x"),
            DataError,
            "already has 9 tokens of 9",
        ),
    ],
)
def test_what_is_refused(call: Callable[[], object], kind: type[Exception], met: str) -> None:
    with pytest.raises(kind, match=met):
        call()

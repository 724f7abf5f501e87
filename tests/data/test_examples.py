"""Does every row become the example it is, and does what is wrong with one end in its place?"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from postgrad.data.problem_type import ProblemType
from postgrad.data.read.columns import detect_columns
from postgrad.data.read.examples import Example, SkippedRow, make_example
from postgrad.data.read.labels import Labels, collect_labels, merge_labels
from postgrad.data.render.renderers import ClassRenderer, PlainRenderer, TagRenderer
from postgrad.errors import DataError, StageError


def example(row: dict[str, Any], kind: str = "auto") -> Example:
    columns = detect_columns(list(row), {}, kind)
    assert columns is not None
    return make_example(columns.kind, {role: row.get(column) for role, column in columns.by_role.items()}, "f:3")


def turns(*contents: str, first: str = "user") -> list[dict[str, str]]:
    roles = ["user", "assistant"] if first == "user" else ["assistant", "user"]
    return [{"role": roles[n % 2], "content": content} for n, content in enumerate(contents)]


# --- what rows become ---------------------------------------------------------------------------------

CALL = [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]


@pytest.mark.parametrize(
    ("row", "fields", "text"),
    [
        ({"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": "b"}, "a\nb"),
        ({"prompt": None, "completion": "b"}, {"prompt": "", "completion": "b"}, "\nb"),
        ({"source": "a", "target": "b"}, {"source": "a", "target": "b"}, "a\nb"),
        ({"source": "a", "target": "b", "references": "c"},
         {"source": "a", "target": "b", "references": ("c",)}, "a\nb"),
        ({"prompt": "a", "completion": "b", "references": ["c", " ", "d"]},
         {"prompt": "a", "completion": "b", "references": ("c", "d")}, "a\nb"),
        ({"prompt": "a", "completion": "b", "references": None}, {"prompt": "a", "completion": "b"}, "a\nb"),
        ({"document": "a", "summary": "b"}, {"source": "a", "target": "b", "document": "a", "summary": "b"}, "a\nb"),
        ({"translation": {"en": "a", "de": "b"}}, {"source": "a", "target": "b", "en": "a", "de": "b"}, "a\nb"),
        ({"question": "q", "context": "c", "answers": {"text": ["a", "b", "a"], "answer_start": [0, 3, 0]}},
         {"question": "q", "context": "c", "answer": "a", "references": ("b",)}, "q\nc\na"),
        ({"question": "q", "context": None, "answers": ["", "a"]},
         {"question": "q", "context": "", "answer": "a"}, "q\n\na"),
        ({"question": "q", "context": "c", "answers": [{"text": "a", "answer_start": 0}]},
         {"question": "q", "context": "c", "answer": "a"}, "q\nc\na"),
        ({"question": "q", "context": "c", "answer": "a"},
         {"question": "q", "context": "c", "answer": "a"}, "q\nc\na"),
        ({"sentence": "a", "label": "x"}, {"sentence": "a", "label": "x"}, "a"),
        ({"sentence": "a", "label": True}, {"sentence": "a", "label": 1}, "a"),
        ({"sentence": "a", "label": -1.0}, {"sentence": "a", "label": -1.0}, "a"),
        ({"sentence": "a", "labels": []}, {"sentence": "a", "labels": ()}, "a"),
        ({"premise": "a", "hypothesis": "b", "labels": ["x", "y"]},
         {"premise": "a", "hypothesis": "b", "labels": ("x", "y")}, "a\nb"),
        ({"tokens": ["a", "b"], "ner_tags": [0, 1]}, {"tokens": ("a", "b"), "tags": (0, 1)}, "a b"),
        ({"question": "q", "choices": ["a", "b"], "answer": "B"},
         {"question": "q", "choices": ("a", "b"), "answer": 1}, "q\na\nb"),
        ({"instruction": "i", "output": "o"},
         {"instruction": "i", "input": "", "output": "o", "messages": tuple(turns("i", "o"))}, "i\no"),
        ({"instruction": "i", "input": "x", "output": "o", "system": "s", "history": [["q", "a"]]},
         {"instruction": "i", "input": "x", "output": "o",
          "messages": ({"role": "system", "content": "s"}, *turns("q", "a", "i\n\nx", "o"))}, "s\nq\na\ni\n\nx\no"),
        ({"messages": turns("q", "a")}, {"messages": tuple(turns("q", "a"))}, "q\na"),
        ({"conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "q"},
                            {"from": "gpt", "value": "a"}]},
         {"messages": ({"role": "system", "content": "s"}, *turns("q", "a"))}, "s\nq\na"),
        ({"messages": turns("q", "a", "thanks"), "system": "s"},
         {"messages": ({"role": "system", "content": "s"}, *turns("q", "a"))}, "s\nq\na"),
        ({"messages": [{"role": "system", "content": "own"}, *turns("q", "a")], "system": "s"},
         {"messages": ({"role": "system", "content": "own"}, *turns("q", "a"))}, "own\nq\na"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}, {"text": "r"}]},
                       {"role": "model", "content": "a", "weight": None}]},
         {"messages": tuple(turns("qr", "a"))}, "qr\na"),
        ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": None, "tool_calls": CALL}],
          "tools": '[{"name": "add"}]'},
         {"messages": ({"role": "user", "content": "q"}, {"role": "assistant", "content": "", "tool_calls": CALL}),
          "tools": [{"name": "add"}]},
         'q\n[{"function": {"arguments": {"a": 1}, "name": "add"}, "type": "function"}]'),
        ({"messages": [{"role": "user", "content": "q"}, {"role": "user", "content": "r"},
                       {"role": "assistant", "content": "a"}]},
         {"messages": ({"role": "user", "content": "q"}, *turns("r", "a"))}, "q\nr\na"),
    ],
)  # fmt: skip
def test_a_row_becomes_fields_and_a_text(row: dict[str, Any], fields: dict[str, Any], text: str) -> None:
    made = example(row)
    assert dict(made.fields) == fields
    assert made.text == text


def test_the_fields_of_an_example_cannot_be_changed() -> None:
    made = example({"source": "a", "target": "b"})
    with pytest.raises(TypeError):
        made.fields["source"] = "c"  # type: ignore[index]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": []}, "no answer"),
        ({"messages": None}, "no answer"),
        ({"messages": turns("q")}, "no answer"),
        ({"messages": turns("a", "q", "a", first="assistant")}, "an answer before any question"),
        ({"messages": [{"role": "system", "content": "s"}, *turns("a", first="assistant")]},
         "an answer before any question"),
        ({"messages": turns("q", "a", "q", " \n")}, "empty answer"),
        ({"instruction": " ", "input": "", "output": "o"}, "empty instruction"),
        ({"instruction": "i", "output": None}, "empty answer"),
        ({"prompt": "p", "completion": ""}, "empty answer"),
        ({"source": "", "target": "t"}, "empty source"),
        ({"source": "s", "target": " "}, "empty answer"),
        ({"article": "a", "highlights": None}, "empty answer"),
        ({"translation": {"en": " ", "de": "b"}}, "empty source"),
        ({"question": " ", "context": "c", "answers": ["a"]}, "empty question"),
        ({"question": "q", "context": "c", "answers": {"text": [], "answer_start": []}}, "no answer"),
        ({"question": "q", "context": "c", "answers": None}, "no answer"),
        ({"question": "q", "context": "c", "answers": ["", " "]}, "empty answer"),
        ({"sentence": "", "label": 1}, "empty text"),
        ({"premise": "a", "hypothesis": None, "label": 1}, "empty text"),
        ({"sentence": "a", "label": None}, "no label"),
        ({"sentence": "a", "label": ""}, "no label"),
        ({"sentence": "a", "labels": None}, "no label"),
        ({"tokens": [], "tags": []}, "no words"),
        ({"tokens": [" "], "tags": [1]}, "no words"),
        ({"question": "", "choices": ["a", "b"], "answer": 0}, "empty question"),
        ({"question": "q", "choices": ["a", "b"], "answer": -1}, "no answer"),
        ({"question": "q", "choices": ["a", "b"], "answerKey": ""}, "no answer"),
    ],
)  # fmt: skip
def test_a_row_that_teaches_nothing_is_skipped_for_a_reason(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(SkippedRow) as caught:
        example(row)
    assert str(caught.value) == reason


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"messages": "hi"}, "`messages` is text"),
        ({"messages": ["hi"]}, "`messages` 1 is text"),
        ({"messages": [{"content": "hi"}]}, "`messages` 1 has no role"),
        ({"messages": [*turns("q"), {"role": "asistant", "content": "a"}]}, "did you mean 'assistant'?"),
        ({"messages": [{"role": "narrator", "content": "a"}]}, "`messages` 1 has the role 'narrator'"),
        ({"conversations": [{"from": "human", "value": 3}]}, "`conversations` 1 has the number 3 for its content"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "has content that is not text"),
        ({"messages": turns("q", "a"), "tools": "{"}, "`tools` is not valid JSON"),
        ({"messages": turns("q", "a"), "tools": {"name": 1}}, "`tools` is an object"),
        ({"messages": turns("q", "a"), "system": 1}, "`system` is the number 1"),
        ({"instruction": ["i"], "output": "o"}, "`instruction` is a list"),
        ({"instruction": "i", "output": "o", "history": ["q"]}, "`history` holds text"),
        ({"prompt": "p", "completion": 1}, "`completion` is the number 1"),
        ({"document": "d", "summary": ["s"]}, "`summary` is a list"),
        ({"translation": "a"}, "`translation` is text"),
        ({"translation": {"en": "a", "de": "b", "fr": "c"}}, "`translation` is an object with 3 languages"),
        ({"question": "q", "context": {"a": 1}, "answers": ["a"]}, "`context` is an object"),
        ({"question": "q", "context": "c", "answers": 3}, "`answers` is the number 3"),
        ({"question": "q", "context": "c", "answers": [3]}, "`answers` holds the number 3"),
        ({"question": "q", "context": "c", "answers": {"text": [None]}}, "`answers.text` holds null"),
        ({"sentence": "a", "label": ["x"]}, "`label` is a list"),
        ({"sentence": "a", "label": float("nan")}, "`label` is the number nan"),
        ({"sentence": "a", "labels": "x"}, "`labels` is text"),
        ({"sentence": "a", "labels": [1.0, 0.0]}, "`labels` holds the number 1.0"),
        ({"tokens": ["a", "b"], "tags": ["O"]}, "2 words in `tokens` and 1 tags in `tags`"),
        ({"tokens": "a b", "tags": ["O"]}, "`tokens` is text"),
        ({"tokens": ["a", None], "tags": ["O", "O"]}, "`tokens` holds null"),
        ({"tokens": ["a"], "tags": [None]}, "`tags` holds null"),
        ({"question": "q", "choices": ["a"], "answer": 0}, "1 choices"),
        ({"question": "q", "choices": ["a"] * 27, "answer": 0}, "27 choices"),
        ({"question": "q", "choices": "ab", "answer": 0}, "`choices` is text"),
        ({"question": "q", "choices": ["a", 2], "answer": 0}, "`choices` holds the number 2"),
        ({"question": "q", "choices": {"text": ["a", "b"], "label": ["A"]}, "answer": "A"}, "not one label"),
        ({"question": "q", "choices": ["a", "b"], "answer": 2}, "the answer '2' is none of the choices"),
        ({"question": "q", "choices": ["a", "b"], "answer": "c"}, "the answer 'c' is none of the choices"),
        ({"question": "q", "choices": ["B", "A"], "answer": "A"}, "the answer 'A' is more than one of the choices"),
        ({"question": "q", "choices": ["a", "b"], "answer": 0.0}, "the answer is the number 0.0"),
    ],
)
def test_a_row_that_cannot_be_is_an_error_with_its_place(row: dict[str, Any], told: str) -> None:
    with pytest.raises(DataError) as caught:
        example(row)
    assert caught.value.where == "f:3"
    assert told in str(caught.value)


@pytest.mark.parametrize(
    ("choices", "answer", "index"),
    [
        (["no", "yes"], 1, 1),
        (["no", "yes"], "1", 1),
        (["no", "yes"], "B", 1),
        (["no", "yes"], "yes", 1),
        (["3", "2"], "2", 1),
        (["A", "B"], "B", 1),
        (["same", "same"], "same", 0),
        ({"text": ["no", "yes"], "label": ["1", "2"]}, "2", 1),
        ({"text": ["no", "yes"], "label": [1, 2]}, "1", 0),
        ([{"text": "no", "label": "X"}, {"text": "yes", "label": "Y"}], "Y", 1),
        ([{"text": "no"}, {"text": "yes"}], "yes", 1),
        ({"A": "no", "B": "yes"}, "B", 1),
        ({"1": "no", "2": "yes"}, "1", 0),
        ({"x": "no", "y": "yes"}, "yes", 1),
    ],
)
def test_an_answer_may_be_an_index_a_letter_a_label_or_a_text(choices: Any, answer: Any, index: int) -> None:
    made = example({"question": "q", "choices": choices, "answer": answer})
    assert made.fields["answer"] == index


# --- labels -------------------------------------------------------------------------------------------


def labelled(*labels: Any, key: str = "label") -> list[tuple[Example, str]]:
    return [(example({"sentence": "a", key: label}), f"f:{n}") for n, label in enumerate(labels, 1)]


def tagged(*tags: Sequence[str | int]) -> list[tuple[Example, str]]:
    return [(example({"tokens": ["a"] * len(each), "tags": list(each)}), f"f:{n}") for n, each in enumerate(tags, 1)]


@given(st.lists(st.one_of(st.text(min_size=1, max_size=3)), min_size=1))
def test_classes_are_the_different_labels_sorted(names: list[str]) -> None:
    met = collect_labels(labelled(*names))
    assert met == Labels(ProblemType.CLASS, tuple(sorted(set(names))))
    for each, _ in labelled(*names):
        index = int(met.values(each)[0])
        assert met.names[index] == each.fields["label"]


def test_the_sorts_of_labels() -> None:
    assert collect_labels(labelled(10, 2, 2)) == Labels(ProblemType.CLASS, (2, 10))
    assert collect_labels(labelled(1, 2.5, 3)) == collect_labels(labelled(2.5)) == Labels(ProblemType.NUMBER)
    assert collect_labels(labelled(["b"], [], ["a", "b"], key="labels")) == Labels(ProblemType.MULTI_LABEL, ("a", "b"))
    assert collect_labels(tagged(["O", "B"], ["I"])) == Labels(ProblemType.TAGS, ("B", "I", "O"))
    assert [Labels(*each).width for each in [("class", ("a", "b")), ("multi", ("a", "b")), ("number",), ("tags",)]] == [
        1, 2, 1, 0,
    ]  # fmt: skip


def test_labels_as_values() -> None:
    def values(labels: Labels, label: Any, key: str = "label") -> tuple[float, ...]:
        return labels.values(labelled(label, key=key)[0][0])

    assert values(Labels(ProblemType.CLASS, ("a", "b", "c")), "c") == (2.0,)
    assert values(Labels(ProblemType.CLASS, (3, 5)), 5) == (1.0,)
    assert values(Labels(ProblemType.NUMBER), 5) == (5.0,)
    assert values(Labels(ProblemType.MULTI_LABEL, ("a", "b", "c")), ["c", "a"], "labels") == (1.0, 0.0, 1.0)
    for labels, label, key in (
        (Labels(ProblemType.CLASS, ("good", "bad")), "god", "label"),
        (Labels(ProblemType.CLASS, (0, 1)), 1.0, "label"),
        (Labels(ProblemType.CLASS, (0, 1)), "1", "label"),
        (Labels(ProblemType.MULTI_LABEL, ("a",)), ["b"], "labels"),
        (Labels(ProblemType.NUMBER), "a", "label"),
        (Labels(ProblemType.NUMBER), ["a"], "labels"),
        (Labels(ProblemType.MULTI_LABEL, ("a",)), "a", "label"),
    ):
        with pytest.raises(DataError):
            values(labels, label, key)
    with pytest.raises(DataError, match="did you mean 'good'"):
        values(Labels(ProblemType.CLASS, ("good", "bad")), "god")


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        (labelled("a", 1), r"^f:2: a label that is 1, a number after labels that are text"),
        (labelled(1, 2.5, "a"), r"^f:3: a label that is 'a', text after labels that are a number"),
        (labelled("a") + labelled(["a"], key="labels"), r"^f:1: a label that is `multi` after labels that are `class`"),
        (tagged(["O"], [1]), r"^f:2: a label that is 1"),
        ([], "where: no row has a label"),
        (labelled([], [], key="labels"), "where: no row has a label"),
    ],
)
def test_labels_of_different_sorts_are_told_with_their_place(rows: list[tuple[Example, str]], told: str) -> None:
    with pytest.raises(DataError, match=told):
        collect_labels(rows, "where")


def test_too_many_classes_are_rather_numbers() -> None:
    row = example({"sentence": "a", "label": 0})
    rows = ((Example(row.kind, {**row.fields, "label": n}, "a"), f"f:{n}") for n in range(70_000))
    with pytest.raises(DataError, match="more than 65,534 different labels"):
        collect_labels(rows)


def test_labels_of_several_sources() -> None:
    assert merge_labels([Labels("class", ("b",)), Labels("class", ("a", "b"))]) == Labels("class", ("a", "b"))
    assert merge_labels([Labels("class", (1, 2)), Labels("number")]) == Labels("number")
    for other in (Labels("multi", ("a",)), Labels("class", (1,)), Labels("number")):
        with pytest.raises(DataError, match="labels of one type"):
            merge_labels([Labels("class", ("a",)), other])


# --- as text ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "renderer", "context", "answer"),
    [
        ({"prompt": "a ", "completion": "b"}, PlainRenderer(), "a ", "b"),
        ({"source": "a", "target": "b"}, PlainRenderer(), "a\n", "b"),
        ({"source": "a", "target": "b"}, PlainRenderer(is_separate=True), "a", "b"),
        ({"source": "a", "target": "b"}, PlainRenderer(separator=" = "), "a = ", "b"),
        ({"source": "a", "target": "b"}, PlainRenderer("{{{source}}}", "{target}{target}"), "{a}\n", "bb"),
        ({"document": "a", "summary": "b"}, PlainRenderer("summarize: {document}", "{summary}"), "summarize: a\n", "b"),
        ({"translation": {"en": "a", "de": "b"}}, PlainRenderer("translate German to English: {de}", "{en}"),
         "translate German to English: b\n", "a"),
        ({"question": "q", "context": "c", "answers": ["a", "b"]}, PlainRenderer(),
         "question: q\ncontext: c\nanswer: ", "a"),
        ({"sentence1": "a", "sentence2": "b", "label": 3.799999952316284}, PlainRenderer(answer="{label:round 0.2}"),
         "sentence1: a\nsentence2: b\nlabel: ", "3.8"),
        ({"sentence": "fine", "label": 1}, PlainRenderer(), "sentence: fine\nlabel: ", "1"),
        ({"sentence": "fine", "label": 1}, PlainRenderer("sst2 sentence: {sentence}", "{label}", label_words={"1": "good"}),
         "sst2 sentence: fine ", "good"),
        ({"premise": "p", "hypothesis": "h", "labels": ["x", "y"]}, PlainRenderer(),
         "premise: p\nhypothesis: h\nlabel: ", "x, y"),
        ({"question": "q", "choices": ["u", "v"], "answer": 1}, PlainRenderer(), "q\nA. u\nB. v\nAnswer: ", "v"),
        ({"question": "q", "choices": ["u", "v"], "answer": 1}, PlainRenderer(answer="{letter}. {answer}"),
         "q\nA. u\nB. v\nAnswer: ", "B. v"),
        ({"tokens": ["a", "b"], "tags": [0, 1]}, PlainRenderer(label_words={"0": "O", "1": "B"}), "a b\n", "O B"),
        ({"instruction": "i", "input": "x", "output": "o"}, PlainRenderer(), "i\n\nx\n\n", "o"),
        ({"instruction": "i", "input": "x", "output": "o"}, PlainRenderer("{instruction}: {input}", separator=" -> "),
         "i: x -> ", "o"),
    ],
)  # fmt: skip
def test_prompts_and_answers(row: dict[str, Any], renderer: PlainRenderer, context: str, answer: str) -> None:
    rendered = renderer.render(example(row))
    assert rendered.pieces == ((context, 0), (answer, 1))
    assert rendered.is_joint is not renderer.is_separate
    assert (rendered.values, rendered.mark_first_token) == ((), False)


@pytest.mark.parametrize("step", ["0.2", "0.5", "1", "5"])
def test_a_number_is_rounded_to_the_nearest_multiple(step: str) -> None:
    """With 0.2 as T5 rounds similarities: `round(5 score) / 5`, a half to the even one, with one decimal."""
    template = PlainRenderer(answer=f"{{label:round {step}}}")
    for hundredths in range(0, 501, 5):
        (_, (said, _)) = template.render(example({"sentence": "a", "label": hundredths / 100})).pieces
        wanted = float(round(Fraction(hundredths, 100) / Fraction(step)) * Fraction(step))  # `round` has the same rule
        assert float(said) == pytest.approx(wanted)
        assert said == (f"{wanted:.1f}" if "." in step else f"{wanted:.0f}")


def test_a_number_below_zero_has_no_zero_of_its_own() -> None:
    template = PlainRenderer(answer="{label:round 0.2}")
    said = [template.render(example({"sentence": "a", "label": label})).pieces[1][0] for label in (-0.05, -0.3)]
    assert said == ["0.0", "-0.4"]


def test_what_cannot_be_rounded() -> None:
    for label in ("good", "nan"):
        with pytest.raises(DataError, match="cannot round"):
            PlainRenderer(answer="{label:round 0.2}").render(example({"sentence": "a", "label": label}))
    for template in ("{label:round}", "{label:upper}", "{label:round 0}", "{label:round -1}", "{label:round x}"):
        with pytest.raises(StageError, match="is not valid"):
            PlainRenderer(answer=template)


def test_what_a_template_cannot_have() -> None:
    row = example({"sentence": "fine", "label": "good"})
    with pytest.raises(DataError, match=r"the template uses \{sentense\}(.|\n)*did you mean 'sentence'"):
        PlainRenderer("{sentense}").render(row)
    with pytest.raises(DataError, match=r"no word for the label 'good'"):
        PlainRenderer(label_words={"bad": "x"}).render(row)
    for template in ("{", "a}", "{a{b}", "{{a}"):
        with pytest.raises(StageError, match="a lone"):
            PlainRenderer(answer=template)
    for row in (
        example({"messages": turns("q", "a", "q", "a")}),
        example({"instruction": "i", "output": "o", "history": [["q", "a"]]}),
    ):
        with pytest.raises(DataError, match="a conversation of several turns"):
            PlainRenderer().render(row)


def test_texts_for_a_classifier() -> None:
    labels = Labels(ProblemType.CLASS, ("no", "yes"))
    pair = example({"premise": "p", "hypothesis": "h", "label": "yes"})
    rendered = ClassRenderer(labels, "[SEP]", is_joint=False).render(pair)
    assert rendered.pieces == (("p", 0), ("[SEP]", 0), ("h", 1))
    assert (rendered.values, rendered.is_joint) == ((1.0,), False)
    one = example({"sentence": "s", "label": "no"})
    assert ClassRenderer(labels).render(one).pieces == (("s", 0),)
    with pytest.raises(DataError, match="a row of kind `tagged`"):
        ClassRenderer(labels).render(example({"tokens": ["a"], "tags": ["O"]}))


def test_words_for_a_tagger() -> None:
    labels = Labels(ProblemType.TAGS, ("B", "I", "O"))
    row = example({"tokens": ["New", "York", "!"], "tags": ["B", "I", "O"]})
    rendered = TagRenderer(labels).render(row)
    assert rendered.pieces == (("New", 1), (" ", 0), ("York", 2), (" ", 0), ("!", 3))
    assert rendered.mark_first_token
    assert TagRenderer(labels, joiner="").render(row).pieces[1] == ("", 0)
    with pytest.raises(DataError, match="the label 'X'"):
        TagRenderer(labels).render(example({"tokens": ["a"], "tags": ["X"]}))


def test_what_changes_the_text_changes_the_fingerprint() -> None:
    labels = Labels(ProblemType.CLASS, ("a", "b"))
    renderers = [
        PlainRenderer(),
        PlainRenderer("{source}"),
        PlainRenderer(answer="{source}"),
        PlainRenderer(separator=""),
        PlainRenderer(is_separate=True),
        PlainRenderer(label_words={"a": "b"}),
        ClassRenderer(labels),
        ClassRenderer(labels, ""),
        ClassRenderer(labels, is_joint=False),
        ClassRenderer(Labels(ProblemType.CLASS, ("b", "a"))),
        TagRenderer(labels),
        TagRenderer(labels, ""),
    ]
    assert len({renderer.fingerprint for renderer in renderers}) == len(renderers)
    assert PlainRenderer(label_words={"a": "b"}).fingerprint == PlainRenderer(label_words={"a": "b"}).fingerprint

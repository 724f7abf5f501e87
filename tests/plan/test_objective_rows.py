"""Which rows an objective asks for: every pair that is promised builds rows, every other one is refused with the hint."""

from __future__ import annotations

import itertools
import json
import re
from typing import Any, get_args

import numpy as np
import pytest

from postgrad.config import objectives as described
from postgrad.config.objectives import ClassifyObjective, MaskedObjective, NextTokenObjective, RowsObjective
from postgrad.data.layouts.classification import ClozeRows, LabelledRows, TaggedRows
from postgrad.data.layouts.generation_prompts import PromptRows
from postgrad.data.layouts.masked_lm import MaskedRows
from postgrad.data.layouts.packed_examples import PackedExampleRows
from postgrad.data.layouts.packed_text import PackedRows
from postgrad.data.layouts.prefix_lm import PrefixRows
from postgrad.data.layouts.rows import IGNORED
from postgrad.data.layouts.seq2seq import Seq2SeqRows
from postgrad.data.layouts.span_corruption import SpanCorruptionRows
from postgrad.data.problem_type import ProblemType
from postgrad.data.read.labels import Labels
from postgrad.data.read.row_kinds import KINDS
from postgrad.data.render.chat import ChatRenderer
from postgrad.data.render.renderers import ClassRenderer, PlainRenderer, TagRenderer
from postgrad.errors import StageError
from postgrad.models.location import locate_model
from postgrad.plan.objective_matching import SUPPORTED_ROW_KINDS, match_objectives, resolve_objectives, resolve_task
from postgrad.plan.objective_rows import make_rows, verbalisers
from postgrad.plan.plan import Plan
from postgrad.plan.row_renderers import RowTemplate, make_renderer
from tests.tiny_stages import QUICK_EVALUATION, Workspace, make_workspace, write_rows

OBJECTIVES: dict[str, type[Any]] = {
    model.model_fields["kind"].annotation.__args__[0]: model for model in get_args(RowsObjective)
}
MODEL_OF = {
    "next-token": "llama",
    "prefix-lm": "llama",
    "masked": "bert",
    "span-corruption": "t5",
    "text-to-text": "t5",
    "classify": "bert",
    "on-policy": "llama",
    "on-policy-replay": "llama",
}
UNIONS = {"AnyObjective", "RowsObjective", "DistillObjective", "TeacherObjective", "GeneratingObjective"}
"""Names in the module that are no class of an objective with rows of its own."""
_SIZES = {"prompt_tokens": 8, "max_new_tokens": 8}
SHORT: dict[str, dict[str, Any]] = {"on-policy": _SIZES, "on-policy-replay": {**_SIZES, "score": "variety"}}
"""Options without which rows of these tests have no room."""
PAIRS = [(objective, kind) for objective, kinds in SUPPORTED_ROW_KINDS.items() for kind in kinds]
LAYOUT_OF: dict[tuple[str, str], type[Any]] = {
    **{("next-token", kind): PackedExampleRows for kind in KINDS},
    ("next-token", "text"): PackedRows,
    ("next-token", "input_ids"): PackedRows,
    **{("prefix-lm", kind): PrefixRows for kind in KINDS},
    **{(name, kind): PromptRows for name in SHORT for kind in KINDS},
    ("masked", "text"): MaskedRows,
    ("masked", "input_ids"): MaskedRows,
    ("masked", "labelled"): ClozeRows,
    ("span-corruption", "text"): SpanCorruptionRows,
    ("span-corruption", "input_ids"): SpanCorruptionRows,
    **{("text-to-text", kind): Seq2SeqRows for kind in KINDS},
    ("classify", "labelled"): LabelledRows,
    ("classify", "tagged"): TaggedRows,
}
CLOZE = {"kind": "p-tuning", "template": "{x} {1} [MASK]", "hidden": 8}
YES_NO = {"words": "yes", "sums": "no"}


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    found = make_workspace(tmp_path_factory.mktemp("shelf"), tmp_path_factory.getbasetemp() / "cache")
    rng = np.random.default_rng(0)
    write_rows(found.folder / "input_ids.jsonl", [{"input_ids": rng.integers(5, 200, 30).tolist()} for _ in range(40)])
    write_rows(
        found.folder / "text.jsonl",
        [json.loads(line) for line in (found.folder / "new.jsonl").read_text().splitlines()],
    )
    return found


def plan_of(shelf: Workspace, objective: str, kind: str, tuning: dict[str, Any] | None = None, **changes: Any) -> Plan:
    """A stage of one objective on one kind of rows, part of which is held out."""
    source = shelf.source(kind, kind, held_out=0.2)
    if (objective, kind) == ("masked", "labelled"):
        tuning, source = tuning or CLOZE, {**source, "label_words": YES_NO}
    said = {"kind": objective, **SHORT.get(objective, {}), **changes.pop("options", {})}
    raw = shelf.stage("plan", tuning, model=MODEL_OF[objective], objectives=[said], sources=[source])
    return shelf.plan({**raw, "tokens": 100, "evaluation": QUICK_EVALUATION, **changes})


def test_every_objective_and_every_kind_is_thought_of() -> None:
    assert SUPPORTED_ROW_KINDS.keys() == OBJECTIVES.keys() == MODEL_OF.keys()
    assert set().union(*SUPPORTED_ROW_KINDS.values()) == set(KINDS)
    assert LAYOUT_OF.keys() == set(PAIRS)


@pytest.mark.parametrize(("objective", "kind"), PAIRS)
def test_rows_are_made_of_what_is_served(shelf: Workspace, objective: str, kind: str) -> None:
    plan = plan_of(shelf, objective, kind)
    (made,), (leaf,), (held_out,) = plan.data.rows, plan.data.sources, plan.evaluation.sets
    assert type(made) is LAYOUT_OF[objective, kind] and leaf.store.kind == kind
    ledger = made.ledger
    assert ledger.read == ledger.held_out + ledger.dropped + ledger.truncated + ledger.placed
    assert ledger.held_out > 0 and ledger.trained > 0 and len(held_out) > 0
    counted, most = 0, plan.model.vocab_size + 1  # one place of a vector
    for i in range(len(made)):
        row = made.get_row(i, i)
        assert len(row.inputs["input_ids"]) <= plan.model.context_length and row.inputs["input_ids"].min() >= 0
        assert row.inputs["input_ids"].max() < most
        if objective == "classify" and kind == "labelled":
            assert row.labels.shape == () and row.labels in (0, 1) and row.label_count == 1
        else:
            assert row.label_count == int((row.labels != IGNORED).sum()) and row.labels.max() < plan.model.vocab_size
        if "decoder_input_ids" in row.inputs:  # the decoder reads the labels one place later
            assert row.inputs["decoder_input_ids"][1:].tolist() == row.labels[:-1].tolist()
        else:
            assert {len(array) for array in row.inputs.values()} == {len(row.inputs["input_ids"])}
        counted += row.label_count
    # Where a plain text is cut in two is drawn, so there the ledger has the mean.
    drawn = objective in ("text-to-text", "prefix-lm") and kind in ("text", "input_ids")
    assert counted == pytest.approx(ledger.trained, rel=0.2 if drawn else 0)


@pytest.mark.parametrize(("objective", "kind"), PAIRS)
def test_rows_stand_one_for_one_where_they_are_scored(shelf: Workspace, objective: str, kind: str) -> None:
    plan = plan_of(shelf, objective, kind)
    (leaf,) = plan.data.sources
    alone = make_rows(
        plan.objectives[0],
        leaf.store,
        plan.model.inputs,
        problem=plan.model.problem,
        pack=False,
        words=leaf.spec.template.words,
    )
    assert alone.document_R is not None and len(alone.document_R) == len(alone)
    assert alone.document_R.tolist() == sorted(alone.document_R.tolist())
    assert set(alone.document_R.tolist()) <= set(range(len(leaf.store)))


@pytest.mark.parametrize(
    ("objective", "kind"),
    [(o, k) for o, k in itertools.product(SUPPORTED_ROW_KINDS, KINDS) if k not in SUPPORTED_ROW_KINDS[o]],
)
def test_what_is_not_served_is_refused_with_what_serves_it(objective: str, kind: str) -> None:
    with pytest.raises(StageError, match=f"'mine' has rows of kind {kind}, which {objective} does not support") as met:
        match_objectives("mine", kind, [OBJECTIVES[objective](kind=objective)], (), "data.sources[3]")
    assert met.value.where == "data.sources[3]"
    named = met.value.expected.partition(": ")[2].split(", ")
    assert set(named) == {o for o, kinds in SUPPORTED_ROW_KINDS.items() if kind in kinds}


# -- which objective -----------------------------------------------------------------------------------------------------


def test_the_one_that_names_a_source_comes_first() -> None:
    open_, named = NextTokenObjective(kind="next-token"), NextTokenObjective(kind="next-token", on=["mine"])
    assert match_objectives("mine", "text", [open_, named], (), "") == (named, (1,))
    assert match_objectives("other", "text", [named, open_], (), "") == (open_, (1,))
    # Of those that name none, the first that serves the rows.
    classify, masked = ClassifyObjective(kind="classify"), MaskedObjective(kind="masked")
    assert match_objectives("mine", "text", [classify, masked], (), "") == (masked, (1,))
    assert match_objectives("mine", "tagged", [masked, classify], (), "") == (classify, (1,))
    with pytest.raises(StageError, match="no objective names"):
        match_objectives("other", "text", [named], (), "")


@pytest.mark.parametrize(
    ("model", "kind", "task"),
    [("llama", "next-token", "causal"), ("bert", "masked", "masked"), ("t5", "span-corruption", "text-to-text")],
)
def test_a_model_has_the_objective_that_it_was_made_with(shelf: Workspace, model: str, kind: str, task: str) -> None:
    start = locate_model(str(shelf.folder / model), shelf.folder)
    (own,) = resolve_objectives([], start)
    assert own.kind == kind and resolve_task([own], start) == task
    given = [ClassifyObjective(kind="classify"), ClassifyObjective(kind="classify", problem="tags")]
    assert resolve_objectives(given, start) == tuple(given)
    assert resolve_task(given[:1], start) == "classify" and resolve_task(given[1:], start) == "tag"


def test_tags_are_found_in_the_rows(shelf: Workspace) -> None:
    assert plan_of(shelf, "classify", "tagged").model.task == "tag"
    assert plan_of(shelf, "classify", "labelled").model.task == "classify"


# -- which layout --------------------------------------------------------------------------------------------------------


def test_running_text_is_packed_unless_something_stands_before_it(shelf: Workspace) -> None:
    packed = plan_of(shelf, "next-token", "text")
    prompted = plan_of(shelf, "next-token", "text", {"kind": "prompt", "length": 2})
    assert type(packed.data.rows[0]) is PackedRows and type(prompted.data.rows[0]) is PackedExampleRows
    # Not packed where it is scored.
    alone = make_rows(packed.objectives[0], packed.data.sources[0].store, packed.model.inputs, pack=False)
    assert type(alone) is PackedExampleRows
    # Nothing of a template stands between a text and an answer that it has not.
    behind = plan_of(shelf, "next-token", "completion", {"kind": "p-tuning", "template": "{1} {x} {1}"})
    assert behind.model.inputs.frame.separator_ids
    text = make_rows(behind.objectives[0], packed.data.sources[0].store, behind.model.inputs)
    assert isinstance(text, PackedExampleRows) and not text.frame.separator_ids


@pytest.mark.parametrize("objective", ["span-corruption", "text-to-text"])
def test_an_encoder_decoder_reads_one_eos(shelf: Workspace, objective: str) -> None:
    """Rows set it themselves; the frame's is left out, and what a template has before it stays."""
    for tuning, behind in ((None, ()), ({"kind": "p-tuning", "template": "{x} {2}"}, (320, 321))):
        plan = plan_of(shelf, objective, "text", tuning)
        assert plan.model.inputs.frame.suffix_ids == (*behind, plan.model.inputs.encoder.eos)
        ids = plan.data.rows[0].get_row(0, 0).inputs["input_ids"].tolist()
        assert ids.count(plan.model.inputs.encoder.eos) == 1
        assert tuple(ids[-1 - len(behind) :]) == (*behind, plan.model.inputs.encoder.eos)


def test_options_of_an_objective_reach_its_rows(shelf: Workspace) -> None:
    few, many = (plan_of(shelf, "masked", "text", options={"share": share}) for share in (0.1, 0.4))
    assert many.data.rows[0].ledger.trained > 3 * few.data.rows[0].ledger.trained
    assert isinstance(few.data.rows[0], MaskedRows) and few.data.rows[0].continues_V is None
    whole = plan_of(shelf, "masked", "text", options={"whole_words": True}).data.rows[0]
    assert isinstance(whole, MaskedRows) and whole.continues_V is not None
    dense = plan_of(shelf, "span-corruption", "text", options={"density": 0.5, "mean_span": 5})
    thin = plan_of(shelf, "span-corruption", "text")
    assert dense.data.rows[0].ledger.trained > 1.5 * thin.data.rows[0].ledger.trained
    every = plan_of(shelf, "next-token", "instruction", options={"train_on": "all"})
    answers = plan_of(shelf, "next-token", "instruction")
    assert every.data.rows[0].ledger.trained > 3 * answers.data.rows[0].ledger.trained
    short = plan_of(shelf, "text-to-text", "text", options={"target_length": 8})
    assert max(len(short.data.rows[0].get_row(i, i).labels) for i in range(len(short.data.rows[0]))) <= 8
    last = plan_of(shelf, "next-token", "chat", options={"answers": "last"})
    assert last.data.rows[0].ledger.trained < plan_of(shelf, "next-token", "chat").data.rows[0].ledger.trained


# -- into words ----------------------------------------------------------------------------------------------------------


def test_what_puts_rows_into_words(shelf: Workspace) -> None:
    causal = plan_of(shelf, "next-token", "completion").model.inputs
    writes = plan_of(shelf, "text-to-text", "pair").model.inputs
    encoder = plan_of(shelf, "classify", "labelled").model.inputs
    next_token, labels = NextTokenObjective(kind="next-token"), Labels(ProblemType.CLASS, ("a", "b"))

    def made(objective: Any, kind: str, reading: Any, wording: RowTemplate | None = None) -> Any:
        return make_renderer(objective, kind, reading, wording or RowTemplate(), labels)

    for kind in ("text", "input_ids"):
        assert made(next_token, kind, causal) is None
    for kind in ("chat", "instruction"):
        assert isinstance(made(next_token, kind, causal), ChatRenderer)
    # A base model's completions are text; a prompt of one's own says how an instruction is read.
    for kind, wording in (
        ("completion", None),
        ("pair", None),
        ("choices", None),
        ("instruction", RowTemplate(prompt="{question}")),
    ):
        plain = made(next_token, kind, causal, wording)
        assert isinstance(plain, PlainRenderer) and not plain.is_separate
    # An encoder-decoder reads and writes apart.
    apart = made(next_token, "instruction", writes)
    assert isinstance(apart, PlainRenderer) and apart.is_separate
    classify = ClassifyObjective(kind="classify")
    pairs = made(classify, "labelled", encoder)
    assert isinstance(pairs, ClassRenderer) and (pairs.separator, pairs.is_joint) == ("", False)
    one = made(classify, "labelled", causal)  # nothing of its own between two texts
    assert (one.separator, one.is_joint) == ("\n", True)
    assert isinstance(made(classify, "tagged", encoder), TagRenderer)


def test_a_model_with_a_chat_template_is_asked_through_it(shelf: Workspace) -> None:
    reading = plan_of(shelf, "next-token", "completion").model.inputs
    reading.tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    found = make_renderer(NextTokenObjective(kind="next-token"), "completion", reading, RowTemplate(), None)
    assert isinstance(found, ChatRenderer) and found.template == reading.tokenizer.chat_template
    last = NextTokenObjective(kind="next-token", answers="last")
    asked = make_renderer(last, "chat", reading, RowTemplate(answer="{output}"), None)
    assert isinstance(asked, ChatRenderer) and asked.answers == "last" and asked.turn_renderer.answer == "{output}"


def test_a_word_for_each_class(shelf: Workspace) -> None:
    plan = plan_of(shelf, "masked", "labelled")
    store, tokenizer = plan.data.sources[0].store, plan.model.tokenizer
    assert store.labels == ["sums", "words"]
    assert verbalisers(store, plan.model.inputs, YES_NO) == tokenizer.convert_tokens_to_ids(["no", "yes"])
    for words, name in (({"words": "yes"}, "sums"), ({**YES_NO, "words": "yesyes"}, "yesyes")):
        with pytest.raises(StageError, match=f"'{name}'") as met:
            verbalisers(store, plan.model.inputs, words)
        assert "one token" in met.value.problem
    classes = [int(plan.data.rows[0].get_row(i, i).labels.max()) for i in range(len(plan.data.rows[0]))]
    assert set(classes) == set(verbalisers(store, plan.model.inputs, YES_NO))


def test_described_objectives_are_all_built() -> None:
    """A kind that is described and served by no rows would be met here."""
    names = {
        name for name, value in vars(described).items() if name.endswith("Objective") and name != "Objective" and value
    }
    assert len(names - UNIONS) == len(OBJECTIVES)


def test_dropped_tokens_are_told_by_their_cause(shelf: Workspace) -> None:
    """Answers that are too long for a row are no copies of held-out text."""
    rows = [{"instruction": f"say {i}", "output": "one two three " * (60 if i % 2 else 1)} for i in range(40)]
    copies = [{"instruction": "say", "output": "seven"}] * 3
    source = {"name": "x", "path": str(write_rows(shelf.folder / "long.jsonl", [*rows, *copies])), "max_passes": 100}
    held_out = write_rows(shelf.folder / "long-heldout.jsonl", copies[:1])
    raw = shelf.stage("dropped", sources=[source], objectives=[{"kind": "next-token", "train_on": "answers"}])
    raw["evaluation"] = {"learned": [{"name": "held", "path": str(held_out)}]}
    plan = shelf.plan(raw)
    told = [
        int(found[1].replace(",", ""))
        for cause in ("copies of held-out documents", "rows that are skipped")
        if (found := re.search(rf"x: ([\d,]+) tokens are dropped \([^)]*{cause}", "\n".join(plan.notes)))
    ]
    store = plan.data.sources[0].store.documents["tokens"]
    assert told == [store[-3:].sum(), store[1:40:2].sum()]

"""What stands around a text: the tokenizer's own ids, a tuning's places inside of them, and which ids are special."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoModelForMaskedLM, PreTrainedConfig, PreTrainedTokenizerFast

from postgrad.config.tunings import (
    AnyTuning,
    InstructionPromptTuning,
    LoraTuning,
    PrefixTuning,
    PromptTuningConfig,
    PTuning,
)
from postgrad.data.render.frame import Frame
from postgrad.errors import ModelError, StageError
from postgrad.models.location import locate_model
from postgrad.models.task import Task
from postgrad.models.task_head_model import decoder_start_token
from postgrad.plan.model_inputs import (
    ModelInputs,
    count_virtual_tokens,
    get_tokenizer_frame,
    make_encoder,
    make_model_inputs,
)
from tests.conftest import make_llama, make_tokenizer
from tests.tiny_stages import (
    WORDS,
    Workspace,
    bert_tokenizer,
    bos_tokenizer,
    make_workspace,
    roberta_tokenizer,
    save_model,
    t5_tokenizer,
)

Maker = Callable[[], PreTrainedTokenizerFast]
FRAMES: dict[str, tuple[Maker, Frame]] = {
    "bert": (bert_tokenizer, Frame((2,), (3,), (3,))),
    "roberta": (roberta_tokenizer, Frame((0,), (2, 2), (2,))),
    "t5": (t5_tokenizer, Frame((), (1,), (1,))),
    "gpt2": (make_tokenizer, Frame()),
    "llama": (bos_tokenizer, Frame((0,), (0,), ())),
}
MODEL_OF = {"bert": "bert", "roberta": "bert", "t5": "t5", "gpt2": "llama", "llama": "llama"}
TASK_OF: dict[str, Task] = {
    "bert": "masked", "roberta": "masked", "t5": "text-to-text", "gpt2": "causal", "llama": "causal"
}  # fmt: skip


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return make_workspace(tmp_path_factory.mktemp("shelf"), tmp_path_factory.getbasetemp() / "cache")


def read_as(shelf: Workspace, family: str, tuning: AnyTuning | None = None, task: Task | None = None) -> ModelInputs:
    """How a family's tokenizer makes a model of the shelf read."""
    tokenizer = FRAMES[family][0]()
    start = locate_model(str(shelf.folder / MODEL_OF[family]), shelf.folder)
    encoder = make_encoder(tokenizer, 400)
    return make_model_inputs(Task(task or TASK_OF[family]), start, tokenizer, encoder, length=48, seed=0, tuning=tuning)


def prompt(length: int) -> PromptTuningConfig:
    return PromptTuningConfig(kind="prompt", length=length)


def template(text: str) -> PTuning:
    return PTuning(kind="p-tuning", template=text)


# -- the tokenizer's own ids ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FRAMES)
def test_a_frame_is_what_the_tokenizer_sets(family: str) -> None:
    make, frame = FRAMES[family]
    tokenizer = make()
    assert get_tokenizer_frame(tokenizer) == frame

    def bare(text: str) -> np.ndarray:
        return np.array(tokenizer(text, add_special_tokens=False)["input_ids"])

    for one, other in (("one and two", "x1 = y2;"), ("a", "b"), ("b a b", "a"), ("a a a", "a a")):
        assert frame.wrap(bare(one)).tolist() == tokenizer(one)["input_ids"]
        both = tokenizer(one, other)["input_ids"]
        assert frame.wrap(bare(one), bare(other)).tolist() == both
        # The mutants: every other family's frame.
        strange = [its for _, its in FRAMES.values() if its != frame]
        assert all(its.wrap(bare(one), bare(other)).tolist() != both for its in strange)


@pytest.mark.parametrize("family", FRAMES)
def test_a_stored_document_begins_with_what_the_frame_replaces(shelf: Workspace, family: str) -> None:
    """A BOS, or what an encoder has in its place, is stored; the EOS of an encoder-decoder stands behind, not before."""
    reading = read_as(shelf, family)
    begins = FRAMES[family][1].prefix_ids
    assert reading.lead == len(begins)
    assert reading.encoder.prefix_ids == begins


# -- a tuning's places ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FRAMES)
def test_places_stand_inside_of_the_tokenizers_ids(shelf: Workspace, family: str) -> None:
    own, v = FRAMES[family][1], 400
    reading = read_as(shelf, family, prompt(2))
    assert reading.virtual_tokens == (v, v + 1) and reading.has_soft_prompt
    assert reading.frame.prefix_ids == (*own.prefix_ids, v, v + 1)
    assert read_as(shelf, family, InstructionPromptTuning(kind="instruction-prompt", length=2)).frame == reading.frame
    around = read_as(shelf, family, template("{2} {x} {1}"))
    if TASK_OF[family] == "causal":  # behind a question is before its answer
        assert around.frame == Frame((*own.prefix_ids, v, v + 1), (v + 2,))
    else:
        assert around.frame == Frame((*own.prefix_ids, v, v + 1), own.separator_ids, (v + 2, *own.suffix_ids))
    plain = read_as(shelf, family)
    assert not plain.has_soft_prompt and plain.virtual_tokens == ()
    assert plain.frame == (Frame(own.prefix_ids) if TASK_OF[family] == "causal" else own)


@pytest.mark.parametrize("task", ["classify", "tag"])
def test_a_decoder_that_decides_has_the_tokenizers_frame(shelf: Workspace, task: Task) -> None:
    reading = read_as(shelf, "llama", template("{1} {a} {1} {b} {1}"), task)
    assert reading.frame == Frame((0, 400), (401, 0), (402,))


def test_a_template_of_two_texts(shelf: Workspace) -> None:
    reading = read_as(shelf, "bert", template("{1} {a} {2} {b} {1}"), "classify")
    assert reading.frame == Frame((2, 400), (401, 402, 3), (403, 3))


def test_words_and_special_tokens_of_a_template(shelf: Workspace) -> None:
    tokenizer = bert_tokenizer()
    yes, mask = (tokenizer.convert_tokens_to_ids(token) for token in ("yes", "[MASK]"))
    reading = read_as(shelf, "bert", template("{x} yes {1} [MASK]"))
    assert reading.frame == Frame((2,), (3,), (yes, 400, mask, 3))


def test_special_tokens_at_the_ends_are_not_set_twice(shelf: Workspace) -> None:
    expected = read_as(shelf, "bert", template("{2} {x} {1}")).frame
    assert read_as(shelf, "bert", template("[CLS] {2} {x} {1} [SEP]")).frame == expected
    # Only those that the tokenizer sets there.
    other = read_as(shelf, "bert", template("[SEP] {2} {x} {1} [CLS]")).frame
    assert other == Frame((2, 3, 400, 401), (3,), (402, 2, 3))


def test_a_template_without_its_text_is_refused(shelf: Workspace) -> None:
    for text in ("{3}", "{x} {y} {z}", "{x} {x}"):
        with pytest.raises(StageError, match="template"):
            read_as(shelf, "bert", template(text))


@pytest.mark.parametrize("family", FRAMES)
@pytest.mark.parametrize("text", ["{2} {x}", "{x} {2}", "{1} one {x} {3}", "{1} {x} two three"])
def test_the_start_model_reads_the_same_without_vectors_and_has_as_much_room(
    shelf: Workspace, family: str, text: str
) -> None:
    reading = read_as(shelf, family, template(text))
    without = reading.without_tuning
    for mine, its in zip(_parts(reading.frame), _parts(without.frame), strict=True):
        assert its == tuple(token for token in mine if token < 400)
    assert reading.length - reading.frame.size(2) == without.length - without.frame.size(2)
    assert without.without_tuning == without
    # Without a tuning there is nothing to leave out.
    plain = read_as(shelf, family)
    assert plain.without_tuning == plain and plain.without_tuning.length == 48


def _parts(frame: Frame) -> tuple[tuple[int, ...], ...]:
    return frame.prefix_ids, frame.separator_ids, frame.suffix_ids


def test_the_prompts_of_a_lineage_stand_outside(shelf: Workspace, tmp_path: Path) -> None:
    """A later stage's vectors have the next ids, stand nearer to the text, and are all that the start model lacks."""
    raw = shelf.stage(
        "left", {"kind": "p-tuning", "template": "{2} plus {x}", "hidden": 8}, output=str(tmp_path / "run")
    )
    below = shelf.run({**raw, "tokens": 200}).run_folder
    plan = shelf.plan(shelf.stage("on-it", {"kind": "prompt", "length": 3}, model=str(below)))
    v = plan.model.vocab_size
    plus = tuple(plan.model.tokenizer("plus ")["input_ids"])
    assert plan.model.inputs.frame == Frame((v, v + 1, *plus, v + 2, v + 3, v + 4))
    assert plan.model.inputs.without_tuning.frame == Frame((v, v + 1, *plus))
    assert shelf.plan(shelf.stage("plain-on-it", {"kind": "norm"}, model=str(below))).model.inputs.virtual_tokens == (
        v,
        v + 1,
        *plus,
    )


def test_how_many_vectors_a_tuning_sets_among_the_ids() -> None:
    assert count_virtual_tokens(prompt(7)) == 7
    assert count_virtual_tokens(InstructionPromptTuning(kind="instruction-prompt")) == 100
    assert count_virtual_tokens(template("{3} {x} word {4} [MASK]")) == 7
    for none in (None, LoraTuning(kind="lora"), PrefixTuning(kind="prefix")):
        assert count_virtual_tokens(none) == 0


# -- ids that mean something ---------------------------------------------------------------------------------------------


def test_which_tokens_go_on_with_a_word(shelf: Workspace) -> None:
    """As many words begin as there are."""
    text = " ".join(WORDS[:9])
    for family in ("bert", "roberta", "gpt2"):
        reading = read_as(shelf, family)
        ids = np.array(reading.tokenizer(f" {text}", add_special_tokens=False)["input_ids"])
        begins = ~reading.continues_V[ids]
        assert begins.sum() == 9 and len(ids) >= 9
        assert reading.continues_V.shape == (400,)
    pieces = read_as(shelf, "bert")
    tokens = pieces.tokenizer.convert_ids_to_tokens(list(range(len(pieces.tokenizer))))
    assert pieces.continues_V[: len(tokens)].tolist() == [token.startswith("##") for token in tokens]


def test_an_encoder_has_a_mask_and_others_do_not(shelf: Workspace) -> None:
    assert read_as(shelf, "bert").mask_id == 4 and read_as(shelf, "roberta").mask_id == 3
    with pytest.raises(ModelError, match="no mask token"):
        _ = read_as(shelf, "gpt2").mask_id


def test_special_ids(shelf: Workspace) -> None:
    assert set(read_as(shelf, "bert").special_ids) == {0, 1, 2, 3, 4}
    assert set(read_as(shelf, "roberta").special_ids) == {0, 1, 2, 3}


def test_sentinels_count_up_without_a_gap(shelf: Workspace) -> None:
    reading = read_as(shelf, "t5")
    assert reading.sentinels == reading.tokenizer.convert_tokens_to_ids([f"<extra_id_{i}>" for i in range(20)])
    with pytest.raises(ModelError, match="no sentinel tokens"):
        _ = read_as(shelf, "gpt2").sentinels


def test_what_a_decoder_begins_with(shelf: Workspace) -> None:
    for names, expected in (
        ({"decoder_start_token_id": 7, "bos_token_id": 8, "pad_token_id": 9}, 7),
        ({"decoder_start_token_id": None, "bos_token_id": 8, "pad_token_id": 9}, 8),
        ({"pad_token_id": 9}, 9),
    ):
        assert decoder_start_token(_Config(**names)) == decoder_start_token(_Config(), _Config(**names)) == expected
    with pytest.raises(ModelError, match="decoder_start_token_id"):
        decoder_start_token(_Config())
    assert read_as(shelf, "t5").decoder_prefix == (0,) and read_as(shelf, "llama").decoder_prefix == ()


class _Config(PreTrainedConfig):
    def __init__(self, **names: Any) -> None:
        self.__dict__.update(dict.fromkeys(("decoder_start_token_id", "bos_token_id", "pad_token_id")) | names)


def test_what_short_rows_are_filled_up_with(shelf: Workspace) -> None:
    """The model's own pad comes first, then the tokenizer's, then the EOS."""
    bert = read_as(shelf, "bert")
    assert replace(bert, config=_Config(pad_token_id=7)).pad_id == 7
    assert replace(bert, config=_Config(pad_token_id=None)).pad_id == bert.tokenizer.pad_token_id
    gpt2 = read_as(shelf, "gpt2")
    assert gpt2.tokenizer.pad_token_id is None
    assert replace(gpt2, config=_Config(pad_token_id=None)).pad_id == gpt2.encoder.eos


def test_two_texts_are_told_apart_where_the_model_does(shelf: Workspace) -> None:
    assert read_as(shelf, "bert").has_token_types
    assert not read_as(shelf, "roberta").has_token_types and not read_as(shelf, "gpt2").has_token_types


def test_a_text_as_numbers(shelf: Workspace) -> None:
    reading = read_as(shelf, "bert")
    ids = reading.tokenizer("one and x1", add_special_tokens=False)["input_ids"]
    assert reading.count_tokens("one and x1") == len(ids) == 4 and reading.count_tokens("") == 0
    table = AutoModelForMaskedLM.from_pretrained(shelf.folder / "bert").get_input_embeddings().weight.detach().numpy()
    assert np.allclose(reading.mean_embedding("one and x1"), np.mean([table[i] for i in ids], 0), atol=1e-7)
    assert not reading.mean_embedding("").any() and reading.mean_embedding("").shape == (table.shape[1],)


def test_a_llama_that_sets_a_bos_reads_prompts_behind_it(shelf: Workspace) -> None:
    """Through a whole stage: the BOS comes first, then the vectors, then the text; both are no labels."""
    tokenizer = bos_tokenizer()
    save_model(make_llama(bos_token_id=0, eos_token_id=1), tokenizer, shelf.folder / "bos")
    raw = shelf.stage("bos", {"kind": "prompt", "length": 2}, model="bos", tokens=300)
    done, plan = shelf.run(raw), shelf.plan(raw)
    assert done.record.scores.after != done.record.scores.before
    row = plan.data.rows[0].get_row(0, 0)
    v = plan.model.vocab_size
    assert row.inputs["input_ids"][:3].tolist() == [0, v, v + 1]
    starts = np.flatnonzero(row.inputs["input_ids"] == v)
    assert (row.inputs["input_ids"][starts - 1] == 0).all() or len(starts) == 1
    assert row.labels.max() < v
    for piece in plan.evaluation.sets[0].iter_rows(plan.model.context_length):
        ids, labels = piece.row.inputs["input_ids"], piece.row.labels
        assert ids[:3].tolist() == [0, v, v + 1] and (labels[:2] < 0).all()
        assert labels[2] == ids[3]  # with a BOS the first token of a text is asked for

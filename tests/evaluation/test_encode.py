"""Where a question ends and its answer begins, in tokens: by hand, and as lm-eval parts them."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from postgrad.data.render.frame import Frame
from postgrad.errors import DataError
from postgrad.evaluation.choices import loglikelihood
from postgrad.evaluation.choices.loglikelihood import ChoiceItem
from postgrad.plan.model_inputs import get_tokenizer_frame
from tests.conftest import make_llama, make_tokenizer
from tests.tiny_stages import make_t5, t5_tokenizer


def with_bos() -> PreTrainedTokenizerFast:
    """A tokenizer that sets a BOS before every text."""
    tokenizer = make_tokenizer(bos=True)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", tokenizer.bos_token_id)]
    )
    return tokenizer


TOKENIZERS = {"plain": make_tokenizer(), "bos": with_bos(), "t5": t5_tokenizer()}


def frame_of(tokenizer: PreTrainedTokenizerFast) -> Frame:
    """What stands around a question: of a decoder's tokenizer only what comes before it."""
    frame = get_tokenizer_frame(tokenizer)
    return frame if tokenizer is TOKENIZERS["t5"] else Frame(frame.prefix_ids)


def encode_items(
    tokenizer: PreTrainedTokenizerFast, questions: list[tuple[str, list[str]]], *, separate: bool = False
) -> list[ChoiceItem]:
    empty = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    return loglikelihood.encode_items(tokenizer, frame_of(tokenizer), questions, empty=empty, separate=separate)


def encode_item(
    tokenizer: PreTrainedTokenizerFast, context: str, choices: list[str], *, separate: bool = False
) -> ChoiceItem:
    return encode_items(tokenizer, [(context, choices)], separate=separate)[0]


def ids(tokenizer: PreTrainedTokenizerFast, text: str, **options: Any) -> list[int]:
    return tokenizer(text, **options)["input_ids"]


def test_an_answer_is_what_one_text_has_more() -> None:
    """Tokenised together: the space goes to the answer, and a word that would merge with it does."""
    tokenizer = TOKENIZERS["plain"]
    item = encode_item(tokenizer, "one and", [" two.", " three."])
    assert item.context == tuple(ids(tokenizer, "one and"))
    assert item.choices == tuple(tuple(ids(tokenizer, f"one and {w}.")[len(item.context) :]) for w in ("two", "three"))
    assert tokenizer.decode(item.choices[0]) == " two."


def test_spaces_at_the_end_of_a_question_belong_to_the_answer() -> None:
    tokenizer = TOKENIZERS["plain"]
    assert encode_item(tokenizer, "one and ", ["two."]) == encode_item(tokenizer, "one and", [" two."])
    assert encode_item(tokenizer, "one and\n\n", ["two."]) == encode_item(tokenizer, "one and", ["\n\ntwo."])
    # The mutant that leaves them where they are reads another answer.
    kept = ids(tokenizer, "one and ")
    assert tuple(ids(tokenizer, "one and two.")[len(kept) :]) != encode_item(tokenizer, "one and ", ["two."]).choices[0]


def test_a_bos_stands_before_a_question_once() -> None:
    tokenizer = TOKENIZERS["bos"]
    bos = tokenizer.bos_token_id
    item = encode_item(tokenizer, "one and", [" two."])
    assert item.context[0] == bos
    assert bos not in (*item.context[1:], *item.choices[0])
    assert encode_item(tokenizer, "<|begin|>one and", [" two."]) == item


@pytest.mark.parametrize("name", ["plain", "bos"])
def test_an_empty_question_is_a_bos_or_an_eos(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    first = tokenizer.bos_token_id if name == "bos" else tokenizer.eos_token_id
    item = encode_item(tokenizer, "", ["two.", " two."])
    assert item.context == (first,)
    assert item.choices == tuple(tuple(ids(tokenizer, t, add_special_tokens=False)) for t in ("two.", " two."))


def test_an_encoder_decoder_reads_both_apart() -> None:
    tokenizer = TOKENIZERS["t5"]
    item = encode_item(tokenizer, "one and ", ["two", "six plus"], separate=True)
    assert item.context == tuple(ids(tokenizer, "one and"))
    assert item.context[-1] == tokenizer.eos_token_id
    assert item.choices == tuple(tuple(ids(tokenizer, t, add_special_tokens=False)) for t in (" two", " six plus"))
    assert tokenizer.eos_token_id not in item.choices[0]


@pytest.mark.parametrize(("context", "choice"), [("one and", ""), ("", "")])
def test_a_choice_without_tokens(context: str, choice: str) -> None:
    with pytest.raises(DataError, match=r"no token of its own"):
        encode_item(TOKENIZERS["plain"], context, ["two", choice])


text = st.text(st.sampled_from("one two.\n 42*é"), max_size=12)
word = st.text(st.sampled_from("six 7;x"), min_size=1, max_size=6).filter(str.strip)
APART = {"plain": False, "bos": False, "t5": True}


@pytest.fixture(scope="session")
def lms() -> dict[str, Any]:
    """lm-eval around tiny models, by the name of their tokenizer."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        huggingface = pytest.importorskip("lm_eval.models.huggingface", reason="lm-eval is not installed")
        models = {"plain": make_llama(), "bos": make_llama(), "t5": make_t5(len(TOKENIZERS["t5"]))}
        return {name: huggingface.HFLM(model, tokenizer=TOKENIZERS[name]) for name, model in models.items()}


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=60)
@given(st.lists(st.tuples(text, st.lists(word, min_size=1, max_size=3)), min_size=1, max_size=4))
def test_texts_are_parted_as_lm_eval_parts_them(lms: dict[str, Any], name: str, questions: list[Any]) -> None:
    lm, tokenizer = lms[name], TOKENIZERS[name]
    questions = [(context, choices) for context, choices in questions if context.strip() or not context]
    for context, choices in list(questions):
        if context and not all(
            lm._encode_pair(context, choice)[1] for choice in choices
        ):  # it merges into the question
            questions.remove((context, choices))
            with pytest.raises(DataError, match=r"no token of its own"):
                encode_item(tokenizer, context, choices, separate=APART[name])
    for (context, choices), item in zip(
        questions, encode_items(tokenizer, questions, separate=APART[name]), strict=True
    ):
        for choice, own in zip(choices, item.choices, strict=True):
            if context:
                assert (list(item.context), list(own)) == lm._encode_pair(context, choice)
            else:
                assert item.context == (lm.prefix_token_id,)
                assert list(own) == lm.tok_encode(choice, add_special_tokens=False)

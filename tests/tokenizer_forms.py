"""Tokenizers of many forms, made in memory: what they put around a text, and where their special tokens stand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from tests.conftest import new_text, old_text
from tests.tiny_stages import bert_tokenizer

SPECIAL = ("<unk>", "<pad>", "<a>", "<b>", "<s>", "</s>")
NAMES = {"pad_token": "<pad>", "unk_token": "<unk>"}
BOS, EOS = {"bos_token": "<s>"}, {"eos_token": "</s>"}


@dataclass(frozen=True)
class Form:
    """A tokenizer's form. `kind`: the model that reads it, a decoder, or an encoder-decoder named by its family."""

    make: Callable[[], PreTrainedTokenizerBase]
    kind: str = "decoder"
    forced: str | None = None
    """The token that the generation configuration forces first."""


@cache
def _trained_bpe(prefix_space: bool) -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(old_text(20) + new_text(20), trainer)
    return tokenizer.to_str()


@cache
def _trained_metaspace(scheme: str) -> str:
    """A tokenizer like SentencePiece's, with bytes for unknown characters."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer.train_from_iterator(
        old_text(20) + new_text(20), trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    )
    return tokenizer.to_str()


@cache
def _trained_unigram() -> str:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=120, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(old_text(20) + new_text(20), trainer)
    return tokenizer.to_str()


def wrap(base: Callable[[], str], single: str = "$A", pair: str = "$A $B", **names: str) -> PreTrainedTokenizerFast:
    """A tokenizer with special tokens behind its vocabulary, and a template."""
    tokenizer = Tokenizer.from_str(base())
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    if single != "$A":
        own = [token for token in SPECIAL if token in single + pair]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=single, pair=pair, special_tokens=[(token, tokenizer.token_to_id(token)) for token in own]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **(NAMES | names))


plain = partial(wrap, partial(_trained_bpe, False))


def inside() -> PreTrainedTokenizerFast:
    """Special tokens at the start of the vocabulary, as GPT-NeoX and OLMo have some."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(old_text(20), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **NAMES, **EOS)


def with_added(*tokens: str | AddedToken, **names: str) -> PreTrainedTokenizerFast:
    """Words that were added behind everything."""
    tokenizer = plain(**names)
    tokenizer.add_tokens(list(tokens))
    return tokenizer


def changed(change: Callable[[Tokenizer], None], **names: str) -> PreTrainedTokenizerFast:
    """A tokenizer with a BOS and another part changed."""
    made = plain("<s> $A", "<s> $A <s> $B", **BOS, **EOS, **names)
    change(made.backend_tokenizer)
    return made


def processed(make: Callable[..., object]) -> PreTrainedTokenizerFast:
    """`<s> x </s>` by a processor that is no template."""
    tokenizer = plain(**BOS, **EOS)
    backend = tokenizer.backend_tokenizer
    ids = [(token, backend.token_to_id(token)) for token in ("</s>", "<s>")]
    backend.post_processor = make(*ids)
    return tokenizer


def _lowercase(tokenizer: Tokenizer) -> None:
    tokenizer.normalizer = normalizers.Lowercase()


FORMS = {
    "nothing": Form(partial(plain, **EOS)),
    "bos": Form(partial(plain, "<s> $A", "<s> $A <s> $B", **BOS, **EOS)),
    "a bos without a name": Form(partial(plain, "<s> $A", "<s> $A $B", **EOS)),
    "a bos in name only": Form(partial(plain, **BOS, **EOS)),
    "eos": Form(partial(plain, "$A </s>", "$A </s> $B </s>", **EOS)),
    "an eos without a name": Form(partial(plain, "$A </s>", "$A </s> $B </s>")),
    "another eos than its name": Form(partial(plain, "$A <b>", "$A <b> $B <b>", **EOS)),
    "bos and eos": Form(partial(plain, "<s> $A </s>", "<s> $A </s> $B </s>", **BOS, **EOS)),
    "bos is eos": Form(partial(plain, "</s> $A", "</s> $A $B", bos_token="</s>", **EOS)),
    "two in front": Form(partial(plain, "<a> <s> $A", "<a> <s> $A $B", **BOS, **EOS)),
    "three in front, the bos first": Form(partial(plain, "<s> <a> <b> $A", "<s> <a> <b> $A $B", **BOS, **EOS)),
    "two in front without names": Form(partial(plain, "<a> <b> $A", "<a> <b> $A $B", **EOS)),
    "a separator": Form(partial(plain, "<s> $A </s>", "<s> $A </s> </s> $B </s>", sep_token="</s>", cls_token="<s>")),
    "a language code": Form(partial(plain, "<a> $A", "<a> $A $B", **EOS)),
    "BERT's processor": Form(partial(processed, processors.BertProcessing)),
    "RoBERTa's processor": Form(
        partial(processed, lambda sep, cls: processors.RobertaProcessing(sep, cls, add_prefix_space=False))
    ),
    "special tokens inside": Form(inside),
    "a word added behind": Form(partial(with_added, "<think>", "</think>", **EOS)),
    "a word added that strips": Form(partial(with_added, AddedToken("<call>", lstrip=True, rstrip=True), **EOS)),
    "a word added as a single word": Form(partial(with_added, AddedToken("two", single_word=True), **EOS)),
    "truncation stored": Form(partial(changed, lambda t: t.enable_truncation(4))),
    "padding stored": Form(partial(changed, lambda t: t.enable_padding(length=40))),
    "lower case": Form(partial(changed, _lowercase)),
    "prefix space": Form(partial(wrap, partial(_trained_bpe, True), **EOS)),
    "prefix space and bos": Form(partial(wrap, partial(_trained_bpe, True), "<s> $A", "<s> $A $B", **BOS, **EOS)),
    "metaspace": Form(partial(wrap, partial(_trained_metaspace, "always"), "<s> $A", "<s> $A <s> $B", **BOS, **EOS)),
    "metaspace, first": Form(partial(wrap, partial(_trained_metaspace, "first"), "<s> $A", "<s> $A $B", **BOS, **EOS)),
    "metaspace, never": Form(partial(wrap, partial(_trained_metaspace, "never"), **EOS)),
    "unigram": Form(partial(wrap, _trained_unigram, "$A </s>", "$A </s> $B </s>", **EOS)),
    "word pieces": Form(bert_tokenizer),
    "T5": Form(partial(plain, "$A </s>", "$A </s> $B </s>", **EOS), "t5"),
    "BART": Form(partial(plain, "<s> $A </s>", "<s> $A </s> </s> $B </s>", **BOS, **EOS), "bart", forced="<s>"),
    "BART, not forced": Form(partial(plain, "<s> $A </s>", "<s> $A </s> $B </s>", **BOS, **EOS), "bart"),
    "BART, forced alone": Form(partial(plain, "$A </s>", "$A </s> $B </s>", **BOS, **EOS), "bart", forced="<a>"),
    "language code in front": Form(partial(plain, "<a> $A </s>", "<a> $A $B </s>", **BOS, **EOS), "bart", forced="<a>"),
    "language code behind": Form(partial(plain, "$A </s> <a>", "$A $B </s> <a>", **BOS, **EOS), "mbart"),
    "an encoder-decoder's without anything": Form(partial(plain, **EOS), "t5"),
}  # fmt: skip

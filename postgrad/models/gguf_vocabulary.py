"""A tokenizer in llama.cpp's form: byte-level BPE with a pre-tokenizer that llama.cpp knows, or SentencePiece's BPE.

llama.cpp knows a pre-tokenizer by a name. Its own converter finds the name by the ids of one text, so that a new vocabulary has
none; here the pre-tokenizer itself is compared, so that a vocabulary trained from scratch has one.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from gguf import TokenType
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from postgrad.errors import ModelError

if TYPE_CHECKING:
    from gguf import GGUFWriter

_WHERE = "export"
_HINT = "export a folder (a name without .gguf) and serve it with transformers or vLLM"
_SPACE = "▁"
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PRE_TOKENIZERS: Mapping[tuple[str, bool], str] = {
    ("ByteLevel", False): "gpt-2",
    ("Digits ByteLevel", False): "smollm",
    (_WORDS % "{1,3}", True): "llama-bpe",
    (_WORDS % "{1,3}", False): "smaug-bpe",
    (_WORDS % "", False): "qwen2",
}
"""llama.cpp's names by steps or regular expression, and by whether a word of the vocabulary is taken whole."""


def add_vocabulary(writer: GGUFWriter, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> list[str]:
    """Write the tokenizer; returns notes on texts for which llama.cpp gives other ids.

    Raises `ModelError` for a tokenizer that llama.cpp cannot apply.
    """
    parts = _read_parts(tokenizer)
    tokens, types = _list_tokens(tokenizer, parts, model.config.vocab_size)
    if parts["model"].get("byte_fallback"):
        notes = _add_sentencepiece(writer, parts)
        writer.add_token_scores(_merge_scores(tokens, parts["model"]["merges"]))
    else:
        notes = _add_byte_level(writer, parts)
        writer.add_token_merges([" ".join(pair) for pair in _merge_pairs(parts["model"]["merges"])])
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    _add_special_tokens(writer, tokenizer, model)
    if any(token["lstrip"] or token["rstrip"] or token["single_word"] for token in parts["added_tokens"]):
        notes.append("llama.cpp removes no spaces beside added tokens, as this tokenizer does")
    return notes


def _read_parts(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The tokenizer.json. Raises `ModelError` for a tokenizer without one, and for another model than BPE."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    parts = json.loads(backend.to_str()) if backend is not None else {"model": {"type": type(tokenizer).__name__}}
    model = parts["model"]
    if model["type"] != "BPE":
        raise _unsupported(f"a tokenizer of {model['type']}", "BPE, byte-level or SentencePiece's")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise _unsupported(f"a BPE tokenizer with `{key}: {model[key]}`", f"no {key}")
    return parts


def _unsupported(problem: str, expected: str) -> ModelError:
    return ModelError(f"llama.cpp has no word for {problem}", where=_WHERE, expected=expected, hint=_HINT)


def _list_tokens(
    tokenizer: PreTrainedTokenizerBase, parts: Mapping[str, Any], size: int
) -> tuple[list[str], list[TokenType]]:
    """The text and type of each id; rows of the embedding without a token are unused."""
    tokens = [f"[PAD{number}]" for number in range(size)]
    types = [TokenType.UNUSED] * size
    has_bytes = bool(parts["model"].get("byte_fallback"))
    for token, number in tokenizer.get_vocab().items():
        if number >= size:
            raise _unsupported(f"the token {token!r} with the id {number}", f"ids below {size}, the rows of the model")
        is_byte = has_bytes and len(token) == 6 and token.startswith("<0x") and token.endswith(">")
        tokens[number], types[number] = token, TokenType.BYTE if is_byte else TokenType.NORMAL
    for added in parts["added_tokens"]:
        types[added["id"]] = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
    if has_bytes and tokenizer.unk_token_id is not None:
        types[tokenizer.unk_token_id] = TokenType.UNKNOWN
    return tokens, types


# -- byte-level BPE ---------------------------------------------------------------------------------------------------


def _add_byte_level(writer: GGUFWriter, parts: Mapping[str, Any]) -> list[str]:
    key = _pre_tokenizer_key(_steps(parts["pre_tokenizer"], "pretokenizers"))
    name = _PRE_TOKENIZERS.get((key, bool(parts["model"].get("ignore_merges"))))
    if name is None:
        raise _unsupported(
            f"the pre-tokenizer {key}", "that of GPT-2, SmolLM, Llama 3 or Qwen 2, or of a new vocabulary"
        )
    normalizers = [step["type"] for step in _steps(parts["normalizer"], "normalizers")]
    if {*normalizers} - {"NFC"}:
        raise _unsupported(f"the normalizer {', '.join(normalizers)}", "none, or NFC")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(name)
    return ["llama.cpp does not normalize text (NFC), as this tokenizer does"] if normalizers else []


def _steps(part: Mapping[str, Any] | None, key: str) -> list[Mapping[str, Any]]:
    if part is None:
        return []
    return list(part[key]) if part["type"] == "Sequence" else [part]


def _pre_tokenizer_key(steps: Sequence[Mapping[str, Any]]) -> str:
    """The steps without what changes no id, or the regular expression of the only split."""
    names = []
    for step in steps:
        match step:
            case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}:
                names.append("ByteLevel")
            case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False} if names:
                pass  # bytes of the pieces before it
            case {"type": "Digits", "individual_digits": True}:
                names.append("Digits")
            case {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}:
                names.append(regex)
            case _:
                names.append(json.dumps(step, ensure_ascii=False))
    return " ".join(names)


# -- SentencePiece's BPE ----------------------------------------------------------------------------------------------


def _add_sentencepiece(writer: GGUFWriter, parts: Mapping[str, Any]) -> list[str]:
    steps = [*_steps(parts["normalizer"], "normalizers"), *_steps(parts["pre_tokenizer"], "pretokenizers")]
    prefix, notes = False, []
    for step in steps:
        match step:
            case {"type": "Prepend", "prepend": "▁"}:
                prefix = True
            case {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}:
                pass
            case {"type": "Split", "pattern": {"String": " "}}:  # none is left
                pass
            case {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": split} if not (
                split and _spans_words(parts["model"]["vocab"])
            ):
                prefix = scheme != "never"
                if prefix:
                    notes.append("llama.cpp puts a space before every text, also before one that begins with a space")
            case _:
                raise _unsupported(f"the step {json.dumps(step, ensure_ascii=False)[:80]}", "those of Llama 2 or Gemma")
    added = {token["content"] for token in parts["added_tokens"]}
    if not _merges_are_complete(parts["model"], {*added, *map("<0x{:02X}>".format, range(256))}):
        raise _unsupported(
            "a BPE whose merges do not reach each token from any two of its parts", "a vocabulary of SentencePiece"
        )
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_add_space_prefix(prefix)
    return notes


def _spans_words(vocabulary: Mapping[str, int]) -> bool:
    """Whether a token has a space behind its first character, so that a split at spaces matters."""
    return any(_SPACE in token[1:] for token in vocabulary)


def _merge_pairs(merges: Sequence[str | Sequence[str]]) -> list[tuple[str, str]]:
    return [tuple(merge.split(" ", 1)) if isinstance(merge, str) else tuple(merge) for merge in merges]  # type: ignore[bad-return]


def _merges_are_complete(model: Mapping[str, Any], excluded: Collection[str]) -> bool:
    """Whether any two neighbours that join to a token are merged, as llama.cpp does it; `excluded` tokens take no part."""
    tokens = {token for token in model["vocab"] if token not in excluded}
    merges = {*_merge_pairs(model["merges"])}
    return all(
        (token[:cut], token[cut:]) in merges
        for token in tokens
        for cut in range(1, len(token))
        if token[:cut] in tokens and token[cut:] in tokens
    )


def _merge_scores(tokens: Sequence[str], merges: Sequence[str | Sequence[str]]) -> list[float]:
    """Earlier merges have higher scores."""
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(_merge_pairs(merges)):
        ranks.setdefault(left + right, rank)
    return [-float(ranks.get(token, 0)) for token in tokens]


# -- special tokens ---------------------------------------------------------------------------------------------------


def _add_special_tokens(writer: GGUFWriter, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
    ids = {name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "unk", "pad", "sep", "mask")}
    for name, number in ids.items():
        if number is not None:
            getattr(writer, f"add_{name}_token_id")(number)
    ends = getattr(model.generation_config, "eos_token_id", None)
    others = [number for number in (ends if isinstance(ends, list) else [ends]) if number not in (None, ids["eos"])]
    if others:
        writer.add_eot_token_id(others[0])
    around, plain = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (True, False))
    before, _, after = (around[: around.index(plain[0])], plain, around[around.index(plain[0]) + len(plain) :])
    if before not in ([], [ids["bos"]]) or after not in ([], [ids["eos"]]):
        raise _unsupported(
            f"the tokens {tokenizer.convert_ids_to_tokens(around)} of a text", "at most BOS and EOS around it"
        )
    writer.add_add_bos_token(bool(before))
    writer.add_add_eos_token(bool(after))
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, dict):
        writer.add_chat_template([{"name": name, "template": text} for name, text in template.items()])
    elif template:
        writer.add_chat_template(template)

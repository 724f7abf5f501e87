"""Publishing a model with its tokenizer: what was written is read back, and ids and rows are compared before it is final."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from postgrad.errors import ModelError
from postgrad.models.layers import get_embedding_weight
from postgrad.models.location import ModelLocation
from postgrad.models.pretrained import load_tokenizer, save_pretrained
from postgrad.models.tied_weights import output_is_tied
from postgrad.storage.atomic import publish_folder

_PROBE_TOKENS = 512
_NAMED = ("bos", "eos", "pad", "unk", "sep", "cls", "mask")


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of a model as they were: their ids, and the rows of its embeddings."""

    ids: Mapping[str, int]
    tables: tuple[Tensor, ...] = ()
    """The input embedding and, where it is another, the output embedding; none: rows may have changed."""

    @classmethod
    def copy(cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Vocabulary:
        """The vocabulary before a model and its tokenizer are extended."""
        tables = tuple(table.detach().clone() for table in _tables(model))
        return cls(dict(tokenizer.get_vocab()), tables)


def publish_pretrained(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    dtype: torch.dtype,
    state: dict[str, Tensor] | None = None,
    before: Vocabulary | None = None,
    add: Callable[[Path], object] = lambda _: None,
) -> None:
    """Publish a plain Hugging Face folder that reads back as what was there.

    `add` writes more files into the folder, which can be read by then. `before`: the vocabulary of a model that was extended;
    each of its tokens must have kept its id and its rows. Raises `ModelError`, and publishes nothing, where a token has another
    id, an id two tokens, a text other ids, a row other numbers.
    """

    def write(staged: Path) -> None:
        save_pretrained(model, tokenizer, staged, dtype=dtype, state=state)
        verify_tokenizer(tokenizer, staged, folder, before)
        _verify_rows(model, state, dtype, staged, folder)
        if before:
            _verify_old_rows(before, model, folder)
        add(staged)

    publish_folder(folder, write)


def verify_tokenizer(
    tokenizer: PreTrainedTokenizerBase, staged: Path, folder: Path, before: Vocabulary | None = None
) -> None:
    """Raise `ModelError` unless the tokenizer in `staged`, to be published as `folder`, gives every text its ids."""
    read = load_tokenizer(ModelLocation(folder.name, staged))
    for ids in (tokenizer.get_vocab(), before.ids if before else {}):
        verify_ids(ids, read.get_vocab(), folder)
    _verify_texts(tokenizer, read, folder)


def verify_ids(before: Mapping[str, int], after: Mapping[str, int], where: Path) -> None:
    """Raise `ModelError` unless every token of `before` has its id in `after`, and no other token has it."""
    tokens, old_tokens = _by_id(after), _by_id(before)
    for token, number in before.items():
        if after.get(token) != number:
            raise _published_error(
                f"the token {token!r} would get the id {after.get(token)} instead of {number}", where
            )
        if tokens[number] != old_tokens[number]:
            raise _published_error(
                f"the id {number} of {token!r} would also be that of {tokens[number] - {token}}", where
            )
    for number in tokens.keys() - old_tokens.keys():
        if len(tokens[number]) > 1:
            raise _published_error(f"{len(tokens[number])} new tokens would have the id {number}", where)


def _by_id(ids: Mapping[str, int]) -> defaultdict[int, set[str]]:
    out: defaultdict[int, set[str]] = defaultdict(set)
    for token, number in ids.items():
        out[number].add(token)
    return out


def _verify_texts(tokenizer: PreTrainedTokenizerBase, read: PreTrainedTokenizerBase, where: Path) -> None:
    """Compare the ids of texts, with and without special tokens, and the ids of named special tokens."""
    for name in _NAMED:
        before, after = (getattr(each, f"{name}_token_id") for each in (tokenizer, read))
        if before != after:
            raise _published_error(f"the {name} token would have the id {after} instead of {before}", where)
    vocabulary = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__)
    step = max(1, len(vocabulary) // _PROBE_TOKENS)
    tokens = [*vocabulary[::step], *vocabulary[-_PROBE_TOKENS:], *tokenizer.all_special_tokens]
    texts = [tokenizer.convert_tokens_to_string([token]) for token in tokens]
    texts = ["", *texts, "".join(texts), " ".join(texts)]
    for special in (True, False):
        pairs = [each(texts, add_special_tokens=special, verbose=False)["input_ids"] for each in (tokenizer, read)]
        for text, one, other in zip(texts, *pairs, strict=True):
            if one != other:
                raise _published_error(f"the text {text[:40]!r} would be {other[:8]} instead of {one[:8]}", where)


def _verify_rows(
    model: PreTrainedModel, state: dict[str, Tensor] | None, dtype: torch.dtype, staged: Path, where: Path
) -> None:
    """Compare the embeddings in the files with those of the model."""
    files = {}
    for path in staged.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            files |= dict.fromkeys(file.keys(), path)
    for number, table in enumerate(_tables(model)):
        names = [
            name for name, each in model.named_parameters(remove_duplicate=False) if each is table and name in files
        ]
        if not names or (state is not None and names[0] not in state):  # written under another name
            continue
        with safe_open(files[names[0]], "pt") as file:
            written = file.get_tensor(names[0])
        expected = (table if state is None else state[names[0]]).detach().cpu().to(dtype)
        if written.shape != expected.shape or not torch.equal(written, expected):
            raise _published_error(f"the {('input', 'output')[number]} embedding differs in the file", where)


def _verify_old_rows(before: Vocabulary, model: PreTrainedModel, where: Path) -> None:
    for number, new in enumerate(_tables(model) if before.tables else ()):
        old = before.tables[min(number, len(before.tables) - 1)]
        rows = torch.tensor(sorted(number for number in set(before.ids.values()) if number < len(old)))
        if not torch.equal(new[rows], old[rows].to(new.dtype)):
            raise _published_error("rows of old tokens would have other numbers", where)


def _tables(model: PreTrainedModel) -> tuple[Tensor, ...]:
    """The input embedding and, where it is another, the output embedding."""
    output = model.get_output_embeddings()
    if output is None or output_is_tied(model) or not isinstance(output.weight, Tensor):
        return (get_embedding_weight(model),)
    return get_embedding_weight(model), output.weight


def _published_error(problem: str, where: Path) -> ModelError:
    return ModelError(
        problem,
        where=str(where),
        expected="every token with its id and its row",
        hint="nothing was published; report this",
    )

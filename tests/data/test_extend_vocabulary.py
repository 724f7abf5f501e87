"""Does a vocabulary grow by what the text needs, and by nothing that changes what was there?"""

from __future__ import annotations

import json
import random

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from postgrad.data.tokens.extend_vocabulary import extend_vocabulary
from postgrad.errors import ModelError
from tests.conftest import make_tokenizer, new_text, old_text

WORDS = ["Verfassung", "Verfahren", "Fassade", "Größe", "größer", "Straße"]


def german(count: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choice(WORDS) for _ in range(12)) + "." for _ in range(count)]


def byte_level() -> str:
    return make_tokenizer().backend_tokenizer.to_str()


def sentencepiece(alphabet: bool = True) -> str:
    """As Llama's is: no parts of a text, a sign for the space, and bytes for what is unknown."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)] if alphabet else []
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>", "</s>", *bytes_], show_progress=False)
    tokenizer.train_from_iterator(old_text(50), trainer)
    tokenizer.pre_tokenizer = None
    return tokenizer.to_str()


@pytest.mark.parametrize("made", [byte_level, sentencepiece])
def test_new_text_takes_fewer_tokens_and_comes_back_whole(made) -> None:  # type: ignore[no-untyped-def]
    text = made()
    before, found = Tokenizer.from_str(text), extend_vocabulary(text, german(60), 60)
    after = Tokenizer.from_str(found.tokenizer_json)
    for document in german(20, 7):
        ids = after.encode(document).ids
        # Bytes are special tokens to the trainer, and so left out by default.
        assert after.decode(ids, skip_special_tokens=False) == document
        assert len(ids) < 0.5 * len(before.encode(document).ids)
    assert 0 < len(found.old_ids) <= 60


@pytest.mark.parametrize("made", [byte_level, sentencepiece])
def test_old_tokens_keep_their_ids_and_old_text_its_cuts(made) -> None:  # type: ignore[no-untyped-def]
    text = made()
    before, after = Tokenizer.from_str(text), Tokenizer.from_str(extend_vocabulary(text, german(60), 40).tokenizer_json)
    assert all(after.token_to_id(token) == number for token, number in before.get_vocab().items())
    for document in old_text(20, 3):
        assert after.encode(document).ids == before.encode(document).ids


def test_each_new_token_stands_for_the_old_ones_it_is_made_of() -> None:
    text = byte_level()
    before, found = Tokenizer.from_str(text), extend_vocabulary(text, german(60), 40)
    by_id = {number: token for token, number in before.get_vocab().items()}
    for token, parts in found.old_ids.items():
        assert len(parts) > 1 and "".join(by_id[part] for part in parts) == token
    numbers = [Tokenizer.from_str(found.tokenizer_json).token_to_id(token) for token in found.old_ids]
    assert numbers == list(range(len(before.get_vocab()), len(before.get_vocab()) + len(found.old_ids)))


def test_characters_that_were_spelt_in_bytes_become_tokens_first() -> None:
    text = sentencepiece()
    before, found = Tokenizer.from_str(text), extend_vocabulary(text, german(60), 40)
    assert before.token_to_id("ß") is None
    assert found.old_ids["ß"] == [before.token_to_id("<0xC3>"), before.token_to_id("<0x9F>")]
    assert len(Tokenizer.from_str(found.tokenizer_json).encode("ß").ids) <= 2


def test_merges_are_those_of_bpe_trained_anew_on_single_characters() -> None:
    """From a vocabulary of single characters, what is learnt is what `tokenizers` itself learns."""
    empty = Tokenizer(models.BPE())
    empty.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    empty.train_from_iterator([], trainers.BpeTrainer(vocab_size=256, initial_alphabet=alphabet, show_progress=False))
    reference = Tokenizer.from_str(empty.to_str())
    texts = new_text(80, 4)
    reference.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=256 + 60, initial_alphabet=alphabet, show_progress=False)
    )
    found = Tokenizer.from_str(extend_vocabulary(empty.to_str(), texts, 60).tokenizer_json)
    # Pairs that are equally frequent may come in another order; what they come to is the same.
    lengths = [sum(len(tokenizer.encode(text).ids) for text in texts) for tokenizer in (found, reference)]
    assert lengths[0] == pytest.approx(lengths[1], rel=0.01)
    assert len(set(found.get_vocab()) & set(reference.get_vocab())) > 256 + 50


def test_no_token_reaches_over_a_space_and_rare_pairs_are_none() -> None:
    found = extend_vocabulary(sentencepiece(), [*german(60), "einmalig"], 200)
    assert all("▁" not in token[1:] for token in found.old_ids)
    assert not any("einmal" in token for token in found.old_ids)


def test_another_kind_of_tokenizer_is_refused() -> None:
    said = json.loads(byte_level())
    said["model"] = {"type": "WordPiece", "unk_token": "[UNK]", "vocab": {"[UNK]": 0}}
    with pytest.raises(ModelError, match="of type WordPiece"):
        extend_vocabulary(json.dumps(said), german(3), 5)

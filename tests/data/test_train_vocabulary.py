"""A vocabulary is learnt from what may be trained on, in the sources' shares, and is a function of the texts alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from postgrad.data.read.files import RawSource
from postgrad.data.tokens.held_out_split import held_out_mask
from postgrad.data.tokens.store import digest
from postgrad.data.tokens.train_vocabulary import VocabularySource, _repeat_counts, train_vocabulary
from postgrad.errors import DataError
from tests.conftest import new_text, old_text, write_jsonl


def source(path: Path) -> RawSource:
    return RawSource(path.stem, str(path), where="data.sources[0]")


def learnt(parts: list[tuple[Path, float, float]], cache: Path, away: list[Path] | None = None, size: int = 400) -> str:
    portions = [VocabularySource(source(path), lambda _, held=held: held) for path, _, held in parts]
    shares = [share for _, share, _ in parts]
    return train_vocabulary(
        portions,
        lambda _: shares,
        shares_key=shares,
        size=size,
        special_tokens=["<s>", "</s>"],
        held_out_sources=[source(path) for path in away or []],
        cache=cache,
    )


def tokens(written: str) -> set[str]:
    return set(Tokenizer.from_str(written).get_vocab())


def test_special_tokens_come_first_and_every_byte_can_be_written(tmp_path: Path) -> None:
    written = learnt([(write_jsonl(tmp_path / "a.jsonl", old_text(40)), 1.0, 0.0)], tmp_path)
    tokenizer = Tokenizer.from_str(written)
    assert [tokenizer.token_to_id(token) for token in ("<s>", "</s>")] == [0, 1]
    assert 258 < tokenizer.get_vocab_size() <= 400
    text = "three and \u00e9\u4e2d\U0001f600\x00 four"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_what_is_held_out_is_not_looked_at(tmp_path: Path) -> None:
    documents = [*old_text(200), *(f"zyqx{i} zyqx zyqx zyqx" for i in range(200))]
    digests = np.array([digest(d.encode()) for d in documents], np.uint64)
    out = held_out_mask(digests, 0.3)
    marked = [d if not o else f"{d} vwkjj vwkjj" for d, o in zip(documents, out, strict=True)]
    # The mark changes the digest, so only those that are held out with it too may keep it.
    still = held_out_mask(np.array([digest(d.encode()) for d in marked], np.uint64), 0.3)
    kept = [m if s or not o else d for d, m, o, s in zip(documents, marked, out, still, strict=True)]
    assert sum("vwkjj" in d for d in kept) > 20
    path = write_jsonl(tmp_path / "a.jsonl", kept)
    assert not any("vwkjj" in token for token in tokens(learnt([(path, 1.0, 0.3)], tmp_path)))
    # The mutant: a vocabulary of all documents has it.
    assert any("vwkjj" in token for token in tokens(learnt([(path, 1.0, 0.0)], tmp_path)))


def test_copies_of_other_held_out_files_are_not_looked_at(tmp_path: Path) -> None:
    secret = [f"vwkjj vwkjj {i}" for i in range(30)]
    path = write_jsonl(tmp_path / "a.jsonl", [*old_text(50), *secret])
    away = write_jsonl(tmp_path / "b.jsonl", secret)
    assert not any("vwkjj" in token for token in tokens(learnt([(path, 1.0, 0.0)], tmp_path, [away])))
    assert any("vwkjj" in token for token in tokens(learnt([(path, 1.0, 0.0)], tmp_path)))


def test_sources_count_by_their_share(tmp_path: Path) -> None:
    old, new = write_jsonl(tmp_path / "old.jsonl", old_text(300)), write_jsonl(tmp_path / "new.jsonl", new_text(30))
    rng = np.random.default_rng(0)
    parts = []
    for count in (3000, 400):
        digests = rng.integers(0, 2**63, count).astype(np.uint64)
        parts.append((digests, rng.integers(10, 100, count), VocabularySource(source(old), lambda _: 0.0)))

    def read_of(most: int) -> list[int]:
        times = _repeat_counts(parts, lambda counts: (0.25, 0.75), np.empty(0, np.uint64), most)
        return [int(sizes @ n) for (_, sizes, _), n in zip(parts, times, strict=True)]

    read, few = read_of(10**9), read_of(20_000)
    assert sum(read) == pytest.approx(sum(int(sizes.sum()) for _, sizes, _ in parts), rel=1e-3)
    assert read[0] / sum(read) == pytest.approx(0.25, abs=1e-3)
    # A limit is on the bytes of both together.
    assert sum(few) == pytest.approx(20_000, rel=0.01) and few[1] / sum(few) == pytest.approx(0.75, abs=0.01)
    mostly_old = tokens(learnt([(old, 0.99, 0.0), (new, 0.01, 0.0)], tmp_path, size=290))
    mostly_new = tokens(learnt([(old, 0.01, 0.0), (new, 0.99, 0.0)], tmp_path, size=290))
    assert "Ġand" in mostly_old and "Ġand" not in mostly_new


def test_the_same_texts_give_the_same_bytes_in_every_process(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", old_text(200) + new_text(200))
    here = learnt([(path, 1.0, 0.1)], tmp_path / "here")
    code = (
        "import sys; from pathlib import Path; from tests.data.test_train_vocabulary import learnt;"
        f"sys.stdout.write(learnt([(Path({str(path)!r}), 1.0, 0.1)], Path({str(tmp_path / 'there')!r})))"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "7", "RAYON_NUM_THREADS": "3", "TOKENIZERS_PARALLELISM": "true"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout == here
    assert json.loads(here)["model"]["merges"]


def test_it_is_learnt_once_and_again_when_the_text_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", old_text(60))
    first = learnt([(path, 1.0, 0.0)], tmp_path)
    from postgrad.data.tokens import train_vocabulary

    monkeypatch.setattr(train_vocabulary.Tokenizer, "train_from_iterator", None, raising=False)
    assert learnt([(path, 1.0, 0.0)], tmp_path) == first
    write_jsonl(path, old_text(60, seed=9))
    with pytest.raises(TypeError):
        learnt([(path, 1.0, 0.0)], tmp_path)


def test_token_ids_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "ids.jsonl"
    path.write_text('{"input_ids": [1, 2, 3]}\n')
    with pytest.raises(DataError, match=r"ids\.jsonl:1.*has token ids[\s\S]*model\.tokenizer"):
        learnt([(path, 1.0, 0.0)], tmp_path)


def test_when_everything_is_held_out_nothing_can_be_learnt(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", old_text(5))
    with pytest.raises(DataError, match="no document remains"):
        learnt([(path, 1.0, 1.0)], tmp_path)

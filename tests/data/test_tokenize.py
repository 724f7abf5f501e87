"""Does every document end in the store once, with one eos, whatever happens to the process that builds it?"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import random
import re
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from postgrad.data.problem_type import ProblemType
from postgrad.data.read.files import HubDataset, RawSource
from postgrad.data.read.labels import Labels
from postgrad.data.render.chat import ChatRenderer
from postgrad.data.render.renderer import Renderer
from postgrad.data.render.renderers import ClassRenderer, PlainRenderer, TagRenderer
from postgrad.data.tokens import batches, source_files, tokenize
from postgrad.data.tokens import store as store_module
from postgrad.data.tokens.encode import token_marks
from postgrad.data.tokens.encoder import Encoder
from postgrad.data.tokens.source_files import read_all_labels
from postgrad.data.tokens.store import TokenStore, digest
from postgrad.data.tokens.tokenize import build_store
from postgrad.errors import DataError, ModelError
from tests.conftest import make_tokenizer

BOS, EOS = 0, 1
WORDS = ["the", "cat", "sat", "on", "a", "mat", "while", "it", "rained", "and", "nobody", "Übermut", "42"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator([" ".join(WORDS)] * 3, trainer)
    return made


@pytest.fixture(scope="module")
def encoder(tokenizer: Tokenizer) -> Encoder:
    return Encoder(tokenizer.to_str(), (), EOS, 400)


def prose(seed: int, words: int) -> str:
    draw = random.Random(seed)
    return " ".join(draw.choice(WORDS) + draw.choice(["", "", ".", "\n"]) for _ in range(words))


def corpus(folder: Path, texts: list[str], name: str = "a.jsonl") -> RawSource:
    (folder / name).write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return RawSource("s", path=name, root=folder, where="data.sources[0]")


def tree(folder: Path) -> dict[str, str]:
    files = (file for file in sorted(folder.rglob("*")) if file.is_file())
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


# --- what is in a store -------------------------------------------------------------------------------


def test_documents_become_ids_and_one_eos(tmp_path: Path, tokenizer: Tokenizer, encoder: Encoder) -> None:
    texts = [prose(n, 1 + n * 7) for n in range(60)] + ["", "  ", "end"]
    store = build_store(corpus(tmp_path, texts), encoder, tmp_path / "cache")
    kept = [text for text in texts if text.strip()]
    assert (len(store), store.empty_count, store.kind, store.eos) == (len(kept), 2, "text", EOS)
    for number, text in enumerate(kept):
        assert store.read(number).tolist() == [*tokenizer.encode(text).ids, EOS]
        assert store.documents["bytes"][number] == len(text.encode())
        assert store.documents["digest"][number] == digest(text.encode())
    store.verify()


@pytest.mark.parametrize("bos", [None, BOS, EOS])
@pytest.mark.parametrize("text", ["cat", "cat</s>", "cat</s></s>", "<s>cat", "<s><s>cat</s>", "a</s>b", "</s>cat"])
def test_never_two_eos_and_never_two_bos(tmp_path: Path, tokenizer: Tokenizer, bos: int | None, text: str) -> None:
    encoder = Encoder(tokenizer.to_str(), () if bos is None else (bos,), EOS, 400)
    ids = build_store(corpus(tmp_path, [text]), encoder, tmp_path / "cache").read(0).tolist()
    assert ids[-1] == EOS
    assert ids[-2] != EOS
    if bos is not None:
        assert ids[0] == bos
        assert ids[1] != bos


def test_a_document_of_nothing_but_eos_is_empty(tmp_path: Path, encoder: Encoder) -> None:
    store = build_store(corpus(tmp_path, ["</s>", "cat", "</s></s>"]), encoder, tmp_path / "cache")
    assert (len(store), store.empty_count) == (1, 2)
    (tmp_path / "b").mkdir()
    with pytest.raises(DataError, match="is empty"):
        build_store(corpus(tmp_path / "b", ["</s>"]), encoder, tmp_path / "cache")


def test_truncation_padding_and_the_template_are_off(tmp_path: Path, tokenizer: Tokenizer, encoder: Encoder) -> None:
    from tokenizers.processors import TemplateProcessing

    other = Tokenizer.from_str(tokenizer.to_str())
    other.enable_truncation(4)
    other.enable_padding(length=64)
    source = corpus(tmp_path, [prose(1, 50)])
    store = build_store(source, Encoder(other.to_str(), (), EOS, 400), tmp_path / "cache")
    plain = build_store(source, encoder, tmp_path / "cache")
    assert store.path == plain.path  # they do not even change the fingerprint
    other.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    store = build_store(source, Encoder(other.to_str(), (), EOS, 400), tmp_path / "cache")
    assert store.read(0).tolist() == plain.read(0).tolist()


def test_ids_are_stored_as_they_are(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = [tokenizer.encode("the cat").ids, [], [BOS, 70, 71, EOS], [EOS], [399]]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"input_ids": ids}) + "\n" for ids in rows))
    source = RawSource("s", path="a.jsonl", root=tmp_path)
    store = build_store(source, Encoder(tokenizer.to_str(), (BOS,), EOS, 400), tmp_path / "cache")
    assert [store.read(n).tolist() for n in range(3)] == [[BOS, *rows[0], EOS], rows[2], [BOS, 399, EOS]]
    assert (store.kind, store.empty_count) == ("input_ids", 2)
    assert store.documents["bytes"][0] == len(b"the cat")
    assert store.documents["digest"][0] == digest(np.array(rows[0], "<u4").data)


@pytest.mark.parametrize("vocabulary", [65_535, 65_536, 65_537, 262_144])
def test_width_and_range(tmp_path: Path, tokenizer: Tokenizer, vocabulary: int) -> None:
    encoder = Encoder(tokenizer.to_str(), (), EOS, vocabulary)
    file = tmp_path / "a.jsonl"
    file.write_text(f'{{"input_ids": [5]}}\n{{"input_ids": [2, {vocabulary - 1}]}}\n')
    store = build_store(RawSource("s", path="a.jsonl", root=tmp_path), encoder, tmp_path / "cache")
    assert store.read(1).tolist() == [2, vocabulary - 1, EOS]
    file.write_text(f'{{"input_ids": [5]}}\n{{"input_ids": [2, {vocabulary}]}}\n')
    with pytest.raises(DataError) as caught:
        build_store(RawSource("s", path="a.jsonl", root=tmp_path), encoder, tmp_path / "cache")
    assert caught.value.where == f"{file}:2"
    assert not list((tmp_path / "cache").rglob(".staging*"))


def test_a_tokenizer_larger_than_the_model_is_refused_with_the_place(tmp_path: Path, tokenizer: Tokenizer) -> None:
    source = corpus(tmp_path, ["A", "the cat sat"])
    with pytest.raises(DataError, match=r"a\.jsonl:2: token id") as caught:
        build_store(source, Encoder(tokenizer.to_str(), (), EOS, 260), tmp_path / "cache")
    assert "use the model's own tokenizer" in str(caught.value)


@pytest.mark.parametrize(
    "made",
    [
        lambda: Encoder("{}", (), 400, 400),
        lambda: Encoder("{}", (-1,), 0, 400),
        lambda: Encoder("{}", (), 1, 400).load(),
        lambda: Encoder("[", (), 1, 4).fingerprint,
    ],
)
def test_an_impossible_encoder_is_a_model_error(made: Callable[[], Any]) -> None:
    with pytest.raises(ModelError):
        made()


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    texts=st.lists(st.one_of(st.text(max_size=30), st.sampled_from(["", "</s>", "a</s>"])), min_size=1, max_size=30),
    batch=st.integers(1, 40),
    shard=st.integers(1, 200),
    workers=st.integers(1, 3),
)
def test_the_ledger(
    tmp_path_factory: pytest.TempPathFactory,
    encoder: Encoder,
    texts: list[str],
    batch: int,
    shard: int,
    workers: int,
) -> None:
    """Documents in = stored + empty, whatever the batches, shards and threads; the tokens stay the same."""
    folder = tmp_path_factory.mktemp("ledger")
    source = corpus(folder, [*texts, "the cat"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batches, "BATCH_CHARACTERS", batch)
        patch.setattr(batches, "SHARD_CHARACTERS", shard)
        store = build_store(source, encoder, folder / "cache", workers=workers)
    assert len(texts) + 1 == len(store) + store.empty_count
    whole = encoder.load()
    expected = [whole.encode(text, add_special_tokens=False).ids for text in [*texts, "the cat"] if text.strip()]
    for ids in expected:
        while ids and ids[-1] == EOS:
            ids.pop()
    assert [store.read(n).tolist() for n in range(len(store))] == [[*ids, EOS] for ids in expected if ids]


def test_a_long_document_is_encoded_in_pieces(
    tmp_path: Path, encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = ["short", prose(3, 4000), "", prose(4, 3000), "short", "x" * 20_000, prose(5, 100)]
    source = corpus(tmp_path, texts)
    plain = build_store(source, encoder, tmp_path / "cache")
    monkeypatch.setattr(batches, "WHOLE_DOCUMENT", 4000)
    monkeypatch.setattr(batches, "PIECE", 1000)
    monkeypatch.setattr(batches, "SHARD_CHARACTERS", 15_000)
    pieces = build_store(source, encoder, tmp_path / "cache")
    assert len(pieces) == len(plain) == 6
    assert pieces.empty_count == 1
    for number in (0, 1, 2, 3, 5):
        assert pieces.read(number).tolist() == plain.read(number).tolist()
    load = encoder.load()
    assert load.decode(pieces.read(4)[:-1].tolist()) == "x" * 20_000
    assert pieces.documents["digest"].tolist() == plain.documents["digest"].tolist()
    assert pieces.documents["bytes"].tolist() == plain.documents["bytes"].tolist()


def test_pieces_are_cut_at_a_line_that_begins_with_a_letter() -> None:
    text = "a\nb\n\n c\n1\nüber" + "z" * 10
    assert text[batches._split_position(text, 18) :].startswith("über")
    assert batches._split_position("aaa bbb ccc", 9) == 7
    assert batches._split_position("a" * 20, 9) == 9


# --- the cache ----------------------------------------------------------------------------------------


def test_a_store_is_reused_and_what_changes_it_changes_its_name(
    tmp_path: Path, tokenizer: Tokenizer, encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "one\n\ntwo three</s>"
    (tmp_path / "a.txt").write_text(text)
    source = RawSource("s", path="a.txt", root=tmp_path)
    first = build_store(source, encoder, tmp_path / "cache")
    with monkeypatch.context() as patch:
        patch.setattr(tokenize, "_build", None)  # it would be called
        assert build_store(source, encoder, tmp_path / "cache").path == first.path
        (tmp_path / "moved").mkdir()
        (tmp_path / "moved" / "b.txt").write_text(text)
        moved = RawSource("other name", path="moved/b.txt", root=tmp_path)
        assert build_store(moved, encoder, tmp_path / "cache").path == first.path
    paths = {first.path}
    paths.add(
        build_store(RawSource("s", path="a.txt", root=tmp_path, documents="lines"), encoder, tmp_path / "cache").path
    )
    for prefix, eos, vocabulary in (((BOS,), EOS, 400), ((), 2, 400), ((), EOS, 401)):
        changed = Encoder(tokenizer.to_str(), prefix, eos, vocabulary)
        paths.add(build_store(source, changed, tmp_path / "cache").path)
    (tmp_path / "a.txt").write_text("One\n\ntwo three</s>")
    paths.add(build_store(source, encoder, tmp_path / "cache").path)
    assert len(paths) == 6


def test_a_file_is_hashed_once(tmp_path: Path, encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    source = corpus(tmp_path, ["the cat"])
    file, young = tmp_path / "a.jsonl", time.time_ns()
    build_store(source, encoder, tmp_path / "cache")
    assert not (tmp_path / "cache" / "hashes.json").exists()  # too young to be sure
    os.utime(file, ns=(young - 10**10,) * 2)
    first = build_store(source, encoder, tmp_path / "cache")
    monkeypatch.setattr(source_files, "sha256", None)
    assert build_store(source, encoder, tmp_path / "cache").path == first.path


@pytest.mark.parametrize("name", ["store.json", "documents.npy", "shard-00000/tokens.bin"])
def test_a_damaged_store_is_rebuilt(tmp_path: Path, encoder: Encoder, name: str) -> None:
    source = corpus(tmp_path, [prose(1, 50)])
    first = build_store(source, encoder, tmp_path / "cache")
    whole = tree(first.path)
    (first.path / name).write_bytes(b"x")
    assert tree(build_store(source, encoder, tmp_path / "cache").path) == whole


def test_a_file_that_changes_under_the_build_is_refused(tmp_path: Path, encoder: Encoder) -> None:
    source = corpus(tmp_path, [prose(n, 50) for n in range(9)])

    def progress(_: int, __: int) -> None:
        (tmp_path / "a.jsonl").write_text('{"text": "other"}\n')

    with pytest.raises(DataError, match="changed while it was being read"):
        build_store(source, encoder, tmp_path / "cache", progress)
    assert not list((tmp_path / "cache" / "stores").iterdir())


def test_progress_is_counted_in_bytes_and_ends_at_the_total(
    tmp_path: Path, encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "BATCH_CHARACTERS", 500)
    monkeypatch.setattr("postgrad.data.read.text_lines._BLOCK", 500)
    source = corpus(tmp_path, [prose(n, 50) for n in range(30)])
    told: list[tuple[int, int]] = []
    build_store(source, encoder, tmp_path / "cache", lambda done, total: told.append((done, total)))
    size = (tmp_path / "a.jsonl").stat().st_size
    assert {total for _, total in told} == {size}
    done = [done for done, _ in told]
    assert done == sorted(done)
    assert done[-1] == size
    assert len(set(done)) > 3


def test_a_hub_folder_becomes_a_store(tmp_path: Path, encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "set").mkdir()
    corpus(tmp_path / "set", ["the cat", "", "sat"], "train.jsonl")
    source = RawSource("s", hub=HubDataset("set"), root=tmp_path)
    store = build_store(source, encoder, tmp_path / "cache")
    assert (len(store), store.empty_count) == (2, 1)


def test_neither_torch_nor_transformers_is_imported() -> None:
    code = "import sys, postgrad.data.tokens.tokenize, postgrad.data.filter.contamination; "
    code += "print([m for m in sys.modules if m in "
    code += "('torch', 'transformers', 'pyarrow', 'datasets', 'huggingface_hub')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_threads_of_the_tokenizer_itself_are_not_started(tmp_path: Path, encoder: Encoder) -> None:
    """They would be one a core in each of ours."""
    code = """
        import os, sys
        from pathlib import Path
        from postgrad.data.tokens.tokenize import Encoder, build_store
        from postgrad.data.read.files import RawSource
        root = Path(sys.argv[1])
        encoder = Encoder((root / "t.json").read_text(), (), 1, 400)
        build_store(RawSource("s", path="a.jsonl", root=root), encoder, root / "cache", workers=2)
        print(len(os.listdir("/proc/self/task")), os.environ.get("TOKENIZERS_PARALLELISM"))
    """
    if not Path("/proc/self/task").exists():
        pytest.skip("threads are counted in /proc")
    corpus(tmp_path, [prose(n, 20) for n in range(50)])
    (tmp_path / "t.json").write_text(encoder.tokenizer)
    environment = {key: value for key, value in os.environ.items() if key != "TOKENIZERS_PARALLELISM"}
    environment |= {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code), str(tmp_path)], capture_output=True,
                          text=True, check=True, env=environment)  # fmt: skip
    assert done.stdout.split() == ["1", "None"]


# --- rows that have parts -----------------------------------------------------------------------------

PIECES = ["the", " cat", "é", "日本", "ü", " ", "\n", "🙂", "</s>", "a", "Übermut", "x" * 9]


def rows_of(folder: Path, rows: list[dict[str, Any]], **options: Any) -> RawSource:
    folder.mkdir(exist_ok=True)
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return RawSource("s", path="a.jsonl", root=folder, where="data.sources[0]", **options)


def runs(store: TokenStore, document: int, tokenizer: Tokenizer) -> list[tuple[int, str]]:
    """The text of each run of equal marks."""
    ids, marks = store.read(document).tolist(), store.marks(document)
    assert marks is not None
    borders = [0, *(np.flatnonzero(np.diff(marks.astype(int))) + 1).tolist(), len(ids)]
    return [
        (int(marks[start]), tokenizer.decode(ids[start:stop], skip_special_tokens=False))
        for start, stop in itertools.pairwise(borders)
    ]


CHAT = [
    {"role": "user", "content": "the cat é"},
    {"role": "assistant", "content": "日本 sat"},
    {"role": "user", "content": "on"},
    {"role": "assistant", "content": "a mat"},
]
CHATML = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
PLAIN_CHAT = ChatRenderer(None, {"eos_token": "</s>"})
BEFORE = "### User:\nthe cat é\n\n### Assistant:\n"
AFTER = "\n\n### User:\non\n\n### Assistant:\n"
CLASSES = Labels(ProblemType.CLASS, ("no", "yes"))

GOLDEN: list[tuple[str, dict[str, Any], Renderer, list[tuple[int, str]], list[float] | None]] = [
    ("chat", {"messages": CHAT}, PLAIN_CHAT, [(0, BEFORE), (1, "日本 sat</s>"), (0, AFTER), (1, "a mat</s>")], None),
    ("chat", {"messages": CHAT}, ChatRenderer(CHATML, {"eos_token": "</s>"}),
     [(0, "[user]the cat é</s>\n[assistant]"), (1, "日本 sat</s>"), (0, "\n[user]on</s>\n[assistant]"),
      (1, "a mat</s>")], None),
    ("chat", {"messages": CHAT}, ChatRenderer("<s>" + CHATML, {"eos_token": "</s>"}, answers="last"),
     [(0, "<s>[user]the cat é</s>\n[assistant]日本 sat</s>\n[user]on</s>\n[assistant]"), (1, "a mat</s>")], None),
    ("instruction", {"instruction": "the", "input": "cat", "output": "sat"}, PLAIN_CHAT,
     [(0, "### User:\nthe\n\ncat\n\n### Assistant:\n"), (1, "sat</s>")], None),
    ("completion", {"prompt": "the cat", "completion": " sat</s>"}, PlainRenderer(),
     [(0, "the cat"), (1, " sat</s>")], None),
    ("completion", {"prompt": "", "completion": "cat"}, PlainRenderer(), [(1, "cat</s>")], None),
    ("pair", {"source": "日", "target": "é"}, PlainRenderer(), [(0, "日\n"), (1, "é</s>")], None),
    ("pair", {"source": "the", "target": "cat"}, PlainRenderer(is_separate=True), [(0, "the"), (1, "cat</s>")], None),
    ("labelled", {"premise": "the é", "hypothesis": "日 cat", "label": "yes"}, ClassRenderer(CLASSES),
     [(0, "the é\n"), (1, "日 cat</s>")], [1.0]),
    ("labelled", {"premise": "the é", "hypothesis": "日 cat", "label": "no"}, ClassRenderer(CLASSES, "", is_joint=False),
     [(0, "the é"), (1, "日 cat</s>")], [0.0]),
    ("labelled", {"sentence": "cat", "label": "no"}, ClassRenderer(CLASSES), [(0, "cat</s>")], [0.0]),
    ("labelled", {"sentence": "cat", "label": 2.5}, ClassRenderer(Labels(ProblemType.NUMBER)), [(0, "cat</s>")], [2.5]),
    ("labelled", {"sentence": "cat", "labels": ["yes"]}, ClassRenderer(Labels(ProblemType.MULTI_LABEL, ("no", "yes"))),
     [(0, "cat</s>")], [0.0, 1.0]),
    ("labelled", {"sentence": "cat", "label": "no"}, PlainRenderer("{sentence}?"), [(0, "cat?"), (1, " no</s>")], None),
    ("choices", {"question": "a", "choices": ["cat", "mat"], "answer": 1}, PlainRenderer(),
     [(0, "a\nA. cat\nB. mat\nAnswer:"), (1, " mat</s>")], None),
    ("tagged", {"tokens": ["the", "cat"], "tags": ["O", "B"]}, PlainRenderer(), [(0, "the cat\n"), (1, "O B</s>")], None),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "row", "renderer", "expected", "values"), GOLDEN)
@pytest.mark.parametrize("bos", [None, BOS])
def test_every_kind_of_row_with_its_marks(
    tmp_path: Path,
    tokenizer: Tokenizer,
    bos: int | None,
    kind: str,
    row: dict[str, Any],
    renderer: Renderer,
    expected: list[tuple[int, str]],
    values: list[float] | None,
) -> None:
    encoder = Encoder(tokenizer.to_str(), () if bos is None else (bos,), EOS, 400)
    store = build_store(rows_of(tmp_path, [row]), encoder, tmp_path / "cache", renderer=renderer)
    if bos is not None and not expected[0][1].startswith("<s>"):  # never two, whether or not the template sets one
        first, *rest = expected
        expected = [(0, "<s>"), *expected] if first[0] else [(0, "<s>" + first[1]), *rest]
    assert runs(store, 0, tokenizer) == expected
    assert store.kind == kind
    if values is None:
        assert store.values is None
    else:
        assert store.values is not None
        assert store.values[0].tolist() == values
    assert store.labels == (list(renderer.labels.names) or None if renderer.labels else None)
    store.verify()


def test_only_the_first_token_of_a_word_has_its_tag(tmp_path: Path, tokenizer: Tokenizer, encoder: Encoder) -> None:
    words, tags = ["Übermut", "the", "日本", "\u200b", "42."], ["B", "O", "B", "O", "I"]
    source = rows_of(tmp_path, [{"tokens": words, "tags": tags}])
    store = build_store(source, encoder, tmp_path / "cache", renderer=TagRenderer(read_all_labels([source], tmp_path)))
    assert (store.labels, store.problem, store.values) == (["B", "I", "O"], "tags", None)
    ids, marks = store.read(0).tolist(), store.marks(0)
    assert marks is not None
    at = np.flatnonzero(marks).tolist()
    assert [store.labels[marks[n] - 1] for n in at] == tags
    for n, following, word in zip(at, [*at[1:], len(ids) - 1], words, strict=True):
        assert tokenizer.decode(ids[n:following]).strip(" ") == word
    assert (ids[-1], marks[-1]) == (EOS, 0)


def byte_level() -> Tokenizer:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(["".join(PIECES[:8]), "é日本", "ü日", "🙂🙂 é", "the the cat"] * 3, trainer)
    return made


def byte_fallback() -> Tokenizer:
    """As SentencePiece makes them: spaces are marked, and what is not in the vocabulary falls apart into bytes."""
    vocabulary = {"<unk>": 2, "<s>": 0, "</s>": 1} | {f"<0x{n:02X}>": 3 + n for n in range(256)}
    letters = "▁abcdefghijklmnopqrstuvwxyz日"
    merged = ["th", "the", "▁the", "ca", "cat", "▁cat"]
    for token in (*letters, *merged):
        vocabulary[token] = len(vocabulary)
    merges = [("t", "h"), ("th", "e"), ("▁", "the"), ("c", "a"), ("ca", "t"), ("▁", "cat")]
    made = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    made.normalizer = normalizers.Replace(" ", "▁")
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    made.add_special_tokens(["<s>", "</s>"])
    return made


def token_bytes(token: str) -> bytes:
    """The bytes that a token stands for, by the definitions of the two families."""
    if token in ("<s>", "</s>"):
        return token.encode()
    if match := re.fullmatch(r"<0x([0-9A-F]{2})>", token):
        return bytes([int(match[1], 16)])
    if "▁" in token or not set(token) <= ALPHABET.keys():
        return token.replace("▁", " ").encode()
    return bytes(ALPHABET[character] for character in token)


def _alphabet() -> dict[str, int]:
    """The letter that stands for each byte in byte-level tokens: itself where it can be seen, else one from 256 on."""
    seen = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in seen]
    return {chr(byte): byte for byte in seen} | {chr(256 + n): byte for n, byte in enumerate(hidden)}


ALPHABET = _alphabet()
FAMILIES = {"byte-level": byte_level(), "byte-fallback": byte_fallback()}


@settings(max_examples=120)
@given(
    pieces=st.lists(st.tuples(st.sampled_from(PIECES), st.integers(0, 1)), min_size=1, max_size=12),
    family=st.sampled_from(sorted(FAMILIES)),
)
def test_a_token_is_an_answers_when_any_of_its_bytes_is(pieces: list[tuple[str, int]], family: str) -> None:
    """Against the tokens' own bytes laid end to end: a character is an answer's if any of its bytes is met."""
    tokenizer = FAMILIES[family]
    text = "".join(text for text, _ in pieces)
    marked = [mark for text, mark in pieces for character in text for _ in character.encode()]
    spans = [n for n, character in enumerate(text) for _ in character.encode()]
    encoding = tokenizer.encode(text, add_special_tokens=False)
    expected, at = [], 0
    for token in encoding.tokens:
        size = len(token_bytes(token))
        characters = set(spans[at : at + size])
        expected.append(max(mark for mark, character in zip(marked, spans, strict=True) if character in characters))
        at += size
    assert at == len(marked)
    given = token_marks(pieces, np.array(encoding.offsets).reshape(-1, 2), False)
    assert given.tolist() == expected


def test_the_marks_of_a_pair_are_the_token_types_of_the_tokenizers_own_pairs(tmp_path: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    names = ["[UNK]", "[CLS]", "[SEP]", "the", "cat", "##s", "sat", "e"]
    made = Tokenizer(models.WordPiece({name: n for n, name in enumerate(names)}, unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.add_special_tokens(["[CLS]", "[SEP]"])
    made.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    pairs = [("The cats", "sat é"), ("é", "cat cat the"), ("cats sat", "日")]
    rows = [{"sentence1": a, "sentence2": b, "label": "no"} for a, b in pairs]
    renderer = ClassRenderer(CLASSES, "[SEP]", is_joint=False)
    store = build_store(
        rows_of(tmp_path, rows), Encoder(made.to_str(), (1,), 2, 8), tmp_path / "cache", renderer=renderer
    )
    for number, (a, b) in enumerate(pairs):
        own = made.encode(a, b)
        assert store.read(number).tolist() == own.ids
        assert store.marks(number).tolist() == own.type_ids  # type: ignore[union-attr]


def test_a_tokenizer_that_trims_its_places_marks_the_same_tokens(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """A byte-level post-processor takes spaces out of the places, by which tokens of nothing but spaces lose theirs."""
    from tokenizers.processors import ByteLevel

    trimming = Tokenizer.from_str(tokenizer.to_str())
    trimming.post_processor = ByteLevel(trim_offsets=True)
    source = rows_of(tmp_path, [{"prompt": "the \n", "completion": "  cat   sat \n "}])
    stores = [
        build_store(source, Encoder(each.to_str(), (), EOS, 400), tmp_path / "cache", renderer=PlainRenderer())
        for each in (tokenizer, trimming)
    ]
    assert stores[0].path != stores[1].path
    assert runs(stores[0], 0, tokenizer) == runs(stores[1], 0, tokenizer) == [
        (0, "the \n"), (1, "  cat   sat \n </s>"),
    ]  # fmt: skip


def test_where_the_end_is_also_the_padding_it_is_trained(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    encoder = Encoder(tokenizer.backend_tokenizer.to_str(), (), tokenizer.eos_token_id, 320)
    renderer = ChatRenderer(None, tokenizer.special_tokens_map)
    store = build_store(rows_of(tmp_path, [{"messages": CHAT}]), encoder, tmp_path / "cache", renderer=renderer)
    ends = store.read(0) == tokenizer.pad_token_id
    assert ends.sum() == 2
    assert (store.marks(0)[ends] == 1).all()  # type: ignore[index]


@pytest.mark.parametrize("bos", [False, True])
def test_the_ids_are_those_of_transformers(tmp_path: Path, bos: bool) -> None:
    tokenizer = make_tokenizer(bos=True)
    template = (
        ("{{ bos_token }}" if bos else "")
        + "{%- for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}"
        + "{% generation %}{{ m.content + eos_token }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    encoder = Encoder(tokenizer.backend_tokenizer.to_str(), (), tokenizer.eos_token_id, 320)
    renderer = ChatRenderer(template, tokenizer.special_tokens_map)
    store = build_store(rows_of(tmp_path, [{"messages": CHAT}]), encoder, tmp_path / "cache", renderer=renderer)
    theirs = tokenizer.apply_chat_template(
        CHAT, chat_template=template, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    assert store.read(0).tolist() == theirs["input_ids"]
    assert store.marks(0).tolist() == theirs["assistant_masks"]  # type: ignore[union-attr]
    assert (store.read(0)[0] == tokenizer.bos_token_id) is np.bool_(bos)


def test_the_table_knows_a_row_by_its_content_not_by_its_template(tmp_path: Path, encoder: Encoder) -> None:
    source = rows_of(tmp_path, [{"sentence": "the cat é", "label": "yes"}])
    one, other, third = (
        build_store(source, encoder, tmp_path / "cache", renderer=renderer)
        for renderer in (PlainRenderer(), PlainRenderer("x {sentence}"), ClassRenderer(CLASSES))
    )
    assert len({one.path, other.path, third.path}) == 3
    digests = {int(store.documents["digest"][0]) for store in (one, other, third)}
    assert digests == {digest("the cat é".encode())}  # so copies are met, and the held-out part stays the same
    assert third.documents["bytes"][0] == len("the cat é".encode())
    assert other.documents["bytes"][0] == len("x the cat é yes".encode())


def test_skipped_rows_are_counted_by_reason(tmp_path: Path, encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    good = {"prompt": "the", "completion": "cat"}
    rows = [good, {"prompt": "a", "completion": ""}, good, {"prompt": "", "completion": "</s>"}] * 5
    source = rows_of(tmp_path, rows)
    plain = build_store(source, encoder, tmp_path / "cache", renderer=PlainRenderer())
    assert (len(plain), plain.empty_count, plain.skipped) == (10, 10, {"empty answer": 5, "no tokens": 5})
    monkeypatch.setattr(batches, "SHARD_CHARACTERS", 15)
    shards = build_store(source, encoder, tmp_path / "cache", renderer=PlainRenderer())
    assert len(shards.header["files"]) > 5
    assert (len(shards), shards.empty_count, shards.skipped) == (10, 10, plain.skipped)


def test_what_is_said_of_a_row_stays_with_it_when_others_are_left_out(tmp_path: Path, encoder: Encoder) -> None:
    texts = [("the", "no"), ("</s>", "yes"), ("cat", "yes"), ("", "no"), ("sat é", "no"), ("</s></s>", "yes")]
    source = rows_of(tmp_path, [{"sentence": text, "label": label} for text, label in texts])
    store = build_store(source, encoder, tmp_path / "cache", renderer=ClassRenderer(CLASSES))
    assert store.values is not None
    assert store.values.tolist() == [[0.0], [1.0], [0.0]]
    assert store.documents["digest"].tolist() == [digest(text.encode()) for text in ("the", "cat", "sat é")]
    assert store.documents["bytes"].tolist() == [3, 3, 6]
    assert store.skipped == {"no tokens": 2, "empty text": 1}


def test_a_row_longer_than_a_piece_is_encoded_as_a_whole(
    tmp_path: Path, tokenizer: Tokenizer, encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "WHOLE_DOCUMENT", 100)
    monkeypatch.setattr(batches, "PIECE", 50)
    source = rows_of(tmp_path, [{"prompt": "the " * 200, "completion": "cat " * 200}] * 2)
    store = build_store(source, encoder, tmp_path / "cache", renderer=PlainRenderer())
    assert runs(store, 1, tokenizer) == [(0, "the " * 199 + "the"), (1, " cat" * 200 + " </s>")]


def test_running_text_does_not_change_with_a_renderer(tmp_path: Path, encoder: Encoder) -> None:
    source = rows_of(tmp_path, [{"text": "the cat", "label": 1}])
    plain = build_store(source, encoder, tmp_path / "cache")
    assert build_store(source, encoder, tmp_path / "cache", renderer=PlainRenderer()).path == plain.path
    asked = rows_of(tmp_path, [{"text": "the cat", "label": 1}], kind="text")
    assert build_store(asked, encoder, tmp_path / "cache").path == plain.path
    labelled = rows_of(tmp_path, [{"text": "the cat", "label": 1}], kind="labelled")
    store = build_store(labelled, encoder, tmp_path / "cache", renderer=PlainRenderer())
    assert (store.kind, store.path == plain.path) == ("labelled", False)


WORD_LEVEL = {
    "version": "1.0",
    "truncation": None,
    "padding": None,
    "added_tokens": [],
    "normalizer": None,
    "pre_tokenizer": {"type": "WhitespaceSplit"},
    "post_processor": None,
    "decoder": None,
    "model": {
        "type": "WordLevel",
        "vocab": {"</s>": 0, "<unk>": 1, "the": 2, "cat": 3, "sat": 4},
        "unk_token": "<unk>",
    },
}


@pytest.mark.parametrize(
    ("name", "text", "cut", "fingerprint", "header"),
    [
        ("a.jsonl", '{"text": "the cat", "label": 1}\n{"text": ""}\n{"text": "the cat sat"}\n', "auto",
         "a8d814b66d49ef3dab9efa4a4b13534ffc4d03734e99891400e304c75dde23ee",
         "a17922a9234e21d4c38120230a5989e57ed9c0e27ef17975e1540e09f4e51eba"),
        ("b.txt", "the cat\n\nsat", "paragraphs",
         "51f854d4bb151064837fa0e8ae5b2036b20b50c3d11322e6e91403da8f7609a2",
         "f2706b7ddf186f5764530259d96f5e8db9537aad2476fd13a45623da3086752c"),
        ("c.jsonl", '{"input_ids": [2, 3]}\n{"input_ids": []}\n', "auto",
         "3e68c2b291b41c8aa140ec37a84a67e2c5963320ead05ec688e450215a428424",
         "2a6f8ba9b175e14c1c8f858ee0e14a7ca454a86cd4dcbf03d7df99950eb98114"),
    ],
)  # fmt: skip
def test_a_store_of_running_text_is_still_of_the_first_format(
    tmp_path: Path, name: str, text: str, cut: str, fingerprint: str, header: str
) -> None:
    """Caches are shared between versions: name, header and bytes (the header lists their hashes) stay as they were.

    Except that the header has a checksum, and counts the columns that nothing reads, where there are any.
    """
    (tmp_path / name).write_text(text)
    source = RawSource("s", path=name, root=tmp_path, documents=cut)
    store = build_store(source, Encoder(json.dumps(WORD_LEVEL), (), 0, 5), tmp_path / "cache")
    assert store.path.name == fingerprint
    written = json.loads((store.path / "store.json").read_text())
    assert written.pop("checksum")
    assert hashlib.sha256((json.dumps(written, indent=1, sort_keys=True) + "\n").encode()).hexdigest() == header


def test_rows_with_parts_need_a_renderer(tmp_path: Path, encoder: Encoder) -> None:
    source = rows_of(tmp_path, [{"prompt": "a", "completion": ""}, {"prompt": "a", "completion": "b"}])
    with pytest.raises(DataError, match=r"a\.jsonl:2: rows of kind `completion` instead of running text"):
        build_store(source, encoder, tmp_path / "cache")


def test_what_a_renderer_refuses_is_told_with_its_place(tmp_path: Path, encoder: Encoder) -> None:
    rows = [{"sentence": "the", "label": "yes"}] * 3
    source = rows_of(tmp_path, [*rows, {"sentence": "cat", "label": "yess"}])
    with pytest.raises(DataError, match=r"a\.jsonl:4: the label 'yess'(.|\n)*did you mean 'yes'") as caught:
        build_store(source, encoder, tmp_path / "cache", renderer=ClassRenderer(CLASSES))
    assert caught.value.where == f"{tmp_path / 'a.jsonl'}:4"
    with pytest.raises(DataError, match=r"a\.jsonl:1: the template uses \{text\}"):
        build_store(source, encoder, tmp_path / "cache", renderer=PlainRenderer("{text}"))
    assert not list((tmp_path / "cache").rglob(".staging*"))


def test_labels_are_read_once_for_each_state_of_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = rows_of(tmp_path / "a", [{"sentence": "x", "label": label} for label in (3, 1)])
    second = rows_of(tmp_path / "b", [{"sentence": "x", "label": 2}])
    assert read_all_labels([first, second], tmp_path / "cache") == Labels(ProblemType.CLASS, (1, 2, 3))
    with monkeypatch.context() as patch:
        patch.setattr(source_files, "read_labels", None)  # it would be called
        assert read_all_labels([second, first], tmp_path / "cache") == Labels("class", (1, 2, 3))
    second = rows_of(tmp_path / "b", [{"sentence": "x", "label": 7}])
    assert read_all_labels([first, second], tmp_path / "cache") == Labels(ProblemType.CLASS, (1, 3, 7))


def test_other_rows_of_a_file_are_another_store_with_other_labels(tmp_path: Path, encoder: Encoder) -> None:
    made = [{"text": f"row {i}", "label": i % 4, "task": "ab"[i % 2]} for i in range(8)]
    every = replace(rows_of(tmp_path, made), kind="labelled")
    first, second = (replace(every, row_filter={"task": (value,)}) for value in "ab")
    cache = tmp_path / "cache"
    assert [read_all_labels([one], cache).names for one in (every, first, second)] == [(0, 1, 2, 3), (0, 2), (1, 3)]
    stores = [
        build_store(one, encoder, cache, renderer=ClassRenderer(read_all_labels([every], cache)))
        for one in (every, first, second)
    ]
    assert [len(store) for store in stores] == [8, 4, 4] and len({store.fingerprint for store in stores}) == 3


def conversations(count: int) -> list[dict[str, Any]]:
    """Conversations of one to three turns; every fifth has an empty answer."""
    return [
        {"messages": [
            {"role": role, "content": prose(10 * n + turn, 12) if n % 5 or role == "user" else ""}
            for turn in range(1 + n % 3) for role in ("user", "assistant")
        ]}
        for n in range(count)
    ]  # fmt: skip


@settings(max_examples=8)
@given(batch=st.integers(1, 400), shard=st.integers(800, 3000), workers=st.integers(1, 4))
def test_threads_and_batches_change_no_byte_of_rows(
    tmp_path_factory: pytest.TempPathFactory, encoder: Encoder, batch: int, shard: int, workers: int
) -> None:
    folder = tmp_path_factory.mktemp("rows")
    source = rows_of(folder, conversations(25))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batches, "SHARD_CHARACTERS", shard)
        one = build_store(source, encoder, folder / "one", workers=1, renderer=PLAIN_CHAT)
        patch.setattr(batches, "BATCH_CHARACTERS", batch)
        other = build_store(source, encoder, folder / "other", workers=workers, renderer=PLAIN_CHAT)
    assert tree(one.path) == tree(other.path)
    assert len(one) + one.empty_count == 25
    assert one.skipped == {"empty answer": 5}


# --- killed anywhere ----------------------------------------------------------------------------------

KILLED = 77
BOUNDARIES = ("mkdir", "rename", "replace", "fsync", "unlink")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "SHARD_CHARACTERS", 3000)
    monkeypatch.setattr(batches, "BATCH_CHARACTERS", 1200)


def in_child(work: Callable[[], object]) -> int:
    """`work` in a process of its own that can die like a killed one: no handler runs, no file is flushed."""
    child = os.fork()
    if not child:
        try:
            work()
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def die_at(step: int) -> None:
    """Lets this process die at its `step`-th boundary: just before it, or in the midst of a write."""
    left = [step]

    def die() -> bool:
        left[0] -= 1
        return left[0] < 0

    for name in BOUNDARIES:
        real = getattr(os, name)

        def shim(*args: Any, real: Callable[..., Any] = real, **options: Any) -> Any:
            if die():
                os._exit(KILLED)
            return real(*args, **options)

        setattr(os, name, shim)
    real_write = store_module.write_all

    def write(file: Any, data: bytes) -> None:
        if die():
            file.write(data[: len(data) // 2])
            os._exit(KILLED)
        real_write(file, data)

    store_module.write_all = write


def sweep_kills(source: RawSource, encoder: Encoder, folder: Path, build: Callable[..., TokenStore]) -> Iterator[int]:
    """Kills a build at every boundary, finishes it, and yields how many shards were kept each time."""
    assert source.path is not None
    os.utime(source.root / source.path, (2**32, 2**32))  # too young for the memo of hashes, however slow the sweep
    whole = tree(build(source, encoder, folder / "whole", workers=1).path)
    for step in range(1000):
        cache = folder / f"cache-{step}"

        def work(cache: Path = cache, step: int = step) -> None:
            die_at(step)
            build(source, encoder, cache, workers=1)

        code = in_child(work)
        assert code in (0, KILLED)
        kept = len(list(cache.glob("building/*/shard-*")))
        store = build(source, encoder, cache, workers=1)
        assert tree(store.path) == whole
        assert not [path for path in cache.rglob("*") if ".staging" in path.name]
        assert not list((cache / "building").iterdir())
        yield kept
        if code == 0:
            return
    raise AssertionError("the build has no end")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")
@pytest.mark.usefixtures("small")
def test_killed_at_every_boundary_the_bytes_are_the_same(tmp_path: Path, encoder: Encoder) -> None:
    source = corpus(tmp_path, [prose(n, 40) if n % 5 else "" for n in range(50)])
    kept = list(sweep_kills(source, encoder, tmp_path, build_store))
    assert len(kept) > 50
    assert set(kept) >= {0, 1, 2, 3}  # finished shards are there again after the kill


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")
def test_killed_at_every_boundary_marks_and_values_are_the_same(
    tmp_path: Path, encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "SHARD_CHARACTERS", 500)
    rows = [{"sentence": prose(n, 20), "label": ["no", "yes", None][n % 3]} for n in range(18)]
    source, renderer = rows_of(tmp_path, rows), ClassRenderer(CLASSES)
    assert set(sweep_kills(source, encoder, tmp_path, partial(build_store, renderer=renderer))) >= {0, 1, 2}
    store = build_store(source, encoder, tmp_path / "whole", renderer=renderer)
    assert store.skipped == {"no label": 6}
    assert store.values is not None
    assert store.values[:, 0].tolist() == [0.0, 1.0] * 6


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")
@pytest.mark.usefixtures("small")
def test_finished_shards_are_not_encoded_again(
    tmp_path: Path, encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed when a shard is published: of the documents before it none is encoded a second time."""
    source = corpus(tmp_path, [prose(n, 40) for n in range(60)])
    whole = build_store(source, encoder, tmp_path / "whole")
    shards = len(whole.header["files"]) - 1
    assert shards > 3
    real_encode = tokenize.encode_batch
    for number in range(shards):
        cache = tmp_path / f"cache-{number}"

        def work(number: int = number, cache: Path = cache) -> None:
            real = tokenize.publish_shard

            def publish(building: Path, at: int, *rest: Any) -> Any:
                if at == number:
                    os._exit(KILLED)
                return real(building, at, *rest)

            tokenize.publish_shard = publish
            build_store(source, encoder, cache, workers=1)

        assert in_child(work) == KILLED
        encoded: list[int] = []

        def count(batch: Any, *rest: Any, encoded: list[int] = encoded) -> Any:
            encoded.append(batch.read_count)
            return real_encode(batch, *rest)

        with monkeypatch.context() as patch:
            patch.setattr(tokenize, "encode_batch", count)
            store = build_store(source, encoder, cache)
        assert tree(store.path) == tree(whole.path)
        assert sum(encoded) == int((whole.documents["shard"] >= number).sum())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")
@pytest.mark.usefixtures("small")
def test_mutant_a_build_that_forgets_where_it_was_is_caught(
    tmp_path: Path, encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = corpus(tmp_path, [prose(n, 40) for n in range(50)])
    monkeypatch.setattr(tokenize, "islice", lambda documents, count: iter(()))
    with pytest.raises(AssertionError):
        list(sweep_kills(source, encoder, tmp_path, build_store))


BUILD = """
    import sys
    from pathlib import Path
    from postgrad.data.tokens import batches, tokenize
    from postgrad.data.read.files import RawSource
    batches.SHARD_CHARACTERS = 20_000
    root = Path(sys.argv[1])
    encoder = tokenize.Encoder((root / "t.json").read_text(), (), 1, 400)
    store = tokenize.build_store(RawSource("s", path="a.jsonl", root=root), encoder, root / "cache")
    store.verify()
    print(store.path)
"""


def test_two_builds_at_once_do_not_hurt_one_another(tmp_path: Path, encoder: Encoder) -> None:
    corpus(tmp_path, [prose(n, 40) for n in range(1500)])
    (tmp_path / "t.json").write_text(encoder.tokenizer)
    command = [sys.executable, "-c", textwrap.dedent(BUILD), str(tmp_path)]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    told = {process.communicate()[0].strip() for process in both}
    assert [process.returncode for process in both] == [0, 0]
    assert len(told) == 1
    store = TokenStore.open(Path(told.pop()))
    assert len(store) == 1500


def test_without_locks_two_builds_do_not_hurt_one_another(
    tmp_path: Path, encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second builder starts and ends while the first is at work."""
    monkeypatch.setitem(sys.modules, "fcntl", None)
    source = corpus(tmp_path, [prose(n, 40) for n in range(50)])
    inner: list[TokenStore] = []

    def progress(_: int, __: int) -> None:
        if not inner:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(os, "getpid", lambda: 1)
                inner.append(build_store(source, encoder, tmp_path / "cache"))

    store = build_store(source, encoder, tmp_path / "cache", progress)
    assert store.path == inner[0].path
    store.verify()

"""Does every document end in the store once, with one eos, whatever happens to the process that builds it?"""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from postgrad.data import store as store_module
from postgrad.data import tokenize
from postgrad.data.sources import HubRows, Source
from postgrad.data.store import TokenStore, digest
from postgrad.data.tokenize import Encoder, build_store
from postgrad.errors import DataError, ModelError

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
    return Encoder(tokenizer.to_str(), None, EOS, 400)


def prose(seed: int, words: int) -> str:
    draw = random.Random(seed)
    return " ".join(draw.choice(WORDS) + draw.choice(["", "", ".", "\n"]) for _ in range(words))


def corpus(folder: Path, texts: list[str], name: str = "a.jsonl") -> Source:
    (folder / name).write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return Source("s", path=name, root=folder, where="data.sources[0]")


def tree(folder: Path) -> dict[str, str]:
    files = (file for file in sorted(folder.rglob("*")) if file.is_file())
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


# --- what is in a store -------------------------------------------------------------------------------


def test_documents_become_ids_and_one_eos(tmp_path: Path, tokenizer: Tokenizer, encoder: Encoder) -> None:
    texts = [prose(n, 1 + n * 7) for n in range(60)] + ["", "  ", "end"]
    store = build_store(corpus(tmp_path, texts), encoder, tmp_path / "cache")
    kept = [text for text in texts if text.strip()]
    assert (len(store), store.empty, store.kind, store.eos) == (len(kept), 2, "text", EOS)
    for number, text in enumerate(kept):
        assert store.read(number).tolist() == [*tokenizer.encode(text).ids, EOS]
        assert store.documents["bytes"][number] == len(text.encode())
        assert store.documents["digest"][number] == digest(text.encode())
    store.verify()


@pytest.mark.parametrize("bos", [None, BOS, EOS])
@pytest.mark.parametrize("text", ["cat", "cat</s>", "cat</s></s>", "<s>cat", "<s><s>cat</s>", "a</s>b", "</s>cat"])
def test_never_two_eos_and_never_two_bos(tmp_path: Path, tokenizer: Tokenizer, bos: int | None, text: str) -> None:
    encoder = Encoder(tokenizer.to_str(), bos, EOS, 400)
    ids = build_store(corpus(tmp_path, [text]), encoder, tmp_path / "cache").read(0).tolist()
    assert ids[-1] == EOS
    assert ids[-2] != EOS
    if bos is not None:
        assert ids[0] == bos
        assert ids[1] != bos


def test_a_document_of_nothing_but_eos_is_empty(tmp_path: Path, encoder: Encoder) -> None:
    store = build_store(corpus(tmp_path, ["</s>", "cat", "</s></s>"]), encoder, tmp_path / "cache")
    assert (len(store), store.empty) == (1, 2)
    (tmp_path / "b").mkdir()
    with pytest.raises(DataError, match="is empty"):
        build_store(corpus(tmp_path / "b", ["</s>"]), encoder, tmp_path / "cache")


def test_truncation_padding_and_the_template_are_off(tmp_path: Path, tokenizer: Tokenizer, encoder: Encoder) -> None:
    from tokenizers.processors import TemplateProcessing

    other = Tokenizer.from_str(tokenizer.to_str())
    other.enable_truncation(4)
    other.enable_padding(length=64)
    source = corpus(tmp_path, [prose(1, 50)])
    store = build_store(source, Encoder(other.to_str(), None, EOS, 400), tmp_path / "cache")
    plain = build_store(source, encoder, tmp_path / "cache")
    assert store.path == plain.path  # they do not even change the fingerprint
    other.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    store = build_store(source, Encoder(other.to_str(), None, EOS, 400), tmp_path / "cache")
    assert store.read(0).tolist() == plain.read(0).tolist()


def test_ids_are_stored_as_they_are(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = [tokenizer.encode("the cat").ids, [], [BOS, 70, 71, EOS], [EOS], [399]]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"input_ids": ids}) + "\n" for ids in rows))
    source = Source("s", path="a.jsonl", root=tmp_path)
    store = build_store(source, Encoder(tokenizer.to_str(), BOS, EOS, 400), tmp_path / "cache")
    assert [store.read(n).tolist() for n in range(3)] == [[BOS, *rows[0], EOS], rows[2], [BOS, 399, EOS]]
    assert (store.kind, store.empty) == ("input_ids", 2)
    assert store.documents["bytes"][0] == len(b"the cat")
    assert store.documents["digest"][0] == digest(np.array(rows[0], "<u4").data)


@pytest.mark.parametrize("vocabulary", [65_535, 65_536, 65_537, 262_144])
def test_width_and_range(tmp_path: Path, tokenizer: Tokenizer, vocabulary: int) -> None:
    encoder = Encoder(tokenizer.to_str(), None, EOS, vocabulary)
    file = tmp_path / "a.jsonl"
    file.write_text(f'{{"input_ids": [5]}}\n{{"input_ids": [2, {vocabulary - 1}]}}\n')
    store = build_store(Source("s", path="a.jsonl", root=tmp_path), encoder, tmp_path / "cache")
    assert store.read(1).tolist() == [2, vocabulary - 1, EOS]
    file.write_text(f'{{"input_ids": [5]}}\n{{"input_ids": [2, {vocabulary}]}}\n')
    with pytest.raises(DataError) as caught:
        build_store(Source("s", path="a.jsonl", root=tmp_path), encoder, tmp_path / "cache")
    assert caught.value.where == f"{file}:2"
    assert not list((tmp_path / "cache").rglob(".staging*"))


def test_a_tokenizer_larger_than_the_model_is_refused_with_the_place(tmp_path: Path, tokenizer: Tokenizer) -> None:
    source = corpus(tmp_path, ["A", "the cat sat"])
    with pytest.raises(DataError, match=r"a\.jsonl:2: token id") as caught:
        build_store(source, Encoder(tokenizer.to_str(), None, EOS, 260), tmp_path / "cache")
    assert "tokenizer that belongs to the model" in str(caught.value)


@pytest.mark.parametrize(
    "made",
    [
        lambda: Encoder("{}", None, 400, 400),
        lambda: Encoder("{}", -1, 0, 400),
        lambda: Encoder("{}", None, 1, 400).load(),
        lambda: Encoder("[", None, 1, 4).fingerprint,
    ],
)
def test_an_impossible_encoder_is_a_model_error(made: Callable[[], Any]) -> None:
    with pytest.raises(ModelError):
        made()


@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
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
        patch.setattr(tokenize, "BATCH_CHARACTERS", batch)
        patch.setattr(tokenize, "SHARD_CHARACTERS", shard)
        store = build_store(source, encoder, folder / "cache", workers=workers)
    assert len(texts) + 1 == len(store) + store.empty
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
    monkeypatch.setattr(tokenize, "WHOLE_DOCUMENT", 4000)
    monkeypatch.setattr(tokenize, "PIECE", 1000)
    monkeypatch.setattr(tokenize, "SHARD_CHARACTERS", 15_000)
    pieces = build_store(source, encoder, tmp_path / "cache")
    assert len(pieces) == len(plain) == 6
    assert pieces.empty == 1
    for number in (0, 1, 2, 3, 5):
        assert pieces.read(number).tolist() == plain.read(number).tolist()
    load = encoder.load()
    assert load.decode(pieces.read(4)[:-1].tolist()) == "x" * 20_000
    assert pieces.documents["digest"].tolist() == plain.documents["digest"].tolist()
    assert pieces.documents["bytes"].tolist() == plain.documents["bytes"].tolist()


def test_pieces_are_cut_at_a_line_that_begins_with_a_letter() -> None:
    text = "a\nb\n\n c\n1\nüber" + "z" * 10
    assert text[tokenize._cut(text, 18) :].startswith("über")
    assert tokenize._cut("aaa bbb ccc", 9) == 7
    assert tokenize._cut("a" * 20, 9) == 9


# --- the cache ----------------------------------------------------------------------------------------


def test_a_store_is_reused_and_what_changes_it_changes_its_name(
    tmp_path: Path, tokenizer: Tokenizer, encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "one\n\ntwo three</s>"
    (tmp_path / "a.txt").write_text(text)
    source = Source("s", path="a.txt", root=tmp_path)
    first = build_store(source, encoder, tmp_path / "cache")
    with monkeypatch.context() as patch:
        patch.setattr(tokenize, "_build", None)  # it would be called
        assert build_store(source, encoder, tmp_path / "cache").path == first.path
        (tmp_path / "moved").mkdir()
        (tmp_path / "moved" / "b.txt").write_text(text)
        moved = Source("other name", path="moved/b.txt", root=tmp_path)
        assert build_store(moved, encoder, tmp_path / "cache").path == first.path
    paths = {first.path}
    paths.add(
        build_store(Source("s", path="a.txt", root=tmp_path, documents="lines"), encoder, tmp_path / "cache").path
    )
    for bos, eos, vocabulary in ((BOS, EOS, 400), (None, 2, 400), (None, EOS, 401)):
        changed = Encoder(tokenizer.to_str(), bos, eos, vocabulary)
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
    monkeypatch.setattr(tokenize, "sha256", None)
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

    with pytest.raises(DataError, match="changed while it was read"):
        build_store(source, encoder, tmp_path / "cache", progress)
    assert not list((tmp_path / "cache" / "stores").iterdir())


def test_progress_is_counted_in_bytes_and_ends_at_the_total(
    tmp_path: Path, encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenize, "BATCH_CHARACTERS", 500)
    monkeypatch.setattr("postgrad.data.sources._BLOCK", 500)
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
    source = Source("s", hub=HubRows("set"), root=tmp_path)
    store = build_store(source, encoder, tmp_path / "cache")
    assert (len(store), store.empty) == (2, 1)


def test_neither_torch_nor_transformers_is_imported() -> None:
    code = "import sys, postgrad.data.tokenize, postgrad.data.overlap; print([m for m in sys.modules if m in "
    code += "('torch', 'transformers', 'pyarrow', 'datasets', 'huggingface_hub')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_threads_of_the_tokenizer_itself_are_not_started(tmp_path: Path, encoder: Encoder) -> None:
    """They would be one a core in each of ours."""
    code = """
        import os, sys
        from pathlib import Path
        from postgrad.data.tokenize import Encoder, build_store
        from postgrad.data.sources import Source
        root = Path(sys.argv[1])
        encoder = Encoder((root / "t.json").read_text(), None, 1, 400)
        build_store(Source("s", path="a.jsonl", root=root), encoder, root / "cache", workers=2)
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


# --- killed anywhere ----------------------------------------------------------------------------------

KILLED = 77
BOUNDARIES = ("mkdir", "rename", "replace", "fsync", "unlink")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenize, "SHARD_CHARACTERS", 3000)
    monkeypatch.setattr(tokenize, "BATCH_CHARACTERS", 1200)


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
    real_write = store_module._write

    def write(file: Any, data: bytes) -> None:
        if die():
            file.write(data[: len(data) // 2])
            os._exit(KILLED)
        real_write(file, data)

    store_module._write = write


def sweep_kills(source: Source, encoder: Encoder, folder: Path, build: Callable[..., TokenStore]) -> Iterator[int]:
    """Kills a build at every boundary, finishes it, and yields how many shards were kept each time."""
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
@pytest.mark.usefixtures("small")
def test_finished_shards_are_not_encoded_again(
    tmp_path: Path, encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed when a shard is published: of the documents before it none is encoded a second time."""
    source = corpus(tmp_path, [prose(n, 40) for n in range(60)])
    whole = build_store(source, encoder, tmp_path / "whole")
    shards = len(whole.header["files"]) - 1
    assert shards > 3
    real_encode = tokenize._encode
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
            encoded.append(batch.met)
            return real_encode(batch, *rest)

        with monkeypatch.context() as patch:
            patch.setattr(tokenize, "_encode", count)
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
    from postgrad.data import tokenize
    from postgrad.data.sources import Source
    tokenize.SHARD_CHARACTERS = 20_000
    root = Path(sys.argv[1])
    encoder = tokenize.Encoder((root / "t.json").read_text(), None, 1, 400)
    store = tokenize.build_store(Source("s", path="a.jsonl", root=root), encoder, root / "cache")
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

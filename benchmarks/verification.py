"""Time to verify a model and a token store at a run's start, relative to reading the model and the first block of data.

    python benchmarks/verification.py --json benchmarks/results/verification.json

Writes a token store of random ids and a random Llama, as a run publishes them, and alternates two arms with a warm page cache:
reading (the weights into a model, and the rows of one global batch) and verifying (sampled blocks of both, as at every start
after the first). The whole verification, once for new or changed files, is timed as well.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from arms import add_integer_options, format_range, median_and_range, provenance, run_rounds, settings, write_results
from small_llama import make_llama

from postgrad.data.tokens.store import ShardWriter, TokenStore, publish_shard, publish_store
from postgrad.hardware import machine
from postgrad.models.location import ModelLocation
from postgrad.models.pretrained import load_pretrained
from postgrad.models.task import Task
from postgrad.storage import verification
from postgrad.storage.atomic import publish_folder

_DOCUMENT_TOKENS = 1000
_SHARD_DOCUMENTS = 2**15


def write_store(folder: Path, megabytes: int, vocabulary: int) -> TokenStore:
    """A store of random documents, of about so many megabytes of ids."""
    rng = np.random.default_rng(0)
    documents = max(1, megabytes * 10**6 // (2 * _DOCUMENT_TOKENS))
    shards = []
    for first in range(0, documents, _SHARD_DOCUMENTS):
        count = min(_SHARD_DOCUMENTS, documents - first)

        def write(writer: ShardWriter, count: int = count) -> int:
            ids = rng.integers(0, vocabulary, count * _DOCUMENT_TOKENS)
            lengths = np.full(count, _DOCUMENT_TOKENS)
            writer.add(ids, lengths, lengths, np.arange(count), [""] * count)
            return 0

        shards.append(publish_shard(folder / "building", len(shards), vocabulary, write))
    header = {"vocabulary": vocabulary, "bos": None, "eos": 0, "kind": "text", "fingerprint": "random"}
    return publish_store(folder / "building", folder / "store", shards, header)


def seconds(work: Callable[[], object]) -> float:
    """How long it takes."""
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_integer_options(
        parser, rounds=15, megabytes=500, hidden=384, layers=6, inner=1024, vocabulary=8192, time=1024, batch=32
    )
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    machine.tune_allocator()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        store = write_store(folder, options.megabytes, options.vocabulary)
        model = make_llama(options)
        parameters = sum(p.numel() for p in model.parameters())
        publish_folder(folder / "model", lambda staged: model.save_pretrained(staged))
        size = sum(p.stat().st_size for p in (folder / "model").iterdir())
        time.sleep(3)  # a file this young is always read whole
        numbers = np.random.default_rng(1).integers(0, len(store), options.batch)

        def read() -> None:
            load_pretrained(ModelLocation("model", folder / "model"), Task.CAUSAL)
            opened = TokenStore.open(store.path)
            np.concatenate([opened.read(int(i)) for i in numbers]).sum()

        def verify() -> None:
            verification.verify_published(folder / "model", folder / "cache")
            store.verify(folder / "cache")

        whole = seconds(verify)
        rounds = list(
            run_rounds({"read": lambda: seconds(read), "verify": lambda: seconds(verify)}, options.rounds, warm=2)
        )
    times = {arm: median_and_range(1e3 * each[arm] for each in rounds) for arm in ("read", "verify")}
    share = median_and_range(each["verify"] / each["read"] for each in rounds)
    print(f"{parameters:,} weights ({size:,} bytes), a store of {store.tokens:,} tokens")
    print(f"read: {format_range(times['read'], '.1f')} ms, verify: {format_range(times['verify'], '.2f')} ms")
    print(f"share: {format_range(share, '.2%')}; whole, once: {1e3 * whole:.0f} ms")
    found = {
        **provenance(),
        **settings(options),
        "parameters": parameters,
        "model_bytes": size,
        "store_tokens": store.tokens,
        "read_ms": times["read"],
        "verify_ms": times["verify"],
        "share": share,
        "whole_ms": 1e3 * whole,
    }
    write_results(options.json, found)


if __name__ == "__main__":
    main()

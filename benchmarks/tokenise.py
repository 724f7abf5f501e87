"""Tokenisation speed, compared with the bare tokenizer and with `datasets.map`.

    python benchmarks/tokenise.py [FILE ...] [--tokenizer tokenizer.json] [--repeats 5] [--json result.json]

Without files, the text is the source of the running Python's standard library; without a tokenizer, a byte-level
BPE of 16,384 tokens is trained on the first of it. The variants take turns, each in a fresh process:

    raw     `encode_batch_fast` over documents that are in memory already: the limit
    ours    `build_store`: hash, read, encode, check, digest, write, sync, verify
    map     `datasets.map` with the same call, one process a core, from JSON lines

All may use the cores of this process (set them with `taskset`). Time is the wall's, from the tokenizer loaded to
the last byte written; the ratio is to raw, within the same round, for machines and hours differ. The CPU ratio
says the same on a machine that others use too.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from arms import provenance, run_rounds, settings, write_results
from training_speed import train_tokenizer

VARIANTS = ("raw", "ours", "map")
EOT = "<|endoftext|>"


def main() -> None:
    words = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    words.add_argument("files", nargs="*", type=Path)
    words.add_argument("--tokenizer", type=Path)
    words.add_argument("--repeats", type=int, default=5)
    words.add_argument("--json", type=Path)
    words.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    words.add_argument("--one", nargs=2, help=argparse.SUPPRESS)  # variant, folder: what a fresh process runs
    given = words.parse_args()
    if given.one:
        print(json.dumps(measure(given.one[0], Path(given.one[1]))))
        return
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder), given.files, given.tokenizer)
        rounds = run(Path(folder), given.variants, given.repeats)
    table = print_report(rounds, given.variants)
    # Only now, as a process is said to have held at least what its parent held, and this loads torch.
    write_results(given.json, {**provenance(), **settings(given), "rounds": rounds, "median": table})


def prepare(folder: Path, files: list[Path], tokenizer: Path | None) -> None:
    """`text/`, one or several text files, and `tokenizer.json`."""
    (folder / "text").mkdir()
    if files:
        for number, file in enumerate(files):
            if not file.is_file():
                sys.exit(f"{file}: no such file")
            (folder / "text" / f"{number:04d}-{file.name}").symlink_to(file.resolve())
    else:
        with open(folder / "text" / "library.txt", "w", encoding="utf-8") as out:
            for file in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
                if "site-packages" not in file.parts:
                    out.write(file.read_text("utf-8", errors="replace").replace("\0", "") + "\n\n")
    if tokenizer:
        (folder / "tokenizer.json").write_bytes(tokenizer.read_bytes())
        return
    first = next(iter(sorted((folder / "text").iterdir())))
    with open(first, encoding="utf-8", errors="replace") as lines:
        train_tokenizer(iter(lambda: lines.read(2**16), ""), 16_384, EOT).save(str(folder / "tokenizer.json"))


def run(folder: Path, variants: list[str], repeats: int) -> list[dict[str, dict[str, float]]]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    environment.pop("TOKENIZERS_PARALLELISM", None)

    def one(variant: str) -> dict[str, float] | None:
        command = [sys.executable, __file__, "--one", variant, str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode:
            print(f"{variant}: {done.stderr.strip().splitlines()[-1:]}", file=sys.stderr)
            return None
        found = json.loads(done.stdout.splitlines()[-1])
        print(f"{variant:5} {found['tokens_per_s']:12,.0f} tokens/s", file=sys.stderr)
        return found

    rounds = run_rounds({variant: partial(one, variant) for variant in variants}, repeats)
    return [{variant: found for variant, found in each.items() if found} for each in rounds]


def measure(variant: str, folder: Path) -> dict[str, float]:
    """One variant in this process: seconds of the wall and the CPUs, tokens (eos excepted), peak memory in MB."""
    tokens, wall, cpu = {"raw": tokenise_raw, "ours": tokenise_postgrad, "map": tokenise_datasets}[variant](folder)
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return {"tokens": tokens, "wall_s": wall, "cpu_s": cpu, "tokens_per_s": tokens / wall, "peak_mb": peak / 1024}


def make_source(folder: Path) -> Any:
    from postgrad.data.read.files import RawSource

    return RawSource("corpus", path="text", root=folder, documents="passages")


def read_clocks() -> tuple[float, float]:
    times = os.times()
    return time.perf_counter(), times.user + times.system + times.children_user + times.children_system


def elapsed_since(start: tuple[float, float]) -> tuple[float, float]:
    now = read_clocks()
    return now[0] - start[0], now[1] - start[1]


def tokenise_raw(folder: Path) -> tuple[int, float, float]:
    from tokenizers import Tokenizer

    from postgrad.data.read.documents import read_documents

    texts = [document.text or "" for document in read_documents(make_source(folder)) if not document.is_empty]
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    start, tokens = read_clocks(), 0
    for at in range(0, len(texts), 256):
        tokens += sum(map(len, tokenizer.encode_batch_fast(texts[at : at + 256], add_special_tokens=False)))
    return tokens, *elapsed_since(start)


def tokenise_postgrad(folder: Path) -> tuple[int, float, float]:
    from tokenizers import Tokenizer

    from postgrad.data.tokens.encoder import Encoder
    from postgrad.data.tokens.tokenize import build_store

    text = (folder / "tokenizer.json").read_text("utf-8")
    tokenizer = Tokenizer.from_str(text)
    vocabulary = tokenizer.get_vocab_size()
    encoder = Encoder(text, None, tokenizer.token_to_id(EOT) or 0, vocabulary)
    del tokenizer
    with tempfile.TemporaryDirectory() as cache:
        start = read_clocks()
        store = build_store(make_source(folder), encoder, Path(cache))
        took = elapsed_since(start)
    return store.tokens - len(store), *took


def tokenise_datasets(folder: Path) -> tuple[int, float, float]:
    import datasets

    from postgrad.data.read.documents import read_documents

    with tempfile.TemporaryDirectory() as cache:
        rows = Path(cache) / "rows.jsonl"
        with open(rows, "w", encoding="utf-8") as out:
            for document in read_documents(make_source(folder)):
                if not document.is_empty:
                    out.write(json.dumps({"text": document.text}) + "\n")
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        table = datasets.load_dataset("json", data_files=str(rows), split="train", cache_dir=cache)
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        eos = tokenizer.token_to_id(EOT) or 0

        def encode(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
            encodings = tokenizer.encode_batch_fast(batch["text"], add_special_tokens=False)
            return {"input_ids": [[*encoding.ids, eos] for encoding in encodings]}

        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        start = read_clocks()
        made = table.map(encode, batched=True, num_proc=cores, remove_columns=["text"])
        took = elapsed_since(start)
        tokens = sum(len(ids) - 1 for ids in made["input_ids"])
    return tokens, *took


def print_report(rounds: list[dict[str, dict[str, float]]], variants: list[str]) -> dict[str, Any]:
    table = {}
    print(f"{'variant':8} {'tokens/s':>12} {'of raw':>8} {'range':>15} {'CPU of raw':>11} {'peak MB':>8}")
    for variant in variants:
        turns = [turn for turn in rounds if variant in turn]
        if not turns:
            continue
        ratios = [turn[variant]["tokens_per_s"] / turn["raw"]["tokens_per_s"] for turn in turns if "raw" in turn]
        cpu = [turn["raw"]["cpu_s"] / turn[variant]["cpu_s"] for turn in turns if "raw" in turn]
        line = {
            "tokens": turns[0][variant]["tokens"],
            "tokens_per_s": statistics.median(turn[variant]["tokens_per_s"] for turn in turns),
            "of_raw": statistics.median(ratios) if ratios else None,
            "cpu_of_raw": statistics.median(cpu) if cpu else None,
            "peak_mb": max(turn[variant]["peak_mb"] for turn in turns),
        }
        table[variant] = line
        span = f"{min(ratios):.2f}..{max(ratios):.2f}" if ratios else "-"
        print(
            f"{variant:8} {line['tokens_per_s']:12,.0f} {line['of_raw'] or 0:8.2f} {span:>15}"
            f" {line['cpu_of_raw'] or 0:11.2f} {line['peak_mb']:8.0f}"
        )
    return table


if __name__ == "__main__":
    main()

"""Make the texts of the paper's protocol for one GPU: `python benchmarks/paper_gpu/texts.py paper-data --tokens 300M`.

Streams public data sets from the Hugging Face Hub (`pip install datasets`; the network is needed) until there are about as many
tokens as asked for, four characters each, and holds out the first documents of each kind. Old: English web text. Weak shift: an
English encyclopedia. Strong shift: German, also as three parts that follow each other. Third: code.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from postgrad.config.quantities import parse_token_count
from postgrad.errors import MissingExtra

CHARACTERS = 4
HELD_OUT = 500
KINDS = {
    "old": ("HuggingFaceFW/fineweb-edu", "sample-10BT", "text"),
    "encyclopedia": ("wikimedia/wikipedia", "20231101.en", "text"),
    "german": ("wikimedia/wikipedia", "20231101.de", "text"),
    "code": ("codeparrot/codeparrot-clean", None, "content"),
}


def documents(name: str, subset: str | None, column: str) -> Iterator[str]:
    """The texts of a data set, as they come."""
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise MissingExtra("this needs datasets", hint="pip install 'postgrad[hub]'") from error
    for row in load_dataset(name, subset, split="train", streaming=True):
        if len(row[column]) > 200:
            yield row[column]


def write(folder: Path, kind: str, tokens: int) -> None:
    """Write a kind's held-out and training documents, the latter of `german` also in thirds."""
    texts = documents(*KINDS[kind])
    with (folder / f"{kind}-heldout.jsonl").open("w") as out:
        for _ in range(HELD_OUT):
            out.write(json.dumps({"text": next(texts)}) + "\n")
    parts = [(folder / f"{kind}-{i}.jsonl").open("w") for i in (1, 2, 3)] if kind == "german" else []
    characters, wanted = 0, tokens * CHARACTERS * (3 if parts else 1)
    begun = folder / f"{kind}.part"
    with begun.open("w") as out:
        while characters < wanted:
            text = next(texts)
            line = json.dumps({"text": text}) + "\n"
            out.write(line)
            if parts:
                parts[min(3 * characters // wanted, 2)].write(line)
            characters += len(text)
    for part in parts:
        part.close()
    begun.rename(folder / f"{kind}.jsonl")
    print(f"{kind}: {characters:,} characters", flush=True)


def main() -> None:
    """Write all kinds that are not there yet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokens", default="300M", help="of each kind")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    for kind in KINDS:
        if not (given.folder / f"{kind}.jsonl").exists():
            write(given.folder, kind, parse_token_count(given.tokens, "--tokens"))


if __name__ == "__main__":
    main()

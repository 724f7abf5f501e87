"""Write what the stages of this folder read: texts and rows in data/, small start models in models/.

    python examples/make_data.py

The texts are this Python's own documentation, library and docstrings; no network is used. A few minutes on one core.
What is there already is kept, so the same command completes an interrupted one.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import postgrad
from postgrad.commands import builtin_corpus

FOLDER = Path(__file__).parent
DATA, MODELS = FOLDER / "data", FOLDER / "models"
BASES: dict[str, tuple[str, str, int, str | None]] = {
    "decoder": ("llama-1M", "600k", 256, None),
    "encoder": ("bert-1M", "150k", 128, "masked"),
    "encoder-decoder": ("t5-1M", "150k", 128, "span-corruption"),
}
"""Of each start model: family and size, trained tokens, length of a row, objective."""


def read(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (DATA / f"{name}.jsonl").read_text("utf-8").splitlines()]


def write(name: str, rows: Iterable[dict[str, Any]]) -> None:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (DATA / f"{name}.jsonl").write_text(text, "utf-8")


def write_tasks(part: str) -> None:
    """A collection of tasks in one file, told apart by a column."""
    rows = [
        {"task": "what", "prompt": row["instruction"], "completion": row["output"]}
        for row in read(f"instructions.{part}")
    ]
    rows += [{"task": "summary", "prompt": row["source"], "completion": row["target"]} for row in read(f"pairs.{part}")]
    rows += [
        {"task": "part", "prompt": f"{row['text']}\nPart of the library:", "completion": row["label"]}
        for row in read(f"labelled.{part}")
    ]
    for row in read(f"choices.{part}"):
        options = "\n".join(f"{letter}. {text}" for letter, text in zip("ABCD", row["choices"], strict=False))
        rows.append({"task": "choice", "prompt": f"{row['question']}\n{options}", "completion": "ABCD"[row["answer"]]})
    write(f"tasks.{part}", rows)


def write_data() -> None:
    """The corpora of the package, and files made of them."""
    builtin_corpus.write_texts(DATA)
    for name in builtin_corpus.ROW_GENERATORS:
        builtin_corpus.write_rows(DATA, name)
    for part in ("train", "test"):
        write_tasks(part)
    old, new = read("old"), read("new")
    for number, month in enumerate(("month-05", "month-06", "month-07")):
        write(month, new[number::3])
    write("target", new[::40])
    crawl = [row for number, row in enumerate(new) if number % 40][::4] + old[::2]
    random.Random(0).shuffle(crawl)
    write("crawl", [*crawl, *crawl[:50]])
    # What `postgrad synthesize --from` writes, here from the docstrings themselves.
    write("rewritten", (
        {"text": text, "form": form}
        for row in read("instructions.train")
        for form, text in (
            ("restatement", f"{row['instruction'][10:-4]}: {row['output']}"),
            ("questions", f"Question: {row['instruction']}\nAnswer: {row['output']}"),
            ("notes", f"- {row['instruction'][10:-4]}\n- {row['output']}"),
        )
    ))  # fmt: skip
    questions = [(f"Question: {row['instruction']}\nAnswer:", row["output"]) for row in read("instructions.test")[:50]]
    write("rewritten-questions", ({"prompt": prompt, "completion": answer} for prompt, answer in questions))


def train_base(name: str) -> None:
    """A small model from random weights, trained on the old text."""
    family, tokens, length, objective = BASES[name]
    stage = {
        "name": name,
        "output": f"models/{name}",
        "model": {"from_scratch": family, "tokenizer": {"vocab_size": 2048}},
        "tokens": tokens,
        "data": {
            "sequence_length": length,
            "sources": [{"name": "english", "path": "data/old.jsonl", "max_passes": 40}],
        },
        "schedule": {"kind": "cosine", "peak": 3e-3, "floor": 3e-4, "warmup": "5%"},
        "batch": {"global_batch_size": 16},
        "evaluation": {
            "learned": [{"name": "english", "path": "data/old-heldout.jsonl"}],
            "every": "50%",
            "eval_tokens": "8k",
        },
        "compute": {"compile": False},
        **({"objectives": [{"kind": objective}]} if objective else {}),
    }
    for event in postgrad.train(postgrad.plan_stage(stage, folder=FOLDER)):
        if isinstance(event, postgrad.RunFinished):
            print(f"models/{name}: {event.record.changes['english'].difference:+.2f} nats per token")


def derive() -> None:
    """What some stages read besides: importances, generated text, a larger vocabulary."""
    decoder, old, new = (str(path) for path in (MODELS / "decoder", DATA / "old.jsonl", DATA / "new.jsonl"))
    postgrad.measure_importance(decoder, [old], out=FOLDER / "importance.safetensors", tokens="20k", force=True)
    answers = [str(DATA / "instructions.train.jsonl")]
    postgrad.measure_importance(
        decoder, answers, out=FOLDER / "activation.safetensors", tokens="20k", kind="activation", force=True
    )
    if not (MODELS / "grown").exists():
        postgrad.grow_vocabulary(decoder, [new], MODELS / "grown", tokens=200)
    if not (DATA / "self-made.jsonl").exists():
        *_, _ = postgrad.synthesize(decoder, DATA / "self-made.jsonl", postgrad.SynthesisRequest(30_000, 128))


def main() -> None:
    """Everything, in order."""
    write_data()
    for name in BASES:
        train_base(name)
    derive()


if __name__ == "__main__":
    main()

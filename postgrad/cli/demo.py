"""The demo: a small model forgets when it continues on new text, and replay retains what it knew.

Old text: English documentation (the language reference that `help()` shows, and docstrings). New text: the standard library's
source code without docstrings and comments. A small model is trained on the old text, and continued on the new text twice:
naively, and with a tenth of the tokens replayed from the old. All numbers are measured on documents of held-out modules.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from postgrad.commands.builtin_corpus import write_texts
from postgrad.commands.results import Result
from postgrad.errors import InterruptError, StageError
from postgrad.storage.atomic import write_atomically

if TYPE_CHECKING:
    from postgrad.lineage.record import Record

SEED = 0
SEQUENCE_LENGTH = 256
BASE_TOKENS, NEW_TOKENS = 2_400_000, 900_000
VOCABULARY = 2048


@dataclass(frozen=True)
class Demo(Result):
    """The runs of the demo, and the page that compares them."""

    folder: Path
    report: Path
    records: dict[str, Record]
    """The record of each stage."""
    seconds: float

    def as_dict(self) -> dict[str, object]:
        """The changes of every stage, and what it took."""
        arms = {
            name: {key: record.as_json()[key] for key in ("changes", "totals")} for name, record in self.records.items()
        }
        return {"report": str(self.report), "arms": arms}


def run_demo(folder: Path, *, as_json: bool) -> Demo:
    """Write the texts and the base model, train both arms, and write the page that compares them."""
    from postgrad.cli.progress import make_screen, watch
    from postgrad.commands.compare import compare_runs
    from postgrad.commands.pages import write_page
    from postgrad.commands.train import plan_stage, train
    from postgrad.run.events import RunFinished

    start_time = time.perf_counter()
    if folder.exists() and not (folder / "data").exists() and any(folder.iterdir()):
        raise StageError(f"{folder} exists and is no demo", where="demo", hint="name another folder")
    folder.mkdir(parents=True, exist_ok=True)

    def show(text: str) -> None:
        if not as_json:
            print(text, file=sys.stderr, flush=True)

    show("1/4  old text: English documentation; new text: Python source code (from this Python installation)")
    sizes = write_texts(folder / "data")
    show(f"     {sizes['old']:,} and {sizes['new']:,} characters")
    write_random_model(folder / "random", folder / "data" / "old.jsonl")
    cache = folder.resolve() / "cache"
    records: dict[str, Record] = {}
    for number, (name, title) in enumerate(_STAGE_TITLES.items(), start=2):
        show(f"{number}/4  {title}")
        path = folder / f"{name}.yaml"
        write_atomically(path, demo_stage_text(name))
        events = train(plan_stage(path, cache=cache), cache=cache, command=f"postgrad train {path}")
        outcome = watch(events, make_screen(as_json))
        if not isinstance(outcome, RunFinished):
            raise InterruptError("the demo was stopped", hint=f"postgrad demo {folder} resumes")
        records[name] = outcome.record
    report = write_page(compare_runs([folder / "runs" / name for name in ("naive", "replay")]), folder / "report.html")
    return Demo(folder, report, records, time.perf_counter() - start_time)


def demo_text(demo: Demo) -> str:
    """The comparison of both arms in words."""
    from postgrad.reports.sections.comparison_table import comparison_table

    arms = [demo.records["naive"], demo.records["replay"]]
    lines = ["", comparison_table(arms, "naive").text(), "", *_conclusion(arms), ""]
    lines += [
        f"took {demo.seconds:.0f} s",
        f"report: {demo.report}   (open it in a browser; it needs no network)",
        f"next, for your own text: postgrad init my-stage --data YOUR-TEXT/ --model {demo.folder}/runs/replay",
    ]
    return "\n".join(lines)


_STAGE_TITLES = {
    "base": "train a small model on the old text",
    "naive": "continue it on the new text alone",
    "replay": "continue it on the new text, with 10 % of the tokens replayed from the old",
}


def demo_stage_text(name: str) -> str:
    """The stage files of the demo."""
    evaluation = (
        "evaluation: {retained: [{name: english, path: data/old-heldout.jsonl}], "
        "learned: [{name: code, path: data/new-heldout.jsonl}], every: 20%, eval_tokens: 8k, samples: 2}"
    )
    new = "    - {name: code, path: data/new.jsonl"
    if name == "base":
        return (
            f"name: base\nmodel: random\ntokens: {BASE_TOKENS}\nseed: {SEED}\n"
            f"data:\n  sequence_length: {SEQUENCE_LENGTH}\n  sources:\n"
            "    - {name: english, path: data/old.jsonl, max_passes: 20}\n"
            "schedule: {kind: cosine, peak: 3.0e-3, floor: 3.0e-4, warmup: 5%}\n"
            "batch: {global_batch_size: 16}\ncompute: {compile: false}   # a run this short gains nothing\n"
            "evaluation: {learned: [{name: english, path: data/old-heldout.jsonl}], every: 50%, eval_tokens: 8k}\n"
        )
    sources = new + "}\n"
    if name == "replay":
        sources = new + ", share: 90%}\n    - {name: english, path: data/old.jsonl, share: 10%, role: replay}\n"
    return (
        f"name: {name}\nmodel: runs/base\ntokens: {NEW_TOKENS}   # the same for both arms: replay costs no compute\n"
        f"seed: {SEED}\ndata:\n  sequence_length: {SEQUENCE_LENGTH}\n  sources:\n{sources}"
        "schedule: {kind: rewarm, peak: 2.0e-3, floor: 2.0e-4, warmup: 1%}\n"
        f"batch: {{global_batch_size: 16}}\ncompute: {{compile: false}}\n{evaluation}\n"
    )


def _conclusion(arms: list[Record]) -> list[str]:
    """The result in two sentences."""
    naive, replay = (arm.changes["english"].difference or 0.0 for arm in arms)
    gain, replay_gain = (arm.changes["code"].difference or 0.0 for arm in arms)
    removed = 1 - replay / naive if naive > 0 else float("nan")
    return [
        f"Naively the model's loss on English rose by {naive:.2f} nats per token ({arms[0].changes['english'].verdict}), while "
        f"it learnt code ({gain:+.2f}).",
        f"With 10 % replay it rose by {replay:.2f}: {removed:.0%} of the forgetting is gone, for "
        f"{replay_gain - gain:+.2f} nats on code and the same number of tokens.",
    ]


def write_random_model(folder: Path, text: Path) -> None:
    """A small Llama with random weights and a byte-level tokenizer trained on the old text."""
    if (folder / "config.json").exists():
        return
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from postgrad.models.published_vocabulary import publish_pretrained

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    with text.open() as lines:
        tokenizer.train_from_iterator((json.loads(line)["text"] for line in lines), trainer)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")
    torch.manual_seed(SEED)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=wrapped.eos_token_id,
        )
    )
    publish_pretrained(folder, model, wrapped, dtype=torch.float32)

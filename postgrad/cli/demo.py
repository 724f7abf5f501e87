"""What does forgetting look like, and its cure? Three small stages on text that every Python installation carries.

Old text: English documentation (the language reference that `help()` shows, and docstrings). New text: the standard
library's source code with its docstrings and comments taken out. A small model learns the old text, and is then continued
on the new twice: naively, and with a tenth of the tokens replayed from the old. Nothing is staged: what is printed was
measured on documents of modules that no model trained on.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from postgrad.commands.builtin_corpus import write_texts
from postgrad.errors import InterruptError, StageError
from postgrad.storage.atomic import write_atomically

if TYPE_CHECKING:
    from postgrad.lineage.record import Record

SEED = 0
SEQUENCE_LENGTH = 256
BASE_TOKENS, NEW_TOKENS = 2_400_000, 900_000
VOCABULARY = 2048


def run_demo(folder: Path, *, as_json: bool) -> dict[str, Any]:
    """Make the texts and the base model, train both arms, and write the page that compares them."""
    from postgrad.cli.progress import make_screen, watch
    from postgrad.config.stage_file import load_stage
    from postgrad.lineage.metrics import read_metrics
    from postgrad.plan.plan import make_plan
    from postgrad.reports.html import document
    from postgrad.reports.pages import comparison_page
    from postgrad.reports.sections.comparison_table import comparison_table
    from postgrad.run.events import RunFinished
    from postgrad.run.run import run_stage

    begun = time.perf_counter()
    if folder.exists() and not (folder / "data").exists() and any(folder.iterdir()):
        raise StageError(f"{folder} is there and is no demo", where="demo", hint="name another folder")
    folder.mkdir(parents=True, exist_ok=True)

    def say(text: str) -> None:
        if not as_json:
            print(text, file=sys.stderr, flush=True)

    say("1/4  old text: English documentation; new text: Python source code (from this Python installation)")
    sizes = write_texts(folder / "data")
    say(f"     {sizes['old']:,} and {sizes['new']:,} characters")
    write_random_model(folder / "random", folder / "data" / "old.jsonl")
    records: dict[str, Record] = {}
    for number, (name, what) in enumerate(_STAGE_TITLES.items(), start=2):
        say(f"{number}/4  {what}")
        place = folder / f"{name}.yaml"
        write_atomically(place, demo_stage_text(name))
        plan = make_plan(load_stage(place), folder.resolve(), folder.resolve() / "cache")
        command = f"postgrad train {place}"
        outcome = watch(run_stage(plan, command=command, cache=folder.resolve() / "cache"), make_screen(as_json))
        if not isinstance(outcome, RunFinished):
            raise InterruptError("the demo was stopped", hint=f"postgrad demo {folder} goes on")
        records[name] = outcome.record
    arms = [records["naive"], records["replay"]]
    report = folder / "report.html"
    metrics = [list(read_metrics(folder / "runs" / name / "metrics.jsonl")) for name in ("naive", "replay")]
    document.write_page(report, comparison_page.comparison_page(arms, metrics, "Forgetting, and its cure", "naive"))
    lines = ["", comparison_table(arms, "naive").text(), "", *_conclusion(arms), ""]
    lines += [
        f"took {time.perf_counter() - begun:.0f} s",
        f"report: {report}   (open it in a browser; it needs no network)",
        f"next, for your own text: postgrad init my-stage --data YOUR-TEXT/ --model {folder}/runs/replay",
    ]
    return {
        "text": "\n".join(lines),
        "report": str(report),
        "arms": {
            name: {key: record.as_json()[key] for key in ("changes", "totals")} for name, record in records.items()
        },
    }


_STAGE_TITLES = {
    "base": "a small model learns the old text",
    "naive": "it goes on with the new text alone",
    "replay": "it goes on with the new text, 10 % of the tokens replayed from the old",
}


def demo_stage_text(name: str) -> str:
    """The stage files of the demo, also worth reading."""
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
    """What the numbers say, in words made from them."""
    naive, cured = (arm.changes["english"].difference or 0.0 for arm in arms)
    gain, gain_cured = (arm.changes["code"].difference or 0.0 for arm in arms)
    removed = 1 - cured / naive if naive > 0 else float("nan")
    return [
        f"Naively the model's loss on English rose by {naive:.2f} nats per token ({arms[0].changes['english'].verdict}), while it "
        f"learnt code ({gain:+.2f}).",
        f"With 10 % replay it rose by {cured:.2f}: {removed:.0%} of the forgetting is gone, for "
        f"{gain_cured - gain:+.2f} nats on code and the same number of tokens.",
    ]


def write_random_model(folder: Path, text: Path) -> None:
    """A small Llama with random weights and a byte-level tokenizer trained on the old text."""
    if (folder / "config.json").exists():
        return
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from postgrad.models.pretrained import save_pretrained
    from postgrad.storage.atomic import publish_folder

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
    publish_folder(folder, lambda staged: save_pretrained(model, wrapped, staged, dtype=torch.float32))

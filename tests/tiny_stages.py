"""Tiny models of every sort in a folder with texts and rows for each task, and stages on them; nothing is downloaded."""

from __future__ import annotations

import json
import os
import random
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import processors
from torch import Tensor
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from postgrad.config.stage_file import parse_stage
from postgrad.distributed.world import World
from postgrad.hardware.execution import Execution
from postgrad.lineage.metrics import read_metrics
from postgrad.lineage.record import SetScore
from postgrad.models.pretrained import save_pretrained
from postgrad.plan.plan import Plan, make_plan
from postgrad.run.build import build_run, make_loader
from postgrad.run.events import CheckpointSaved, RunEvent, RunFinished, RunStopped, StepCompleted
from postgrad.run.run import run_stage
from postgrad.run.tuned_model import make_tuned_model
from postgrad.storage.atomic import MANIFEST
from postgrad.training.loop import train_steps
from postgrad.training.step import Run
from tests.conftest import write_jsonl
from tests.tiny_models import WORDS as WORDS
from tests.tiny_models import bert_tokenizer as bert_tokenizer
from tests.tiny_models import make_bert as make_bert
from tests.tiny_models import make_bpe as make_bpe
from tests.tiny_models import make_llama, make_tokenizer, new_text, old_text
from tests.tiny_models import make_t5 as make_t5
from tests.tiny_models import t5_tokenizer as t5_tokenizer

LENGTH = 48
"""Positions in a row."""


# -- tokenizers and models -------------------------------------------------------------------------------------------


def roberta_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer that sets `<s> x </s>` and `<s> x </s></s> y </s>`."""
    tokenizer = make_bpe(["<s>", "<pad>", "</s>", "<mask>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        pad_token="<pad>",
        eos_token="</s>",
        cls_token="<s>",
        sep_token="</s>",
        mask_token="<mask>",
    )


def bos_tokenizer() -> PreTrainedTokenizerFast:
    """A Llama-like tokenizer: `<s> x`, and nothing behind."""
    tokenizer = make_bpe(["<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> Path:
    """A model and its tokenizer in a folder."""
    save_pretrained(model, tokenizer, folder, dtype=torch.float32)
    return folder


# -- texts and rows ----------------------------------------------------------------------------------------------------


def write_rows(path: Path, examples: list[dict[str, Any]]) -> Path:
    """Rows as a JSON lines file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in examples))
    return path


def two_kind_texts(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """Short texts of two kinds, and which kind each is."""
    rng = random.Random(seed)
    out = []
    for _ in range(count):
        kind = rng.choice(["words", "sums"])
        made = old_text(1, rng.randrange(10**6)) if kind == "words" else new_text(1, rng.randrange(10**6))
        out.append((made[0][:40], kind))
    return out


def classification_examples(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Texts with one of two classes."""
    return [{"text": text, "label": kind} for text, kind in two_kind_texts(count, seed)]


def multi_label_examples(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Texts with any of three classes."""
    out = []
    for text, kind in two_kind_texts(count, seed):
        out.append({"text": text, "labels": [kind, *(["nine"] if "9" in text or "nine" in text else [])]})
    return out


def regression_examples(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Texts with a number: how much of them is digits."""
    return [
        {"text": text, "label": round(sum(c.isdigit() for c in text) / len(text) + 0.01, 3)}
        for text, _ in two_kind_texts(count, seed)
    ]


def tagging_examples(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Words with a tag each."""
    out = []
    for text, _ in two_kind_texts(count, seed):
        words = text.split()[:7]
        out.append({"tokens": words, "tags": ["mark" if any(c in ".;=*" for c in word) else "word" for word in words]})
    return out


def text_pair_examples(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Two texts and whether they are of one kind."""
    both = zip(two_kind_texts(count, seed), two_kind_texts(count, seed + 1), strict=True)
    return [
        {"sentence1": a[:20], "sentence2": b[:20], "label": "same" if one == other else "other"}
        for (a, one), (b, other) in both
    ]


def instruction_examples(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """An instruction and its output."""
    return [{"instruction": text[:25], "output": kind} for text, kind in two_kind_texts(count, seed)]


def completion_examples(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """A prompt and its completion."""
    return [{"prompt": text[:25], "completion": f" {kind}"} for text, kind in two_kind_texts(count, seed)]


def chat_examples(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Conversations of one turn or two."""
    out = []
    for i, (text, kind) in enumerate(two_kind_texts(count, seed)):
        turn = [{"role": "user", "content": text[:12]}, {"role": "assistant", "content": kind}]
        out.append({"messages": turn * (1 + i % 2)})
    return out


def source_target_examples(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """A source and a target."""
    return [{"source": text[:25], "target": kind} for text, kind in two_kind_texts(count, seed)]


def question_examples(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """A question about a text, and its answers as SQuAD has them."""
    return [
        {"question": "what is it?", "context": text[:20], "answers": {"text": [kind, "text"], "answer_start": [0, 0]}}
        for text, kind in two_kind_texts(count, seed)
    ]


def multiple_choice_examples(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """A question, choices, and the number of the right one."""
    return [
        {"question": text[:20], "choices": ["words", "sums"], "answer": int(kind == "sums")}
        for text, kind in two_kind_texts(count, seed)
    ]


EXAMPLE_MAKERS = {
    "labelled": classification_examples,
    "multi": multi_label_examples,
    "numbered": regression_examples,
    "tagged": tagging_examples,
    "paired": text_pair_examples,
    "instruction": instruction_examples,
    "completion": completion_examples,
    "chat": chat_examples,
    "pair": source_target_examples,
    "question": question_examples,
    "choices": multiple_choice_examples,
}
"""Rows of every sort, by the name of their file."""


# -- a folder with all of it, and stages on it ------------------------------------------------------------------------


@dataclass(frozen=True)
class Workspace:
    """A folder with models (`llama`, `bert`, `t5`), texts (`old`, `new`) and rows of every sort, each with a held-out part."""

    folder: Path
    cache: Path

    def file(self, name: str, *, held_out: bool = False) -> str:
        """A file of texts or rows."""
        return str(self.folder / f"{name}{'-heldout' if held_out else ''}.jsonl")

    def source(self, name: str, kind: str | None = None, **changes: Any) -> dict[str, Any]:
        """A source of texts or rows, read as often as a stage likes."""
        said = {"kind": kind} if kind else {}
        return {"name": name, "path": self.file(name), "max_passes": 100, **said, **changes}

    @property
    def old_and_new(self) -> list[dict[str, Any]]:
        """New text with a quarter of replay."""
        return [self.source("new", share=0.75), self.source("old", share=0.25, role="replay")]

    @property
    def text_evaluation(self) -> dict[str, Any]:
        """An evaluation on both texts."""
        return {
            **QUICK_EVALUATION,
            "retained": [self.file("old", held_out=True)],
            "learned": [self.file("new", held_out=True)],
        }

    def stage(self, name: str, tuning: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
        """A stage of six small steps on the llama, in the folder `runs/name`."""
        model = changes.pop("model", "llama")
        sources = changes.pop("sources", self.old_and_new)
        data = {"sequence_length": LENGTH, "overlap": "off", "sources": sources, **changes.pop("data", {})}
        return {
            "name": name,
            "model": str(self.folder / model),
            "output": str(self.folder / "runs" / name),
            "tokens": 6 * 4 * LENGTH,
            "data": data,
            "batch": {"global_batch_size": 4, "micro_batch_size": 2},
            "schedule": {"kind": "constant", "peak": 1e-2, "warmup": 0},
            "evaluation": self.text_evaluation,
            "save": {"every": "2 steps"},
            "compute": {"threads": 1, "dtype": "float32", "compile": False},
            **({"tuning": tuning} if tuning else {}),
            **changes,
        }

    def plan(self, raw: dict[str, Any]) -> Plan:
        """What a stage will do."""
        return make_plan(parse_stage(raw, "test"), self.folder, self.cache)

    def run_events(self, raw: dict[str, Any]) -> list[RunEvent]:
        """All that happens in a stage."""
        return list(run_stage(self.plan(raw), command="test", cache=self.cache))

    def run(self, raw: dict[str, Any]) -> RunFinished:
        """A stage carried out; one that is finished already is not carried out again."""
        last = self.run_events(raw)[-1]
        assert isinstance(last, RunFinished)
        return last


QUICK_EVALUATION = {"every": "50%", "eval_tokens": 10_000, "samples": 0}


def make_workspace(folder: Path, cache: Path) -> Workspace:
    """Write it all. Held-out texts are so short that each is one window, with a soft prompt before it too."""
    llama, bert, t5 = make_tokenizer(), bert_tokenizer(), t5_tokenizer()
    save_model(make_llama(), llama, folder / "llama")
    save_model(make_bert(len(bert)), bert, folder / "bert")
    save_model(make_t5(len(t5)), t5, folder / "t5")
    for name, made in (("old", old_text), ("new", new_text)):
        write_jsonl(folder / f"{name}.jsonl", made(60, 10))
        write_jsonl(folder / f"{name}-heldout.jsonl", [text[:36] for text in made(12, 20)])
    for name, make in EXAMPLE_MAKERS.items():
        write_rows(folder / f"{name}.jsonl", make(60, 1))
        write_rows(folder / f"{name}-heldout.jsonl", make(24, 1000))
    return Workspace(folder, cache)


# -- what two runs must have in common -------------------------------------------------------------------------------


def typed_scores(sets: dict[str, dict[str, Any]]) -> dict[str, SetScore]:
    """Scores that `postgrad eval` printed, as a record holds them."""
    return {name: SetScore.model_validate(scores) for name, scores in sets.items()}


def run_trace(run_folder: Path) -> list[str]:
    """All that must be the same bit for bit: losses as hex, evaluations, and every file that is published."""
    out = []
    for row in read_metrics(run_folder / "metrics.jsonl"):
        data = row.model_dump(exclude={"seconds"})
        out.append(json.dumps({k: v.hex() if isinstance(v, float) else v for k, v in data.items()}))
    manifest = json.loads((run_folder / "model" / MANIFEST).read_text())
    return [*out, *(f"{name} {entry['sha256']}" for name, entry in sorted(manifest.items()))]


def run_interrupted(workspace: Workspace, raw: dict[str, Any]) -> RunFinished:
    """A stage that is killed a step behind a checkpoint, then stopped by hand, then finished."""
    saved = False
    for event in run_stage(workspace.plan(raw), command="test", cache=workspace.cache):
        if saved and isinstance(event, StepCompleted):
            break  # whatever was made since the checkpoint is lost
        saved |= isinstance(event, CheckpointSaved)
    last: RunEvent | None = None
    for event in run_stage(workspace.plan(raw), command="test", cache=workspace.cache):
        last = event
        if isinstance(event, StepCompleted) and event.report.step == 5:
            os.kill(os.getpid(), signal.SIGTERM)
    assert saved and isinstance(last, RunStopped) and last.step == 5
    return workspace.run(raw)


def train_for(
    workspace: Workspace, raw: dict[str, Any], count: int
) -> tuple[dict[str, Tensor], dict[str, Tensor], Run]:
    """Every weight of a model before and after so many steps of a stage, and the run."""
    plan, world = workspace.plan(raw), World(torch.device("cpu"))
    subject = make_tuned_model(plan, world)
    model = subject.model.pretrained
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    execution = Execution("float32", False, subject.attention or "sdpa", 1, 2, False, 0.0)
    run = build_run(plan, subject, execution, world)
    for _ in train_steps(run, make_loader(plan, execution, world), count):
        pass
    return before, {name: p.detach() for name, p in model.named_parameters()}, run

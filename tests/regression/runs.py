"""A fixed set of small runs, and what each of them computes, down to the bit.

    python tests/regression/runs.py --compare [NAME ...]      one line a run; exit code 1 on any difference
    python tests/regression/runs.py --compare --loose         without the intervals, whose number of draws may change
    python tests/regression/runs.py --write [--out FILE]      capture all runs anew
    python tests/regression/runs.py --list                    the names of the runs

The models, tokenizers and texts are made from seeds, here and in `tests/tiny_models.py`. The package is driven through its
command line alone, in this process, and everything is read from what that leaves behind. Whatever the package calls its keys,
options and files stands in one place, `the adapter`: the rest of this file, and `expected.json`, keep the words of the commit
that was captured.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import hashlib
import importlib
import io
import json
import os
import platform
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
import yaml
from safetensors import safe_open
from transformers import (
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as transformers_logging

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))  # as a script and as a module of the tests

from tiny_models import (  # noqa: E402
    NUMBERS,
    bert_tokenizer,
    make_bert,
    make_bpe,
    make_llama,
    make_t5,
    new_text,
    old_text,
    t5_tokenizer,
)

EXPECTED = HERE / "expected.json"

Data = dict[str, Any]


# == The adapter =======================================================================================================
#
# Everything below this section is written in the words of the captured commit. When the package renames something, say so in
# these tables, and nowhere else. All of them are empty for the captured commit itself.

Moves = Sequence[tuple[str, str]]
"""Pairs `(here, now)` of paths into nested data: the word of this file, and what the package calls it now.

A path is a list of keys with dots between them; `*` stands for every item of a list or every value of a mapping, and
`key@kind` for a mapping of this kind alone. Both paths
share what stands before the part that is renamed: `("data.shifts", "data.schedule")`,
`("data.sources.*.words", "data.sources.*.label_words")`, `("batch.sequences", "batch_size")`.
"""
Values = Sequence[tuple[str, Mapping[str, str]]]
"""Of a path the values that are renamed, `{here: now}`: `("data.when_short", {"renormalise": "rescale"})`."""

VERBS: Mapping[str, str] = {}
"""Verbs of the command line: `{here: now}`."""
OPTIONS: Mapping[tuple[str, str], str] = {
    ("restore", "--until"): "--min-recovered",
    ("compare", "--on"): "--text",
    ("synthesize", "--longest"): "--max-tokens",
    ("synthesize", "--from"): "--prompts",
    ("synthesize", "--beginning"): "--prompt-tokens",
    ("synthesize", "--at-once"): "--batch-size",
    ("synthesize", "--most-repeated"): "--max-repetition",
    ("synthesize", "--keep"): "--diverse-share",
    ("blend", "--sweep"): "--weights",
    ("blend", "--by"): "--granularity",
    ("blend", "--choose"): "--weight",
    ("importance", "--onto"): "--accumulate",
    ("generate", "--tokens"): "--max-new-tokens",
    ("generate", "--beside"): "--compare-with",
}
"""Options of a verb: `{("synthesize", "--longest"): "--max-tokens"}`."""
_ROW_KEYS = (("words", "label_words"), ("only", "filter"), ("documents", "document_unit"))
_ROWS = ("data.sources.*", "evaluation.retained.*", "evaluation.learned.*", "evaluation.test.*", "evaluation.tasks.*")
STAGE: Moves = (
    ("model.fresh", "model.from_scratch"),
    ("model.tokenizer.vocabulary", "model.tokenizer.vocab_size"),
    ("data.when_short", "data.on_exhausted"),
    ("data.shifts", "data.curriculum"),
    *((f"{rows}.{here}", f"{rows}.{now}") for rows in _ROWS for here, now in _ROW_KEYS),
    *((f"{rows}.like", f"{rows}.same_format_as") for rows in _ROWS[1:4]),
    ("data.sources.*.stands_for", "data.sources.*.prior_tokens"),
    ("data.sources.*.select.*@dsir.like", "data.sources.*.select.*@dsir.target"),
    ("data.sources.*.select.*@perplexity.between", "data.sources.*.select.*@perplexity.quantiles"),
    ("data.sources.*.select.*@perplexity.tokens", "data.sources.*.select.*@perplexity.max_tokens"),
    ("batch.sequences", "batch.global_batch_size"),
    ("batch.micro", "batch.micro_batch_size"),
    ("optimizer.decay_tables", "optimizer.decay_embeddings"),
    ("optimizer.clip", "optimizer.max_grad_norm"),
    ("optimizer.update", "optimizer.sparse_update"),
    ("optimizer.loss_adaptive.start", "optimizer.loss_adaptive.initial_share"),
    ("objectives.*.cache.draws", "objectives.*.cache.samples"),
    ("objectives.*.cache.temper", "objectives.*.cache.sampling_power"),
    ("objectives.*@on-policy.new_tokens", "objectives.*@on-policy.max_new_tokens"),
    ("penalties.*.normalise", "penalties.*.normalize"),
    ("penalties.*.only", "penalties.*.targets"),
    ("tuning.also", "tuning.also_train"),
    ("tuning.form", "tuning.variant"),
    ("tuning.quantise", "tuning.quantization"),
    ("tuning.leave_out", "tuning.skip_layers"),
    ("tuning.names", "tuning.targets"),
    ("tuning@prompt.start", "tuning@prompt.init"),
    ("tuning@prompt.text", "tuning@prompt.init_text"),
    ("tuning@prompt.labels", "tuning@prompt.init_labels"),
    ("tuning@prefix.start", "tuning@prefix.init_text"),
    ("tuning@p-tuning-v2.start", "tuning@p-tuning-v2.init_text"),
    ("tuning.demonstrations.by", "tuning.demonstrations.sampler"),
    ("tuning.demonstrations.tokens", "tuning.demonstrations.max_tokens"),
    ("evaluation.during_tokens", "evaluation.eval_tokens"),
    ("evaluation.realign_steps", "evaluation.relearning_steps"),
    ("evaluation.tasks.*.shown.by", "evaluation.tasks.*.shown.sampler"),
    ("evaluation.tasks.*.shown", "evaluation.tasks.*.few_shot"),
    ("evaluation.tasks.*.by", "evaluation.tasks.*.normalization"),
    ("evaluation.tasks.*.answered", "evaluation.tasks.*.scoring"),
    ("evaluation.tasks.*.most_tokens", "evaluation.tasks.*.max_new_tokens"),
    ("evaluation.tasks.*.during", "evaluation.tasks.*.during_training"),
    ("save.choose.by", "save.choose.metric"),
    ("save.choose.gain", "save.choose.min_delta"),
    ("save.choose.enough", "save.choose.stop_at"),
    ("save.choose.at_least", "save.choose.burn_in"),
)
"""Keys of a stage file; tasks (also in a file of their own) are `evaluation.tasks.*`."""
STAGE_VALUES: Values = (
    ("schedule.kind", {"then": "piecewise"}),
    ("optimizer.update.kind", {"momentum": "mofo", "magnitude": "migu"}),
    ("penalties.*.storage", {"mapped": "mmap"}),
    ("tuning.demonstrations.by", {"seed": "random"}),
    ("evaluation.tasks.*.shown.by", {"seed": "random"}),
    ("evaluation.tasks.*.answered", {"choose": "multiple-choice", "write": "generate"}),
    ("save.choose.patience", {f"{n} look{'s' * (n > 1)}": f"{n} evaluations" for n in range(1, 10)}),
)
"""Values in a stage file, such as kinds."""
STUDY: Moves = (
    ("against", "baseline"),
    ("old.stands_for", "old.prior_tokens"),
    ("arms.*.parts", "arms.*.stages"),
    ("arms.*.blend.of", "arms.*.blend.arm"),
    ("claims.*.say", "claims.*.statement"),
    ("claims.*.than", "claims.*.compared_with"),
    ("claims.*.on", "claims.*.loss"),
    ("claims.*.at_most", "claims.*.max_difference"),
    ("claims.*.removes", "claims.*.min_removed"),
)
"""Keys of a study file, beside those of a stage that stand under `stage` and in each of its `arms`."""
STUDY_VALUES: Values = (("arms.*.replay_from", {"self-made": "generated"}),)
"""Values in a study file."""


def _from_previous_format(keys: str) -> Moves:
    """A table of the package that converts files of the format that was captured, parents first."""
    pairs = getattr(importlib.import_module("postgrad.lineage.previous_format"), keys)
    return [
        (path, ".".join([*path.split(".")[:-1], new])) for path, new in sorted(pairs, key=lambda p: p[0].count("."))
    ]


RECORD: Moves = _from_previous_format("RECORD_KEYS")
"""Keys of a run's record."""
STEP: Moves = _from_previous_format("ROW_KEYS")
"""Keys of a step's row of metrics."""
LOOK: Moves = STEP
"""Keys of an evaluation's row of metrics."""
OMITTED = (
    *(("chosen", "realign", "gate", "drift", "update", "pseudo_perplexity")),
    *("changes.*.share_of_range", "pseudo_perplexity.changes.*.share_of_range"),
    *("tasks.*.before.*.spread", "tasks.*.after.*.spread", "penalties.*.importance"),
)
"""Keys of a record that are left out where they are null."""
EMPTY = ("scores.*.*.metrics", "pseudo_perplexity.scores.*.*.metrics")
"""Keys of a record that were left out where they are empty."""
RESULTS: Mapping[str, Moves] = {
    "eval": (
        ("sets.*.pseudo", "sets.*.pseudo_perplexity"),
        ("tasks.*.scores.*.seeds", "tasks.*.scores.*.values_by_seed"),
        ("tasks.*.scores.*.spread", "tasks.*.scores.*.std"),
    ),
    "advise": (
        ("share", "replay_share"),
        ("even", "break_even"),
        ("even.share", "even.replay_share"),
        ("old", "retained_losses"),
        ("rise", "retained_rises"),
        ("new", "learned_losses"),
        ("tokens", "pilot_tokens"),
        ("pilots.*.share", "pilots.*.replay_share"),
    ),
    "generate": (("continuations.*.written", "continuations.*.text"),),
}
"""Keys of what a verb prints with `--json`, by verb (as it is called here)."""
NAMES: Mapping[str, str] = {}
"""Names that the package makes up and that are keys in what was captured, such as metrics: `{here: now}`."""
FILES = {
    "record": "record.json",
    "metrics": "metrics.jsonl",
    "model": "model",
    "checkpoints": "checkpoints",
}
"""Files and folders of a run."""
ROWS = {"key": "kind", "step": "step", "look": "evaluation"}
"""What tells the rows of metrics apart: the key, and its value for a step and for an evaluation."""
EVENTS = {"key": "event", "step": "step", "saved": "checkpoint"}
"""What is printed on standard error, a line an event, with `--json`: the key, and its value for a step and a checkpoint."""
CACHE_VARIABLE = "POSTGRAD_CACHE"
"""The environment variable that names the cache."""
CODES = {"stopped": 3, "gate failed": 4}
"""Exit codes that are no errors."""


def entry_point() -> Callable[[], None]:
    """What the command `postgrad` calls; it reads `sys.argv`, prints, and raises `SystemExit`."""
    from postgrad.cli.main import main

    return main


def steps_of(run: Path) -> list[Data]:
    """A run's rows of metrics that are steps."""
    return [renamed(row, STEP, back=True) for row in _rows(run) if row[ROWS["key"]] == ROWS["step"]]


def looks_of(run: Path) -> list[Data]:
    """A run's rows of metrics that are evaluations."""
    return [renamed(row, LOOK, back=True) for row in _rows(run) if row[ROWS["key"]] == ROWS["look"]]


def record_of(run: Path) -> Data:
    """A run's record."""
    record = renamed(json.loads((run / FILES["record"]).read_text()), RECORD, back=True)
    for path in OMITTED:
        *parents, key = path.split(".")
        for parent in _at(record, parents):
            parent.setdefault(key, None)
    for path in EMPTY:
        *parents, key = path.split(".")
        for parent in _at(record, parents):
            if not parent.get(key):
                parent.pop(key, None)
    return record


def _at(node: Any, path: Sequence[str]) -> list[Data]:
    """Every mapping that a path leads to."""
    nodes = [node]
    for step in path:
        nodes = [child for each in nodes for child in _children(each, step)]
    return [each for each in nodes if isinstance(each, dict)]


def _rows(run: Path) -> list[Data]:
    return [json.loads(line) for line in (run / FILES["metrics"]).read_text().splitlines()]


def renamed(data: Any, moves: Moves, values: Values = (), *, back: bool = False) -> Any:
    """Data in the package's words of now; with `back` the other way."""
    data = copy.deepcopy(data)
    for path, names in values:
        for holder, key in list(_holders(data, path.split("."))):
            if isinstance(holder[key], str):
                holder[key] = names.get(holder[key], holder[key])
    for here, now in moves:
        old, new = (now, here) if back else (here, now)
        _move(data, old.split("."), new.split("."))
    if back and NAMES:
        data = _called(data, {now: here for here, now in NAMES.items()})
    return data


def _called(data: Any, names: Mapping[str, str]) -> Any:
    if isinstance(data, dict):
        return {names.get(key, key): _called(value, names) for key, value in data.items()}
    return [_called(value, names) for value in data] if isinstance(data, list) else data


def _children(node: Any, step: str) -> list[Any]:
    key, _, kind = step.partition("@")
    if kind:
        return _of_kind(_children(node, key), kind)
    if key == "*":
        return list(node.values()) if isinstance(node, dict) else node if isinstance(node, list) else []
    return [node[key]] if isinstance(node, dict) and key in node else []


def _of_kind(nodes: list[Any], kind: str) -> list[Any]:
    return [node for node in nodes if not kind or (isinstance(node, dict) and node.get("kind") == kind)]


def _holders(node: Any, path: list[str]) -> Iterator[tuple[Data, str]]:
    """Every mapping that has the last key of a path, with that key."""
    first, *rest = path
    if rest:
        for child in _children(node, first):
            yield from _holders(child, rest)
    elif isinstance(node, dict) and first in node:
        yield node, first


def _move(node: Any, old: list[str], new: list[str]) -> None:
    if len(old) > 1 and len(new) > 1 and old[0] == new[0]:
        for child in _children(node, old[0]):
            _move(child, old[1:], new[1:])
        return
    assert "*" not in (*old, *new), f"the paths part before a *: {'.'.join(old)} and {'.'.join(new)}"
    found = list(_holders(node, old))
    for holder, key in found:
        value = holder.pop(key)
        target = node
        for name in new[:-1]:
            target = target.setdefault(name, {})
        target[new[-1]] = value


# == Texts and rows ====================================================================================================


def two_kinds(count: int, seed: int) -> list[tuple[str, str]]:
    """Short texts of both kinds, and which kind each is of."""
    rng = random.Random(seed)
    out = []
    for _ in range(count):
        kind = rng.choice(["words", "sums"])
        make = old_text if kind == "words" else new_text
        out.append((make(1, rng.randrange(10**6))[0][:40], kind))
    return out


def _labelled(text: str, kind: str, number: int) -> Data:
    return {"text": text, "label": kind}


def _multi(text: str, kind: str, number: int) -> Data:
    return {"text": text, "labels": [kind, *(["nine"] if "9" in text or "nine" in text else [])]}


def _numbered(text: str, kind: str, number: int) -> Data:
    return {"text": text, "label": round(sum(c.isdigit() for c in text) / len(text) + 0.01, 3)}


def _tagged(text: str, kind: str, number: int) -> Data:
    words = text.split()[:7]
    return {"tokens": words, "tags": ["mark" if any(c in ".;=*" for c in word) else "word" for word in words]}


def _instruction(text: str, kind: str, number: int) -> Data:
    return {"instruction": text[:25], "output": kind}


def _completion(text: str, kind: str, number: int) -> Data:
    return {"prompt": text[:25], "completion": f" {kind}"}


def _chat(text: str, kind: str, number: int) -> Data:
    turn = [{"role": "user", "content": text[:12]}, {"role": "assistant", "content": kind}]
    return {"messages": turn * (1 + number % 2)}


def _pair(text: str, kind: str, number: int) -> Data:
    return {"source": text[:25], "target": kind}


def _choices(text: str, kind: str, number: int) -> Data:
    return {"question": text[:20], "choices": ["words", "sums"], "answer": int(kind == "sums")}


ROW_MAKERS: Mapping[str, Callable[[str, str, int], Data]] = {
    "labelled": _labelled,
    "multi": _multi,
    "numbered": _numbered,
    "tagged": _tagged,
    "instruction": _instruction,
    "completion": _completion,
    "chat": _chat,
    "pair": _pair,
    "choices": _choices,
}


def made_rows(name: str, count: int, seed: int) -> list[Data]:
    """Rows of a sort."""
    return [ROW_MAKERS[name](text, kind, i) for i, (text, kind) in enumerate(two_kinds(count, seed))]


def write_rows(path: Path, rows: Iterable[Data]) -> Path:
    """Rows as a JSON lines file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


# == Tokenizers and models =============================================================================================

LENGTH = 48
"""Positions in a row."""
CHAT_TEMPLATE = """\
{%- for message in messages %}{% if not loop.first %}{{ "\\n\\n" }}{% endif %}### {{ message["role"] }}:
{{ message["content"] }}{% if message["role"] == "assistant" %}<|end|>{% endif %}{% endfor %}\
{% if add_generation_prompt %}{{ "\\n\\n### assistant:\\n" }}{% endif %}"""


def llama_tokenizer() -> PreTrainedTokenizerFast:
    """A decoder's tokenizer, with an end-of-text token alone."""
    return PreTrainedTokenizerFast(tokenizer_object=make_bpe(["<|end|>"]), eos_token="<|end|>")


def biased_llama() -> LlamaForCausalLM:
    """A Llama whose linear layers have biases that are not zero."""
    model = make_llama(attention_bias=True, mlp_bias=True)
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model


def chatting_llama(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama that has learnt to ask and answer in the tokenizer's chat template."""
    rng = random.Random(0)
    rows = []
    for _ in range(32):
        one, two = rng.sample(NUMBERS[:6], 2)
        talk = [{"role": "user", "content": f"{one} and {two}"}, {"role": "assistant", "content": f"{two} and {one}."}]
        text = tokenizer.apply_chat_template(talk, tokenize=False)
        rows.append(tokenizer(text, add_special_tokens=False)["input_ids"])
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    labels = torch.tensor([row + [-100] * (longest - len(row)) for row in rows])
    model = make_llama(max_position_embeddings=256)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(200):
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def write_model(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    """A model and its tokenizer as transformers writes them."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def _write_llama(folder: Path) -> None:
    write_model(folder, make_llama(), llama_tokenizer())


def _write_other(folder: Path) -> None:
    write_model(folder, make_llama(7), llama_tokenizer())


def _write_biased(folder: Path) -> None:
    write_model(folder, biased_llama(), llama_tokenizer())


def _write_wide(folder: Path) -> None:
    write_model(folder, make_llama(max_position_embeddings=256), llama_tokenizer())


def _write_bert(folder: Path) -> None:
    tokenizer = bert_tokenizer([*NUMBERS, "and", "yes", "no"])
    write_model(folder, make_bert(len(tokenizer), dropout=0.1), tokenizer)


def _write_t5(folder: Path) -> None:
    tokenizer = t5_tokenizer()
    write_model(folder, make_t5(len(tokenizer)), tokenizer)


def _write_talker(folder: Path) -> None:
    tokenizer = llama_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    write_model(folder, chatting_llama(tokenizer), tokenizer)


MODELS: Mapping[str, Callable[[Path], None]] = {
    "llama": _write_llama,
    "other": _write_other,
    "biased": _write_biased,
    "wide": _write_wide,
    "bert": _write_bert,
    "t5": _write_t5,
    "talker": _write_talker,
}


# == What is captured ==================================================================================================

INTERVALS = frozenset({"low", "high", "relative_high", "same"})
"""Keys of what depends on the number of bootstrap draws; it is kept under `intervals`, apart from everything else."""
LEFT_OUT = frozenset({"seconds", "bytes", "fingerprint", "format"})
"""Keys of numbers that say nothing about a result, or something about the machine."""


def hexed(value: float) -> str:
    """A number to the bit."""
    return float(value).hex()


def split(data: Any) -> tuple[Any, Any]:
    """Numbers of nested data, floats as hex, without any words; and the same of the intervals alone (None: there are none)."""
    if isinstance(data, bool) or data is None or isinstance(data, int):
        return data, None
    if isinstance(data, float):
        return hexed(data), None
    if isinstance(data, dict):
        plain, intervals = {}, {}
        for key, value in data.items():
            if key in LEFT_OUT or isinstance(value, str):
                continue
            own, within = split(value)
            if key in INTERVALS:
                intervals[key] = own if within is None else {"value": own, "within": within}
                continue
            plain[key] = own
            if within is not None:
                intervals[key] = within
        return plain, intervals or None
    if isinstance(data, list):
        parts = [split(item) for item in data if not isinstance(item, str)]
        found = {str(i): within for i, (_, within) in enumerate(parts) if within is not None}
        return [own for own, _ in parts], found or None
    raise TypeError(f"{type(data).__name__} is no plain data")


class Captured:
    """What is written down of a run: named fields, with the intervals of all of them apart."""

    def __init__(self) -> None:
        self.fields: Data = {}
        self.intervals: Data = {}

    def add(self, name: str, data: Any) -> Captured:
        """Take the numbers of a field."""
        self.fields[name], within = split(data)
        if within is not None:
            self.intervals[name] = within
        return self

    def put(self, name: str, value: Any) -> Captured:
        """Take a field as it is: hashes, names, numbers that are hex already."""
        self.fields[name] = value
        return self

    def under(self, name: str, other: Captured) -> Captured:
        """Take all that was captured of another run."""
        self.fields[name] = other.fields
        if other.intervals:
            self.intervals[name] = other.intervals
        return self

    def as_data(self) -> Data:
        """All fields, the intervals last."""
        return {**self.fields, "intervals": self.intervals}


def text_hash(texts: Iterable[str]) -> str:
    """The hash of some texts."""
    return hashlib.sha256(json.dumps(list(texts)).encode()).hexdigest()


def tensors_in(place: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a folder's safetensors files, or of one such file."""
    for path in sorted(place.glob("*.safetensors")) if place.is_dir() else [place]:
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 (it is no mapping)
                yield name, file.get_tensor(name)


def weights(place: Path) -> Data:
    """The hash of all tensors with their names, and of the tensors alone, in whatever order and under whatever names.

    Neither hash knows of files or of what is said beside the tensors. Where tensors are renamed the second one stays.
    """
    named, bare = [], []
    for name, tensor in tensors_in(place):
        raw = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
        said = f"{tensor.dtype} {list(tensor.shape)} {hashlib.sha256(raw).hexdigest()}"
        named.append(f"{name} {said}")
        bare.append(said)
    return {
        "tensors": len(named),
        "named": hashlib.sha256("\n".join(sorted(named)).encode()).hexdigest(),
        "bare": hashlib.sha256("\n".join(sorted(bare)).encode()).hexdigest(),
    }


_STEP_PARTS = {"loss": "loss", "gradient norm": "grad_norm", "rate": "rate", "push": "push", "moved": "moved"}


def losses(run: Path) -> list[Data]:
    """Every step of a run: its loss, that of each objective, each penalty, the gradient's norm, the rate, and what was read."""
    out = []
    for row in steps_of(run):
        step: Data = {"step": row["step"]}
        for name, key in _STEP_PARTS.items():
            if key in row:
                step[name] = row[key] if isinstance(row[key], int) else hexed(row[key])
        step["objectives"] = [hexed(value) for value in row["losses"].values()]
        step["penalties"] = [hexed(value) for value in row["penalties"].values()]
        step["sources"] = {name: [hexed(nats), tokens] for name, (nats, tokens) in row["by_source"].items()}
        out.append(step)
    return out


def _look(row: Data) -> Data:
    """What was seen at a look; what decides whether a step forgot too much is the upper end of an interval."""
    look = {key: row[key] for key in ("step", "sets", "choice", "tasks") if row.get(key) not in (None, {})}
    if "choice" in look:
        choice = {"best": None} | {key: value for key, value in look["choice"].items() if key != "rise"}
        look["choice"] = {**choice, "forgot": {"high": look["choice"].get("rise")}}
    return look


def captured(run: Path) -> Captured:
    """What a run computed, from the files that it left."""
    record = record_of(run)
    out = Captured().put("steps", losses(run))
    achieved = record["achieved"]
    out.put("trained", {source["name"]: source["trained"] for source in achieved["sources"]})
    out.add("seen", sorted([entry["tokens"] for entry in record["seen"].values()]))
    out.put("weights", weights(run / FILES["model"]))
    out.add("scores", record["scores"])
    out.add("changes", record["changes"])
    out.add("looks", [_look(row) for row in looks_of(run)])
    if record["tasks"]:
        parts = ("items", "shortened", "before", "after", "changes")
        out.add("tasks", {task["name"]: {key: task[key] for key in parts} for task in record["tasks"]})
        said = [str(example[key]) for t in record["tasks"] for example in t["examples"] for key in ("before", "after")]
        out.put("answers", text_hash(said))
    if record["clusters"]:
        out.add("clusters", {entry["cluster"]: entry for entry in record["clusters"]})
    if record["samples"]:
        out.put("samples", text_hash(sample[key] for sample in record["samples"] for key in ("before", "after")))
    for key in ("drift", "pseudo_perplexity", "update", "penalties"):
        if record[key]:
            out.add(key, record[key])
    if record["chosen"]:
        out.add("chosen", {key: record["chosen"][key] for key in ("step", "last", "first", "stopped")})
    if record["realign"]:
        # What came back is a share only of what was lost beyond the interval.
        sets = {
            name: {k: v for k, v in found.items() if k != "share"} for name, found in record["realign"]["sets"].items()
        }
        out.add("realign", {**record["realign"], "sets": sets})
    if record["gate"]:
        out.intervals["gate"] = split(record["gate"]["worst"])[0]
    return out


# == A folder with all of it ===========================================================================================


class Killed(BaseException):
    """The process is gone, as far as the package can tell."""


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Inside, torch has one thread, and the process one core: what chooses its threads by the cores that are there has one."""
    threads = torch.get_num_threads()
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    torch.set_num_threads(1)
    if cores:
        os.sched_setaffinity(0, {sorted(cores)[os.getpid() % len(cores)]})
    try:
        yield
    finally:
        if cores:
            os.sched_setaffinity(0, cores)
        torch.set_num_threads(threads)


@dataclass
class Errors(io.TextIOBase):
    """Standard error, which may end a run at a step: `stop` asks it to stop, `kill` leaves it where it is."""

    stop: int | None = None
    kill: int | None = None
    """The first step behind a checkpoint, from this one on."""
    said: list[str] = field(default_factory=list)
    saved: bool = False

    def write(self, text: str) -> int:
        self.said.append(text)
        if self.stop is not None or self.kill is not None:
            for line in text.splitlines():
                self._met(line)
        return len(text)

    def _met(self, line: str) -> None:
        with contextlib.suppress(ValueError):
            event = json.loads(line)
            self.saved |= event.get(EVENTS["key"]) == EVENTS["saved"]
            if event.get(EVENTS["key"]) != EVENTS["step"]:
                return
            if event["step"] == self.stop:
                self.stop = None
                os.kill(os.getpid(), signal.SIGINT)
            if self.kill is not None and self.saved and event["step"] >= self.kill:
                self.kill = None
                raise Killed

    def writable(self) -> bool:
        return True


class Shelf:
    """A folder with models, texts and rows, each with a held-out part, and the runs that were made of them."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.done: dict[str, Path] = {}
        for name, make in (("old", old_text), ("new", new_text)):
            write_rows(home / f"{name}.jsonl", ({"text": text} for text in make(60, 10)))
            write_rows(home / f"{name}-held.jsonl", ({"text": text[:60]} for text in make(24, 20)))
        for name in ROW_MAKERS:
            write_rows(home / f"{name}.jsonl", made_rows(name, 60, 1))
            write_rows(home / f"{name}-held.jsonl", made_rows(name, 24, 1000))

    # -- files

    def model(self, name: str) -> str:
        """A model's folder."""
        place = self.home / "models" / name
        if not place.exists():
            with one_thread():
                MODELS[name](place)
        return str(place)

    def file(self, name: str, *, held: bool = False) -> str:
        """A file of texts or rows."""
        return str(self.home / f"{name}{'-held' * held}.jsonl")

    def held(self, name: str, **said: Any) -> Data:
        """A held-out set."""
        return {"name": f"{name}-held", "path": self.file(name, held=True), **said}

    def source(self, name: str, **said: Any) -> Data:
        """A source that may be read as often as a stage likes."""
        return {"name": name, "path": self.file(name), "max_passes": 100, **said}

    def written(self, name: str, data: Any) -> str:
        """Plain data as a YAML file."""
        place = self.home / f"{name}.yaml"
        place.write_text(yaml.safe_dump(data, sort_keys=False), encoding="utf-8")
        return str(place)

    def room(self, name: str) -> Path:
        """A place where nothing is."""
        place = self.home / name
        if place.is_dir():
            shutil.rmtree(place)
        place.unlink(missing_ok=True)
        return place

    # -- the command line

    def call(self, verb: str, *said: str, errors: Errors | None = None, codes: Sequence[int] = (0,)) -> Data:
        """Call a verb with `--json`; what it printed, in the words of this file."""
        words = [OPTIONS.get((verb, word), word) for word in said]
        errors, out, before = errors or Errors(), io.StringIO(), sys.argv
        sys.argv = ["postgrad", VERBS.get(verb, verb), *words, "--json"]
        code: Any = 0
        try:
            with self._environment(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
                entry_point()()
        except SystemExit as ended:
            code = ended.code or 0
        except Killed:
            code = "killed"
        finally:
            sys.argv = before
        if code == "killed":
            gc.collect()
            return {}
        if code not in codes:
            raise RuntimeError(f"{verb} ended with {code}: {''.join(errors.said)[-2000:]}")
        return renamed(json.loads(out.getvalue()), RESULTS.get(verb, ()), back=True)

    @contextlib.contextmanager
    def _environment(self) -> Iterator[None]:
        kept = os.environ.get(CACHE_VARIABLE)
        os.environ[CACHE_VARIABLE] = str(self.home / "cache")
        try:
            with one_thread(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                yield
        finally:
            if kept is None:
                del os.environ[CACHE_VARIABLE]
            else:
                os.environ[CACHE_VARIABLE] = kept

    # -- stages

    def stage(self, name: str, **changes: Any) -> Data:
        """A stage of six small steps of the Llama on new text, with a quarter of replay; `changes` are merged into it."""
        both = [self.source("new", share=0.75), self.source("old", share=0.25, role="replay")]
        return merged(
            {
                "name": name,
                "model": self.model(changes.pop("model", "llama")),
                "output": str(self.home / "runs" / name),
                "tokens": 6 * 4 * LENGTH,
                "seed": 3,
                "data": {"sequence_length": LENGTH, "overlap": "off", "workers": 1, "sources": both},
                "batch": {"sequences": 4, "micro": 2},
                "schedule": {"kind": "rewarm", "peak": 1e-2, "floor": 1e-3, "warmup": "1 steps"},
                "evaluation": {
                    "retained": [self.held("old")],
                    "learned": [self.held("new")],
                    "every": "50%",
                    "during_tokens": 300,
                    "samples": 1,
                    "drift_tokens": 300,
                },
                "save": {"every": "2 steps"},
                "compute": {"threads": 1, "dtype": "float32", "compile": False, "attention": "sdpa"},
            },
            changes,
        )

    def rows(self, name: str, rows: str, tokens: int, *, kind: str | None = None, **changes: Any) -> Data:
        """A stage on rows of a sort."""
        said = {"kind": kind} if kind else {}
        changes = merged({"evaluation": {"retained": [], "learned": [self.held(rows, like=rows)]}}, changes)
        return self.stage(name, tokens=tokens, **merged({"data": {"sources": [self.source(rows, **said)]}}, changes))

    def start(self, raw: Data, **how: Any) -> Data:
        """Call `train` for a stage."""
        file = self.written(raw["name"], renamed(raw, STAGE, STAGE_VALUES))
        return self.call("train", file, **how)

    def train(self, raw: Data) -> Path:
        """The run of a stage, carried out when it is first asked for."""
        name = raw["name"]
        if name not in self.done:
            self.start(raw, codes=(0, CODES["gate failed"]))
            self.done[name] = Path(raw["output"])
        return self.done[name]


def merged(base: Data, changes: Mapping[str, Any]) -> Data:
    """Mappings are merged, save those of another `kind`; all else is replaced."""
    out = dict(base)
    for key, value in changes.items():
        there = out.get(key)
        alike = (
            isinstance(there, dict)
            and isinstance(value, Mapping)
            and there.get("kind") == value.get("kind", there.get("kind"))
        )
        out[key] = merged(there, value) if alike else value
    return out


# == The runs ==========================================================================================================

Run = Callable[[Shelf], Captured]
RUNS: dict[str, Run] = {}


def run(make: Run) -> Run:
    """Take a function into the fixed set, by its name."""
    RUNS[make.__name__.replace("_", "-")] = make
    return make


def stage_run(name: str, **changes: Any) -> None:
    """A run that is one stage on both texts."""
    RUNS[name] = lambda shelf: captured(shelf.train(shelf.stage(name, **copy.deepcopy(changes))))


def row_run(name: str, rows: str, tokens: int, kind: str | None = None, **changes: Any) -> None:
    """A run that is one stage on rows of a sort."""
    RUNS[name] = lambda shelf: captured(
        shelf.train(shelf.rows(name, rows, tokens, kind=kind, **copy.deepcopy(changes)))
    )


# -- objectives --------------------------------------------------------------------------------------------------------


@run
def full(shelf: Shelf) -> Captured:
    """Next-token prediction with replay, a gate, a test set, and steps on old text that win back what was lost."""
    evaluation = {"test": [{"name": "asked-once", "path": shelf.file("completion", held=True)}], "realign_steps": 2}
    changes: Data = {"evaluation": {**evaluation, "samples": 2}, "max_forgetting": 0.5, "data": {"overlap": "report"}}
    return captured(shelf.train(shelf.stage("full", **changes)))


stage_run(
    "full-layer-decay",
    tuning={"kind": "full", "layer_decay": 0.8},
    schedule={"kind": "wsd", "peak": 1e-2, "floor": 1e-3, "warmup": "1 steps", "decay": "50%"},
    optimizer={"betas": [0.8, 0.9], "eps": 1e-6, "weight_decay": 0.2, "decay_tables": True, "clip": 0.3},
    compute={"attention": "causal_blocks", "activation_checkpointing": True},
)
stage_run("bfloat16", compute={"dtype": "bfloat16"}, save={"dtype": "bfloat16"})
stage_run("bfloat16-lora", compute={"dtype": "bfloat16"}, tuning={"kind": "lora", "rank": 4})


def _quizzes(shelf: Shelf) -> list[Data]:
    return [
        {
            "name": "kinds",
            "path": shelf.file("labelled", held=True),
            "kind": "labelled",
            "cluster": "sorts",
            "shots": 2,
            "seeds": 2,
            "shown": {"path": shelf.file("labelled"), "by": "balanced"},
            "items": 16,
            "during": True,
        },
        {"name": "pairs", "path": shelf.file("choices", held=True), "cluster": "choices", "calibrate": True},
        {"name": "alike", "path": shelf.file("choices", held=True), "by": "answer-only", "shots": 1,
         "shown": {"path": shelf.file("choices"), "by": "bm25"}, "items": 12},
        {"name": "named", "path": shelf.file("completion", held=True), "role": "learned", "most_tokens": 4,
         "cluster": "sorts"},
    ]  # fmt: skip


@run
def answers(shelf: Shelf) -> Captured:
    """Answers of conversations, instructions and completions, mixed by a temperature; tasks are asked before and after."""
    names = ("chat", "instruction", "completion")
    raw = shelf.stage(
        "answers",
        tokens=500,
        data={
            "sequence_length": 96,
            "sources": [shelf.source(name, cluster="sorts") for name in names],
            "mixing": {"kind": "temperature", "temperature": 2, "cap": 40},
        },
        evaluation={
            "retained": [shelf.held("old")],
            "learned": [shelf.held(name, like=name) for name in names],
            "tasks": _quizzes(shelf),
        },
    )
    return captured(shelf.train(raw))


@run
def answers_last(shelf: Shelf) -> Captured:
    """The last answer of conversations in one source, every token of instructions in another."""
    objectives = [
        {"kind": "next-token", "answers": "last", "on": ["chat"], "too_long": "drop"},
        {"kind": "next-token", "train_on": "all", "on": ["instruction"], "weight": 0.5},
    ]
    sources = [shelf.source("chat", share=0.5), shelf.source("instruction", share=0.5)]
    held = {"retained": [], "learned": [shelf.held("chat", like="chat"), shelf.held("instruction", like="instruction")]}
    changes = {"objectives": objectives, "data": {"sources": sources}, "evaluation": held}
    raw = shelf.stage("answers-last", tokens=300, **changes)
    return captured(shelf.train(raw))


@run
def prefix_lm(shelf: Shelf) -> Captured:
    """A prefix read in both directions, of completions and of running text."""
    sources = [shelf.source("completion", share=0.4), shelf.source("new", share=0.6)]
    raw = shelf.stage("prefix-lm", tokens=300, objectives=[{"kind": "prefix-lm"}], data={"sources": sources})
    return captured(shelf.train(raw))


stage_run(
    "masked",
    model="bert",
    tokens=200,
    objectives=[{"kind": "masked", "share": 0.3, "whole_words": True}],
    evaluation={"pseudo_perplexity": 60, "samples": 0},
)
stage_run(
    "span-corruption",
    model="t5",
    tokens=400,
    objectives=[{"kind": "span-corruption", "density": 0.3, "mean_span": 2.0}],
)


@run
def text_to_text(shelf: Shelf) -> Captured:
    """Pairs and conversations for an encoder-decoder."""
    raw = shelf.stage(
        "text-to-text",
        model="t5",
        tokens=150,
        objectives=[{"kind": "text-to-text", "target_length": 16, "too_long": "cut-end"}],
        data={"sources": [shelf.source("pair", share=0.5), shelf.source("chat", share=0.5)]},
        evaluation={"retained": [], "learned": [shelf.held("pair"), shelf.held("chat")]},
    )
    return captured(shelf.train(raw))


row_run(
    "classify-class",
    "labelled",
    24,
    "labelled",
    model="bert",
    objectives=[{"kind": "classify", "layers": "mix", "pooling": "mean", "head": {"kind": "mlp", "width": 16}}],
    save={"choose": {"set": "labelled-held", "by": "accuracy"}},
)
row_run("classify-multi", "multi", 24, "labelled", model="llama", objectives=[{"kind": "classify"}])
row_run(
    "classify-number",
    "numbered",
    24,
    "labelled",
    model="t5",
    objectives=[{"kind": "classify", "pooling": "mean", "stack": "encoder"}],
)
row_run(
    "classify-tags",
    "tagged",
    150,
    model="bert",
    objectives=[{"kind": "classify", "head": {"kind": "bilstm", "width": 8, "depth": 1}, "layers": {"concat": 2}}],
    tuning={"kind": "head"},
)


@run
def distill_online(shelf: Shelf) -> Captured:
    """Another model teaches old text at every step, in the reverse direction, with a weight that falls."""
    weight = {"start": 1.0, "end": 0.1, "shape": "cosine", "over": "80%"}
    taught = {"kind": "distill", "teacher": shelf.model("other"), "direction": "reverse", "temperature": 2.0}
    objectives = [{"kind": "next-token"}, {**taught, "weight": weight, "on": ["old"]}]
    return captured(shelf.train(shelf.stage("distill-online", objectives=objectives)))


@run
def distill_start(shelf: Shelf) -> Captured:
    """The start model teaches a LoRA on all text: it is the model itself with its tuning switched off."""
    objectives = [{"kind": "next-token"}, {"kind": "distill", "weight": 0.5}]
    tuning = {"kind": "lora", "rank": 4, "dropout": 0.1}
    return captured(shelf.train(shelf.stage("distill-start", objectives=objectives, tuning=tuning)))


def _cached(shelf: Shelf, name: str, cache: Data) -> Captured:
    objectives = [
        {"kind": "next-token", "on": ["new"]},
        {"kind": "distill", "teacher": shelf.model("other"), "on": ["old"], "cache": cache},
    ]
    return captured(shelf.train(shelf.stage(name, objectives=objectives)))


@run
def distill_sampled(shelf: Shelf) -> Captured:
    """A teacher that was asked once, by draws; it alone judges the old text."""
    return _cached(shelf, "distill-sampled", {"kind": "sampled", "draws": 12, "temper": 0.8})


@run
def distill_top_k(shelf: Shelf) -> Captured:
    """A teacher that was asked once, of which the likeliest ids are kept."""
    return _cached(shelf, "distill-top-k", {"kind": "top-k", "k": 8})


@run
def on_policy(shelf: Shelf) -> Captured:
    """The model writes, and another one judges every token."""
    writes = {"kind": "on-policy", "prompt_tokens": 5, "new_tokens": 7, "teacher": shelf.model("other")}
    objectives = [{"kind": "next-token", "on": ["new"]}, {**writes, "on": ["old"]}]
    return captured(shelf.train(shelf.stage("on-policy", objectives=objectives)))


# -- tunings -----------------------------------------------------------------------------------------------------------

stage_run("head", tuning={"kind": "head", "untie": True})
stage_run("blocks", tuning={"kind": "blocks", "last": 2, "unfreeze_every": "2 steps"})
stage_run("bias", model="biased", tuning={"kind": "bias", "names": ["*q_proj*", "*mlp*"]})
stage_run("norm", tuning={"kind": "norm", "also": ["model.layers.0.mlp.up_proj.weight"]})
stage_run("adapter-houlsby", tuning={"kind": "adapter", "form": "houlsby", "size": 4})
stage_run("adapter-pfeiffer", tuning={"kind": "adapter", "size": 4, "dropout": 0.1, "leave_out": [0]})
row_run(
    "adapter-parallel",
    "pair",
    100,
    model="t5",
    objectives=[{"kind": "text-to-text", "target_length": 16}],
    tuning={"kind": "adapter", "form": "parallel", "reduction": 8},
)
stage_run("prefix", tuning={"kind": "prefix", "length": 3, "hidden": 8, "deep": True, "dropout": 0.1})
stage_run("p-tuning-v2", tuning={"kind": "p-tuning-v2", "length": 3, "start": "one and two"})
row_run(
    "prompt",
    "labelled",
    24,
    "labelled",
    model="bert",
    objectives=[{"kind": "classify"}],
    tuning={"kind": "prompt", "length": 3, "start": "labels", "labels": ["yes", "no"]},
)


@run
def p_tuning(shelf: Shelf) -> Captured:
    """A cloze task: vectors around a text and a mask, whose word is the label."""
    words = {"words": "yes", "sums": "no"}
    raw = shelf.rows(
        "p-tuning",
        "labelled",
        24,
        model="bert",
        objectives=[{"kind": "masked"}],
        tuning={"kind": "p-tuning", "template": "{2} {x} {1} [MASK]", "encoder": "lstm", "hidden": 8},
    )
    raw["data"]["sources"] = [shelf.source("labelled", kind="labelled", words=words)]
    return captured(shelf.train(raw))


row_run(
    "instruction-prompt",
    "completion",
    400,
    data={"sequence_length": 64},
    tuning={"kind": "instruction-prompt", "length": 3, "demonstrations": {"count": 1, "by": "bm25", "tokens": 20}},
)
stage_run("lora", tuning={"kind": "lora", "rank": 2, "dropout": 0.1, "exclude": ["*down_proj"]})
stage_run("lora-rslora", tuning={"kind": "lora", "form": "rslora", "rank": 2, "alpha": 3, "targets": "attention"})
stage_run("lora-dora", tuning={"kind": "lora", "form": "dora", "rank": 2, "also": ["model.norm.weight"]})
stage_run("lora-pissa", tuning={"kind": "lora", "form": "pissa", "rank": 2})
stage_run("osf", tuning={"kind": "osf", "effective_rank": 0.6})
stage_run("expand", tuning={"kind": "expand", "positions": [0]})


@run
def lora_orthogonal(shelf: Shelf) -> Captured:
    """Three LoRA stages of one lineage, the later ones orthogonal to those before; the first one as a plain model."""
    first = {"kind": "lora", "rank": 2, "targets": ["q_proj"]}
    later = {**first, "rank": 1, "orthogonal": 0.5}
    one = shelf.train(shelf.stage("orthogonal-1", tuning=first))
    two = shelf.train({**shelf.stage("orthogonal-2", tuning=later, seed=4), "model": str(one)})
    three = shelf.train({**shelf.stage("orthogonal-3", tuning=later, seed=5), "model": str(two)})
    plain = shelf.room("orthogonal-plain")
    shelf.call("export", str(one), str(plain))
    out = Captured().put("exported", weights(plain))
    for name, place in (("one", one), ("two", two), ("three", three)):
        out.under(name, captured(place))
    return out


# -- penalties and updates ---------------------------------------------------------------------------------------------


def _importance(shelf: Shelf, name: str, file: str, *said: str) -> tuple[Path, Captured]:
    out = shelf.room(f"{name}.safetensors")
    found = shelf.call(
        "importance", shelf.model("llama"), shelf.file(file), "--out", str(out), "--tokens", "600", *said
    )
    parts = {part["part"]: {key: part[key] for key in ("weights", "share", "relative")} for part in found["parts"]}
    kept = Captured().add("numbers", {key: found[key] for key in ("tokens", "mean", "convergence", "weights")})
    return out, kept.add("parts", parts).put("file", weights(out))


stage_run("l2-sp", penalties=[{"kind": "anchor", "strength": "auto"}])


@run
def ewc(shelf: Shelf) -> Captured:
    """Fisher information of old text, and a stage that is held by it; beside it a second, decoupled pull on some weights."""
    file, found = _importance(shelf, "fisher", "old", "--kind", "fisher", "--context", "48", "--seed", "2")
    penalties = [
        {"kind": "anchor", "strength": 50.0, "importance": str(file), "normalise": True, "storage": "bfloat16"}
    ]
    penalties += [{"kind": "anchor", "strength": 0.1, "decoupled": True, "only": ["model.norm"]}]
    run = shelf.train(shelf.stage("ewc", penalties=penalties))
    return captured(run).under("importance", found)


@run
def mas(shelf: Shelf) -> Captured:
    """MAS of two texts, the older one decayed; it holds a LoRA, by a strength that is found."""
    older, first = _importance(shelf, "mas-old", "old", "--kind", "mas", "--context", "48")
    file, found = _importance(shelf, "mas", "new", "--kind", "mas", "--context", "48", "--onto", str(older))
    penalties = [{"kind": "anchor", "strength": "auto", "importance": str(file)}]
    run = shelf.train(shelf.stage("mas", penalties=penalties, tuning={"kind": "lora", "rank": 2}))
    return captured(run).under("older", first).under("importance", found)


@run
def importance_empirical(shelf: Shelf) -> Captured:
    """Importance by the text's own labels, as a file in bfloat16."""
    return _importance(shelf, "empirical", "new", "--kind", "empirical", "--context", "48", "--dtype", "bfloat16")[1]


stage_run(
    "mofo-loss-adaptive",
    optimizer={"update": {"kind": "momentum", "share": "10%"}, "loss_adaptive": {"start": "40%", "smoothing": 0.5}},
)
stage_run("migu", optimizer={"update": {"kind": "magnitude", "share": "30%"}})
stage_run("migu-lora", tuning={"kind": "lora", "rank": 3}, optimizer={"update": {"kind": "magnitude", "share": "30%"}})
stage_run("loss-adaptive", optimizer={"loss_adaptive": {"start": "50%"}})


# -- data, schedules, and where a run ends -----------------------------------------------------------------------------


@run
def curriculum(shelf: Shelf) -> Captured:
    """Shares that change twice, a source that is spent, an infinite schedule; then an anneal that goes on from a checkpoint."""
    little = write_rows(shelf.home / "little.jsonl", ({"text": text} for text in new_text(5, 77)))
    sources = [
        {"name": "little", "path": str(little), "share": 0.5, "max_passes": 1},
        shelf.source("new", share=0.3),
        shelf.source("old", share=0.2, role="replay"),
    ]
    schedule = {"kind": "infinite", "peak": 1e-2, "constant": 5e-3, "floor": 1e-4, "warmup": "1 steps"}
    raw = shelf.stage(
        "curriculum",
        tokens=10 * 4 * LENGTH,
        schedule={**schedule, "cooldown": "30%", "constant_until": "100%"},
        data={
            "sources": sources,
            "when_short": "renormalise",
            "skip_steps": 1,
            "max_document_tokens": 40,
            "shifts": [
                {"at": "40%", "shares": {"little": 0.2, "new": 0.5, "old": 0.3}},
                {"at": "80%", "shares": {"new": 0.5, "old": 0.5}},
            ],
        },
        save={"every": "4 steps", "keep": "all"},
    )
    first = shelf.train(raw)
    checkpoint = sorted((first / FILES["checkpoints"]).iterdir())[-1]
    branch = shelf.stage(
        "anneal",
        tokens=4 * 4 * LENGTH,
        schedule={"kind": "anneal", "floor": 1e-4, "shape": "1-sqrt"},
        optimizer={"moments": "keep"},
        data={"skip_steps": 10},
    )
    second = shelf.train({**branch, "model": str(checkpoint)})
    return Captured().under("whole", captured(first)).under("anneal", captured(second))


stage_run(
    "at-rate",
    schedule={"kind": "cosine", "peak": 1e-2, "floor": 0, "warmup": "1 steps"},
    data={"shifts": [{"at_rate": 0.4, "shares": {"new": 0.2, "old": 0.8}}], "when_short": "repeat"},
)


@run
def selected(shelf: Shelf) -> Captured:
    """Documents that are no copies, that a model finds neither too easy nor too hard, and that are like given texts."""
    mixed = [*old_text(40, 3), *new_text(50, 4)]
    random.Random(0).shuffle(mixed)
    path = write_rows(shelf.home / "mixed.jsonl", ({"text": text} for text in (*mixed, *mixed[:5])))
    like = write_rows(shelf.home / "like.jsonl", ({"text": text} for text in old_text(80, 9)))
    select = [
        {"kind": "duplicates", "threshold": 0.8},
        {"kind": "perplexity", "between": ["10%", "90%"], "tokens": 64},
        {"kind": "dsir", "like": str(like), "keep": "40%", "seed": 1},
    ]
    source = {"name": "mixed", "path": str(path), "max_passes": 100, "select": select}
    run = shelf.train(shelf.stage("selected", data={"sources": [source]}))
    ways = record_of(run)["plan"]["sources"][0]["selected"]
    kept = [{side: {k: way[side][k] for k in ("documents", "tokens")} for side in ("before", "after")} for way in ways]
    return captured(run).add("selected", kept)


@run
def chosen_best(shelf: Shelf) -> Captured:
    """Two texts learnt by heart: the best checkpoint is published, and training ends without a gain."""
    little = write_rows(shelf.home / "two.jsonl", ({"text": text} for text in new_text(2, 10)))
    raw = shelf.stage(
        "chosen-best",
        tokens=24 * 4 * LENGTH,
        data={"sources": [{"name": "two", "path": str(little), "max_passes": 10**6}]},
        schedule={"kind": "constant", "peak": 3e-2, "warmup": "2 steps"},
        evaluation={"every": "2 steps"},
        save={"every": "8 steps", "keep": 1, "choose": {"set": "new-held", "patience": "3 looks"}},
    )
    return captured(shelf.train(raw))


def _in_parts(shelf: Shelf, name: str, **changes: Any) -> Captured:
    raw = shelf.stage(name, **changes)
    if name not in shelf.done:
        shelf.start(raw, errors=Errors(kill=3))
        shelf.start(raw, errors=Errors(stop=5), codes=(CODES["stopped"],))
    return captured(shelf.train(raw))


@run
def stopped(shelf: Shelf) -> Captured:
    """A run that is killed behind a checkpoint, then asked to stop, then finished; the same stage as `mofo-loss-adaptive`."""
    optimizer = {"update": {"kind": "momentum", "share": "10%"}, "loss_adaptive": {"start": "40%", "smoothing": 0.5}}
    return _in_parts(shelf, "stopped", optimizer=optimizer)


@run
def stopped_lora(shelf: Shelf) -> Captured:
    """The same of a LoRA with dropout that is taught and held."""
    objectives = [{"kind": "next-token"}, {"kind": "distill", "weight": 0.5, "on": ["old"]}]
    tuning = {"kind": "lora", "rank": 2, "dropout": 0.1}
    penalties = [{"kind": "anchor", "strength": 0.1}]
    return _in_parts(shelf, "stopped-lora", objectives=objectives, tuning=tuning, penalties=penalties)


def _learnt(shelf: Shelf, steps: int = 12) -> Path:
    """A run that has learnt the old text."""
    raw = shelf.stage("learnt", tokens=steps * 4 * LENGTH, data={"sources": [shelf.source("old", stands_for=5000)]})
    raw["evaluation"] |= {"retained": [], "learned": [shelf.held("old")], "samples": 0}
    return shelf.train(raw)


@run
def replay_of_everything(shelf: Shelf) -> Captured:
    """Three stages, the later ones with a replay of all that was seen; and their lineage."""
    one = _learnt(shelf)
    seen = {"name": "seen", "seen_so_far": True, "share": 0.25, "max_passes": 100}
    two = shelf.train(
        {**shelf.stage("second", data={"sources": [shelf.source("new", share=0.75), seen]}), "model": str(one)}
    )
    third = shelf.stage("third", tokens=200, data={"sources": [shelf.source("completion", share=0.75), seen]})
    third["evaluation"]["learned"] = [shelf.held("new"), shelf.held("completion")]
    three = shelf.train({**third, "model": str(two)})
    found = shelf.call("lineage", str(three))
    out = Captured().add("lineage", found)
    for name, place in (("one", one), ("two", two), ("three", three)):
        out.under(name, captured(place))
    return out


@run
def from_scratch(shelf: Shelf) -> Captured:
    """A new model with a new tokenizer; the seed decides its weights."""
    raw = shelf.stage("from-scratch", evaluation={"samples": 0})
    raw["model"] = {"fresh": "llama-60k", "tokenizer": {"vocabulary": 320}, "dropout": 0.1}
    return captured(shelf.train(raw))


# -- verbs -------------------------------------------------------------------------------------------------------------


@run
def restored(shelf: Shelf) -> Captured:
    """What a run has forgotten is won back."""
    one = shelf.stage("restore-old", model="wide", data={"sources": [shelf.source("old")]}, tokens=3000)
    one["evaluation"] |= {"retained": [], "learned": [shelf.held("old")], "samples": 0}
    first = shelf.train(one)
    two = shelf.stage("restore-new", data={"sources": [shelf.source("new", held_out=0.1)]}, tokens=3000)
    second = shelf.train({**two, "model": str(first)})
    place = shelf.home / "runs" / "restored"
    said = ["--prompts", shelf.file("old"), "--until", "95%", "--max-cost", "100%", "--steps", "5"]
    said += ["--learning-rate", "0.01", "--output", str(place)]  # the peak of the run, which was the default
    found = shelf.call("restore", str(second), *said, codes=(0, CODES["gate failed"]))
    out = captured(place).under("forgot", captured(second))
    return out.add("restored", found["restored"])


def _study(shelf: Shelf) -> Data:
    compute = {"threads": 1, "dtype": "float32", "compile": False, "attention": "sdpa"}
    return {
        "name": "study",
        "base": shelf.model("llama"),
        "old": {"path": shelf.file("old"), "stands_for": 2000, "max_passes": 20},
        "new": {"path": shelf.file("new"), "max_passes": 20},
        "retained": shelf.held("old"),
        "learned": shelf.held("new"),
        "stage": {
            "tokens": 800,
            "data": {"sequence_length": 32, "overlap": "off"},
            "batch": {"sequences": 8, "micro": 4},
            "schedule": {"kind": "rewarm", "peak": 1e-2, "floor": 1e-3, "warmup": "1 steps"},
            "evaluation": {"every": "50%", "during_tokens": 300},
            "save": {"every": "3 steps"},
            "compute": compute,
        },
        "arms": {"none": {}, "replay": {"replay": "25%"}, "half": {"blend": {"of": "none", "weight": 0.5}}},
        "seeds": [0, 1],
        "claims": [{"say": "replay keeps more", "arm": "replay", "than": "none", "on": "old"}],
    }


@run
def study(shelf: Shelf) -> Captured:
    """Two arms and a blend, with two seeds: the table of the arms."""
    raw = _study(shelf)
    raw["stage"] = renamed(raw["stage"], STAGE, STAGE_VALUES)
    raw["arms"] = {name: renamed(arm, STAGE, STAGE_VALUES) for name, arm in raw["arms"].items()}
    found = shelf.call("study", shelf.written("study", renamed(raw, STUDY, STUDY_VALUES)))
    out = Captured()
    parts = ("seeds", "loss", "by_seed", "spread", "change", "tokens", "curve", "dominated_by")
    for arm in found["arms"]:
        own = {key: arm[key] for key in parts if key in arm}
        spread = own.pop("spread")  # its ends are seeds, not draws
        own["apart"] = {what: [found["deviation"], found["low"], found["high"]] for what, found in spread.items()}
        out.add(arm["name"], own)
    pairs = {
        f"{pair['arm']} - {pair['than']}": {k: v for k, v in pair.items() if k != "arm"} for pair in found["pairs"]
    }
    out.add("pairs", pairs).add("base", found["base"]["loss"])
    out.intervals["claims"] = split(found["claims"])[0]
    out.intervals["removed"] = {arm["name"]: split(arm.get("removed"))[0] for arm in found["arms"]}
    return out


@run
def advise(shelf: Shelf) -> Captured:
    """Pilots of a stage, and the share of replay and the peak that follow from them."""
    raw = shelf.stage("advised", tokens=600 * 4 * LENGTH, data={"when_short": "repeat"})
    raw |= {"model": str(_learnt(shelf))}
    raw["schedule"] |= {"warmup": "30 steps"}
    file = shelf.written("advised", renamed(raw, STAGE, STAGE_VALUES))
    found = shelf.call("advise", file, "--max-forgetting", "100%", "--pilots", "4")
    numbers = ("share", "peak", "even", "old", "rise", "new", "tokens", "run_tokens", "pilots")
    return Captured().add("advice", {key: found[key] for key in numbers})


@run
def synthesize(shelf: Shelf) -> Captured:
    """Text that a model writes for its own replay: from nothing, and from the beginnings of given texts."""
    out = Captured()
    learnt = str(_learnt(shelf))
    begun = ["--from", shelf.file("old"), "--beginning", "4", "--temperature", "0.9", "--top-p", "0.95", "--seed", "3"]
    for name, said in (("from nothing", []), ("from beginnings", begun)):
        place = shelf.room(f"made-{name.replace(' ', '-')}.jsonl")
        shared = ["--tokens", "300", "--longest", "40", "--at-once", "4", "--out", str(place)]
        found = shelf.call("synthesize", learnt, *shared, *said)
        texts = [json.loads(line)["text"] for line in place.read_text().splitlines()]
        out.add(name, _written(found))
        out.put(f"{name}: texts", text_hash(texts))
    return out


@run
def synthesize_chat(shelf: Shelf) -> Captured:
    """Conversations that a model has with itself, the most various of them kept."""
    place = shelf.room("made-chat.jsonl")
    said = ["--tokens", "200", "--longest", "96", "--at-once", "8", "--most-repeated", "0.9", "--keep", "50%", "--chat"]
    found = shelf.call("synthesize", shelf.model("talker"), "--out", str(place), *said)
    talks = [json.dumps(json.loads(line)["messages"]) for line in place.read_text().splitlines()]
    numbers = {**_written(found), "chosen": found["chosen"]}
    return Captured().add("numbers", numbers).put("texts", text_hash(talks))


def _written(found: Data) -> Data:
    """What was written, and how much of it was left out for each reason, whatever that is called."""
    return {
        **{key: found[key] for key in ("documents", "tokens", "ended")},
        "left_out": sorted(found["left_out"].values()),
    }


def _naive(shelf: Shelf) -> Path:
    """A run on new text alone, from a model that has learnt the old text."""
    raw = shelf.stage("naive", data={"sources": [shelf.source("new")]}, save={"every": "2 steps", "keep": "all"})
    return shelf.train({**raw, "model": str(_learnt(shelf))})


@run
def blend(shelf: Shelf) -> Captured:
    """Models between a run's start and its end, whole and by block, and one of them written; of the mean of checkpoints too."""
    run, out = str(_naive(shelf)), Captured()
    for name, said in (
        ("whole", ["--sweep", "0,0.3,0.7,1", "--choose", "0.7"]),
        ("block", ["--sweep", "1", "--by", "block", "--choose", "1", "--average", "2"]),
    ):
        place = shelf.room(f"blend-{name}")
        found = shelf.call("blend", run, *said, "--out", str(place))
        out.add(name, {point["name"]: point["changes"] for point in found["points"]})
        out.put(f"{name}: weights", weights(place))
    return out


@run
def compared(shelf: Shelf) -> Captured:
    """Runs beside each other on what they held out, and models beside each other on a text."""
    learnt, naive = str(_learnt(shelf)), str(_naive(shelf))
    raw = {**shelf.stage("kept"), "model": learnt}
    found = shelf.call("compare", naive, str(shelf.train(raw)))
    paired = {item["set"]: {key: item[key] for key in ("difference", "low", "high")} for item in found["paired"]}
    text = shelf.call("compare", learnt, naive, "--on", shelf.file("old", held=True))
    return Captured().add("runs", paired).add("models", text["rows"])


@run
def evaluated(shelf: Shelf) -> Captured:
    """A model scored on texts, on a task with choices, with and without examples, and on one that is written."""
    learnt = str(_learnt(shelf))
    file = renamed({"evaluation": {"tasks": _quizzes(shelf)}}, STAGE, STAGE_VALUES)["evaluation"]["tasks"]
    texts = [shelf.file("old", held=True), shelf.file("new", held=True)]
    found = shelf.call("eval", learnt, *texts, "--context", "48", "--tasks", shelf.written("tasks", file))
    masked = shelf.call("eval", shelf.model("bert"), texts[0], "--context", "48", "--pseudo", "60")
    out = Captured().add("sets", found["sets"]).add("masked", masked["sets"])
    return out.add("tasks", {task["name"]: {k: task[k] for k in ("items", "scores")} for task in found["tasks"]})


@run
def generated(shelf: Shelf) -> Captured:
    """Text behind a prompt, of two models, drawn and likeliest."""
    models = [str(_learnt(shelf)), "--beside", shelf.model("talker")]
    shared = ["--prompt", "one and two. three", "--tokens", "20"]
    drawn = shelf.call("generate", *models, *shared, "--temperature", "0.9", "--top-p", "0.9", "--seed", "4")
    likeliest = shelf.call("generate", *models, *shared, "--temperature", "0")
    return Captured().put("drawn", text_hash(_texts(drawn))).put("likeliest", text_hash(_texts(likeliest)))


def _texts(found: Data) -> list[str]:
    return [item["written"] for item in found["continuations"]]


def _probed(shelf: Shelf, model: str, rows: str, *said: str) -> Data:
    files = [shelf.file(rows), shelf.file(rows, held=True)]
    found = shelf.call("probe", shelf.model(model), *files, "--context", "48", *said)
    views = {view["name"]: {k: v for k, v in view.items() if k != "name"} for view in found["views"]}
    return {**{key: found[key] for key in ("items", "layers", "width", "guess")}, "views": views}


@run
def probe(shelf: Shelf) -> Captured:
    """Every layer of frozen models probed for labels of texts and tags of words."""
    out = Captured().add("multi", _probed(shelf, "bert", "multi", "--pooling", "mean"))
    return out.add("tags", _probed(shelf, "llama", "tagged"))


@run
def shift(shelf: Shelf) -> Captured:
    """How far new text is from old text, for a model."""
    files = [write_rows(shelf.home / f"much-{name}.jsonl", ({"text": text} for text in make(160, 30)))
             for name, make in (("old", old_text), ("new", new_text))]  # fmt: skip
    said = ["--model", str(_learnt(shelf)), "--old", str(files[0]), "--new", str(files[1]), "--context", "48"]
    found = shelf.call("shift", *said)
    out = Captured().add("numbers", {key: found[key] for key in ("old", "new", "surprise")})
    # Two of the distances are what their draws correct them to.
    corrected = {name: found["distances"].pop(name) for name in ("byte trigrams", "tokens")}
    out.add("distances", found["distances"]).intervals["corrected"] = split(corrected)
    return out.put("proposed", [re.findall(r"\d[\d.,e%-]*", str(p["value"])) for p in found["proposals"]])


@run
def grow(shelf: Shelf) -> Captured:
    """Tokens added to a vocabulary, and a stage that moves the embeddings alone, held to the model of before."""
    place = shelf.room("grown")
    said = ["--out", str(place), "--tokens", "10", "--old", shelf.file("old")]
    found = shelf.call("grow", shelf.model("llama"), shelf.file("new"), *said)
    tuning = {"kind": "blocks", "all_but_first": 2, "embeddings": True}
    penalties = [{"kind": "anchor", "strength": 0.5, "reference": shelf.model("llama")}]
    run = shelf.train({**shelf.stage("grown-stage", tuning=tuning, penalties=penalties), "model": str(place)})
    out = captured(run).put("grown", weights(place)).put("new tokens", found["first"])
    return out.add("numbers", {key: found[key] for key in ("added", "tokens", "new", "old")})


# == Capturing and comparing ===========================================================================================

PACKAGES = ("torch", "transformers", "numpy", "tokenizers", "safetensors", "peft", "scipy", "scikit-learn")
FLAGS = ("avx2", "fma", "f16c", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_bf16", "amx_int8")


def machine() -> Data:
    """What decides about bits beside the code: versions, the processor, and what it can do."""
    return {
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
        "processor": _processor(),
        "flags": {flag: flag in _cpu_line("flags").split() for flag in FLAGS},
        "capability": torch.backends.cpu.get_cpu_capability(),
    }


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "none"


def _cpu_line(key: str) -> str:
    """What Linux says of the first processor; nothing elsewhere."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == key:
                return value.strip()
    return ""


def _processor() -> str:
    said = [_cpu_line("model name") or platform.processor() or platform.machine()]
    return " ".join(
        [*said, *(f"{key} {value}" for key in ("cpu family", "model", "stepping") if (value := _cpu_line(key)))]
    )


def commit() -> str:
    """The commit of the package that is driven, where it lies in a repository."""
    spec = find_spec("postgrad")
    assert spec is not None and spec.origin is not None
    asked = ["git", "-C", str(Path(spec.origin).parent), "rev-parse", "--short=7", "HEAD"]
    found = subprocess.run(asked, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "none"


def not_comparable(head: Mapping[str, Any]) -> str | None:
    """Why what was captured cannot be compared here, to the bit: another machine, or other versions."""
    now = machine()
    apart = [f"{key}: {head.get(key)} then, {now[key]} now" for key in now if head.get(key) != now[key]]
    return "; ".join(apart) or None


def read_expected(path: Path = EXPECTED) -> tuple[Data, dict[str, Data]]:
    """The head, and what was captured of every run."""
    found = json.loads(path.read_text(encoding="utf-8"))
    return found["head"], found["runs"]


def as_json(head: Data, runs: Mapping[str, Data]) -> str:
    """Everything as JSON with a line for each step and for each other field, so that two captures can be held side by side."""
    parts = []
    for name, fields in runs.items():
        lines = [f"   {json.dumps(key)}: {_field(value)}" for key, value in fields.items()]
        parts.append(f"  {json.dumps(name)}: {{\n" + ",\n".join(lines) + "\n  }")
    return f'{{\n "head": {json.dumps(head)},\n "runs": {{\n' + ",\n".join(parts) + "\n }\n}\n"


def _field(value: Any) -> str:
    if isinstance(value, dict) and "steps" in value:  # a run within a run
        return "{\n" + ",\n".join(f"    {json.dumps(key)}: {_field(own)}" for key, own in value.items()) + "\n   }"
    if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        return "[\n" + ",\n".join(f"     {json.dumps(item)}" for item in value) + "\n   ]"
    return json.dumps(value)


def differences(expected: Data, found: Data, *, loose: bool = False) -> list[str]:
    """Where two captures of a run differ, in words, the first differing step first. `loose`: the intervals are not compared."""
    left_out = {"intervals"} if loose else set()
    first = [*_differing_steps(expected, found, "")]
    rest = [*_apart("", expected, found, left_out)]
    return first + rest


def _differing_steps(expected: Data, found: Data, within: str) -> Iterator[str]:
    """Of each list of steps the first one that differs."""
    for key, value in expected.items():
        other = found.get(key)
        if key == "steps" and isinstance(other, list):
            for one, two in zip(value, other, strict=False):
                apart = list(_apart("", one, two, set()))
                if apart:
                    yield f"{within}step {one['step']} is the first that differs: {'; '.join(apart)}"
                    break
            if len(value) != len(other):
                yield f"{within}{len(value)} steps were expected, {len(other)} found"
        elif isinstance(value, dict) and isinstance(other, dict):
            yield from _differing_steps(value, other, f"{within}{key}: ")


def _apart(place: str, expected: Any, found: Any, left_out: set[str]) -> Iterator[str]:
    if isinstance(expected, dict) and isinstance(found, dict):
        for key in [*expected, *(key for key in found if key not in expected)]:
            if key in left_out or (key == "steps" and isinstance(expected.get(key), list)):
                continue
            where = f"{place}.{key}" if place else str(key)
            if expected.get(key) is None and found.get(key) is None:  # an absent value is not written any more
                continue
            if key not in found:
                yield f"{where} is missing"
            elif key not in expected:
                yield f"{where} is new"
            else:
                yield from _apart(where, expected[key], found[key], left_out)
    elif isinstance(expected, list) and isinstance(found, list) and len(expected) == len(found):
        for i, (one, two) in enumerate(zip(expected, found, strict=True)):
            yield from _apart(f"{place}[{i}]", one, two, left_out)
    elif type(expected) is not type(found) or expected != found:
        yield f"{place}: {_told(expected)} expected, {_told(found)} found"


def _told(value: Any) -> str:
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            if "0x" in value:
                return f"{float.fromhex(value)!r} ({value})"
    return json.dumps(value)


def capture(name: str, shelf: Shelf) -> Data:
    """What a run computes now, as plain data."""
    return json.loads(json.dumps(RUNS[name](shelf).as_data()))


@contextlib.contextmanager
def shelves() -> Iterator[Shelf]:
    """A shelf in a temporary folder of its own, with a cache of its own."""
    with tempfile.TemporaryDirectory(prefix="regression-") as folder:
        yield Shelf(Path(folder))


def main(said: Sequence[str] | None = None) -> int:
    """Write what the runs compute, or compare it with what was written."""
    parser = argparse.ArgumentParser(description="A fixed set of small runs, and what each of them computes.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="only these runs")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--compare", action="store_true", help="compare with what was captured")
    what.add_argument("--write", action="store_true", help="capture all runs anew")
    what.add_argument("--list", action="store_true", help="print the names of the runs")
    parser.add_argument("--loose", action="store_true", help="do not compare the intervals")
    parser.add_argument("--all", action="store_true", help="print every difference of a run, not the first one alone")
    parser.add_argument("--expected", "--out", type=Path, default=EXPECTED, help="the file of captured values")
    asked = parser.parse_args(said)
    if asked.list:
        print("\n".join(RUNS))
        return 0
    unknown = [name for name in asked.names if name not in RUNS]
    if unknown:
        parser.error(f"there is no run {unknown[0]!r}")
    names = asked.names or list(RUNS)
    torch.set_num_threads(1)
    if find_spec("postgrad") is None:
        sys.path.append(str(HERE.parents[1]))
    print(f"driving the package of commit {commit()}", file=sys.stderr)
    return _write(names, asked.expected) if asked.write else _compare(names, asked.expected, asked.loose, asked.all)


def _write(names: Sequence[str], path: Path) -> int:
    runs: dict[str, Data] = {}
    begun = time.monotonic()
    with shelves() as shelf:
        for name in names:
            at = time.monotonic()
            runs[name] = capture(name, shelf)
            print(f"{name:<24} captured in {time.monotonic() - at:.1f} s", flush=True)
    path.write_text(as_json({"commit": commit(), **machine()}, runs), encoding="utf-8")
    print(f"{len(runs)} runs captured in {time.monotonic() - begun:.0f} s")
    return 0


def _compare(names: Sequence[str], path: Path, loose: bool, every: bool) -> int:
    head, expected = read_expected(path)
    if why := not_comparable(head):
        print(f"note: bits may differ, as this is not what was captured on: {why}", file=sys.stderr)
    equal, begun = 0, time.monotonic()
    with shelves() as shelf:
        for name in names:
            if name not in expected:
                print(f"{name:<24} was never captured", flush=True)
                continue
            try:
                apart = differences(expected[name], capture(name, shelf), loose=loose)
            except Exception as error:  # one run that fails says nothing of the others
                last = traceback.extract_tb(error.__traceback__)[-1]
                apart = [f"failed in {Path(last.filename).name}:{last.lineno}: {type(error).__name__}: {error}"]
            equal += not apart
            more = f" (and {len(apart) - 1} more)" if len(apart) > 1 and not every else ""
            shown = "equal" if not apart else ("\n    ".join(["", *apart]) if every else apart[0] + more)
            print(f"{name:<24} {shown}", flush=True)
    print(f"{equal} of {len(names)} runs are equal, in {time.monotonic() - begun:.0f} s")
    return int(equal < len(names))


if __name__ == "__main__":
    raise SystemExit(main())

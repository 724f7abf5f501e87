"""Speed of a training step, compared with common trainers and with the bare matrix products.

    python benchmarks/training_speed.py --peers-python /path/to/venv/bin/python --json benchmarks/results/speed.json

Every arm trains the same Llama-style model from the same weights on the same packed rows in the same order, with
AdamW, one constant rate and clipping at 1. Arms take turns, each in a fresh process, so that a slow minute of the
machine hits all of them; only the ratios within one run travel. The text is the standard library's own source.

The peers' interpreter needs torch, transformers, accelerate and, for its arms, litgpt. One round of all arms takes
about six minutes on two cores; two of them are compilation, in the first round.

An arm is a process that prints one JSON line per step, ``{"step": 1, "seconds": 0.41, "loss": 9.07}``; seconds from
the end of the step before. Any command that does so can stand in for ours: ``--ours-command "prog {work} {steps}"``,
where `work` holds `model/` (a Hugging Face folder), `rows.npz` (ids, positions, labels: (rows, T), labels aligned
with ids, -100 at each document's first token) and `setting.json`. Lines that are not JSON are ignored.

What differs on purpose: litgpt does not keep packed documents apart (which is less work), and `trainer-tuned` is
Trainer with everything its user could set from outside: bf16, compilation, and the allocator's settings in the
environment. (Plain attention, faster than SDPA on a CPU in bf16, is slower under autocast, and takes twice the
memory.)
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from arms import provenance, run_rounds, settings, write_results

SIZES: dict[str, dict[str, int]] = {
    # 4.7 M in the layers and a tied table of 2.1 M
    "5M": {"hidden": 256, "layers": 6, "heads": 8, "intermediate": 688, "vocabulary": 8192},
    # 10.6 M and 6.3 M
    "15M": {"hidden": 384, "layers": 6, "heads": 6, "intermediate": 1024, "vocabulary": 16384},
    # 85 M and 25 M
    "124M": {"hidden": 768, "layers": 12, "heads": 12, "intermediate": 2048, "vocabulary": 32768},
}
TIME, RATE = 512, 1e-3
MICRO_BATCH_ROWS = 2048 // TIME
"""Rows that our arm takes at once, as it would choose by itself on a CPU: about 2,048 tokens."""
PEER_ARMS = (
    "trainer",
    "trainer-best",
    "trainer-tuned",
    "litgpt-mixed",
    "litgpt-true",
)
ARMS = (*PEER_ARMS, "ours", "floor")
TUNED_ALLOCATOR = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1)}


# --- what all arms share: model, rows ---------------------------------------------------------------------------


def library_sources() -> list[str]:
    """The sources of the standard library, in random order."""
    import numpy as np

    folder = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(f for f in folder.rglob("*.py") if not {"site-packages", "test", "tests"} & set(f.parts))
    texts = [text for f in files if 200 < len(text := f.read_text(errors="replace")) < 200_000]
    return [texts[k] for k in np.random.default_rng(0).permutation(len(texts))]


def train_tokenizer(texts: Iterable[str], vocabulary: int, end: str = "<end>") -> Any:
    """A byte-level BPE that was trained on some texts; the first id ends a document."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[end], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def make_llama(size: str, time: int) -> Any:
    """The same Llama every time."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = SIZES[size]
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=shape["hidden"],
            num_hidden_layers=shape["layers"],
            num_attention_heads=shape["heads"],
            num_key_value_heads=shape["heads"],
            intermediate_size=shape["intermediate"],
            vocab_size=shape["vocabulary"],
            max_position_embeddings=time,
            tie_word_embeddings=True,
            use_cache=False,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=None,
        )
    )


def prepare(work: Path, size: str, rows: int, batch: int) -> None:
    """Write `model/`, `rows.npz` and `setting.json`. Needs tokenizers, transformers and torch, here."""
    import numpy as np

    texts = library_sources()
    tokenizer = train_tokenizer(texts, SIZES[size]["vocabulary"])
    # Functions and classes as documents of their own: several to a row, as in real packed text.
    pieces = [piece for text in texts for piece in text.split("\n\n\n") if len(piece) > 100]
    ids = np.zeros((rows, TIME), np.int64)
    positions, labels = np.zeros_like(ids), np.full_like(ids, -100)
    row = column = 0
    for encoding in tokenizer.encode_batch_fast(pieces):
        left = [*encoding.ids, 0]
        while left and row < rows:
            part, left = left[: TIME - column], left[TIME - column :]
            here = (row, slice(column, column + len(part)))
            ids[here], positions[here] = part, np.arange(len(part))
            labels[row, column + 1 : column + len(part)] = part[1:]
            column += len(part)
            if column == TIME:
                row, column = row + 1, 0
    if row < rows:
        raise SystemExit(f"the standard library gives {row} rows, {rows} are needed: fewer --steps")
    np.savez(work / "rows.npz", ids=ids, positions=positions, labels=labels)

    make_llama(size, TIME).save_pretrained(work / "model")
    setting = {"size": size, **SIZES[size], "time": TIME, "batch": batch, "rate": RATE, "clip": 1.0}
    (work / "setting.json").write_text(json.dumps(setting))


def read_batches(work: Path, batch: int) -> Iterator[tuple[Any, Any, Any]]:
    """Batches of ids, positions and aligned labels as tensors, in order, again and again."""
    import numpy as np
    import torch

    rows = {k: torch.from_numpy(v) for k, v in np.load(work / "rows.npz").items()}
    while True:
        for start in range(0, len(rows["ids"]), batch):
            yield tuple(rows[k][start : start + batch] for k in ("ids", "positions", "labels"))


class Report:
    """Prints one line per step."""

    def __init__(self) -> None:
        self.step, self.last = 0, time.perf_counter()

    def __call__(self, loss: float) -> None:
        now = time.perf_counter()
        self.step += 1
        print(json.dumps({"step": self.step, "seconds": now - self.last, "loss": loss}), flush=True)
        self.last = now


# --- the arms, each run in a process of its own -----------------------------------------------------------------


def run_trainer(work: Path, steps: int, setting: dict[str, Any], *, bf16: bool, compile: bool) -> None:
    """Hugging Face Trainer."""
    import torch
    from torch.utils.data import SequentialSampler
    from transformers import LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

    ids, positions, labels = next(read_batches(work, 10**9))
    data = [{"input_ids": i, "position_ids": p, "labels": y} for i, p, y in zip(ids, positions, labels, strict=True)]
    model = LlamaForCausalLM.from_pretrained(work / "model")
    report, losses = Report(), []

    class InOrder(Trainer):
        def _get_train_sampler(self, *_: Any) -> Any:
            return SequentialSampler(data)

        def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            losses.append(super().training_step(*args, **kwargs))
            return losses[-1]

    class Steps(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            report(losses[-1].item())

    arguments = TrainingArguments(
        output_dir=str(work / "trainer"),
        per_device_train_batch_size=setting["batch"],
        max_steps=steps,
        learning_rate=setting["rate"],
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=setting["clip"],
        bf16=bf16,
        torch_compile=compile,
        use_cpu=True,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    InOrder(model=model, args=arguments, train_dataset=data, callbacks=[Steps()]).train()


def run_litgpt(work: Path, steps: int, setting: dict[str, Any], *, precision: str) -> None:
    """The step of litgpt's pretrain: Fabric, compiled model, its own chunked cross-entropy."""
    import lightning as L
    import torch
    from litgpt import GPT, Config
    from litgpt.utils import chunked_cross_entropy
    from safetensors.torch import load_file

    fabric = L.Fabric(accelerator="cpu", devices=1, precision=precision)
    config = Config(
        name="same",
        block_size=setting["time"],
        vocab_size=setting["vocabulary"],
        padded_vocab_size=setting["vocabulary"],
        n_layer=setting["layers"],
        n_head=setting["heads"],
        n_embd=setting["hidden"],
        intermediate_size=setting["intermediate"],
        rotary_percentage=1.0,
        parallel_residual=False,
        bias=False,
        norm_class_name="RMSNorm",
        norm_eps=1e-6,
        mlp_class_name="LLaMAMLP",
        rope_base=10000,
    )
    hf = load_file(work / "model" / "model.safetensors")
    table = hf["model.embed_tokens.weight"]
    state = {"transformer.wte.weight": table, "lm_head.weight": table}
    state["transformer.ln_f.weight"] = hf["model.norm.weight"]
    for k in range(setting["layers"]):
        theirs, ours = f"model.layers.{k}.", f"transformer.h.{k}."
        state[ours + "attn.qkv.weight"] = torch.cat([hf[f"{theirs}self_attn.{n}_proj.weight"] for n in "qkv"])
        for a, b in {
            "attn.proj": "self_attn.o_proj",
            "norm_1": "input_layernorm",
            "norm_2": "post_attention_layernorm",
            "mlp.fc_1": "mlp.gate_proj",
            "mlp.fc_2": "mlp.up_proj",
            "mlp.proj": "mlp.down_proj",
        }.items():
            state[f"{ours}{a}.weight"] = hf[f"{theirs}{b}.weight"]
    with fabric.init_module():
        model = GPT(config)
    model.load_state_dict(state, strict=False)
    model.transformer.wte.weight = model.lm_head.weight
    model = fabric.setup(torch.compile(model))
    optimizer = fabric.setup_optimizers(torch.optim.AdamW(model.parameters(), lr=setting["rate"], weight_decay=0.0))
    feed, report = read_batches(work, setting["batch"]), Report()
    for _ in range(steps):
        ids, _, labels = next(feed)
        loss = chunked_cross_entropy(model(ids)[:, :-1], labels[:, 1:].contiguous())
        fabric.backward(loss)
        fabric.clip_gradients(model, optimizer, max_norm=setting["clip"])
        optimizer.step()
        optimizer.zero_grad()
        report(loss.item())


def run_ours(work: Path, steps: int, setting: dict[str, Any]) -> None:
    """The project's own step, as `postgrad train` takes it once a run is long enough to be compiled."""
    import torch
    from small_llama import make_batch, make_run

    from postgrad.distributed import fsdp
    from postgrad.hardware import machine
    from postgrad.models import cpu_attention
    from postgrad.models.model import CausalModel
    from postgrad.models.pretrained import ModelLocation, load_model
    from postgrad.objectives.next_token import TokenLoss
    from postgrad.optim.optimizer import Weights
    from postgrad.training.step import train_step
    from postgrad.tuning.weight_subsets import FullFinetuning

    machine.tune_allocator()
    model = CausalModel(
        load_model(ModelLocation("start", work / "model"), attention=cpu_attention.CAUSAL_BLOCKS)
    ).train()
    weights = Weights(model, FullFinetuning(model.pretrained), torch.bfloat16, master_copies=True)
    fsdp.compile_layers(model)
    run = make_run(model, weights, [TokenLoss()], rate=setting["rate"], betas=(0.9, 0.999), weight_decay=0.0)
    feed, report = read_batches(work, setting["batch"]), Report()
    for _ in range(steps):
        ids, positions, labels = (each.split(MICRO_BATCH_ROWS) for each in next(feed))
        report(train_step(run, list(map(make_batch, ids, positions, labels))).loss)


def run_floor(work: Path, steps: int, setting: dict[str, Any]) -> None:
    """Only the products of forward and backward, in bf16: linear layers, whole T x T attention, head."""
    import ctypes

    import torch

    if sys.platform == "linux":
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-4, 0), libc.mallopt(-1, 2**31 - 1)
    width, inner, heads = setting["hidden"], setting["intermediate"], setting["heads"]
    tokens, layers = setting["batch"] * setting["time"], setting["layers"]

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape).bfloat16()

    def linear(read: int, write: int) -> Callable[[], object]:
        x, w, g = draw(tokens, read), draw(write, read), draw(tokens, write)
        return lambda: (x @ w.t(), g @ w, g.t() @ x)

    q = draw(setting["batch"] * heads, setting["time"], width // heads)
    p = draw(setting["batch"] * heads, setting["time"], setting["time"])
    products = {
        linear(width, width): 4 * layers,
        linear(width, inner): 2 * layers,
        linear(inner, width): layers,
        linear(width, setting["vocabulary"]): 1,
        # the transposed ones as d^T p, the faster order
        lambda: (q @ q.mT, p @ q, q.mT @ p, q @ q.mT, p @ q, q.mT @ p): layers,
    }
    report = Report()
    for _ in range(steps):
        for product, times in products.items():
            for _ in range(times):
                product()
        report(float("nan"))


RUN: dict[str, Callable[..., None]] = {
    "trainer": lambda *a: run_trainer(*a, bf16=False, compile=False),
    "trainer-best": lambda *a: run_trainer(*a, bf16=True, compile=True),
    "trainer-tuned": lambda *a: run_trainer(*a, bf16=True, compile=True),
    "litgpt-mixed": lambda *a: run_litgpt(*a, precision="bf16-mixed"),
    "litgpt-true": lambda *a: run_litgpt(*a, precision="bf16-true"),
    "ours": run_ours,
    "floor": run_floor,
}


# --- the comparison -------------------------------------------------------------------------------------------


def measure(command: list[str], environment: dict[str, str], log: Path) -> dict[str, Any]:
    """Run one arm: its steps, and the peak memory of its process in bytes."""
    with log.open("w") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, env=environment, text=True)
        assert process.stdout is not None
        lines = [json.loads(line) for line in process.stdout if line.startswith('{"step"')]
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode or not lines:
        tail = "\n".join(log.read_text().splitlines()[-5:])
        return {"error": f"exit {process.returncode}: {shlex.join(command)}\n{tail}"}
    scale = 1 if sys.platform == "darwin" else 1024
    return {
        "seconds": [line["seconds"] for line in lines],
        "losses": [line["loss"] for line in lines],
        "rss": usage.ru_maxrss * scale,
    }


def summarise(runs: dict[str, list[dict[str, Any]]], tokens: int, warm: int) -> list[dict[str, Any]]:
    """One row per arm. A run's speed is that of its median step after `warm` steps."""
    speeds = {
        arm: [tokens / statistics.median(run["seconds"][warm:]) for run in each if "error" not in run]
        for arm, each in runs.items()
    }
    rows = []
    for arm, each in runs.items():
        good = [run for run in each if "error" not in run]
        if not good:
            rows.append({"arm": arm, "error": each[-1]["error"]})
            continue
        # Paired by round: both arms met the same minutes of the machine.
        ratios = [a / b for a, b in zip(speeds[arm], speeds.get("trainer", []), strict=False)]
        rows.append(
            {
                "arm": arm,
                "tokens_per_second": statistics.median(speeds[arm]),
                "lowest": min(speeds[arm]),
                "highest": max(speeds[arm]),
                "of_trainer": statistics.median(ratios) if ratios else None,
                "first_step_seconds": [run["seconds"][0] for run in good],
                "peak_rss_mb": statistics.median(run["rss"] for run in good) / 1e6,
                "final_loss": statistics.median(statistics.mean(run["losses"][-5:]) for run in good),
            }
        )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as text."""
    head = f"{'arm':<14} {'tokens/s':>9} {'[min..max]':>17} {'x Trainer':>9} {'peak MB':>8}"
    out = [f"{head} {'loss':>7} {'first step s: cold, warm':>25}"]
    for row in rows:
        if "error" in row:
            out.append(f"{row['arm']:<14} {row['error']}")
            continue
        spread = f"[{row['lowest']:.0f}..{row['highest']:.0f}]"
        ratio = f"{row['of_trainer']:.2f}" if row["of_trainer"] else "-"
        first = row["first_step_seconds"]
        seconds = f"{first[0]:.1f}, {min(first):.1f}"
        out.append(
            f"{row['arm']:<14} {row['tokens_per_second']:>9.0f} {spread:>17} {ratio:>9} "
            f"{row['peak_rss_mb']:>8.0f} {row['final_loss']:>7.3f} {seconds:>25}"
        )
    return "\n".join(out)


def main() -> None:
    """Compare, or (with --arm) be one of the arms."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peers-python", default=sys.executable, help="interpreter of the Trainer and litgpt arms")
    parser.add_argument("--ours-command", help="a command in place of our arm; {work} and {steps} are filled in")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--size", default="5M", choices=SIZES)
    parser.add_argument("--batch", type=int, default=8, help=f"rows of {TIME} tokens in a step")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--warm", type=int, default=5, help="first steps that are not counted")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.arm:
        RUN[options.arm](options.work, options.steps, json.loads((options.work / "setting.json").read_text()))
        return
    if options.steps <= options.warm:
        parser.error("--steps must be more than --warm")

    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        prepare(work, options.size, options.steps * options.batch, options.batch)

        def one(arm: str) -> dict[str, Any]:
            python = options.peers_python if arm in PEER_ARMS else sys.executable
            command = [python, __file__, "--arm", arm, "--work", folder, "--steps", str(options.steps)]
            if arm == "ours" and options.ours_command:
                command = shlex.split(options.ours_command.format(work=folder, steps=options.steps))
            environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(work / "compiled" / arm)}
            environment.update(TUNED_ALLOCATOR if arm == "trainer-tuned" else {})
            run = measure(command, environment, work / "log.txt")
            told = run.get("error") or f"{sum(run['seconds']):.0f} s"
            print(f"{arm}: {told}", flush=True)
            return run

        rounds = list(run_rounds({arm: partial(one, arm) for arm in options.arms}, options.rounds))
        runs = {arm: [each[arm] for each in rounds] for arm in options.arms}
        rows = summarise(runs, options.batch * TIME, options.warm)
        print(table(rows))
        import torch

        setting = json.loads((work / "setting.json").read_text())
        setting |= {**settings(options), "threads": torch.get_num_threads(), **provenance()}
        write_results(options.json, {"setting": setting, "rows": rows, "runs": runs})


if __name__ == "__main__":
    main()

"""Training speed and memory on this device in bf16, at several sizes: ours, HF Trainer, a lean torch loop, the matrix ceiling.

    python benchmarks/gpu/speed.py --json speed.json

Every arm is a process of its own that trains the same random Llama in rows of the same length and batch, compiled, AdamW with
fp32 masters, clipping at 1; ours is a whole stage on the Python library's documentation with every document apart, the others
read random ids. Tokens per second are the median over the steps after the first ones. The share of the ceiling is that of
6 (weights) + 12 (layers x width x half the row) operations a token in the speed of a large bf16 matrix product here.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from arms import provenance, settings, write_results

SIZES: dict[str, dict[str, int]] = {
    "tiny": {"hidden": 128, "layers": 2, "inner": 256, "rows": 4},
    "124M": {"hidden": 768, "layers": 12, "inner": 2048, "rows": 32},
    "350M": {"hidden": 1024, "layers": 24, "inner": 2816, "rows": 16},
    "1B": {"hidden": 2048, "layers": 18, "inner": 5632, "rows": 8},
}
VOCABULARY, WARM_STEPS, RATE = 32_768, 4, 1e-4


def make_model(size: str, length: int) -> Any:
    """The same Llama every time."""
    from small_llama import make_llama

    shape = {name: SIZES[size][name] for name in ("hidden", "layers", "inner")}
    return make_llama(argparse.Namespace(**shape, vocabulary=VOCABULARY, time=length))


def save_start_model(size: str, length: int, folder: Path) -> None:
    """The Llama with a small tokenizer; most of its vocabulary is not used."""
    from training_speed import library_sources, train_tokenizer
    from transformers import PreTrainedTokenizerFast

    make_model(size, length).save_pretrained(folder)
    tokenizer = train_tokenizer(library_sources()[:200], 4096)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(folder)


def random_rows(size: str, length: int, steps: int) -> Any:
    """Ids of all steps: (steps * rows, length)."""
    import torch

    shape = (steps * SIZES[size]["rows"], length)
    return torch.randint(0, VOCABULARY, shape, generator=torch.Generator().manual_seed(0))


def run_ours(size: str, length: int, steps: int) -> list[float]:
    """A stage of the project, as `postgrad train` runs it."""
    from training_speed import library_sources

    from postgrad.config.stage_file import parse_stage
    from postgrad.lineage.metrics import read_metrics
    from postgrad.plan.plan import make_plan
    from postgrad.run.run import run_stage

    rows = SIZES[size]["rows"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        texts = library_sources()[:1000]
        save_start_model(size, length, folder / "model")
        (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        stage = {
            "name": size,
            "model": str(folder / "model"),
            "output": str(folder / "run"),
            "tokens": steps * rows * length,
            "data": {
                "sequence_length": length,
                "sources": [{"name": "code", "path": str(folder / "texts.jsonl"), "max_passes": 1000}],
            },
            "batch": {"global_batch_size": rows},
            "schedule": {"kind": "constant", "peak": RATE, "warmup": 0},
            "evaluation": {"every": "100%", "eval_tokens": 1000, "samples": 0, "drift_tokens": 0},
            "compute": {"dtype": "bfloat16", "compile": True},
        }
        for _ in run_stage(
            make_plan(parse_stage(stage, "speed"), folder, folder / "cache"), command="", cache=folder / "cache"
        ):
            pass
        return [row.seconds for row in read_metrics(folder / "run" / "metrics.jsonl").steps]


def run_trainer(size: str, length: int, steps: int) -> list[float]:
    """HF Trainer in bf16, compiled, with the fused AdamW."""
    import torch
    from transformers import Trainer, TrainerCallback, TrainingArguments

    ids = random_rows(size, length, steps)
    seconds: list[float] = []

    class Steps(TrainerCallback):
        last = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            synchronize()
            seconds.append(time.perf_counter() - self.last)
            self.last = time.perf_counter()

    is_cuda = torch.cuda.is_available()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder, per_device_train_batch_size=SIZES[size]["rows"], max_steps=steps, learning_rate=RATE,
            lr_scheduler_type="constant", weight_decay=0.0, max_grad_norm=1.0, bf16=True, torch_compile=True,
            use_cpu=not is_cuda, optim="adamw_torch_fused" if is_cuda else "adamw_torch", save_strategy="no",
            logging_strategy="no", report_to=[], disable_tqdm=True,
        )  # fmt: skip
        data = [{"input_ids": row, "labels": row} for row in ids]
        Trainer(model=make_model(size, length), args=arguments, train_dataset=data, callbacks=[Steps()]).train()
    return seconds


def run_lean(size: str, length: int, steps: int) -> list[float]:
    """A loop of torch alone: compiled model, autocast, fused AdamW."""
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = torch.compile(make_model(size, length).to(device))
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0, fused=True)
    rows, seconds = SIZES[size]["rows"], []
    for ids in random_rows(size, length, steps).split(rows):
        begin = time.perf_counter()
        ids = ids.to(device, non_blocking=True)
        with torch.autocast(device.type, torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        synchronize()
        seconds.append(time.perf_counter() - begin)
    return seconds


ARMS = {"ours": run_ours, "trainer": run_trainer, "lean": run_lean}


def synchronize() -> None:
    """Wait for the device."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def run_arm(arm: str, size: str, length: int, steps: int) -> dict[str, Any]:
    """Tokens per second, the first step's seconds, and peak memory of an arm in this process."""
    import torch

    seconds = ARMS[arm](size, length, steps)
    later = seconds[WARM_STEPS:] or seconds[1:]
    is_cuda = torch.cuda.is_available()
    return {
        "tokens_per_second": SIZES[size]["rows"] * length / statistics.median(later),
        "first_step_seconds": seconds[0],
        "steps": len(seconds),
        "peak_bytes": torch.cuda.max_memory_allocated() if is_cuda else None,
    }


def matrix_ceiling() -> float:
    """Operations per second of a large bf16 product here."""
    import torch

    from postgrad.hardware import machine

    side = 8192 if torch.cuda.is_available() else 1024
    return 2 * machine.matmul_speed(torch.bfloat16, (side, side, side), machine.default_device())


def operations_per_token(size: str, length: int) -> float:
    """Of forward and backward."""
    shape = SIZES[size]
    block = 4 * shape["hidden"] ** 2 + 3 * shape["hidden"] * shape["inner"]
    weights = shape["layers"] * block + VOCABULARY * shape["hidden"]
    return 6 * weights + 12 * shape["layers"] * shape["hidden"] * length / 2


def main() -> None:
    """Run the arms of each size in turn until the time is up."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["124M", "1B", "350M"])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=160.0, help="No arm goes on for longer.")
    parser.add_argument("--one", nargs=2, metavar=("ARM", "SIZE"), help="Run this arm here and print its result.")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.one:
        print("\n" + json.dumps(run_arm(*options.one, options.length, options.steps)))
        return
    end = time.monotonic() + options.seconds
    ceiling, results = matrix_ceiling(), {}
    for size in options.sizes:
        results[size] = {}
        for arm in options.arms:
            command = [sys.executable, __file__, "--one", arm, size, "--length", str(options.length)]
            try:
                run = subprocess.run(
                    [*command, "--steps", str(options.steps)], capture_output=True, text=True,
                    timeout=max(end - time.monotonic(), 1.0),
                )  # fmt: skip
                result = (
                    json.loads(run.stdout.splitlines()[-1]) if run.returncode == 0 else {"error": run.stderr[-2000:]}
                )
            except subprocess.TimeoutExpired:
                result = {"error": "the time was up"}
            if speed := result.get("tokens_per_second"):
                result["share_of_ceiling"] = speed * operations_per_token(size, options.length) / ceiling
            results[size][arm] = result
            print(size, arm, result, flush=True)
            write_results(
                options.json,
                {"settings": settings(options), **provenance(), "ceiling": ceiling, "sizes": SIZES, "results": results},
            )
    raise SystemExit(any("error" in result for arms in results.values() for result in arms.values()))


if __name__ == "__main__":
    main()

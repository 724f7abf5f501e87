"""Cost of a training step of each tuning, compared with PEFT, and cost of a disabled tuning.

    python benchmarks/tuning_speed.py --json benchmarks/results/tuning_speed.json

Every arm trains the same random Llama on the same batch: forward, backward and torch's AdamW, in fp32 with SDPA. Ours and
PEFT's of a kind take turns, and the one that begins changes each round; the ratio is of the two steps of one round, so a
slow minute hits both. Kinds that PEFT has not are held against tuning the whole model, which has no PEFT to beat.
Switched off: a forward without gradients inside `disable()`, and one of a model that never had a tuning.

Memory is that of a whole training of a LoRA, ours as a stage steps and PEFT's under Trainer, in processes of their own: the
most each ever held (VmHWM), less what it held with its libraries imported and nothing else.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from arms import add_integer_options, format_range, median_and_range, provenance, run_rounds, settings, write_results
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

VECTORS, WIDTH_OF_MLP, RANK = 20, 512, 16
Kind = dict[str, Any]
# By name: ours, and PEFT's configuration of the same (None: it has none).
KINDS: dict[str, tuple[Kind, Callable[[LlamaConfig], Any] | None]] = {
    "lora": ({"kind": "lora", "rank": RANK}, lambda c: _lora()),
    "dora": ({"kind": "lora", "rank": RANK, "variant": "dora"}, lambda c: _lora(use_dora=True)),
    "prompt": ({"kind": "prompt", "length": VECTORS, "init": "random"}, lambda c: _prompt()),
    "prefix": ({"kind": "prefix", "length": VECTORS, "hidden": WIDTH_OF_MLP}, lambda c: _prefix(projected=True)),
    "p-tuning-v2": ({"kind": "p-tuning-v2", "length": VECTORS, "dropout": 0.0}, lambda c: _prefix(projected=False)),
    "osf": ({"kind": "osf"}, lambda c: _osf(c)),
    "norm": ({"kind": "norm"}, lambda c: _norm()),
    "adapter": ({"kind": "adapter", "variant": "pfeiffer"}, None),
    "blocks": ({"kind": "blocks", "last": 1}, None),
    "expand": ({"kind": "expand", "every": 3}, None),
    "full": ({"kind": "full"}, None),
}
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RATE = 1e-4


def _lora(**more: Any) -> Any:
    from peft import LoraConfig

    return LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM", **more)


def _prompt() -> Any:
    from peft import PromptTuningConfig

    return PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=VECTORS)


def _prefix(*, projected: bool) -> Any:
    from peft import PrefixTuningConfig

    return PrefixTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=VECTORS,
        prefix_projection=projected,
        encoder_hidden_size=WIDTH_OF_MLP,
    )


def _osf(config: LlamaConfig) -> Any:
    from peft import OSFConfig

    return OSFConfig(task_type="CAUSAL_LM", target_modules=LINEAR, effective_rank=0.5)


def _norm() -> Any:
    from peft import LNTuningConfig

    names = ["input_layernorm", "post_attention_layernorm", "norm"]
    return LNTuningConfig(task_type="CAUSAL_LM", target_modules=names)


# --- steps -------------------------------------------------------------------------------------------------------


def random_model(options: argparse.Namespace) -> LlamaForCausalLM:
    """The same Llama every time."""
    from small_llama import make_llama

    return make_llama(options, extra_positions=VECTORS).train()


class Arm:
    """A model under a tuning, and its optimizer."""

    def __init__(
        self, model: torch.nn.Module, ids: Tensor, *, virtual: int = 0, first: int = 0, caches: bool = False
    ) -> None:
        """`virtual` ids from `first` on are set before each row; PEFT sets its own."""
        vectors = torch.arange(first, first + virtual).expand(len(ids), -1)
        self.ids = torch.cat([vectors, ids], 1)
        self.labels = torch.cat([torch.full_like(vectors, -100), ids], 1)
        self.model, self.caches = model, caches
        moving = [p for p in model.parameters() if p.requires_grad]
        self.trainable = sum(p.numel() for p in moving)
        self.optimizer = torch.optim.AdamW(moving, lr=RATE)

    def step(self) -> float:
        """Seconds of forward, backward and update."""
        begin = time.perf_counter()
        self.model(input_ids=self.ids, labels=self.labels, use_cache=self.caches).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return time.perf_counter() - begin


def postgrad_arm(options: argparse.Namespace, kind: Kind, ids: Tensor) -> tuple[Arm, Any]:
    """Our arm, and its tuning."""
    from postgrad.tuning.attach import attach

    model = random_model(options)
    tuning = attach(model, kind)
    return Arm(model, ids, virtual=tuning.num_virtual_tokens, first=options.vocabulary), tuning


def peft_arm(options: argparse.Namespace, config: Callable[[LlamaConfig], Any], ids: Tensor) -> Arm:
    """PEFT's arm."""
    from peft import get_peft_model

    model = random_model(options)
    wanted = config(model.config)
    # PEFT hands its prefix over in the cache, and takes no other way on this architecture.
    return Arm(get_peft_model(model, wanted), ids, caches=wanted.peft_type == "PREFIX_TUNING")


def compare_steps(options: argparse.Namespace, ids: Tensor) -> list[dict[str, Any]]:
    """Each kind's step beside PEFT's, or beside that of tuning the whole model."""
    rows = []
    for name in options.kinds:
        kind, config = KINDS[name]
        mine, _ = postgrad_arm(options, kind, ids)
        other = peft_arm(options, config, ids) if config else postgrad_arm(options, {"kind": "full"}, ids)[0]
        rounds = list(run_rounds({"ours": mine.step, "other": other.step}, options.rounds, options.warm))
        row = {
            "kind": name,
            "against": "peft" if config else "full",
            "ours_ms": median_and_range(1e3 * each["ours"] for each in rounds),
            "other_ms": median_and_range(1e3 * each["other"] for each in rounds),
            "ratio": median_and_range(each["ours"] / each["other"] for each in rounds),
            "trainable": mine.trainable,
            "other_trainable": other.trainable,
        }
        rows.append(row)
        print(
            f"{name:<12} {row['ours_ms'][0]:>8.1f} ms  {row['against']:<5}{row['other_ms'][0]:>8.1f} ms"
            f"  ratio {format_range(row['ratio'], '.3f')}  weights {mine.trainable:,} / {other.trainable:,}",
            flush=True,
        )
    return rows


def time_forward(
    model: torch.nn.Module, ids: Tensor, context: Callable[[], AbstractContextManager[Any]] = nullcontext
) -> float:
    """Seconds of a forward."""
    with context():
        begin = time.perf_counter()
        model(input_ids=ids, use_cache=False)
        return time.perf_counter() - begin


@torch.no_grad()
def compare_switched_off(options: argparse.Namespace, ids: Tensor) -> list[dict[str, Any]]:
    """A forward with each tuning off, and on, beside one of the bare model."""
    bare = random_model(options).eval()
    rows = []
    for name in options.kinds:
        arm, tuning = postgrad_arm(options, KINDS[name][0], ids)
        if not tuning.additive:
            continue
        arm.model.eval()
        arms = {
            "bare": partial(time_forward, bare, ids),
            "off": partial(time_forward, arm.model, ids, tuning.disable),
            "on": partial(time_forward, arm.model, arm.ids),
        }
        rounds = list(run_rounds(arms, options.rounds, options.warm))
        ratios = {
            f"{side}_ratio": median_and_range(each[side] / each["bare"] for each in rounds) for side in ("off", "on")
        }
        with tuning.disable():
            same = torch.equal(arm.model(input_ids=ids).logits, bare(input_ids=ids).logits)
        rows.append(
            {
                "kind": name,
                "bare_ms": 1e3 * median_and_range(each["bare"] for each in rounds)[0],
                **ratios,
                "off_is_bit_equal": same,
            }
        )
        told = "  ".join(f"{k.split('_')[0]} {format_range(v, '.3f')}" for k, v in ratios.items())
        print(f"{name:<12} x bare: {told}  off bit-equal: {same}", flush=True)
    return rows


# --- memory, in a process of its own -------------------------------------------------------------------------------


def process_megabytes(key: str) -> float:
    """A number of this process in megabytes, such as VmHWM or VmRSS."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith(f"{key}:"))


def measure_memory(arm: str, work: Path, options: argparse.Namespace) -> dict[str, float]:
    """Train a LoRA for some steps; what the process held at most beside its libraries."""
    ids = torch.randint(0, options.vocabulary, (1, options.time), generator=torch.Generator().manual_seed(0))
    dtype = torch.bfloat16 if arm.endswith("bf16") else torch.float32
    train = (postgrad_lora_training if arm.startswith("ours") else peft_lora_training)(work, ids, options, dtype)
    # Libraries load parts of themselves at their first product.
    torch.nn.functional.linear(torch.zeros(8, 8), torch.zeros(8, 8))
    libraries = process_megabytes("VmRSS")
    train()
    return {"peak_mb": process_megabytes("VmHWM") - libraries, "libraries_mb": libraries}


def postgrad_lora_training(
    work: Path, ids: Tensor, options: argparse.Namespace, dtype: torch.dtype
) -> Callable[[], None]:
    """The steps of a stage, its libraries imported: masters where something moves, the base in the compute dtype."""
    from small_llama import make_batch, make_run

    from postgrad.hardware import machine
    from postgrad.models.model import CausalModel
    from postgrad.objectives.next_token import TokenLoss
    from postgrad.optim.optimizer import Weights
    from postgrad.training.step import train_step
    from postgrad.tuning import lora
    from postgrad.tuning.attach import attach

    def train() -> None:
        machine.tune_allocator()
        pretrained = LlamaForCausalLM.from_pretrained(work, attn_implementation="sdpa")
        tuning = attach(pretrained, KINDS["lora"][0])
        assert isinstance(tuning, lora.LoraAdapter)
        model = CausalModel(pretrained).train()
        weights = Weights(model, tuning, dtype, master_copies=True)
        objectives = [TokenLoss("next-token", 1.0)]
        run = make_run(model, weights, objectives, rate=RATE, betas=(0.9, 0.999), weight_decay=0.0)
        batch = make_batch(ids)
        for _ in range(options.memory_steps):
            train_step(run, [batch])

    return train


def peft_lora_training(work: Path, ids: Tensor, options: argparse.Namespace, dtype: torch.dtype) -> Callable[[], None]:
    """PEFT's LoRA under Hugging Face Trainer, its libraries imported."""
    import accelerate  # noqa: F401 (Trainer imports it late)
    from peft import get_peft_model
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        output_dir=str(work / "trainer"),
        per_device_train_batch_size=len(ids),
        max_steps=options.memory_steps,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        bf16=dtype == torch.bfloat16,
        use_cpu=True,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )

    def train() -> None:
        model: PreTrainedModel = LlamaForCausalLM.from_pretrained(work, attn_implementation="sdpa")
        rows = [{"input_ids": row, "labels": row} for row in ids] * options.memory_steps
        Trainer(model=get_peft_model(model, _lora()), args=arguments, train_dataset=rows).train()

    return train


MEMORY_ARMS = ("ours-fp32", "peft-trainer-fp32", "ours-bf16", "peft-trainer-bf16")


def compare_memory(options: argparse.Namespace) -> dict[str, dict[str, list[float]]]:
    """Each arm's peak, in turns."""
    sizes = {"hidden": 1024, "inner": 4096, "layers": 2, "time": 512, "vocabulary": options.vocabulary}
    with tempfile.TemporaryDirectory() as folder:
        random_model(argparse.Namespace(**sizes)).save_pretrained(folder)
        told = json.dumps({**sizes, "memory_steps": options.memory_steps})

        def one(arm: str) -> dict[str, float]:
            command = [sys.executable, __file__, "--memory-of", arm, "--work", folder, "--sizes", told]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            return json.loads(done.stdout.splitlines()[-1])

        rounds = list(run_rounds({arm: partial(one, arm) for arm in MEMORY_ARMS}, options.memory_rounds))
    out = {
        arm: {key: median_and_range(each[arm][key] for each in rounds) for key in rounds[0][arm]} for arm in MEMORY_ARMS
    }
    for arm, each in out.items():
        libraries = each["libraries_mb"][0]
        print(f"{arm:<18} peak {format_range(each['peak_mb'], '.0f')} MB beside {libraries:.0f} MB of libraries")
    return out


def parse_arguments() -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    add_integer_options(
        parser, hidden=384, inner=1024, layers=6, vocabulary=4096, rows=8, time=128, rounds=9, warm=2, threads=1
    )
    add_integer_options(parser, memory_steps=4, memory_rounds=2)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--memory-of", choices=MEMORY_ARMS, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--sizes", type=json.loads, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Compare, or (with --memory-of) be one of the arms."""
    options = parse_arguments()
    torch.set_num_threads(options.threads)
    if options.memory_of:
        print(json.dumps(measure_memory(options.memory_of, options.work, argparse.Namespace(**options.sizes))))
        return
    ids = torch.randint(0, options.vocabulary, (options.rows, options.time), generator=torch.Generator().manual_seed(0))
    found = {
        "steps": compare_steps(options, ids),
        "forwards": compare_switched_off(options, ids),
        "memory": compare_memory(options),
    }
    write_results(options.json, {"setting": {**settings(options), **provenance("peft")}, **found})


if __name__ == "__main__":
    main()

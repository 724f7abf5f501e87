"""How will this machine do the arithmetic? Chosen by probes, said with reasons, and kept when a run is resumed."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from transformers import PreTrainedConfig

from postgrad.errors import StageError
from postgrad.models import machine
from postgrad.models.attention import NAME
from postgrad.planning.memory import Shape, estimate

_BF16_WORTH = 1.5
_COMPILE_WORTH_SECONDS = 120.0
_SHARE_OF_PEAK = 0.25
"""What an eager step reaches of a bare matrix product's speed; only to tell short runs from long ones."""


@dataclass(frozen=True)
class Execution:
    """The choices of a run."""

    dtype: str
    compile: bool
    attention: str
    threads: int
    micro: int
    activation_checkpointing: bool
    reasons: dict[str, str] = field(default_factory=dict)

    @property
    def compute(self) -> torch.dtype:
        """The dtype of the forward and backward pass."""
        return torch.bfloat16 if self.dtype == "bfloat16" else torch.float32

    def as_dict(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


def shape_of(config: PreTrainedConfig, parameters: int) -> Shape:
    """A model's shape from its configuration, whatever its keys are called."""
    width = int(getattr(config, "hidden_size", 0) or getattr(config, "n_embd", 0) or 1)
    inner = int(getattr(config, "intermediate_size", 0) or getattr(config, "n_inner", 0) or 4 * width)
    return Shape(
        parameters=parameters,
        layers=int(getattr(config, "num_hidden_layers", 0) or getattr(config, "n_layer", 0) or 1),
        width=width,
        inner=inner,
        heads=int(getattr(config, "num_attention_heads", 0) or getattr(config, "n_head", 0) or 1),
        vocabulary=int(config.vocab_size),
    )


def choose(
    shape: Shape,
    *,
    dtype: str,
    compile: str | bool,
    attention: str,
    activation_checkpointing: bool,
    threads: int | None,
    micro: int | None,
    sequences: int,
    length: int,
    tokens: int,
    device: torch.device,
    default_attention: str,
    blocks_usable: bool,
    ranks: int = 1,
) -> Execution:
    """Decide what was left to `auto`. Raises `StageError` when rows do not part evenly."""
    reasons: dict[str, str] = {}
    mine = sequences // ranks
    if sequences % ranks:
        raise StageError(
            f"{sequences} rows do not part into {ranks} ranks",
            where="batch.sequences",
            expected=f"a multiple of {ranks}",
        )

    if threads is None:
        threads = max(1, machine.cores() // ranks) if device.type == "cpu" else machine.cores()
        reasons["threads"] = f"{machine.cores()} cores are free to this process"
    torch.set_num_threads(threads)

    product = (min(4096, (micro or min(8, mine)) * length), shape.width, shape.inner)
    plain = machine.product_speed(torch.float32, product, device)
    fast = machine.product_speed(torch.bfloat16, product, device)
    if dtype == "auto":
        dtype = "bfloat16" if fast >= _BF16_WORTH * plain else "float32"
        reasons["dtype"] = f"bf16 products are {fast / plain:.1f} x as fast as fp32 here"
    bf16 = dtype == "bfloat16"

    if micro is None:
        micro = max(m for m in range(1, min(8, mine) + 1) if mine % m == 0)
        free = machine.memory_bytes()
        reasons["micro"] = "as many rows at once as fit, at most 8"
        while free and micro > 1:
            need = estimate(
                shape,
                rows=micro,
                length=length,
                bf16=bf16,
                checkpointing=activation_checkpointing,
                sdpa=attention != "eager",
            )
            if need.total < 0.6 * free:
                break
            micro = max(m for m in range(1, micro) if mine % m == 0)
    elif mine % micro:
        raise StageError(
            f"{mine} rows a rank do not part into micro-batches of {micro}",
            where="batch.micro",
            expected=f"a divisor of {mine}",
        )

    seconds = 3 * shape.parameters * tokens / ((fast if bf16 else plain) * _SHARE_OF_PEAK) / ranks
    if compile == "auto":
        compile = seconds > _COMPILE_WORTH_SECONDS
        reasons["compile"] = (
            f"the run takes about {seconds:,.0f} s without; compiling pays from about {_COMPILE_WORTH_SECONDS:.0f} s"
        )
    if attention == "auto":
        blocks = bool(compile) and device.type == "cpu" and length <= 2048 and blocks_usable
        attention = NAME if blocks else default_attention
        reasons["attention"] = (
            "compiled, causal blocks are about three times as fast as SDPA on a CPU; the logits were checked"
            if blocks
            else "what transformers picks for this architecture"
        )
    return Execution(
        dtype=dtype,
        compile=bool(compile),
        attention=attention,
        threads=threads,
        micro=micro,
        activation_checkpointing=activation_checkpointing,
        reasons=reasons,
    )

"""How will this machine do the arithmetic? Chosen by probes, said with reasons, and kept when a run is resumed."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from postgrad.errors import StageError
from postgrad.hardware import machine
from postgrad.hardware.memory import ModelDimensions, estimate_memory
from postgrad.models.cpu_attention import CAUSAL_BLOCKS, is_supported
from postgrad.models.model import CausalModel, Model
from postgrad.models.pretrained import get_layers

_MIN_BF16_SPEEDUP = 1.3
"""Below this, bf16's rounding buys too little."""
_MIN_THREADS_SPEEDUP = 1.15
_COMPILE_SECONDS = {"cpu": 60.0, "cuda": 300.0}
"""Runs that take longer without are compiled: compiling costs 15 to 30 s once and saves about a third on a CPU."""
_TOKENS_AT_ONCE = {"cpu": 2048, "cuda": 32_768}
"""A CPU is no faster with more (measured: .98 of the speed at half the activations); a GPU wants to be filled."""
_MAX_BLOCKS_LENGTH = 2048


@dataclass(frozen=True)
class ExecutionRequest:
    """What a stage asks for; `auto` or None is decided here."""

    dtype: str
    compile: str | bool
    attention: str
    activation_checkpointing: bool
    threads: int | None
    micro: int | None
    sequences: int
    length: int
    steps: int
    is_fixed_length: bool = True
    """Every row is as long as the next; where they are not, compiled code would be compiled again and again."""
    is_causal: bool = True
    """No token sees what stands behind it; of a prefix language model's rows that is not so."""


@dataclass(frozen=True)
class Execution:
    """The choices of a run."""

    dtype: str
    compile: bool
    attention: str
    threads: int
    micro: int
    activation_checkpointing: bool
    seconds: float
    """What the training is expected to take without compiling, from two timed micro-batches."""
    reasons: dict[str, str] = field(default_factory=dict)

    @property
    def compute(self) -> torch.dtype:
        """The dtype of the forward and backward pass."""
        return torch.bfloat16 if self.dtype == "bfloat16" else torch.float32

    def as_dict(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


def get_model_dimensions(model: Model) -> ModelDimensions:
    """A model's shape from its configuration, whatever its keys are called."""
    config = model.pretrained.config
    width = int(getattr(config, "hidden_size", 0) or getattr(config, "n_embd", 0) or 1)
    inner = int(getattr(config, "intermediate_size", 0) or getattr(config, "n_inner", 0) or 4 * width)
    return ModelDimensions(
        parameters=sum(p.numel() for p in model.parameters()),
        trainable=sum(p.numel() for p in model.parameters() if p.requires_grad),
        layers=len(get_layers(model.pretrained)),
        width=width,
        inner=inner,
        heads=int(getattr(config, "num_attention_heads", 0) or getattr(config, "n_head", 0) or 1),
        vocabulary=int(config.vocab_size),
    )


def select_execution(
    request: ExecutionRequest,
    model: Model,
    make_inputs: Callable[[int], dict[str, Tensor]],
    device: torch.device,
    ranks: int = 1,
) -> Execution:
    """Decide what was left open, with a reason each; `example` gives what the model is called with for so many rows.

    Raises `StageError` for what cannot be had here.
    """
    reasons: dict[str, str] = {}
    shape = get_model_dimensions(model)
    mine = _rows_per_rank(request, ranks)
    product = (min(2048, (request.micro or mine) * request.length), shape.width, shape.inner)

    threads, reasons["threads"] = choose_threads(request.threads, product, device, ranks)
    torch.set_num_threads(threads)
    gain = machine.matmul_speed(torch.bfloat16, product, device) / machine.matmul_speed(torch.float32, product, device)
    dtype = request.dtype
    if dtype == "auto":
        dtype = "bfloat16" if gain >= _MIN_BF16_SPEEDUP else "float32"
        reasons["dtype"] = f"bf16 products of this model's size are {gain:.1f} x as fast as fp32 ones"
    micro = request.micro or _choose_micro_batch(request, shape, mine, device, bf16=dtype == "bfloat16")
    if request.micro is None:
        reasons["micro"] = f"as many rows at once as fit, about {_TOKENS_AT_ONCE[_device_kind(device)]:,} tokens"

    attention = request.attention
    if attention == CAUSAL_BLOCKS and not request.is_causal:
        raise StageError(
            f"{CAUSAL_BLOCKS} looks only at what stands before a token, and prefixes are read in both directions",
            where="compute.attention",
            expected="auto, sdpa or eager",
        )
    if attention == "auto":
        attention = model.pretrained.config._attn_implementation or "eager"
        reasons["attention"] = "what transformers picks for this architecture"
        packed = isinstance(model, CausalModel) and request.is_fixed_length and request.is_causal
        if device.type == "cpu" and packed and request.length <= _MAX_BLOCKS_LENGTH and is_supported(model.pretrained):
            attention = CAUSAL_BLOCKS
            reasons["attention"] = "faster than SDPA on a CPU (up to three times, compiled); its logits were checked"
    model.pretrained.set_attn_implementation(attention)
    seconds = _micro_batch_seconds(model, make_inputs(micro), dtype, device) * (mine // micro) * request.steps
    compiled, limit = request.compile, _COMPILE_SECONDS[_device_kind(device)]
    able = machine.can_compile(device)
    if compiled == "auto":
        compiled = able and request.is_fixed_length and seconds > limit
        if not able:
            reasons["compile"] = "there is no C++ compiler or no Python headers here"
        elif not request.is_fixed_length:
            reasons["compile"] = "the rows differ in length, so it would be compiled again for each"
        else:
            reasons["compile"] = (
                f"the training takes about {seconds:,.0f} s without; compiling pays from about {limit:.0f} s"
            )
    elif compiled and not able:
        raise StageError(
            "torch.compile finds no C++ compiler or no Python headers here",
            where="compute.compile",
            hint="install them, or leave it at auto",
        )
    return Execution(
        dtype=dtype,
        compile=bool(compiled),
        attention=attention,
        threads=threads,
        micro=micro,
        activation_checkpointing=request.activation_checkpointing,
        seconds=round(seconds, 4),
        reasons=reasons,
    )


def _rows_per_rank(request: ExecutionRequest, ranks: int) -> int:
    if request.sequences % ranks:
        raise StageError(
            f"{request.sequences} rows do not part into {ranks} ranks",
            where="batch.global_batch_size",
            expected=f"a multiple of {ranks}",
        )
    mine = request.sequences // ranks
    if request.micro and mine % request.micro:
        raise StageError(
            f"{mine} rows a rank do not part into micro-batches of {request.micro}",
            where="batch.micro_batch_size",
            expected=f"a divisor of {mine}",
        )
    return mine


def choose_threads(
    requested: int | None, product: tuple[int, int, int], device: torch.device, ranks: int
) -> tuple[int, str]:
    """Threads, and why. Two threads beside a busy process are far slower than one, so more than one is tried out."""
    if requested is not None:
        return requested, "as asked"
    free = max(1, machine.core_count() // ranks)
    if device.type != "cpu" or free == 1:
        return free, f"{free} cores are there for this process"
    speeds = {}
    for threads in (1, free):
        torch.set_num_threads(threads)
        speeds[threads] = machine.matmul_speed(torch.float32, product, device)
    gain = speeds[free] / speeds[1]
    if gain < _MIN_THREADS_SPEEDUP:
        return 1, f"{free} threads are only {gain:.2f} x as fast as one here (small products, or other busy processes)"
    return free, f"{free} threads are {gain:.2f} x as fast as one here"


def _device_kind(device: torch.device) -> str:
    return "cpu" if device.type == "cpu" else "cuda"


def _choose_micro_batch(
    request: ExecutionRequest, shape: ModelDimensions, rank_rows: int, device: torch.device, *, bf16: bool
) -> int:
    """The most rows at once that part the rank's rows evenly and fit into six tenths of the free memory."""
    free = machine.available_memory()
    most = max(1, _TOKENS_AT_ONCE[_device_kind(device)] // request.length)
    fitting = 1
    for rows in (m for m in range(1, min(most, rank_rows) + 1) if rank_rows % m == 0):
        need = estimate_memory(
            shape,
            rows=rows,
            length=request.length,
            bf16=bf16,
            checkpointing=request.activation_checkpointing,
            sdpa=request.attention != "eager",
        )
        if not free or need.total < 0.6 * free:
            fitting = rows
    return fitting


_TIMINGS: dict[tuple[object, ...], float] = {}
"""What was timed in this process: of many runs of one sort only the first is."""


def _micro_batch_seconds(model: Model, inputs: dict[str, Tensor], dtype: str, device: torch.device) -> float:
    """Seconds of one micro-batch, forward and backward, not compiled; what was timed once is not timed again."""
    attention = model.pretrained.config._attn_implementation
    sizes = tuple(sorted((name, tuple(tensor.shape)) for name, tensor in inputs.items()))
    key = (type(model), get_model_dimensions(model), sizes, dtype, device, attention, torch.get_num_threads())
    if key not in _TIMINGS:
        _TIMINGS[key] = _time_micro_batch(model, inputs, dtype, device)
    return _TIMINGS[key]


def _time_micro_batch(model: Model, inputs: dict[str, Tensor], dtype: str, device: torch.device) -> float:
    """The shorter of two after a first one.

    The head is timed on a part of the tokens, as the loss takes it: all logits at once could need more memory than the
    training itself.
    """
    inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
    moving = [p for p in model.parameters() if p.requires_grad]
    times: list[float] = []
    while len(times) < 3 and sum(times) < 10:  # a large model: one is enough
        begin = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
            output = model(**inputs)
            tokens = output.hidden[..., 0].numel()
            part = min(256, tokens)
            seconds_of_head = -time.perf_counter()
            read = output.hidden.detach().flatten(0, -2)[:part].requires_grad_()
            logits = read if output.head is None else output.head.logits(read)
            logits.float().logsumexp(-1).sum().backward()
            seconds_of_head += time.perf_counter()
        if output.hidden.requires_grad:
            output.hidden.float().mean().backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin + seconds_of_head * (tokens / part - 1))
        for parameter in moving:
            parameter.grad = None
    return min(times[1:], default=times[0])

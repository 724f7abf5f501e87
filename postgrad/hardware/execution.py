"""Execution choices (dtype, compilation, attention, threads, micro-batch size), measured once per run, with reasons."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from postgrad.data.loading.unpacked_rows import drop_positions
from postgrad.errors import StageError
from postgrad.hardware import machine
from postgrad.hardware.memory import ModelDimensions, StateDtypes, estimate_memory
from postgrad.models.architecture_errors import SHORTER, as_model_error
from postgrad.models.cpu_attention import CAUSAL_BLOCKS, is_supported
from postgrad.models.layers import get_embedding_weight, get_layers
from postgrad.models.model import CausalModel, Model, find_model_leak
from postgrad.models.sublayers import training_mode

MIN_BF16_SPEEDUP = 1.3
"""Minimum speed-up of bf16 products to accept their rounding."""
_MIN_THREADS_SPEEDUP = 1.15
_COMPILE_SECONDS = {"cpu": 60.0, "cuda": 300.0}
"""Longer runs are compiled: compiling takes 15 to 30 s once and saves about a third on a CPU."""
_MICRO_BATCH_TOKENS = {"cpu": 2048, "cuda": 32_768}
"""Tokens of a micro-batch. A CPU is no faster with more (0.98 of the speed at half the activations)."""
_MAX_BLOCKS_LENGTH = 2048


@dataclass(frozen=True)
class ExecutionRequest:
    """Settings of a stage; `auto` and None are decided here."""

    dtype: str
    compile: str | bool
    attention: str
    activation_checkpointing: str | bool
    threads: int | None
    micro: int | None
    sequences: int
    length: int
    steps: int
    is_fixed_length: bool = True
    """Whether all rows have the same length; compiled code is compiled again for each length."""
    is_causal: bool = True
    """Whether tokens attend to earlier ones only; false for a prefix language model."""
    packing: bool | None = None
    """Whether documents share a row. Default: where they do not see each other."""
    state: StateDtypes = field(default_factory=StateDtypes)


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
    """Estimated training time without compilation, from timed micro-batches."""
    packed: bool = True
    """Whether the documents of a packed row go through the model together; false: each in a row of its own."""
    reasons: dict[str, str] = field(default_factory=dict)

    @property
    def compute(self) -> torch.dtype:
        """The dtype of the forward and backward pass."""
        return torch.bfloat16 if self.dtype == "bfloat16" else torch.float32

    def as_dict(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


def get_model_dimensions(model: Model) -> ModelDimensions:
    """A model's sizes, from the configuration keys of its architecture."""
    config = model.pretrained.config.get_text_config()
    width = _read_size(config, "hidden_size", "n_embd") or 1
    inner = _read_size(config, "intermediate_size", "n_inner") or 4 * width
    head = model.head()
    heads = [head.weight_VD] if head else []
    return ModelDimensions(
        parameters=sum(p.numel() for p in model.parameters()),
        trainable=sum(p.numel() for p in model.parameters() if p.requires_grad),
        layers=len(get_layers(model.pretrained)),
        width=width,
        inner=inner,
        heads=_read_size(config, "num_attention_heads", "n_head") or 1,
        vocabulary=get_embedding_weight(model.pretrained).shape[0],
        tables=sum({id(table): table.numel() for table in (get_embedding_weight(model.pretrained), *heads)}.values()),
    )


def _read_size(config: PreTrainedConfig, *names: str) -> int:
    """The first of these keys that is set; the largest where it has a value for each layer."""
    parts = [config, *(getattr(config, "per_layer_config", None) or ())]
    for name in names:
        values: list[int] = []
        for part in parts:
            # Reading a key that differs between layers raises an error of transformers' own.
            with suppress(Exception):
                value = getattr(part, name)
                values += value if isinstance(value, list) else [value]
        if sizes := [int(value) for value in values if value]:
            return max(sizes)
    return 0


def select_execution(
    request: ExecutionRequest,
    model: Model,
    make_inputs: Callable[[int], dict[str, Tensor]],
    device: torch.device,
    ranks: int = 1,
    agree: Callable[[float], float] = float,
) -> Execution:
    """Decide what the stage leaves open, with a reason each; `make_inputs` gives model inputs of a number of rows.

    `agree`: from the seconds of one rank those of all; a sharded model runs on all of them at once.

    Sets torch's threads and the model's attention on the way. Raises `StageError` for a request this machine cannot meet.
    """
    reasons: dict[str, str] = {}
    shape, rank_rows = get_model_dimensions(model), _rows_per_rank(request, ranks)
    product = (min(2048, (request.micro or rank_rows) * request.length), shape.width, shape.inner)

    threads, reasons["threads"] = choose_threads(request.threads, product, device, ranks)
    torch.set_num_threads(threads)
    dtype = _choose_dtype(request, product, device, reasons)
    bf16 = dtype == "bfloat16"
    checkpointing = _choose_checkpointing(request, shape, reasons, bf16=bf16)
    request = replace(request, activation_checkpointing=checkpointing)
    micro = request.micro or _choose_micro_batch(request, shape, rank_rows, device, bf16=bf16)
    if request.micro is None:
        tokens = _MICRO_BATCH_TOKENS[_device_kind(device)]
        reasons["micro"] = f"as many rows as fit in memory, about {tokens:,} tokens"
    attention = _choose_attention(request, model, device, reasons)
    model.pretrained.set_attn_implementation(attention)
    packed = _choose_packing(request, model, reasons)
    if not packed or (isinstance(model, CausalModel) and model.passes_documents):
        request = replace(request, is_fixed_length=False)
    inputs = make_inputs(micro) if packed else drop_positions(make_inputs(micro))
    steps = (rank_rows // micro) * request.steps
    seconds = _micro_batch_seconds(model, inputs, dtype, device, agree) * steps
    return Execution(
        dtype=dtype,
        compile=_choose_compile(request, seconds, device, reasons),
        packed=packed,
        attention=attention,
        threads=threads,
        micro=micro,
        activation_checkpointing=checkpointing,
        seconds=round(seconds, 4),
        reasons=reasons,
    )


def _rows_per_rank(request: ExecutionRequest, ranks: int) -> int:
    if request.sequences % ranks:
        raise StageError(
            f"{request.sequences} rows cannot be split evenly over {ranks} ranks",
            where="batch.global_batch_size",
            expected=f"a multiple of {ranks}",
        )
    rank_rows = request.sequences // ranks
    if request.micro and rank_rows % request.micro:
        raise StageError(
            f"{rank_rows} rows per rank cannot be split evenly into micro-batches of {request.micro}",
            where="batch.micro_batch_size",
            expected=f"a divisor of {rank_rows}",
        )
    return rank_rows


def choose_threads(
    requested: int | None, product: tuple[int, int, int], device: torch.device, ranks: int
) -> tuple[int, str]:
    """Threads, and the reason. Next to a busy process two threads can be far slower than one, so both are measured.

    Where the rounds of the measurement disagree, the default is taken: the cores.
    """
    if requested is not None:
        processors = os.cpu_count() or 1
        if requested > processors:
            raise StageError(
                f"{requested:,} threads", where="compute.threads", expected=f"at most {processors}, the processors here"
            )
        return requested, "set in the stage"
    if (threads := machine.environment_threads()) is not None:
        return threads, "set by OMP_NUM_THREADS"
    cores = max(1, machine.core_count() // ranks)
    if device.type != "cpu" or cores == 1:
        return cores, f"{cores} cores for this process"

    def speed(threads: int) -> float:
        torch.set_num_threads(threads)
        return machine.matmul_speed(torch.float32, product, device)

    gains = machine.compare_speeds(lambda: speed(cores), lambda: speed(1))
    gain = statistics.median(gains)
    if gain >= _MIN_THREADS_SPEEDUP:
        return cores, f"{cores} threads are {gain:.2f} x as fast as one"
    if max(gains) >= _MIN_THREADS_SPEEDUP and gain >= 1 / _MIN_THREADS_SPEEDUP:
        return (
            cores,
            f"{cores} cores for this process; the measured gain over one thread, {gain:.2f} x, is within noise",
        )
    return 1, f"{cores} threads are only {gain:.2f} x as fast as one (small products, or other busy processes)"


def _choose_dtype(
    request: ExecutionRequest, product: tuple[int, int, int], device: torch.device, reasons: dict[str, str]
) -> str:
    if request.dtype != "auto":
        return request.dtype
    speeds = [partial(machine.matmul_speed, dtype, product, device) for dtype in (torch.bfloat16, torch.float32)]
    gain = statistics.median(machine.compare_speeds(*speeds))
    reasons["dtype"] = f"bf16 products of this model's size are {gain:.1f} x as fast as fp32 ones"
    return "bfloat16" if gain >= MIN_BF16_SPEEDUP else "float32"


def _choose_attention(request: ExecutionRequest, model: Model, device: torch.device, reasons: dict[str, str]) -> str:
    if request.attention == CAUSAL_BLOCKS and not request.is_causal:
        raise StageError(
            f"{CAUSAL_BLOCKS} is causal, and a prefix language model reads its prefixes in both directions",
            where="compute.attention",
            expected="auto, sdpa or eager",
        )
    if request.attention != "auto":
        return request.attention
    is_packed = isinstance(model, CausalModel) and request.is_fixed_length and request.is_causal
    if device.type == "cpu" and is_packed and request.length <= _MAX_BLOCKS_LENGTH and is_supported(model.pretrained):
        reasons["attention"] = "faster than SDPA on a CPU (up to three times, compiled); its logits were checked"
        return CAUSAL_BLOCKS
    reasons["attention"] = "the default of transformers for this architecture"
    return model.pretrained.config._attn_implementation or "eager"


def _choose_packing(request: ExecutionRequest, model: Model, reasons: dict[str, str]) -> bool:
    """Whether documents share rows: where they do not see each other. Raises `ModelError` if they must, and do."""
    if not isinstance(model, CausalModel):
        return True
    if request.packing is False:
        reasons["packing"] = "each document is a row of its own, set in the stage"
        return False
    leak = find_model_leak(model, request.length)
    if leak is None:
        return True
    if request.packing is True:
        raise leak.as_error(model.pretrained)
    reasons["packing"] = f"each document is a row of its own, since {leak.describe()}"
    return False


def _choose_compile(request: ExecutionRequest, seconds: float, device: torch.device, reasons: dict[str, str]) -> bool:
    """Whether to compile; `seconds`: the training without."""
    can_compile, threshold = machine.can_compile(device), _COMPILE_SECONDS[_device_kind(device)]
    if request.compile != "auto":
        if request.compile and not can_compile:
            raise StageError(
                "torch.compile finds no C++ compiler or no Python headers",
                where="compute.compile",
                hint="install them, or set it to auto",
            )
        return bool(request.compile)
    if not can_compile:
        reasons["compile"] = "no C++ compiler or no Python headers"
    elif not request.is_fixed_length:
        reasons["compile"] = (
            "the rows differ in length or in their number of documents, and each shape would be compiled again"
        )
    else:
        reasons["compile"] = (
            f"training takes about {seconds:,.0f} s without; compiling pays from about {threshold:.0f} s"
        )
    return can_compile and request.is_fixed_length and seconds > threshold


def _device_kind(device: torch.device) -> str:
    return "cpu" if device.type == "cpu" else "cuda"


def _choose_micro_batch(
    request: ExecutionRequest, shape: ModelDimensions, rank_rows: int, device: torch.device, *, bf16: bool
) -> int:
    """The largest micro-batch that divides the rank's rows and fits into 60 % of the free memory."""
    max_rows = max(1, _MICRO_BATCH_TOKENS[_device_kind(device)] // request.length)
    divisors = [m for m in range(1, min(max_rows, rank_rows) + 1) if rank_rows % m == 0]
    return max((rows for rows in divisors if _fits(request, shape, rows, bf16=bf16)), default=1)


def _choose_checkpointing(
    request: ExecutionRequest, shape: ModelDimensions, reasons: dict[str, str], *, bf16: bool
) -> bool:
    """Whether activations are recomputed: when the stage says so, or where its rows do not fit otherwise."""
    if isinstance(request.activation_checkpointing, bool):
        return request.activation_checkpointing
    rows = request.micro or 1
    if _fits(replace(request, activation_checkpointing=False), shape, rows, bf16=bf16):
        return False
    reasons["activation_checkpointing"] = f"the activations of {rows:,} row{'s' * (rows > 1)} do not fit otherwise"
    return True


def _fits(request: ExecutionRequest, shape: ModelDimensions, rows: int, *, bf16: bool) -> bool:
    """Whether a step on so many rows takes less than 60 % of the free memory."""
    free = machine.available_memory()
    memory = estimate_memory(
        shape,
        rows=rows,
        length=request.length,
        bf16=bf16,
        checkpointing=bool(request.activation_checkpointing),
        sdpa=request.attention != "eager",
        state=request.state,
    )
    return not free or memory.total < 0.6 * free


_TIMINGS: dict[tuple[object, ...], float] = {}
"""Timings of this process: of equal runs only the first is timed."""


def _micro_batch_seconds(
    model: Model, inputs: dict[str, Tensor], dtype: str, device: torch.device, agree: Callable[[float], float]
) -> float:
    """Seconds of one micro-batch, forward and backward, not compiled; cached per process."""
    attention = model.pretrained.config._attn_implementation
    sizes = tuple(sorted((name, tuple(tensor.shape)) for name, tensor in inputs.items()))
    key = (type(model), get_model_dimensions(model), sizes, dtype, device, attention, torch.get_num_threads())
    if key not in _TIMINGS:
        _TIMINGS[key] = _time_micro_batch(model, inputs, dtype, device, agree)
    return _TIMINGS[key]


@contextmanager
def _drop_gradients(model: Model) -> Iterator[None]:
    """Inside, a backward pass drops each gradient when it is complete: those of all weights are never held at once."""

    def drop(parameter: Tensor) -> None:
        parameter.grad = None

    with ExitStack() as hooks:
        for parameter in model.parameters():
            if parameter.requires_grad:
                hooks.callback(parameter.register_post_accumulate_grad_hook(drop).remove)
        yield


def _time_micro_batch(
    model: Model, inputs: dict[str, Tensor], dtype: str, device: torch.device, agree: Callable[[float], float]
) -> float:
    """The faster of two runs after a warm-up, in training mode. Raises `ModelError` for an architecture that cannot be trained.

    The head is timed on some of the tokens, in a chunk as in the loss: all logits at once may need more memory than training.
    """
    inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
    times: list[float] = []
    length = next(iter(inputs.values())).shape[-1]
    what = f"a training step on rows of {length:,} tokens"
    random_devices = [] if device.type == "cpu" else [device]
    with (
        training_mode(model),
        torch.random.fork_rng(random_devices),
        as_model_error(model.pretrained, what, SHORTER),
        _drop_gradients(model),
    ):
        while len(times) < 3 and sum(times) < 10:  # a large model: one run is enough
            begin = time.perf_counter()
            with torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
                output = model(**inputs)
                tokens = output.hidden[..., 0].numel()
                chunk = min(256, tokens)
                head_seconds = -time.perf_counter()
                hidden = output.hidden.detach().flatten(0, -2)[:chunk].requires_grad_()
                logits = hidden if output.head is None else output.head.logits(hidden)
                logits.float().logsumexp(-1).sum().backward()
                head_seconds += time.perf_counter()
            if output.hidden.requires_grad:
                output.hidden.float().mean().backward()
            if device.type == "cuda":
                torch.cuda.synchronize()
            times.append(agree(time.perf_counter() - begin + head_seconds * (tokens / chunk - 1)))
    return min(times[1:], default=times[0])

"""A step of a stage on devices that are not here, walked at its real size with tensors that have shapes and no values.

The code is that of a real step: meta model, tuning, sharding, forward and backward pass, loss, optimizer. torch's fake process
group answers every collective call at once, and fake tensors take no memory, so a laptop walks 70 billion weights on 64 ranks.
The bytes that are alive are counted, every collective call by its bytes, and operations by torch's formulas.

Two steps are walked: the second one has the moments of the first. Scores, teachers, penalties and the balancing loss of experts
are not part of it.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop, sdpa_flop
from transformers import PreTrainedModel

from postgrad.config.objectives import DistillObjective, GeneratingObjective
from postgrad.data.loading.batch import Batch, collate
from postgrad.distributed import fsdp
from postgrad.distributed.shards import local_shard
from postgrad.distributed.world import MeshShape, World
from postgrad.errors import StageError
from postgrad.hardware.accelerators import ACCELERATORS, DEVICES_PER_NODE, Accelerator
from postgrad.hardware.memory import format_bytes
from postgrad.models.experts import find_experts
from postgrad.models.pretrained import make_placeholder_model
from postgrad.optim.gradient_release import release_gradients
from postgrad.optim.low_precision_adamw import ROWS_BYTES, LowPrecisionAdamW
from postgrad.optim.optimizer import Weights
from postgrad.optim.sparse_update import FullMask
from postgrad.plan.plan import Plan
from postgrad.run.build import longest_row, make_optimizer
from postgrad.run.losses import make_objectives
from postgrad.run.tuned_model import TunedModel, tune
from postgrad.training.step import Run, compute_gradients
from postgrad.tuning.open_model import LoadedModel

_ROW_TOKENS = 32_768
"""Tokens of a micro-batch, as a run takes on a GPU."""
_UTILISATION = (0.3, 0.5)
"""Share of a device's matrix products that training reaches: torchtitan published figures of 8 B on 8 H100 that are .33 with
plain FSDP2, and .49 compiled and in float8."""
_REST = "gathered weights, gradients, activations and buffers"
_SCANNED_SHARE = 1 / 256
"""New bytes, as a share of the state, after which those that are alive are counted."""


def _grouped_flops(left: Tensor, right: Tensor, *_: Any, **__: Any) -> int:
    """Of products of groups of rows, or of columns, each with its own matrix: each row has one."""
    return 2 * (left.numel() * right.shape[-1] if left.ndim == 2 else right.numel() * left.shape[-2])


_FLOPS: Mapping[Any, Any] = {
    **flop_registry,
    torch.ops.aten._grouped_mm: _grouped_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: sdpa_flop,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: sdpa_backward_flop,
}
"""Operations of a call, of torch's counter, with attention as the CPU calls it."""
_COLLECTIVES = {
    "_allgather_base_": "all-gather",
    "allgather_into_tensor_coalesced_": "all-gather",
    "_reduce_scatter_base_": "reduce-scatter",
    "allreduce_": "all-reduce",
}


@dataclass(frozen=True)
class Collective:
    """Calls of one kind in a step, and the bytes of their larger side."""

    calls: int
    bytes: int


@dataclass(frozen=True)
class DryRun:
    """A step on one of several equal devices."""

    device: str
    ranks: int
    rows: int
    """Rows of a micro-batch."""
    micro_batches: int
    """Micro-batches of a rank in a step."""
    memory: Mapping[str, int]
    """Bytes by kind at the peak, which is inside the step."""
    collectives: Mapping[str, Collective]
    """Of one micro-batch with its update."""
    flops: int
    """Operations of one micro-batch on one rank, recomputed ones included."""
    tokens_per_second: tuple[float, float]
    """Of one device, at the lower and the higher utilisation."""
    notes: tuple[str, ...]

    @property
    def peak(self) -> int:
        """Bytes of all kinds."""
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        """Whether the peak leaves a tenth of the device for the allocator and CUDA."""
        return self.peak < 0.9 * ACCELERATORS[self.device].memory

    def as_json(self) -> dict[str, Any]:
        """As plain data."""
        return {**asdict(self), "peak": self.peak, "fits": self.fits}

    def lines(self) -> list[str]:
        """In words."""
        room = ACCELERATORS[self.device].memory
        low, high = self.tokens_per_second
        return [
            f"on {self.ranks:,} x {self.device}: micro-batches of {self.rows:,} rows, "
            f"{self.micro_batches:,} for each rank in a step",
            f"  memory of a device: {format_bytes(self.peak)} of {format_bytes(room)} at the peak of a step: "
            + ", ".join(f"{kind} {format_bytes(size)}" for kind, size in self.memory.items() if size),
            *(
                f"  {kind}: {each.calls:,} calls, {format_bytes(each.bytes)} in a micro-batch with its update"
                for kind, each in self.collectives.items()
            ),
            f"  operations: {self.flops:.3g} in a micro-batch on a device",
            f"  expected: {low:,.0f} to {high:,.0f} tokens/s on a device, {low * self.ranks:,.0f} to {high * self.ranks:,.0f} "
            f"in all (at {_UTILISATION[0]:.0%} to {_UTILISATION[1]:.0%} of its matrix products, or as fast as its links)",
            *(f"  note: {note}" for note in self.notes),
        ]


def walk_step(plan: Plan, ranks: int, device: str) -> DryRun:
    """Walk two steps of the stage on one of `ranks` devices; of one rank without sharding.

    Raises `StageError` for an unknown device, for rows that do not divide, and for a tuning that computes from weights.
    """
    accelerator = ACCELERATORS.get(device)
    if accelerator is None:
        raise StageError(f"{device!r} is unknown", where="--device", expected=", ".join(ACCELERATORS))
    if dist.is_initialized():
        raise StageError("a dry run makes ranks of its own", where="--world", expected="one process, without torchrun")
    rows, micro_batches = _micro_batches(plan, ranks)
    shape = plan.stage.parallel
    mesh_shape = MeshShape(shape.replicate, shape.shard) if shape else MeshShape()
    with _quiet(), _fake_world(ranks, mesh_shape) as world:
        tuned_model = _make_model(plan, world)
        batch = _make_batch(plan, rows)
        with FakeTensorMode(allow_non_fake_inputs=True):
            run = _build(plan, tuned_model, world)
            releases = plan.stage.optimizer.release_gradients
            _step(run, batch, releases_gradients=releases)
            state = _state_bytes(run)
            counter = _StepCounter(round(sum(state.values()) * _SCANNED_SHARE))
            for tensor in (*run.weights.masters, *run.model.parameters(), *run.optimizer.sharded_moments().values()):
                counter.watch(local_shard(tensor))
            with counter:
                _step(run, batch, releases_gradients=releases)
            counter.scan()
    memory = {**state, _REST: counter.peak - sum(state.values())}
    collectives = counter.summary()
    tokens = rows * plan.model.context_length
    return DryRun(
        device,
        ranks,
        rows,
        micro_batches,
        memory,
        collectives,
        counter.flops,
        _expected_speed(accelerator, ranks, tokens, counter.flops, collectives),
        _notes(plan, memory, accelerator),
    )


def _micro_batches(plan: Plan, ranks: int) -> tuple[int, int]:
    """Rows of a micro-batch, and the micro-batches of a rank."""
    batch = plan.stage.batch
    if batch.global_batch_size % ranks:
        raise StageError(
            f"{batch.global_batch_size} rows cannot be split evenly over {ranks} ranks",
            where="batch.global_batch_size",
            expected=f"a multiple of {ranks}",
        )
    own = batch.global_batch_size // ranks
    most = batch.micro_batch_size or max(1, _ROW_TOKENS // plan.model.context_length)
    rows = max(m for m in range(1, min(own, most) + 1) if own % m == 0)
    if plan.stage.optimizer.release_gradients:
        rows = own
    return rows, own // rows


@contextmanager
def _quiet() -> Iterator[None]:
    """Inside, torch's trackers say nothing of their own experiments."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


@contextmanager
def _fake_world(ranks: int, shape: MeshShape) -> Iterator[World]:
    """The first of so many ranks, none of which exists; a single process for one."""
    device = torch.device("cpu")
    if ranks == 1:
        shape.check(1)
        yield World(device)
        return
    shape.check(ranks)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        yield World(device, 0, ranks, None, shape.make(device, ranks))
    finally:
        dist.destroy_process_group()


def _make_model(plan: Plan, world: World) -> TunedModel:
    """The model with the stage's tuning, without memory for its weights."""
    model = plan.model
    if model.start.base is not None or model.start.scratch_recipe:
        raise StageError(
            "a dry run walks plain models",
            where="model",
            expected="a folder with a config.json, or a Hub name, that is no tuning's and no new model",
        )
    pretrained = make_placeholder_model(model.start, model.task)
    if find_experts(pretrained) and plan.stage.compute.dtype == "float32":
        raise StageError(
            "a dry run walks mixtures of experts in bf16, as torch's kernel for their products on a GPU",
            where="compute.dtype",
            expected="bfloat16 or auto",
        )
    loaded = LoadedModel(pretrained, model.task, model.task_layer, ())
    try:
        with _experts_as_on_gpus(pretrained):
            return tune(plan, loaded, world, has_values=False)
    except (NotImplementedError, RuntimeError) as error:
        raise StageError(
            f"`{plan.stage.tuning.kind}` computes from the weights of its start model, and a dry run has no values",
            where="tuning.kind",
            expected="full, lora without `variant`, or another kind with weights of its own",
        ) from error


@contextmanager
def _experts_as_on_gpus(pretrained: PreTrainedModel) -> Iterator[None]:
    """From here on, experts are computed group by group, whose shapes depend on no value; inside, token by token.

    The kernel of groups has no placeholders in fp32, in which a model is tried.
    """
    if not find_experts(pretrained):
        yield
        return
    if not pretrained._can_set_experts_implementation():
        raise StageError(
            "a dry run does not walk experts that transformers computes one by one: which tokens they get depends on values",
            where="model",
            expected="a mixture of experts with their weights in one tensor, or a model without experts",
        )
    pretrained.set_experts_implementation("batched_mm")
    try:
        yield
    finally:
        pretrained.set_experts_implementation("grouped_mm")


def _build(plan: Plan, tuned_model: TunedModel, world: World) -> Run:
    """The run at step 0 on fake tensors; as `run.build.build_run` without what reads values."""
    compute, spec, model = plan.stage.compute, plan.stage.optimizer, tuned_model.model
    dtype = torch.float32 if compute.dtype == "float32" else torch.bfloat16
    model.to_empty(device="cpu")
    model.pretrained.tie_weights()
    if compute.activation_checkpointing is True:
        fsdp.checkpoint_activations(model)
    if world.mesh:
        fsdp.shard(model, world.mesh, dtype)
        fsdp.reshard(model)
    masters = torch.bfloat16 if spec.master_dtype else torch.float32
    weights = Weights(model, tuned_model.tuning, dtype, master_copies=world.mesh is None, master_dtype=masters)
    taught = (DistillObjective, GeneratingObjective)
    specs = [o for o in plan.objectives if not isinstance(o, taught)] or plan.objectives[:1]
    model.train()
    optimizer = make_optimizer(plan, weights, FullMask())
    for inner in optimizer.inner:
        if isinstance(inner, LowPrecisionAdamW):
            inner.rows_bytes = ROWS_BYTES["cuda"]
    return Run(
        model=model,
        weights=weights,
        optimizer=optimizer,
        objectives=make_objectives(specs, plan.model.problem, plan.model.task, steps=plan.steps, tokens=plan.tokens),
        penalties=[],
        schedule=plan.schedule,
        world=world,
        sources=plan.data.source_names,
        max_grad_norm=math.inf if spec.max_grad_norm is None else spec.max_grad_norm,
        seed=plan.stage.seed,
    )


def _make_batch(plan: Plan, rows: int) -> Batch:
    """So many copies of the longest row."""
    longest = longest_row(plan)
    return collate([longest] * rows, [0] * rows, pad_token_id=plan.model.inputs.pad_id).find_label_positions()


def _step(run: Run, batch: Batch, *, releases_gradients: bool) -> None:
    if releases_gradients:
        with release_gradients(run.optimizer, 0.0) as released:
            compute_gradients(run, [batch], max(1, batch.label_count))
        released.norm()
        return
    compute_gradients(run, [batch], max(1, batch.label_count))
    run.weights.gradient_norm()
    run.optimizer.step(0.0)


class _StepCounter(TorchDispatchMode):
    """Counts what a step does and holds: operations, collective calls, and the bytes of all storages that are alive.

    torch's own trackers of memory and operations keep recomputed activations alive by their hooks, which a step does not.
    """

    def __init__(self, scanned_bytes: int) -> None:
        """`scanned_bytes`: new bytes after which those that are alive are counted."""
        super().__init__()
        self.flops, self.peak, self.scanned_bytes = 0, 0, scanned_bytes
        self._sizes: dict[str, list[int]] = defaultdict(list)
        self._storages: dict[int, StorageWeakRef] = {}
        self._bytes_since = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if count := _FLOPS.get(func._overloadpacket):
            self.flops += count(*args, **kwargs, out_val=out)
        if func.namespace == "c10d" and (kind := _COLLECTIVES.get(func._schema.name.split("::")[1])):
            self._sizes[kind].append(max(sum(t.nbytes for t in _tensors(side)) for side in args[:2]))
        for tensor in _tensors(out):
            self.watch(tensor)
        if self._bytes_since >= self.scanned_bytes:
            self.scan()
        return out

    def watch(self, tensor: Tensor) -> None:
        """Count the storage of a tensor, as long as anything holds it."""
        if isinstance(tensor, DTensor) or tensor.is_meta:
            return
        storage = tensor.untyped_storage()
        known = self._storages.get(storage._cdata)
        if known is None or known.expired():
            self._storages[storage._cdata] = StorageWeakRef(storage)
            self._bytes_since += storage.nbytes()

    def scan(self) -> int:
        """The bytes that are alive now."""
        self._storages = {address: held for address, held in self._storages.items() if not held.expired()}
        alive = sum(torch.UntypedStorage._new_with_weak_ptr(address).nbytes() for address in self._storages)
        self.peak, self._bytes_since = max(self.peak, alive), 0
        return alive

    def summary(self) -> dict[str, Collective]:
        """The collective calls by kind."""
        return {kind: Collective(len(sizes), sum(sizes)) for kind, sizes in sorted(self._sizes.items())}


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def _state_bytes(run: Run) -> dict[str, int]:
    """What a rank holds between steps."""
    moments = {name: local_shard(tensor).nbytes for name, tensor in run.optimizer.sharded_moments().items()}
    parameters = {id(p): local_shard(p).nbytes for p in run.model.parameters()}
    copies = {id(w.master): local_shard(w.master).nbytes for w in run.weights.entries}
    return {"weights": sum({**parameters, **copies}.values()), "optimizer states": sum(moments.values())}


def _expected_speed(
    device: Accelerator, ranks: int, tokens: int, flops: int, collectives: Mapping[str, Collective]
) -> tuple[float, float]:
    """Tokens a second of a device: the slower of its products and its links, which work at the same time."""
    # Rings through all nodes use the adapters of all devices of a node at once.
    rate = device.link if ranks <= DEVICES_PER_NODE else min(device.link, DEVICES_PER_NODE * device.network)
    communication = sum(each.bytes for each in collectives.values()) * (ranks - 1) / ranks / rate
    low, high = (tokens / max(flops / (share * device.flops), communication) for share in _UTILISATION)
    return low, high


def _notes(plan: Plan, memory: Mapping[str, int], device: Accelerator) -> tuple[str, ...]:
    notes = []
    if any(isinstance(o, (DistillObjective, GeneratingObjective)) for o in plan.objectives):
        notes.append("the memory and time of teachers come on top")
    if plan.stage.penalties:
        notes.append("the memory and time of penalties come on top")
    if sum(memory.values()) >= 0.9 * device.memory:
        notes.append(f"it does not fit; what helps: {', '.join(_helpful_keys(plan, memory))}")
    return tuple(notes)


def _helpful_keys(plan: Plan, memory: Mapping[str, int]) -> list[str]:
    """Keys that make the step smaller, those against its largest part first."""
    compute, optimizer, batch = plan.stage.compute, plan.stage.optimizer, plan.stage.batch
    against_activations = [
        *([] if optimizer.release_gradients else ["optimizer.release_gradients: true"]),
        *([] if compute.activation_checkpointing is True else ["compute.activation_checkpointing: true"]),
        *([] if batch.micro_batch_size == 1 else ["batch.micro_batch_size: 1"]),
    ]
    against_state = [
        *([] if optimizer.moment_dtype or optimizer.kind == "muon" else ["optimizer.moment_dtype: float8"]),
        *(["tuning: {kind: lora}"] if plan.stage.tuning.kind == "full" else []),
        "more ranks",
    ]
    is_state = 2 * memory[_REST] < sum(memory.values())
    return [*against_state, *against_activations] if is_state else [*against_activations, *against_state]

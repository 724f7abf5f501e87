"""The learning rate of a stage as a pure function of the step."""

from __future__ import annotations

from typing import NamedTuple

from postgrad.config import schedules as s
from postgrad.config.quantities import length_in_steps
from postgrad.config.stage import SharpnessAware
from postgrad.errors import StageError
from postgrad.models.location import ModelLocation
from postgrad.optim import lr_schedules
from postgrad.training.checkpoint_state import read_progress


class ScheduleContext(NamedTuple):
    """The stage that a schedule is laid over: its steps, trained tokens and start model."""

    steps: int
    tokens: int
    start_model: ModelLocation

    def length(self, text: str) -> float:
        """A length in steps."""
        return length_in_steps(text, self.steps, self.tokens)


def make_schedule(spec: s.AnySchedule, steps: int, tokens: int, start_model: ModelLocation) -> lr_schedules.Schedule:
    """The learning rate of each step, as a pure function."""
    return spec.load()(spec, ScheduleContext(steps, tokens, start_model))


def warmup_notes(spec: s.AnySchedule, steps: int, tokens: int, beta2: float) -> list[str]:
    """A note on a warm-up from (about) zero that is too short to be one; what the stage file says is done all the same."""
    if not isinstance(spec, s.ConstantSchedule | s.DecaySchedule | s.InfiniteSchedule | s.WsdSchedule):
        return []
    if isinstance(spec, s.DecaySchedule) and spec.start >= spec.peak / 2:
        return []
    warmup, shortest = length_in_steps(spec.warmup, steps, tokens), lr_schedules.shortest_warmup(steps, beta2)
    if steps <= lr_schedules.MIN_WARMUP_STEPS or warmup >= shortest:
        return []
    return [
        f"schedule.warmup: {spec.warmup} is {warmup:.3g} of {steps:,} steps; until about step {shortest} the steps of Adam are"
        f" too large, which can cost learning and retention: write `warmup: {shortest} steps`"
    ]


def find_sharpness_start(
    spec: SharpnessAware | None, schedule: lr_schedules.Schedule, steps: int, tokens: int
) -> int | None:
    """The first sharpness-aware step; None without any. Raises `StageError` without a decay to begin with."""
    if spec is None:
        return None
    if spec.over != "decay":
        first = steps - round(length_in_steps(spec.over, steps, tokens)) + 1
        if first > steps:
            raise StageError(
                f"{spec.over} of {steps:,} steps is no step",
                where="optimizer.sharpness_aware.over",
                expected="at least one step",
            )
        return max(first, 1)
    last_before = steps
    while last_before > 0 and (last_before == 1 or schedule(last_before - 1) > schedule(last_before)):
        last_before -= 1
    if last_before == steps:
        raise StageError(
            "the learning rate does not decay at the end of this schedule",
            where="optimizer.sharpness_aware.over",
            expected="a length such as 10%, or a schedule that decays: rewarm, wsd, anneal ...",
        )
    return last_before + 1


def make_constant(spec: s.ConstantSchedule, stage: ScheduleContext) -> lr_schedules.Schedule:
    """Warm-up, then a constant rate."""
    warmup = stage.length(spec.warmup)
    _check_phases_fit(stage.steps, warmup=warmup)
    return lr_schedules.chain(
        (lr_schedules.linear(0.0, spec.peak), warmup), (lr_schedules.constant(spec.peak), stage.steps)
    )


def make_decay(spec: s.DecaySchedule, stage: ScheduleContext) -> lr_schedules.Schedule:
    """Warm-up, then decay to the floor."""
    shape, warmup = "cosine" if spec.kind == "rewarm" else spec.kind, stage.length(spec.warmup)
    _check_positive_floor(shape, spec.floor)
    _check_phases_fit(stage.steps, warmup=warmup)
    return lr_schedules.rewarm(
        steps=stage.steps, peak=spec.peak, floor=spec.floor, warmup=warmup, start=spec.start, shape=shape
    )


def make_from_floor(spec: s.FromFloorSchedule, stage: ScheduleContext) -> lr_schedules.Schedule:
    """Decay from the final rate of the pre-training."""
    _check_positive_floor(spec.shape, spec.floor)
    return lr_schedules.chain((lr_schedules.SHAPES[spec.shape](spec.start, spec.floor), stage.steps))


def make_infinite(spec: s.InfiniteSchedule, stage: ScheduleContext) -> lr_schedules.Schedule:
    """Warm-up, cooldown, constant, anneal."""
    warmup, cooldown, until = (stage.length(text) for text in (spec.warmup, spec.cooldown, spec.constant_until))
    if warmup + cooldown > until or until > stage.steps:
        raise StageError(
            f"warm-up and cooldown end at step {warmup + cooldown:.0f}, the constant phase at {until:.0f}, "
            f"the stage at {stage.steps}",
            where="schedule.constant_until",
            expected="warm-up + cooldown <= constant_until <= 100%",
        )
    return lr_schedules.infinite(
        steps=stage.steps,
        peak=spec.peak,
        constant_rate=spec.constant,
        floor=spec.floor,
        warmup=warmup,
        cooldown=cooldown,
        constant_until=until,
        cooldown_shape=spec.cooldown_shape,
        timescale=spec.timescale,
    )


def make_wsd(spec: s.WsdSchedule, stage: ScheduleContext) -> lr_schedules.Schedule:
    """Warm-up, stable phase, decay."""
    warmup, decay = stage.length(spec.warmup), stage.length(spec.decay)
    _check_phases_fit(stage.steps, warmup=warmup, decay=decay)
    return lr_schedules.wsd(
        steps=stage.steps, peak=spec.peak, floor=spec.floor, warmup=warmup, decay=decay, shape=spec.shape
    )


def make_anneal(spec: s.AnnealSchedule, stage: ScheduleContext) -> lr_schedules.Schedule:
    """Decay from the rate of a checkpoint."""
    rate = spec.start if spec.start is not None else _get_checkpoint_rate(stage.start_model)
    return lr_schedules.chain((lr_schedules.SHAPES[spec.shape](rate, spec.floor), stage.steps))


def make_piecewise(spec: s.PiecewiseSchedule, stage: ScheduleContext) -> lr_schedules.Schedule:
    """Pieces one after another."""
    lengths = [stage.length(piece.length) if piece.length is not None else None for piece in spec.pieces]
    rest = stage.steps - sum(length for length in lengths if length is not None)
    _check_phases_fit(stage.steps, pieces=stage.steps - rest)
    pieces = []
    for piece, length in zip(spec.pieces, lengths, strict=True):
        if piece.shape == "constant":
            curve = lr_schedules.constant(piece.start)
        else:
            assert piece.end is not None
            _check_positive_floor(piece.shape, min(piece.start, piece.end))
            curve = lr_schedules.SHAPES[piece.shape](piece.start, piece.end)
        pieces.append((curve, max(rest, 0) if length is None else length))
    return lr_schedules.chain(*pieces)


def _check_phases_fit(steps: int, **lengths: float) -> None:
    """Raise `StageError` for phases that are longer than the stage together, rather than cut one silently."""
    if sum(lengths.values()) > steps + 1e-6:
        names = " and ".join(f"{name} ({length:,.0f} steps)" for name, length in lengths.items())
        raise StageError(
            f"phases longer than the stage's {steps:,} steps: {names}",
            where=f"schedule.{next(iter(lengths))}",
            expected=f"at most {steps:,} steps, or 100%",
        )


def _check_positive_floor(shape: str, floor: float) -> None:
    if shape in ("exponential", "inverse-linear") and floor <= 0:
        raise StageError(f"an {shape} decay never reaches 0", where="schedule.floor", expected="a floor above zero")


def _get_checkpoint_rate(start_model: ModelLocation) -> float:
    """The learning rate at the checkpoint that the stage starts from."""
    if start_model.folder is not None and (start_model.folder / "state.json").exists():
        return read_progress(start_model.folder).rate
    raise StageError(
        "annealing needs a start rate, as the stage does not start from a checkpoint",
        where="schedule.start",
        hint="set `model` to a checkpoint (runs/.../checkpoints/step-...), or set `start`",
    )

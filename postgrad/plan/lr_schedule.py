"""The learning rate of a stage as a pure function of the step."""

from __future__ import annotations

from postgrad.config import schedules as s
from postgrad.config.quantities import length_in_steps
from postgrad.errors import StageError
from postgrad.models.location import ModelLocation
from postgrad.optim import lr_schedules
from postgrad.training.checkpoint_files import read_progress


def make_schedule(spec: s.AnySchedule, steps: int, tokens: int, start_model: ModelLocation) -> lr_schedules.Schedule:
    """The learning rate of each step, as a pure function."""

    def length(text: str) -> float:
        return length_in_steps(text, steps, tokens)

    match spec:
        case s.ConstantSchedule():
            _check_phases_fit(steps, warmup=length(spec.warmup))
            return lr_schedules.chain(
                (lr_schedules.linear(0.0, spec.peak), length(spec.warmup)),
                (lr_schedules.constant(spec.peak), steps),
            )
        case s.DecaySchedule():
            shape = "cosine" if spec.kind == "rewarm" else spec.kind
            _check_positive_floor(shape, spec.floor)
            _check_phases_fit(steps, warmup=length(spec.warmup))
            return lr_schedules.rewarm(
                steps=steps, peak=spec.peak, floor=spec.floor, warmup=length(spec.warmup), start=spec.start, shape=shape
            )
        case s.FromFloorSchedule():
            _check_positive_floor(spec.shape, spec.floor)
            return lr_schedules.chain((lr_schedules.SHAPES[spec.shape](spec.start, spec.floor), steps))
        case s.InfiniteSchedule():
            warmup, cooldown, until = length(spec.warmup), length(spec.cooldown), length(spec.constant_until)
            if warmup + cooldown > until or until > steps:
                raise StageError(
                    f"warm-up and cooldown end at step {warmup + cooldown:.0f}, the constant phase at {until:.0f}, "
                    f"the stage at {steps}",
                    where="schedule.constant_until",
                    expected="warm-up + cooldown <= constant_until <= 100%",
                )
            return lr_schedules.infinite(
                steps=steps,
                peak=spec.peak,
                constant_rate=spec.constant,
                floor=spec.floor,
                warmup=warmup,
                cooldown=cooldown,
                constant_until=until,
                cooldown_shape=spec.cooldown_shape,
                timescale=spec.timescale,
            )
        case s.WsdSchedule():
            _check_phases_fit(steps, warmup=length(spec.warmup), decay=length(spec.decay))
            return lr_schedules.wsd(
                steps=steps,
                peak=spec.peak,
                floor=spec.floor,
                warmup=length(spec.warmup),
                decay=length(spec.decay),
                shape=spec.shape,
            )
        case s.AnnealSchedule():
            rate = spec.start if spec.start is not None else _get_checkpoint_rate(start_model)
            return lr_schedules.chain((lr_schedules.SHAPES[spec.shape](rate, spec.floor), steps))
        case s.PiecewiseSchedule():
            given = [length(p.length) if p.length is not None else None for p in spec.pieces]
            rest = steps - sum(g for g in given if g is not None)
            _check_phases_fit(steps, pieces=steps - rest)
            pieces = []
            for piece, own in zip(spec.pieces, given, strict=True):
                if piece.shape == "constant":
                    curve = lr_schedules.constant(piece.start)
                else:
                    assert piece.end is not None
                    _check_positive_floor(piece.shape, min(piece.start, piece.end))
                    curve = lr_schedules.SHAPES[piece.shape](piece.start, piece.end)
                pieces.append((curve, max(rest, 0) if own is None else own))
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
        hint="name a checkpoint (runs/.../checkpoints/step-...) as `model`, or give `start`",
    )

"""Which learning rate has each step? A stage's schedule as a pure function."""

from __future__ import annotations

from postgrad.config import schedules as s
from postgrad.config.quantities import in_steps
from postgrad.errors import StageError
from postgrad.models.pretrained import Start
from postgrad.optim import lr_schedules
from postgrad.training.checkpoint_files import read_progress


def make_schedule(spec: s.AnySchedule, steps: int, tokens: int, start: Start) -> lr_schedules.Schedule:
    """The learning rate of each step, as a pure function."""

    def length(text: str) -> float:
        return in_steps(text, steps, tokens)

    match spec:
        case s.Constant():
            _inside(steps, warmup=length(spec.warmup))
            return lr_schedules.then(
                (lr_schedules.linear(0.0, spec.peak), length(spec.warmup)),
                (lr_schedules.constant(spec.peak), steps),
            )
        case s.Decay():
            shape = "cosine" if spec.kind == "rewarm" else spec.kind
            _above_zero(shape, spec.floor)
            _inside(steps, warmup=length(spec.warmup))
            return lr_schedules.rewarm(
                steps=steps, peak=spec.peak, floor=spec.floor, warmup=length(spec.warmup), start=spec.start, shape=shape
            )
        case s.FromFloor():
            _above_zero(spec.shape, spec.floor)
            return lr_schedules.then((lr_schedules.SHAPES[spec.shape](spec.start, spec.floor), steps))
        case s.Infinite():
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
        case s.Wsd():
            _inside(steps, warmup=length(spec.warmup), decay=length(spec.decay))
            return lr_schedules.wsd(
                steps=steps,
                peak=spec.peak,
                floor=spec.floor,
                warmup=length(spec.warmup),
                decay=length(spec.decay),
                shape=spec.shape,
            )
        case s.Anneal():
            rate = spec.start if spec.start is not None else _rate_at(start)
            return lr_schedules.then((lr_schedules.SHAPES[spec.shape](rate, spec.floor), steps))
        case s.Then():
            given = [length(p.length) if p.length is not None else None for p in spec.pieces]
            rest = steps - sum(g for g in given if g is not None)
            _inside(steps, pieces=steps - rest)
            pieces = []
            for piece, own in zip(spec.pieces, given, strict=True):
                if piece.shape == "constant":
                    curve = lr_schedules.constant(piece.start)
                else:
                    assert piece.end is not None
                    _above_zero(piece.shape, min(piece.start, piece.end))
                    curve = lr_schedules.SHAPES[piece.shape](piece.start, piece.end)
                pieces.append((curve, max(rest, 0) if own is None else own))
            return lr_schedules.then(*pieces)


def _inside(steps: int, **lengths: float) -> None:
    """Refuse phases that do not fit the stage together: one of them would be cut without a word."""
    if sum(lengths.values()) > steps + 1e-6:
        names = " and ".join(f"{name} ({length:,.0f} steps)" for name, length in lengths.items())
        raise StageError(
            f"longer than the stage's {steps:,} steps: {names}",
            where=f"schedule.{next(iter(lengths))}",
            expected=f"at most {steps:,} steps, or 100%",
        )


def _above_zero(shape: str, floor: float) -> None:
    if shape in ("exponential", "inverse-linear") and floor <= 0:
        raise StageError(f"an {shape} decay never reaches 0", where="schedule.floor", expected="a floor above zero")


def _rate_at(start: Start) -> float:
    """The learning rate that held at the checkpoint a stage starts from."""
    if start.folder is not None and (start.folder / "state.json").exists():
        return read_progress(start.folder).rate
    raise StageError(
        "the rate to anneal from is not known: the stage does not start from a checkpoint",
        where="schedule.start",
        way_out="name a checkpoint (runs/.../checkpoints/step-...) as `model`, or give `start`",
    )

"""What a stage can change when its memory is too small: keys that a resumed run may change first, without those in use."""

from __future__ import annotations

from postgrad.hardware.execution import Execution
from postgrad.plan.plan import Plan


def training_hint(plan: Plan, execution: Execution | None = None) -> str:
    """The keys that make a step smaller; `execution` None: before it is chosen."""
    compute, optimizer = plan.stage.compute, plan.stage.optimizer
    micro = execution.micro if execution else plan.stage.batch.micro_batch_size or plan.stage.batch.global_batch_size
    resumed = [
        *_smaller_micro_batch(micro),
        *([] if compute.activation_checkpointing is True else ["compute.activation_checkpointing: true"]),
    ]
    anew = [
        _shorter_rows(plan),
        *([] if (execution or compute).dtype == "bfloat16" else ["compute.dtype: bfloat16"]),
        *([] if optimizer.moment_dtype or optimizer.kind == "muon" else ["optimizer.moment_dtype: float8"]),
        *(["tuning: {kind: lora}, which trains fewer weights"] if plan.stage.tuning.kind == "full" else []),
    ]
    return _join([*resumed, "several processes (torchrun), which shard the state"], anew)


def teacher_hint(plan: Plan, execution: Execution) -> str:
    """The keys that make a teacher's forward pass smaller."""
    return _join(_smaller_micro_batch(execution.micro), [_shorter_rows(plan), "a smaller `teacher` in objectives"])


def scoring_hint(plan: Plan) -> str:
    """The keys that make the scores before and after the training smaller."""
    evaluation = plan.stage.evaluation
    resumed = [
        *(["evaluation.drift_tokens: 0 (it compares two models in memory)"] if evaluation.drift_tokens else []),
        *(["evaluation.relearning_steps: 0"] if evaluation.relearning_steps else []),
    ]
    tasks = ["fewer `shots` or `max_new_tokens` in evaluation.tasks"] if evaluation.tasks else []
    abilities = ["fewer `shots` in evaluation.abilities"] if evaluation.abilities else []
    return _join(resumed, [*tasks, *abilities, _shorter_rows(plan)])


def _smaller_micro_batch(micro: int) -> list[str]:
    return [f"batch.micro_batch_size: {micro // 2}"] if micro > 1 else []


def _shorter_rows(plan: Plan) -> str:
    return f"a smaller data.sequence_length than {plan.stage.data.sequence_length}"


def _join(resumed: list[str], anew: list[str]) -> str:
    """What the same run may change, and what makes another one."""
    first = f"repeat the command with {' or '.join(resumed)}; or " if resumed else ""
    return f"{first}under another `output`, {'; '.join(anew)}"

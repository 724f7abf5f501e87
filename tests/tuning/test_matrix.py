"""Does every way of tuning keep every promise, on every family of models?

Each cell is one check of `checks.py` on one kind, one family and one task. What a kind refuses is a cell too: `REFUSED`
says with which words it must be refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import pytest
from transformers import PreTrainedModel

from postgrad.errors import TuningError
from postgrad.tuning.attach import KINDS, attach
from postgrad.tuning.tuning import Tuning
from tests.tuning import checks
from tests.tuning.families import EVERY, FAMILIES, WIDER, Task

TASK_LAYERS = ("score.*", "classifier.*", "classification_head.*")


@dataclass(frozen=True)
class Kind:
    """A way of tuning with its options, and what is promised of it.

    `moves`: patterns of the base's own weights that move, by family ("" for all of them); a task layer always does.
    `starts`: how far from its base an untrained model may be; None where it need not be near.
    `published`, `merged`: how far from the trained model what is published, or merged, may be.
    `finds_task_layers`: a task layer moves without being named in `also`.
    `leaves`: the parts of a model's anatomy that rightly stay changed after `detach`.
    """

    options: Mapping[str, Any]
    moves: Mapping[str, Sequence[str]] = field(default_factory=dict)
    starts: float | None = 0.0
    published: float = 0.0
    merged: float = checks.TOLERANCE
    finds_task_layers: bool = False
    tasks: tuple[Task, ...] = ("lm", "classify", "tags")
    leaves: tuple[str, ...] = ()

    def of_base(self, family: str, task: Task) -> list[str]:
        """Patterns of the base's own weights that move."""
        found = [*self.moves.get("", ()), *self.moves.get(family, ())]
        return [*found, *([] if task == "lm" else TASK_LAYERS)]

    def alone(self, model: PreTrainedModel, *, seed: int = 0) -> Tuning:
        """Attached with nothing else that moves: an additive kind leaves a task layer as it is."""
        return attach(model, self.options, seed=seed, tokenizer=checks.tokenizer())

    def attach(self, model: PreTrainedModel, *, seed: int = 0) -> Tuning:
        """Attached, with the task layer moving, where there is one."""
        heads = [p for p in TASK_LAYERS if any(fnmatchcase(n, p) for n, _ in model.named_parameters())]
        also = {} if self.finds_task_layers or not heads else {"also": heads}
        return attach(model, {**self.options, **also}, seed=seed, tokenizer=checks.tokenizer())


LAST_BLOCK = {
    "llama": ["model.layers.1.*", "model.norm.*", "lm_head.*"],
    "qwen3": ["model.layers.1.*", "model.norm.*", "lm_head.*"],
    "gpt2": ["transformer.h.1.*", "transformer.ln_f.*"],
    "bert": ["bert.encoder.layer.1.*", "cls.predictions.transform.*", "cls.predictions.bias", "bert.pooler.*"],
    "t5": ["*encoder.block.1.*", "*decoder.block.1.*", "*final_layer_norm.*"],
}
NORMS = {
    "llama": ["*norm.*"],
    "qwen3": ["*norm.*"],
    "gpt2": ["*.ln_*"],
    "bert": ["bert.*LayerNorm.*"],
    "t5": ["*layer_norm.*"],
}
OWN_OUTPUT = {family: ["lm_head.*"] for family in ("llama", "qwen3")}


def selection(moves: Mapping[str, Sequence[str]], **options: Any) -> Kind:
    return Kind(options, moves, finds_task_layers=True)


TUNINGS = {
    "full": selection({"": ["*"]}, kind="full"),
    "head": selection(OWN_OUTPUT, kind="head"),
    "head-untied": Kind(
        {"kind": "head", "untie": True},
        {**OWN_OUTPUT, "bert": ["cls.predictions.transform.*"]},
        tasks=("lm",),
        leaves=("configuration",),
    ),
    "blocks": selection(LAST_BLOCK, kind="blocks", last=1),
    "blocks-thawing": selection(LAST_BLOCK, kind="blocks", last=1, unfreeze_every=1),
    "bias": selection({"": ["*bias"]}, kind="bias"),
    "norm": selection({**NORMS, "bert": ["*LayerNorm.*"]}, kind="norm"),
    "houlsby": Kind({"kind": "adapter", "form": "houlsby", "size": 4}, NORMS),
    "pfeiffer": Kind({"kind": "adapter", "form": "pfeiffer", "size": 4}),
    "parallel": Kind({"kind": "adapter", "form": "parallel", "size": 4}),
    "prefix": Kind({"kind": "prefix", "length": 3, "hidden": 16}, starts=None),
    "p-tuning-v2": Kind({"kind": "p-tuning-v2", "length": 3}, starts=None),
    "prompt": Kind({"kind": "prompt", "length": 3}, starts=None),
    "p-tuning-lstm": Kind({"kind": "p-tuning", "length": 3, "encoder": "lstm"}, starts=None),
    "p-tuning-mlp": Kind({"kind": "p-tuning", "length": 3, "encoder": "mlp"}, starts=None),
    "instruction-prompt": Kind({"kind": "instruction-prompt", "length": 4}, starts=None),
}


def trains(kind: Kind, family: str, task: Task) -> None:
    checks.trains_only_what_it_should(kind.attach, family, task, base=kind.of_base(family, task))


def starts(kind: Kind, family: str, task: Task) -> None:
    assert kind.starts is not None
    checks.starts_equal_to_base(kind.attach, family, task, tolerance=kind.starts)


def published(kind: Kind, family: str, task: Task) -> None:
    def from_options(model: PreTrainedModel, options: Mapping[str, Any]) -> Tuning:
        return attach(model, options, seed=7, tokenizer=checks.tokenizer())

    checks.published_equal(kind.attach, from_options, family, task, tolerance=kind.published)


CHECKS: dict[str, Callable[[Kind, str, Task], None]] = {
    "trains": trains,
    "starts": starts,
    "batch": lambda kind, family, task: checks.batch_equals_alone(kind.attach, family, task),
    "cache": lambda kind, family, task: checks.cache_equals_no_cache(kind.attach, family),
    "checkpointing": lambda kind, family, task: checks.checkpointed_gradients_equal(kind.attach, family, task),
    "saving": lambda kind, family, task: checks.save_load_bit_identical(kind.attach, family, task),
    "publishing": published,
    "resuming": lambda kind, family, task: checks.resume_exact(kind.attach, family, task),
    "merging": lambda kind, family, task: checks.merge_exact(kind.attach, family, task, tolerance=kind.merged),
    "off": lambda kind, family, task: checks.off_equals_base(kind.alone, family, task),
    "detaching": lambda kind, family, task: checks.detach_restores(kind.alone, family, task, leaves=kind.leaves),
    "packing": lambda kind, family, task: checks.packed_documents_apart(kind.attach, family),
}


class Refusal(NamedTuple):
    """What is refused, and the words that say why; an empty part means all there are."""

    says: str
    kinds: Sequence[str]
    checks: Sequence[str] = ()
    families: Sequence[str] = ()
    tasks: Sequence[Task] = ()

    def meets(self, check: str, kind: str, family: str, task: Task) -> bool:
        parts: Iterable[tuple[str, Sequence[str]]] = (
            (kind, self.kinds),
            (check, self.checks),
            (family, self.families),
            (task, self.tasks),
        )
        return all(not among or one in among for one, among in parts)


SELECTIONS = ("full", "head", "head-untied", "blocks", "blocks-thawing", "bias", "norm")
ADAPTERS = ("houlsby", "pfeiffer", "parallel")
REFUSED = (
    # With all of the input embedding moving, "only the head" would not be true.
    Refusal("is tied to", ["head"], families=["gpt2", "bert", "t5"], tasks=["lm"]),
    Refusal("has no biases", ["bias"], families=["llama", "qwen3", "t5"]),
    # The base is gone when its own weights have moved.
    Refusal("nothing to switch off", SELECTIONS, checks=["off"]),
    # A nonlinear function is no matrix.
    Refusal("nonlinearity", ADAPTERS, checks=["merging"]),
    # Nor are keys and values that every token reads.
    Refusal("a prefix is no weight", ["prefix", "p-tuning-v2"], checks=["merging"]),
)


def applies(check: str, kind: str, family: str, task: Task) -> bool:
    """Whether the promise makes sense there."""
    shape = EVERY[family].shape
    return (
        task in TUNINGS[kind].tasks
        and (check != "starts" or TUNINGS[kind].starts is not None)
        and (check != "cache" or (task == "lm" and shape != "encoder"))
        and (check != "packing" or (task == "lm" and shape == "decoder"))
    )


def cells(families: Iterable[str]) -> Iterator[Any]:
    """Every check that applies, by kind, family and task."""
    for family in families:
        for task in EVERY[family].tasks:
            for kind in TUNINGS:
                for check in CHECKS:
                    if applies(check, kind, family, task):
                        yield pytest.param(check, kind, family, task, id=f"{check}-{kind}-{family}-{task}")


def try_cell(check: str, kind: str, family: str, task: Task) -> None:
    refusals = [r for r in REFUSED if r.meets(check, kind, family, task)]
    if not refusals:
        CHECKS[check](TUNINGS[kind], family, task)
        return
    with pytest.raises(TuningError, match="|".join(re.escape(r.says) for r in refusals)):
        CHECKS[check](TUNINGS[kind], family, task)


@pytest.mark.parametrize(("check", "kind", "family", "task"), cells(FAMILIES))
def test_promise(check: str, kind: str, family: str, task: Task) -> None:
    try_cell(check, kind, family, task)


@pytest.mark.slow
@pytest.mark.parametrize(("check", "kind", "family", "task"), cells(WIDER))
def test_promise_of_a_wider_family(check: str, kind: str, family: str, task: Task) -> None:
    try_cell(check, kind, family, task)


def test_every_kind_is_tried() -> None:
    assert {str(kind.options["kind"]) for kind in TUNINGS.values()} == set(KINDS)


def test_every_refusal_is_met() -> None:
    for refusal in REFUSED:
        assert any(
            refusal.meets(check, kind, family, task) and applies(check, kind, family, task)
            for check in CHECKS
            for kind in TUNINGS
            for family in EVERY
            for task in EVERY[family].tasks
        )

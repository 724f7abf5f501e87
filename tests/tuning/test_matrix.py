"""Does every way of tuning keep every promise, on every family of models?

Each cell is one check of `checks.py` on one kind, one family and one task. What a kind refuses is a cell too: `REFUSED`
says with which words it must be refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import pytest
from transformers import PreTrainedModel

from postgrad.config.tunings import find_tuning, known_tunings
from postgrad.errors import TuningError
from postgrad.tuning.attach import attach
from postgrad.tuning.tuning import Tuning
from tests.tuning import checks
from tests.tuning.families import ALL_FAMILIES, FAMILIES, TASK_LAYERS, Task


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
        names = [n for n, _ in model.named_parameters()] if type(model).__name__.endswith("Classification") else []
        heads = [p for p in TASK_LAYERS if any(fnmatchcase(n, p) for n in names)]
        also = {} if self.finds_task_layers or not heads else {"also_train": heads}
        return attach(model, {**self.options, **also}, seed=seed, tokenizer=checks.tokenizer())


MODERN = ("llama", "qwen2", "qwen3", "mistral", "phi3", "gemma2", "gemma3", "olmo2")
UNTIED = (*MODERN, "gpt-neox", "opt")
MASKED_HEADS = {
    "bert": ["cls.predictions.transform.*"],
    "roberta": ["lm_head.dense.*", "lm_head.layer_norm.*"],
    "distilbert": ["vocab_transform.*", "vocab_layer_norm.*"],
    "modernbert": ["head.*"],
    "electra": ["generator_predictions.*"],
}
MASKED_BIASES = {
    "bert": ["cls.predictions.bias"],
    "roberta": ["lm_head.bias"],
    "distilbert": ["vocab_projector.bias"],
    "modernbert": ["decoder.bias"],
    "electra": ["generator_lm_head.bias"],
}
NORMS = {
    **{family: ["*norm.*"] for family in (*MODERN, "gpt-neox")},
    **{family: ["*layer_norm.*"] for family in ("t5", "mt5", "opt")},
    **{family: [f"{family}.*LayerNorm.*"] for family in ("bert", "roberta", "electra")},
    "gpt2": ["*.ln_*"],
    "distilbert": ["distilbert.*LayerNorm.*", "distilbert.*layer_norm.*"],
    "modernbert": ["model.*norm.*"],
    "bart": ["*layer_norm.*", "*layernorm_embedding.*"],
}
NORMS_OF_HEADS = {
    "bert": ["cls.predictions.transform.LayerNorm.*"],
    "roberta": ["lm_head.layer_norm.*"],
    "distilbert": ["vocab_layer_norm.*"],
    "modernbert": ["head.*norm.*"],
    "electra": ["generator_predictions.LayerNorm.*"],
}
LAST_BLOCKS = {
    **{family: ["model.layers.1.*", "model.norm.*"] for family in MODERN},
    **{family: [f"{family}.encoder.layer.1.*", f"{family}.pooler.*"] for family in ("bert", "roberta", "electra")},
    **{family: ["*encoder.block.1.*", "*decoder.block.1.*", "*final_layer_norm.*"] for family in ("t5", "mt5")},
    "gpt2": ["transformer.h.1.*", "transformer.ln_f.*"],
    "gpt-neox": ["gpt_neox.layers.1.*", "gpt_neox.final_layer_norm.*"],
    "opt": ["model.decoder.layers.1.*", "model.decoder.final_layer_norm.*"],
    "distilbert": ["distilbert.transformer.layer.1.*"],
    "modernbert": ["model.layers.1.*", "model.final_norm.*"],
    "bart": ["model.encoder.layers.1.*", "model.decoder.layers.1.*"],
}
# BERT's and RoBERTa's have two names, so untying makes them a weight of its own.
BIASES_OF_ONE_NAME = {family: MASKED_BIASES[family] for family in ("distilbert", "modernbert", "electra")}
OWN_OUTPUT = {family: ["lm_head.*"] for family in UNTIED}


def both(*tables: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """The patterns of several tables, by family."""
    return {family: [p for table in tables for p in table.get(family, ())] for table in tables for family in table}


LAST_AND_HEADS = both(LAST_BLOCKS, OWN_OUTPUT, MASKED_HEADS, MASKED_BIASES)


def selection(moves: Mapping[str, Sequence[str]], **options: Any) -> Kind:
    return Kind(options, moves, finds_task_layers=True)


TUNINGS = {
    "full": selection({"": ["*"]}, kind="full"),
    "head": selection(OWN_OUTPUT, kind="head"),
    "head-untied": Kind(
        {"kind": "head", "untie": True},
        both(OWN_OUTPUT, MASKED_HEADS, BIASES_OF_ONE_NAME),
        tasks=("lm",),
        leaves=("configuration",),
    ),
    "blocks": selection(LAST_AND_HEADS, kind="blocks", last=1),
    "blocks-thawing": selection(LAST_AND_HEADS, kind="blocks", last=1, unfreeze_every=1),
    "bias": selection({"": ["*bias"]}, kind="bias"),
    "norm": selection(both(NORMS, NORMS_OF_HEADS), kind="norm"),
    "houlsby": Kind({"kind": "adapter", "variant": "houlsby", "size": 4}, NORMS),
    "pfeiffer": Kind({"kind": "adapter", "variant": "pfeiffer", "size": 4}),
    "parallel": Kind({"kind": "adapter", "variant": "parallel", "size": 4}),
    "prefix": Kind({"kind": "prefix", "length": 3, "hidden": 16}, starts=None),
    "p-tuning-v2": Kind({"kind": "p-tuning-v2", "length": 3}, starts=None),
    "prompt": Kind({"kind": "prompt", "length": 3}, starts=None),
    "p-tuning-lstm": Kind({"kind": "p-tuning", "length": 3, "encoder": "lstm"}, starts=None),
    "p-tuning-mlp": Kind({"kind": "p-tuning", "length": 3, "encoder": "mlp"}, starts=None),
    "instruction-prompt": Kind({"kind": "instruction-prompt", "length": 4}, starts=None),
    "lora": Kind({"kind": "lora", "rank": 2}),
    "rslora": Kind({"kind": "lora", "rank": 2, "variant": "rslora"}),
    "dora": Kind({"kind": "lora", "rank": 2, "variant": "dora"}, starts=checks.TOLERANCE),
    "pissa": Kind(
        {"kind": "lora", "rank": 2, "variant": "pissa"}, starts=5 * checks.TOLERANCE, published=checks.TOLERANCE
    ),
    "osf": Kind({"kind": "osf"}, starts=checks.TOLERANCE),
    "expand": Kind({"kind": "expand", "every": 1}, finds_task_layers=True),
}


def trains(kind: Kind, family: str, task: Task) -> None:
    checks.trains_only_declared(kind.attach, family, task, base=kind.of_base(family, task))


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
    "batch": lambda kind, family, task: checks.batch_equals_single_row(kind.attach, family, task),
    "cache": lambda kind, family, task: checks.cache_equals_no_cache(kind.attach, family),
    "checkpointing": lambda kind, family, task: checks.checkpointed_gradients_equal(kind.attach, family, task),
    "saving": lambda kind, family, task: checks.save_load_bit_identical(kind.attach, family, task),
    "publishing": published,
    "resuming": lambda kind, family, task: checks.resume_exact(kind.attach, family, task),
    "merging": lambda kind, family, task: checks.merge_exact(kind.attach, family, task, tolerance=kind.merged),
    "off": lambda kind, family, task: checks.off_equals_base(kind.alone, family, task),
    "detaching": lambda kind, family, task: checks.detach_restores(
        kind.alone, family, task, allowed_changes=kind.leaves
    ),
    "packing": lambda kind, family, task: checks.packed_documents_isolated(kind.attach, family),
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
TIED = ("gpt2", "bert", "t5", "mt5", "roberta", "distilbert", "modernbert", "electra", "bart")
WITHOUT_BIASES = ("llama", "qwen3", "mistral", "phi3", "gemma2", "gemma3", "olmo2", "modernbert", "t5", "mt5")
POST_LN = ("bert", "roberta", "distilbert", "electra", "bart")
REFUSED = (
    # With all of the input embedding moving, "only the head" would not be true.
    Refusal("is tied to", ["head"], families=TIED, tasks=["lm"]),
    Refusal("has no biases", ["bias"], families=WITHOUT_BIASES),
    # The base is gone when its own weights have moved.
    Refusal("cannot be disabled", SELECTIONS, checks=["off"]),
    # PEFT's layer holds its weights the other way round than GPT-2.
    Refusal("is a Conv1D", ["osf"], families=["gpt2"]),
    # Behind a block of the post-LN kind stands a norm, so a block that adds nothing still changes what goes through it.
    Refusal("cannot be expanded", ["expand"], families=POST_LN),
    # Its first block lacks a norm that every other has, so no copy of it can stand elsewhere.
    Refusal("in its new position", ["expand"], families=["modernbert"]),
    # Scores that are capped before the softmax are not what torch's attention computes.
    Refusal("cannot use `sdpa` attention", ["prefix", "p-tuning-v2"], families=["gemma2"]),
    # A nonlinear function is no matrix.
    Refusal("nonlinearity", ADAPTERS, checks=["merging"]),
    # Nor are keys and values that every token reads.
    Refusal("a prefix adds keys and values", ["prefix", "p-tuning-v2"], checks=["merging"]),
)


def applies(check: str, kind: str, family: str, task: Task) -> bool:
    """Whether the promise makes sense there."""
    shape = ALL_FAMILIES[family].shape
    return (
        task in TUNINGS[kind].tasks
        and (check != "starts" or TUNINGS[kind].starts is not None)
        and (check != "cache" or (task == "lm" and shape != "encoder"))
        # OPT numbers positions itself and lets packed documents see each other, whatever it is tuned by.
        and (check != "packing" or (task == "lm" and shape == "decoder" and family != "opt"))
    )


ALWAYS: Mapping[Task, Sequence[str]] = {
    "lm": tuple(CHECKS),
    "classify": ("trains", "batch", "saving", "off"),
    "tags": ("trains", "batch", "saving"),
}
"""What is tried at every change: of tasks with a layer of their own, that which the layer could break."""


def cells(families: Iterable[str], *, always: bool) -> list[Any]:
    """Every check that applies, by kind, family and task: those that are always tried, or the others."""
    return [
        pytest.param(check, kind, family, task, id=f"{check}-{kind}-{family}-{task}")
        for family in families
        for task in ALL_FAMILIES[family].tasks
        for kind in TUNINGS
        for check in CHECKS
        if applies(check, kind, family, task) and always == (family in FAMILIES and check in ALWAYS[task])
    ]


def try_cell(check: str, kind: str, family: str, task: Task) -> None:
    refusals = [r for r in REFUSED if r.meets(check, kind, family, task)]
    if not refusals:
        CHECKS[check](TUNINGS[kind], family, task)
        return
    with pytest.raises(TuningError, match="|".join(re.escape(r.says) for r in refusals)):
        CHECKS[check](TUNINGS[kind], family, task)


@pytest.mark.parametrize(("check", "kind", "family", "task"), cells(FAMILIES, always=True))
def test_promise(check: str, kind: str, family: str, task: Task) -> None:
    try_cell(check, kind, family, task)


ADDITIVE = tuple(kind for kind in TUNINGS if kind not in SELECTIONS)


@pytest.mark.parametrize("check", ["off", "detaching", "saving", "resuming", "publishing"])
@pytest.mark.parametrize("kind", ADDITIVE)
def test_weights_of_the_body_that_move_besides_come_back(check: str, kind: str) -> None:
    """And they are part of what is saved."""
    besides = {"also_train": ["model.layers.0.input_layernorm", "lm_head"]}
    CHECKS[check](replace(TUNINGS[kind], options={**TUNINGS[kind].options, **besides}), "llama", "lm")


# Not Houlsby's adapters: two of them share the norms that both train.
STACKED = ("pfeiffer", "parallel", "prefix", "prompt", "p-tuning-lstm", "lora", "dora", "osf", "expand")
DECOMPOSED = ("lora", "dora", "osf")


def refused_on_top(below: str, above: str) -> str | None:
    """The words with which a tuning is refused on top of another."""
    if above == "expand" and below != "expand":
        return "put expand before other tunings"
    if above in ("dora", "osf") and below in DECOMPOSED:
        return "merge the (earlier )?adapter first"
    return None


@pytest.mark.parametrize("above", STACKED)
@pytest.mark.parametrize("below", STACKED)
def test_one_tuning_stands_on_another(below: str, above: str) -> None:
    says = refused_on_top(below, above)
    with pytest.raises(TuningError, match=says) if says else nullcontext():
        checks.stacks_on_another(TUNINGS[below].alone, TUNINGS[above].alone, "llama", "lm")


@pytest.mark.slow
@pytest.mark.parametrize(("check", "kind", "family", "task"), cells(ALL_FAMILIES, always=False))
def test_promise_that_takes_longer_to_try(check: str, kind: str, family: str, task: Task) -> None:
    try_cell(check, kind, family, task)


def test_every_kind_is_tried() -> None:
    classes = {kind: find_tuning(kind) for kind in known_tunings()}
    # Other tests define kinds of their own.
    ours = {kind for kind, found in classes.items() if found and found.__module__.startswith("postgrad.")}
    assert {str(kind.options["kind"]) for kind in TUNINGS.values()} == ours


def test_every_refusal_is_met() -> None:
    for refusal in REFUSED:
        assert any(
            refusal.meets(check, kind, family, task) and applies(check, kind, family, task)
            for check in CHECKS
            for kind in TUNINGS
            for family in ALL_FAMILIES
            for task in ALL_FAMILIES[family].tasks
        )

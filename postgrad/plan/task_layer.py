"""The input of a stage's task layer: that of transformers' own classifier, or other layers, pooling and heads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

from postgrad.config.objectives import AnyObjective, ClassifierHeadConfig, ClassifyObjective, JoinedLayers
from postgrad.errors import StageError
from postgrad.models.auto_classes import load_config
from postgrad.models.location import ModelLocation
from postgrad.models.task import Task
from postgrad.models.task_head import Join, Pooling, TaskHeadConfig, count_blocks, load_task_head_config
from postgrad.models.task_head_model import is_decoder
from postgrad.tuning.open_model import BaseReference

_TASK_LAYER_KEYS = ("layers", "pooling", "stack", "head")
_BILSTM_WIDTH, _BILSTM_DEPTH = 768, 2
"""Devlin et al. 2019, section 5.3."""
Stack = Literal["encoder", "decoder"] | None


def resolve_representation(
    objectives: Sequence[AnyObjective], start_model: ModelLocation, task: Task
) -> TaskHeadConfig | None:
    """The input of a stage's task layer; None for transformers' own classifier of the family.

    Raises `StageError` for a choice that this backbone or task does not support.
    """
    specs = [o for o in objectives if isinstance(o, ClassifyObjective)]
    if not task.is_classifier or not specs:
        return None
    spec = specs[0]
    for other in specs[1:]:
        differing = [key for key in _TASK_LAYER_KEYS if getattr(other, key) != getattr(spec, key)]
        if differing:
            raise StageError(
                f"two `classify` objectives differ in `{differing[0]}`",
                where="objectives",
                expected="one task layer for all of them",
            )
    config = load_config(start_model.name_or_path)
    is_default = all(getattr(spec, key) == ClassifyObjective.model_fields[key].default for key in _TASK_LAYER_KEYS)
    start = _get_start_representation(start_model)
    if is_default and start and (start.pooling is None) == (task == Task.TAG):
        return start
    _check_supported(spec, config, task)
    stack = _resolve_stack(spec, config, start)
    layers, join = _resolve_layers(spec, count_blocks(config, stack))
    if _is_standard_classifier(spec, config, task, stack, (layers, join)):
        return None
    return _make_representation(spec, config, task, stack, layers, join)


def _get_start_representation(start_model: ModelLocation) -> TaskHeadConfig | None:
    """The input of the start model's task layer, if it has one of ours."""
    reference = BaseReference.read_folder(start_model)
    if reference and reference.layer:
        return reference.layer.form
    return load_task_head_config(start_model.full_model.folder)


def _check_supported(spec: ClassifyObjective, config: Any, task: Task) -> None:
    """Raise `StageError` for a choice that the backbone or the task does not support."""
    has_two_stacks, head, tags = _is_encoder_decoder(config), spec.head.kind, task == Task.TAG
    if tags and spec.pooling != "auto":
        raise StageError(
            f"tags are predicted word by word without pooling, and `{spec.pooling}` is a pooling",
            where="objectives.pooling",
            expected="rows with one label for a text, or no `pooling`",
        )
    if not has_two_stacks and spec.stack != "auto":
        raise StageError(
            f"a {config.model_type} model has a single stack, so `{spec.stack}` cannot be chosen",
            where="objectives.stack",
            expected="an encoder-decoder, or no `stack`",
        )
    causal = is_decoder(config) or (has_two_stacks and spec.stack == "decoder")
    if causal and not tags and spec.pooling == "first" and head != "bilstm":
        raise StageError(
            "the first token of a decoder attends only to itself",
            where="objectives.pooling",
            expected="last, mean or max",
        )
    if causal and not tags and head == "bilstm" and spec.pooling not in ("mean", "max"):
        raise StageError(
            f"a BiLSTM over a decoder is pointless with the pooling of one token ({spec.pooling}): "
            "the last token attends to the whole text already",
            where="objectives.head",
            expected="pooling: mean or max with a bilstm, or head: linear or mlp",
        )


def _is_encoder_decoder(config: Any) -> bool:
    return bool(config.is_encoder_decoder)


def _resolve_stack(spec: ClassifyObjective, config: Any, start_representation: TaskHeadConfig | None) -> Stack:
    if not _is_encoder_decoder(config):
        # A folder of ours with an encoder alone is marked as such.
        return "encoder" if start_representation and start_representation.stack == "encoder" else None
    return "decoder" if spec.stack == "decoder" else "encoder"


def _resolve_layers(spec: ClassifyObjective, depth: int) -> tuple[tuple[int, ...], Join]:
    """The indices of the hidden states, counted from the embeddings, and how they are joined."""
    match spec.layers:
        case "auto" | "last":
            return (depth,), "concat"
        case "embeddings":
            return (0,), "concat"
        case "mix":
            return tuple(range(depth + 1)), "mix"
        case int() as one:
            return (_resolve_layer_number(one, depth, "objectives.layers"),), "concat"
        case list() as several:
            return _resolve_layer_list(several, depth, "objectives.layers"), "concat"
        case JoinedLayers(sum=several) if several is not None:
            return _resolve_layer_list(several, depth, "objectives.layers.sum"), "sum"
        case JoinedLayers(concat=several) if several is not None:
            return _resolve_layer_list(several, depth, "objectives.layers.concat"), "concat"
        case JoinedLayers(mix=several) if several is not None:
            return _resolve_layer_list(several, depth, "objectives.layers.mix"), "mix"
    raise AssertionError("all ways of joining are covered")


def _resolve_layer_list(layers: int | list[int], depth: int, where: str) -> tuple[int, ...]:
    if isinstance(layers, list):
        numbers = tuple(_resolve_layer_number(one, depth, where) for one in layers)
        if len(set(numbers)) < len(numbers):
            raise StageError("a layer is named twice", where=where, expected="each layer once")
        return numbers
    if layers > depth:
        raise StageError(f"the model has fewer than {layers} layers", where=where, expected=f"at most {depth} blocks")
    return tuple(range(depth + 1 - layers, depth + 1))


def _resolve_layer_number(layer: int, depth: int, where: str) -> int:
    if not -depth - 1 <= layer <= depth:
        raise StageError(
            f"layer {layer} does not exist",
            where=where,
            expected=f"0 (the embeddings) to {depth}, or -1 to {-depth - 1} from the top",
        )
    return layer % (depth + 1)


def _is_standard_classifier(
    spec: ClassifyObjective, config: Any, task: Task, stack: Stack, layer_choice: tuple[tuple[int, ...], Join]
) -> bool:
    """Whether transformers' own classifier of this backbone does the same."""
    auto = AutoModelForTokenClassification if task == Task.TAG else AutoModelForSequenceClassification
    has_classifier = type(config) in auto._model_mapping
    is_last_layer = layer_choice == ((count_blocks(config, stack),), "concat")
    head, no_dropout = spec.head.kind, spec.head.dropout is None
    if not has_classifier or not is_last_layer or not no_dropout:
        return False
    if task == Task.TAG:
        return head in ("auto", "linear") and spec.stack in ("auto", "encoder")
    if _is_encoder_decoder(config):
        return head == "auto" and spec.pooling == "auto" and spec.stack in ("auto", "decoder")
    if is_decoder(config):
        return head in ("auto", "linear") and spec.pooling in ("auto", "last")
    first = getattr(config, "classifier_pooling", None) in (None, "cls")
    return head == "auto" and (spec.pooling == "auto" or (spec.pooling == "first" and first))


def _make_representation(
    spec: ClassifyObjective, config: Any, task: Task, stack: Stack, layers: tuple[int, ...], join: Join
) -> TaskHeadConfig:
    """The configuration with all defaults resolved."""
    head: ClassifierHeadConfig = spec.head
    kind: Literal["linear", "mlp", "bilstm"] = "linear" if head.kind == "auto" else head.kind
    width = config.get_text_config().hidden_size * (len(layers) if join == "concat" else 1)
    defaults = {"linear": (0, 0), "mlp": (width, 1), "bilstm": (_BILSTM_WIDTH, _BILSTM_DEPTH)}
    default_width, default_depth = defaults[kind]
    pooling: Pooling | None = None
    if task == Task.CLASSIFY:
        pooling = _default_pooling(config, stack, kind) if spec.pooling == "auto" else spec.pooling
    return TaskHeadConfig(
        layers,
        join,
        pooling,
        kind,
        default_width if head.width is None else head.width,
        default_depth if head.depth is None else head.depth,
        _default_dropout(config) if head.dropout is None else head.dropout,
        stack,
    )


def _default_pooling(config: Any, stack: Stack, head: str) -> Pooling:
    """The default pooling: maximum over a BiLSTM (Conneau et al. 2017, arXiv 1705.02364), else by the stack."""
    if head == "bilstm":
        return "max"
    if stack == "encoder":
        return "mean"
    return "last" if stack == "decoder" or is_decoder(config) else "first"


def _default_dropout(config: Any) -> float:
    for name in ("classifier_dropout", "hidden_dropout_prob", "dropout_rate", "dropout"):
        value = getattr(config, name, None)
        if isinstance(value, int | float):
            return float(value)
    return 0.1

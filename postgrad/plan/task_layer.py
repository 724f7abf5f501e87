"""What does a stage's task layer read of the backbone: as transformers' own classifier does, or in a way of its own?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from transformers import AutoConfig, AutoModelForSequenceClassification, AutoModelForTokenClassification

from postgrad.config.objectives import AnyObjective, ClassifierHeadConfig, ClassifyObjective, JoinedLayers
from postgrad.errors import StageError
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
    """What the task layer of a stage reads; None: as transformers' own classifier of the family does.

    Raises `StageError` for a choice that this backbone or this task has no meaning for.
    """
    asked = [o for o in objectives if isinstance(o, ClassifyObjective)]
    if not task.is_classifier or not asked:
        return None
    spec = asked[0]
    for other in asked[1:]:
        differing = [key for key in _TASK_LAYER_KEYS if getattr(other, key) != getattr(spec, key)]
        if differing:
            raise StageError(
                f"two `classify` objectives differ in `{differing[0]}`",
                where="objectives",
                expected="one task layer for all of them",
            )
    config = AutoConfig.from_pretrained(start_model.name_or_path)
    plain = all(getattr(spec, key) == ClassifyObjective.model_fields[key].default for key in _TASK_LAYER_KEYS)
    own = _get_start_representation(start_model)
    if plain and own and (own.pooling is None) == (task == Task.TAG):
        return own
    _check_supported(spec, config, task)
    stack = _resolve_stack(spec, config, own)
    layers, join = _resolve_layers(spec, count_blocks(config, stack))
    if _is_standard_classifier(spec, config, task, stack, (layers, join)):
        return None
    return _make_representation(spec, config, task, stack, layers, join)


def _get_start_representation(start_model: ModelLocation) -> TaskHeadConfig | None:
    """What the start model's own task layer reads, when it is one of ours."""
    said = BaseReference.read_folder(start_model)
    if said and said.layer:
        return said.layer.form
    return load_task_head_config(start_model.full_model.folder)


def _check_supported(spec: ClassifyObjective, config: Any, task: Task) -> None:
    """Raise `StageError` for what is asked of a backbone that has nothing of the sort."""
    both, head, tags = _is_encoder_decoder(config), spec.head.kind, task == Task.TAG
    if tags and spec.pooling != "auto":
        raise StageError(
            f"tags are decided word by word, so nothing is pooled, and `{spec.pooling}` has no meaning",
            where="objectives.pooling",
            expected="rows with one label for a text, or no `pooling`",
        )
    if not both and spec.stack != "auto":
        raise StageError(
            f"a {config.model_type} model has no {spec.stack} beside something else",
            where="objectives.stack",
            expected="an encoder-decoder, or no `stack`",
        )
    causal = is_decoder(config) or (both and spec.stack == "decoder")
    if causal and not tags and spec.pooling == "first" and head != "bilstm":
        raise StageError(
            "the first token of a decoder has read nothing but itself",
            where="objectives.pooling",
            expected="last, mean or max",
        )
    if causal and not tags and head == "bilstm" and spec.pooling not in ("mean", "max"):
        raise StageError(
            f"a BiLSTM over a decoder, of which one token is read ({spec.pooling}), has no meaning: "
            "the last token has read the whole text already",
            where="objectives.head",
            expected="pooling: mean or max with a bilstm, or head: linear or mlp",
        )


def _is_encoder_decoder(config: Any) -> bool:
    return bool(config.is_encoder_decoder)


def _resolve_stack(spec: ClassifyObjective, config: Any, start_representation: TaskHeadConfig | None) -> Stack:
    if not _is_encoder_decoder(config):
        # A folder of ours that holds an encoder alone says so itself.
        return "encoder" if start_representation and start_representation.stack == "encoder" else None
    return "decoder" if spec.stack == "decoder" else "encoder"


def _resolve_layers(spec: ClassifyObjective, depth: int) -> tuple[tuple[int, ...], Join]:
    """The numbers of the states that are read, counted from the embeddings, and how they are joined."""
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
    raise AssertionError("every way of joining has its case")


def _resolve_layer_list(layers: int | list[int], depth: int, where: str) -> tuple[int, ...]:
    if isinstance(layers, list):
        found = tuple(_resolve_layer_number(one, depth, where) for one in layers)
        if len(set(found)) < len(found):
            raise StageError("a layer is named twice", where=where, expected="each layer once")
        return found
    if layers > depth:
        raise StageError(
            f"the last {layers} layers are more than there are", where=where, expected=f"at most {depth} blocks"
        )
    return tuple(range(depth + 1 - layers, depth + 1))


def _resolve_layer_number(layer: int, depth: int, where: str) -> int:
    if not -depth - 1 <= layer <= depth:
        raise StageError(
            f"there is no layer {layer}",
            where=where,
            expected=f"0 (what the embeddings give) to {depth}, or -1 to {-depth - 1} from the top",
        )
    return layer % (depth + 1)


def _is_standard_classifier(
    spec: ClassifyObjective, config: Any, task: Task, stack: Stack, layer_choice: tuple[tuple[int, ...], Join]
) -> bool:
    """Whether what is asked is what transformers' own classifier of this backbone does."""
    auto = AutoModelForTokenClassification if task == Task.TAG else AutoModelForSequenceClassification
    there = type(config) in auto._model_mapping
    last = layer_choice == ((count_blocks(config, stack),), "concat")
    head, no_dropout = spec.head.kind, spec.head.dropout is None
    if not there or not last or not no_dropout:
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
    """Every choice made."""
    head: ClassifierHeadConfig = spec.head
    kind: Literal["linear", "mlp", "bilstm"] = "linear" if head.kind == "auto" else head.kind
    read = config.get_text_config().hidden_size * (len(layers) if join == "concat" else 1)
    usual = {"linear": (0, 0), "mlp": (read, 1), "bilstm": (_BILSTM_WIDTH, _BILSTM_DEPTH)}[kind]
    pooling: Pooling | None = None
    if task == Task.CLASSIFY:
        pooling = _default_pooling(config, stack, kind) if spec.pooling == "auto" else spec.pooling
    return TaskHeadConfig(
        layers,
        join,
        pooling,
        kind,
        usual[0] if head.width is None else head.width,
        usual[1] if head.depth is None else head.depth,
        _default_dropout(config) if head.dropout is None else head.dropout,
        stack,
    )


def _default_pooling(config: Any, stack: Stack, head: str) -> Pooling:
    """What is pooled when nothing is said: a BiLSTM by its greatest values (Conneau et al. 2017, arXiv 1705.02364)."""
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

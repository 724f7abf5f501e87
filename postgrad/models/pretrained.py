"""Loading and saving of Hugging Face models and tokenizers."""

from __future__ import annotations

import json
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import logging as transformers_logging

from postgrad.errors import ModelError, first_line
from postgrad.models.auto_classes import (
    ADDED_TOKEN_SETTINGS,
    load_config,
    load_model_files,
    load_tokenizer_files,
    make_meta_model,
    make_model,
)
from postgrad.models.config_limits import check_weight_file
from postgrad.models.finite import refuse_non_finite
from postgrad.models.layers import count_parameters
from postgrad.models.location import ModelLocation
from postgrad.models.quantized_folders import forget_quantization, make_plain, prepare_dequantization
from postgrad.models.task import Task
from postgrad.models.task_head import TaskHeadConfig, load_task_head_config
from postgrad.models.task_head_model import make_model_class
from postgrad.models.tied_weights import record_separate_output

CHAT_TEMPLATE_FILE = "chat_template.jinja"


def load_tokenizer(start: ModelLocation) -> PreTrainedTokenizerBase:
    """The tokenizer of the plain model at the bottom, with the chat template of the newest tuning that has one.

    Raises `ModelError` when there is no tokenizer that is fast.
    """
    tokenizer = load_tokenizer_files(start.name_or_path)
    # Long documents are cut into rows: transformers' warning that one is longer than the model would be wrong.
    tokenizer.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True
    here: ModelLocation | None = start
    while here and here.base:
        if here.folder and (here.folder / CHAT_TEMPLATE_FILE).exists():
            tokenizer.chat_template = (here.folder / CHAT_TEMPLATE_FILE).read_text("utf-8")
            break
        here = here.base
    return tokenizer


def save_chat_template(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save the chat template of a tuning's training in its folder, under Hugging Face's file name."""
    if isinstance(tokenizer.chat_template, str):
        (folder / CHAT_TEMPLATE_FILE).write_text(tokenizer.chat_template, "utf-8")


_CLASSES: dict[Task, Any] = {
    Task.CAUSAL: AutoModelForCausalLM,
    Task.MASKED: AutoModelForMaskedLM,
    Task.TEXT_TO_TEXT: AutoModelForSeq2SeqLM,
    Task.CLASSIFY: AutoModelForSequenceClassification,
    Task.TAG: AutoModelForTokenClassification,
}


class LoadResult(NamedTuple):
    """A model, and the weights that its folder lacks: a new, randomly initialised task layer."""

    model: PreTrainedModel
    new_weights: tuple[str, ...]
    notes: tuple[str, ...] = ()
    """Effects of loading that the folder does not show, as sentences for the plan."""


@dataclass(frozen=True)
class ClassifierSpec:
    """Labels and task layer of a classifier. `problem` is transformers' `problem_type`; `seed` initialises a new layer.

    `pad`: the padding id, by which a decoder finds the end of a text. `form`: the task head; None: transformers' own classifier
    of the family.
    """

    labels: tuple[str, ...]
    problem: str
    pad: int
    seed: int = 0
    form: TaskHeadConfig | None = None

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ClassifierSpec:
        """From plain data, as `asdict` gives it."""
        form = data.get("form")
        return cls(
            tuple(data["labels"]),
            data["problem"],
            data["pad"],
            data["seed"],
            TaskHeadConfig.from_dict(form) if form else None,
        )

    def config_options(self) -> dict[str, Any]:
        """The options of a model's configuration."""
        return {
            "num_labels": len(self.labels),
            "id2label": dict(enumerate(self.labels)),
            "label2id": {name: i for i, name in enumerate(self.labels)},
            "problem_type": self.problem,
            "pad_token_id": self.pad,
        }


def detect_task(start: ModelLocation) -> Task:
    """The task of a model folder, from its task layer or its configuration."""
    form = load_task_head_config(start.folder)
    if form:
        return Task.TAG if form.pooling is None else Task.CLASSIFY
    return detect_config_task(load_config(start.name_or_path))


def detect_config_task(config: PreTrainedConfig) -> Task:
    """The task of a configuration, from the architecture that it names."""
    name = (getattr(config, "architectures", None) or [""])[0]
    endings: dict[str, Task] = {
        "ForCausalLM": Task.CAUSAL,
        "ForMaskedLM": Task.MASKED,
        "ForPreTraining": Task.MASKED,
        "ForSequenceClassification": Task.CLASSIFY,
        "ForTokenClassification": Task.TAG,
        "ForConditionalGeneration": Task.TEXT_TO_TEXT if config.is_encoder_decoder else Task.CAUSAL,
    }
    for ending, task in endings.items():
        if name.endswith(ending):
            return task
    if config.is_encoder_decoder:
        return Task.TEXT_TO_TEXT
    generates = type(config) in AutoModelForCausalLM._model_mapping and not _is_bare_encoder(name, config)
    return Task.CAUSAL if generates else Task.MASKED


def _is_bare_encoder(name: str, config: PreTrainedConfig) -> bool:
    """Whether a bare backbone is an encoder: the families that also have a masked language model, and are no decoders."""
    bare = name.endswith("Model") or not name
    is_decoder = any(getattr(config, key, False) for key in ("is_decoder", "causal"))
    return bare and type(config) in AutoModelForMaskedLM._model_mapping and not is_decoder


def load_pretrained(
    start: ModelLocation,
    task: Task = Task.CAUSAL,
    *,
    layer: ClassifierSpec | None = None,
    attention: str | None = None,
    dtype: torch.dtype = torch.float32,
    state: dict[str, Tensor] | None = None,
    has_values: bool = True,
) -> LoadResult:
    """The plain model at the bottom of `start` for a task in `dtype`, in eval mode. No code of a foreign repository runs.

    `attention`: an attention implementation. Default: transformers' choice, SDPA where the architecture supports it. `layer`: a
    task layer that the folder lacks (or has for other labels) is initialised from its seed; no other weight may be missing.
    `state`: weights that replace the folder's. `has_values`: False for placeholders, which are NaN.
    """
    try:
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]), _suppress_load_report():
            warnings.simplefilter("ignore")
            config = load_config(start.name_or_path)
            quantization = prepare_dequantization(config, start.name)
            if state is not None:
                forget_quantization(config)
            folder = start.full_model.folder
            auto = _auto_class(config, task)
            if folder and state is None:
                layers = getattr(config.get_text_config(), "num_hidden_layers", None)
                check_weight_file(folder, layers, lambda: count_parameters(make_meta_model(config, auto)), start.name)
            own = load_task_head_config(folder)
            form = layer.form if layer else own if task.is_classifier else None
            where, make = (start.name_or_path, auto) if state is None else (None, auto._model_mapping[type(config)])
            make = make_model_class(config, form) if form else make
            options = {}
            if layer:
                torch.manual_seed(layer.seed)
                for key, value in layer.config_options().items():
                    setattr(config, key, value)
                options["ignore_mismatched_sizes"] = True
            model, loading = load_model_files(
                make, where, config, state_dict=state, dtype=dtype, attn_implementation=attention, **options
            )
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(
            f"{start.name} could not be loaded as {task.description}: {first_line(error)}", where="model"
        ) from error
    notes = (make_plain(model, quantization),) if quantization and state is None else ()
    record_separate_output(model)
    # Some architectures have a pooler in the backbone, which only a task layer uses.
    new = sorted({*loading["missing_keys"], *(key for key, *_ in loading.get("mismatched_keys", ()))})
    missing = [key for key in new if not (layer and _is_task_layer_weight(model, key))]
    if missing:
        raise ModelError(
            f"{start.name} lacks {len(missing)} weights ({missing[0]}, ...), which would be random",
            where="model",
            expected="weights for every parameter of the architecture in its config.json",
            hint=_missing_head_hint(model, missing, task),
        )
    if has_values:
        refuse_non_finite(model.named_parameters(), start.name, where="model")
    return LoadResult(model.eval(), tuple(new), notes)


def _missing_head_hint(model: PreTrainedModel, missing: Sequence[str], task: Task) -> str:
    """What to do with a backbone alone, such as an encoder of sentences; empty when weights of the backbone are missing."""
    if any(key.startswith(f"{model.base_model_prefix}.") for key in missing):
        return ""
    return (
        f"these are the weights of its head: it is a backbone, and not {task.description}. Train a task layer on it with "
        "objectives: [{kind: classify}], or name the model that it was made from"
    )


def ignored_token_settings(tokenizer: PreTrainedTokenizerBase) -> dict[str, bool]:
    """`add_bos_token` and `add_eos_token` as the tokenizer follows them, where its configuration has the other value."""
    return {
        name: value
        for name, value in _added_tokens(tokenizer).items()
        if tokenizer.init_kwargs.get(name) is (not value)
    }


def _added_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, bool]:
    ids = tokenizer("a")["input_ids"]
    return dict(
        zip(
            ADDED_TOKEN_SETTINGS,
            (ids[:1] == [tokenizer.bos_token_id], ids[-1:] == [tokenizer.eos_token_id]),
            strict=True,
        )
    )


def _make_readable(path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Rewrite a tokenizer's configuration so that transformers 4 reads the same tokenizer from it."""
    config = json.loads(path.read_text())
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    else:
        config |= _added_tokens(tokenizer)
    if isinstance(config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")


def make_random_model(config: PreTrainedConfig, task: Task) -> PreTrainedModel:
    """A model of a configuration with transformers' random initialisation, in fp32 and eval mode.

    The caller seeds torch. Raises `ModelError` for a configuration without a model for the task.
    """
    try:
        with warnings.catch_warnings(), _suppress_load_report():
            warnings.simplefilter("ignore")
            return make_model(_auto_class(config, task), config, dtype=torch.float32).eval()
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(
            f"no {config.model_type} could be made as {task.description}: {first_line(error)}", where="model"
        ) from error


def make_placeholder_model(start: ModelLocation, task: Task) -> PreTrainedModel:
    """The model of a folder's or Hub name's configuration, in eval mode, without memory for its weights, which are not read."""
    config = load_config(start.name_or_path)
    forget_quantization(config)
    with torch.device("meta"):
        return make_random_model(config, task)


def _auto_class(config: PreTrainedConfig, task: Task) -> Any:
    """The Auto class of a task; that with images for composite decoders that have no other (Mistral 3), or are saved with them.

    The class of Qwen 3.5 or Llama 4 without images would lose the vision part of the folder.
    """
    with_images = AutoModelForImageTextToText._model_mapping
    if task == Task.CAUSAL and type(config) in with_images:
        is_saved_whole = with_images[type(config)].__name__ in (config.architectures or ())
        if is_saved_whole or type(config) not in AutoModelForCausalLM._model_mapping:
            return AutoModelForImageTextToText
    return _CLASSES[task]


@contextmanager
def _suppress_load_report() -> Iterator[None]:
    """Inside, transformers prints no report of new weights; `load_pretrained` checks them."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)


def load_model(
    start: ModelLocation, *, attention: str | None = None, dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """The model with the task of its folder; see `load_pretrained`."""
    return load_pretrained(start, detect_task(start), attention=attention, dtype=dtype).model


def _is_task_layer_weight(model: PreTrainedModel, key: str) -> bool:
    """Whether a weight belongs to the task layer."""
    prefix = f"{model.base_model_prefix}."
    return not key.startswith(prefix) or key.removeprefix(prefix).startswith("pooler.")


def stored_dtype(start: ModelLocation) -> torch.dtype:
    """The dtype of the stored weights in the configuration. Default: float32."""
    dtype = getattr(load_config(start.name_or_path), "dtype", None)
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def save_pretrained(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    dtype: torch.dtype,
    state: dict[str, Tensor] | None = None,
    original_names: bool = True,
) -> None:
    """A plain Hugging Face folder: safetensors weights in `dtype`, config, generation config and tokenizer.

    `original_names`: those of published checkpoints, which transformers renames for some families as it loads them (and stacks
    the weights of experts); False: the names in the model.
    """
    weights = model.state_dict() if state is None else state
    # Tied weights share one storage: cast once, they stay tied and are written once.
    by_storage: dict[int, Tensor] = {}
    cast = {
        name: by_storage.setdefault(tensor.data_ptr(), tensor.to(dtype)) if tensor.is_floating_point() else tensor
        for name, tensor in weights.items()
    }
    model.save_pretrained(folder, state_dict=cast, save_original_format=original_names)
    _save_tokenizer(tokenizer, folder, dtype)


def save_config(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, *, dtype: torch.dtype
) -> None:
    """What `save_pretrained` writes besides the weights, which are in files of `dtype`."""
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        model.save_pretrained(scratch, state_dict={})
        for path in Path(scratch).glob("*.json"):
            path.rename(folder / path.name)
    _save_tokenizer(tokenizer, folder, dtype)


def published_tensors(model: PreTrainedModel, state: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """A part of a model's state under the names of published checkpoints, in `dtype`; tensors may be on `meta`."""
    return revert_weight_conversion(model, {name: cast_tensor(tensor, dtype) for name, tensor in state.items()})


def cast_tensor(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor in `dtype`, if it holds floating-point numbers."""
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path, dtype: torch.dtype) -> None:
    """Save a tokenizer, and correct the configurations beside it."""
    tokenizer.save_pretrained(folder)
    _make_readable(folder / "tokenizer_config.json", tokenizer)
    config = json.loads((folder / "config.json").read_text())
    # The dtype in the config is that of the file, not that of the computation.
    config["dtype"] = str(dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")

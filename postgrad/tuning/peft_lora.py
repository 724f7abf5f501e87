"""How does a low-rank adapter look in PEFT's format, and what does a folder of PEFT's mean to us?

In PEFT's files a tensor's name is the model's own with `base_model.model.` before it; the rank, the scaling and the layers are
in `adapter_config.json`, where patterns are regular expressions for the ends of names. Whole layers that were trained besides
(task heads) are its `modules_to_save`.
"""

from __future__ import annotations

import copy
import glob
import math
from collections.abc import Mapping, Sequence
from typing import Any

from peft import LoraConfig
from peft.utils.other import get_pattern_key
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto

from postgrad.errors import TuningError
from postgrad.tuning.targets import is_transposed
from postgrad.tuning.tuning import PeftFolder, TuningExport

PEFT_PREFIX = "base_model.model."

_PEFT_TASKS = {
    "CAUSAL_LM": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "SEQ_2_SEQ_LM": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "SEQ_CLS": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "TOKEN_CLS": modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
}

# What a configuration may ask for that is more than A and B at linear layers.
_UNSUPPORTED_OPTIONS = (
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "lora_bias",
    "monteclora_config",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_qalora",
    "velora_config",
)
_BASE_CHANGING_INITS = ("pissa", "olora", "corda", "lora_ga", "loftq")


def write_lora(model: PreTrainedModel, export: TuningExport, layers: Sequence[str]) -> PeftFolder | None:
    """A published adapter of `layers` in PEFT's format.

    None when a weight that moved besides has no place in it, or PEFT would take the layers' names for others.
    """
    options = export.options
    saved = _modules_to_save(model, options.get("also_train", []), layers)
    if saved is None:
        return None
    task = next((task for task, names in _PEFT_TASKS.items() if type(model).__name__ in names.values()), None)
    if task in ("SEQ_CLS", "TOKEN_CLS") and not saved:
        task = None  # PEFT would look for the head among the tensors
    config = LoraConfig(
        r=options["rank"],
        lora_alpha=_int_if_integral(options["alpha"]),  # type: ignore[bad-argument-type]  # PEFT divides it, whatever it is
        target_modules=options["targets"],
        fan_in_fan_out=any(is_transposed(model.get_submodule(name)) for name in layers),
        use_rslora=options["variant"] == "rslora",
        use_dora=options["variant"] == "dora",
        rank_pattern=options.get("rank_pattern", {}),
        alpha_pattern={name: _int_if_integral(alpha) for name, alpha in options.get("alpha_pattern", {}).items()},
        modules_to_save=saved or None,
        task_type=task,
        inference_mode=True,
        base_model_name_or_path=model.name_or_path or None,
    )
    if not _preserves_target_names(config, model):
        return None
    plain = {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
    plain["peft_type"] = "LORA"
    # PEFT loads whole modules, so what was not trained of them goes along.
    besides = {
        f"{name}.{leaf}": tensor.detach()
        for name, module in model.named_modules()
        if any(name.endswith(end) for end in saved)
        for leaf, tensor in module.named_parameters()
    }
    return PeftFolder(plain, {f"{PEFT_PREFIX}{name}": t for name, t in (export.state | besides).items()})


def read_lora(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> TuningExport:
    """A LoRA folder of PEFT's as options and state of ours. Raises `TuningError` for what has no place in them."""
    _check_config(config)
    ours = {name.removeprefix(PEFT_PREFIX): tensor for name, tensor in state.items()}
    layers = [name.removesuffix(".lora_A.weight") for name in ours if name.endswith(".lora_A.weight")]
    endings = ("lora_A.weight", "lora_B.weight", *(("lora_magnitude_vector",) if config.get("use_dora") else ()))
    adapters = {f"{layer}.{ending}" for layer in layers for ending in endings}
    also = [name for name in ours if name not in adapters and ".lora_" not in name]
    unknown = sorted(ours.keys() - adapters - set(also)) or sorted(adapters - ours.keys())
    if unknown or not layers:
        raise TuningError(
            f"this adapter's tensors are not those of linear layers: {unknown[0] if unknown else 'it has none'}",
            where="adapter_model.safetensors",
            expected="a lora_A and a lora_B of two dimensions at each layer",
        )
    ranks = {layer: ours[f"{layer}.lora_A.weight"].shape[0] for layer in layers}
    alphas = {layer: _layer_alpha(config, layer) for layer in layers}
    options: dict[str, Any] = {
        "rank": config["r"],
        "alpha": config["lora_alpha"],
        "dropout": config.get("lora_dropout", 0.0),
        "variant": "dora" if config.get("use_dora") else "rslora" if config.get("use_rslora") else "lora",
        "targets": layers,
        "rank_pattern": {layer: rank for layer, rank in ranks.items() if rank != config["r"]},
        "alpha_pattern": {layer: alpha for layer, alpha in alphas.items() if alpha != config["lora_alpha"]},
        "also_train": [glob.escape(name) for name in also],
    }
    return TuningExport(options, ours)


def _check_config(config: Mapping[str, Any]) -> None:
    where = "adapter_config.json"
    if str(config.get("peft_type")).upper() != "LORA":
        raise TuningError(f"a folder of PEFT's method {config.get('peft_type')}", where=where, expected="LORA")
    asked = [key for key in _UNSUPPORTED_OPTIONS if config.get(key)]
    if config.get("use_dora") and config.get("use_rslora"):
        asked.append("use_dora and use_rslora at once")
    if str(config.get("bias", "none")) != "none":
        asked.append(f"bias: {config['bias']}")
    if asked:
        raise TuningError(
            f"{asked[0]} has no place here", where=where, expected="A and B at linear layers, and task heads"
        )
    start = str(config.get("init_lora_weights", True)).lower()
    if start.startswith(_BASE_CHANGING_INITS):
        raise TuningError(
            f"this adapter belongs to a base that was changed when it was made (init_lora_weights: {start})",
            where=where,
            hint="save it with PEFT's `path_initial_model_for_weight_conversion`, which makes it a plain LoRA",
        )


def _layer_alpha(config: Mapping[str, Any], layer: str) -> float:
    pattern = config.get("alpha_pattern") or {}
    return pattern.get(get_pattern_key(list(pattern), layer), config["lora_alpha"])


def _modules_to_save(model: PreTrainedModel, also: Sequence[str], layers: Sequence[str]) -> list[str] | None:
    """The modules that hold the parameters `also`; None when PEFT cannot save one of them whole."""
    owners = sorted({name.rpartition(".")[0] for name in also})
    every = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    shared = set(every) - {name for name, _ in model.named_parameters()}
    twins = {id(model.get_parameter(name)) for name in shared}
    for owner in owners:
        module = model.get_submodule(owner)
        tied = any(id(p) in twins for p in module.parameters())
        if not owner or tied or any(f"{layer}.".startswith(f"{owner}.") for layer in layers):
            return None
    return owners


def _preserves_target_names(config: LoraConfig, model: PreTrainedModel) -> bool:
    """Whether PEFT leaves the names of layers as they are: of some mixtures of experts it takes dense layers for experts."""
    read = copy.deepcopy(config)
    try:
        convert_peft_config_for_transformers(read, model, None)
    except ValueError:
        return False
    return read.target_modules == config.target_modules and not read.target_parameters


def _int_if_integral(value: float) -> float:
    """Whole numbers as integers: other readers of PEFT's format expect them."""
    return int(value) if math.isclose(value, round(value)) else value

"""Low-rank adapters in PEFT's format: writing them, and reading PEFT's folders.

In PEFT's files a tensor's name is the model's own with the prefix `base_model.model.`; the rank, the scaling and the layers
are in `adapter_config.json`, where patterns are regular expressions for the ends of names. Whole layers trained with the
adapter (task heads) are its `modules_to_save`.
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
from postgrad.tuning.expert_weights import current_name, expert_weights, peft_names
from postgrad.tuning.parameter_location import is_inside
from postgrad.tuning.targets import EXPERTS, is_transposed
from postgrad.tuning.tuning import PeftFolder, TuningExport

PEFT_PREFIX = "base_model.model."

_PEFT_TASKS = {
    "CAUSAL_LM": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "SEQ_2_SEQ_LM": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "SEQ_CLS": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "TOKEN_CLS": modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
}

# Options of PEFT that need more than A and B at linear layers.
_UNSUPPORTED_OPTIONS = (
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "lora_bias",
    "monteclora_config",
    "trainable_token_indices",
    "use_bdlora",
    "use_qalora",
    "velora_config",
)
_AB = ("lora_A.weight", "lora_B.weight")
_BASE_CHANGING_INITS = ("pissa", "olora", "corda", "lora_ga", "loftq")


def write_lora(model: PreTrainedModel, export: TuningExport, layers: Sequence[str]) -> PeftFolder | None:
    """A published adapter of `layers` in PEFT's format.

    None if the format cannot store a trained base weight, or PEFT would map the layers' names to others.
    """
    options = export.options
    modules = _modules_to_save(model, options.get("also_train", []), layers)
    if modules is None:
        return None
    experts = peft_names(model, layers)
    task = next((task for task, names in _PEFT_TASKS.items() if type(model).__name__ in names.values()), None)
    if task in ("SEQ_CLS", "TOKEN_CLS") and not modules:
        task = None  # PEFT would expect the head among the tensors
    config = LoraConfig(
        r=options["rank"],
        lora_alpha=_int_if_integral(options["alpha"]),  # type: ignore[bad-argument-type]  # PEFT accepts a float
        target_modules=[target for target in options["targets"] if target not in experts],
        target_parameters=sorted(experts) or None,
        fan_in_fan_out=any(is_transposed(model.get_submodule(name)) for name in layers if name not in experts),
        use_rslora=options["variant"] == "rslora",
        use_dora=options["variant"] == "dora",
        rank_pattern=options.get("rank_pattern", {}),
        alpha_pattern={name: _int_if_integral(alpha) for name, alpha in options.get("alpha_pattern", {}).items()},
        modules_to_save=modules or None,
        task_type=task,
        inference_mode=True,
        base_model_name_or_path=model.name_or_path or None,
    )
    if not _preserves_target_names(config, model):
        return None
    plain = {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
    plain["peft_type"] = "LORA"
    # PEFT loads whole modules, so their frozen parameters are written too.
    extra = {
        f"{name}.{local}": tensor.detach()
        for name, module in model.named_modules()
        if any(name.endswith(end) for end in modules)
        for local, tensor in module.named_parameters()
    }
    renamed = {f"{name}.lora_{ab}.{EXPERTS}": f"{experts[name]}.lora_{ab}.weight" for name in experts for ab in "AB"}
    tensors = export.state | extra
    return PeftFolder(plain, {f"{PEFT_PREFIX}{renamed.get(name, name)}": tensor for name, tensor in tensors.items()})


def read_lora(model: PreTrainedModel, config: Mapping[str, Any], state: Mapping[str, Tensor]) -> TuningExport:
    """Options and state of `LoraAdapter` for a LoRA folder of PEFT's. Raises `TuningError` for what is not supported."""
    _check_config(config)
    tensors = {name.removeprefix(PEFT_PREFIX): tensor for name, tensor in state.items()}
    experts = peft_names(model, _target_parameters(model, config))
    of_experts = {f"{experts[name]}.lora_{ab}.weight": f"{name}.lora_{ab}.{EXPERTS}" for name in experts for ab in "AB"}
    tensors = {of_experts.get(name, name): tensor for name, tensor in tensors.items()}
    starts = (".lora_A.weight", f".lora_A.{EXPERTS}")
    layers = [name.removesuffix(start) for name in tensors for start in starts if name.endswith(start)]
    magnitudes = ("lora_magnitude_vector",) if config.get("use_dora") else ()
    adapters = {
        f"{layer}.{ending}"
        for layer in layers
        for ending in (*((f"lora_A.{EXPERTS}", f"lora_B.{EXPERTS}") if layer in experts else _AB), *magnitudes)
    }
    extra = [name for name in tensors if name not in adapters and ".lora_" not in name]
    unknown = sorted(tensors.keys() - adapters - set(extra)) or sorted(adapters - tensors.keys())
    if unknown or not layers:
        raise TuningError(
            f"the adapter's tensors are not those of linear layers: {unknown[0] if unknown else 'there are none'}",
            where="adapter_model.safetensors",
            expected="a two-dimensional lora_A and lora_B for each layer",
        )
    counts = {name: len(model.get_parameter(current_name(model, name))) for name in experts}
    ranks = {
        layer: len(tensors[f"{layer}.lora_A.{EXPERTS if layer in experts else 'weight'}"]) // counts.get(layer, 1)
        for layer in layers
    }
    rank_patterns = config.get("rank_pattern") or {}
    for layer, rank in ranks.items():
        declared = rank_patterns.get(get_pattern_key(list(rank_patterns), layer), config["r"])
        if declared != rank:
            raise TuningError(
                f"{layer} has the rank {rank}, and adapter_config.json says {declared}",
                where="adapter_model.safetensors",
                expected="the tensors and the configuration of one adapter",
            )
    patterns = config.get("alpha_pattern") or {}
    alphas = {layer: patterns.get(get_pattern_key(list(patterns), layer), config["lora_alpha"]) for layer in layers}
    options: dict[str, Any] = {
        "rank": config["r"],
        "alpha": config["lora_alpha"],
        "dropout": config.get("lora_dropout", 0.0),
        "variant": "dora" if config.get("use_dora") else "rslora" if config.get("use_rslora") else "lora",
        "targets": layers,
        "rank_pattern": {layer: rank for layer, rank in ranks.items() if rank != config["r"]},
        "alpha_pattern": {layer: alpha for layer, alpha in alphas.items() if alpha != config["lora_alpha"]},
        "also_train": [glob.escape(name) for name in extra],
    }
    return TuningExport(options, tensors)


def _target_parameters(model: PreTrainedModel, config: Mapping[str, Any]) -> list[str]:
    """The weights of experts that a folder of PEFT's has adapters for."""
    where = "adapter_config.json"
    patterns = config.get("target_parameters") or ()
    names = expert_weights(model)
    unknown = [p for p in patterns if not any(name == p or name.endswith(f".{p}") for name in names)]
    if unknown:
        raise TuningError(
            f"target_parameters has {unknown[0]}, which is no tensor of fused experts in this model",
            where=where,
            expected=f"names such as {names[0]}" if names else "A and B at linear layers",
        )
    return [name for name in names if any(name == p or name.endswith(f".{p}") for p in patterns)]


def check_tables(model: PreTrainedModel, state: Mapping[str, Tensor]) -> None:
    """Raise `TuningError` for an adapter whose embedding or head has more rows than its base: PEFT resized the base."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, tensor in state.items():
        plain = name.removeprefix(PEFT_PREFIX).replace(".modules_to_save.", ".").replace(".original_module.", ".")
        table = parameters.get(plain)
        if table is not None and tensor.shape[1:] == table.shape[1:] and len(tensor) > len(table):
            raise TuningError(
                f"the adapter's {plain} has {len(tensor):,} rows and its base's {len(table):,}: tokens were added",
                where="adapter_model.safetensors",
                expected="tables of the size of the base's",
                hint="merge it into its base with PEFT, and start from the merged model",
            )


def _check_config(config: Mapping[str, Any]) -> None:
    where = "adapter_config.json"
    if str(config.get("peft_type")).upper() != "LORA":
        raise TuningError(f"PEFT's method {config.get('peft_type')} is not LoRA", where=where, expected="LORA")
    unsupported = [key for key in _UNSUPPORTED_OPTIONS if config.get(key)]
    if config.get("use_dora") and config.get("use_rslora"):
        unsupported.append("use_dora with use_rslora")
    if str(config.get("bias", "none")) != "none":
        unsupported.append(f"bias: {config['bias']}")
    if unsupported:
        raise TuningError(
            f"{unsupported[0]} is not supported", where=where, expected="A and B at linear layers, and task heads"
        )
    init = str(config.get("init_lora_weights", True)).lower()
    if init.startswith(_BASE_CHANGING_INITS):
        raise TuningError(
            f"the adapter's initialisation changed its base (init_lora_weights: {init})",
            where=where,
            hint="save it with PEFT's `path_initial_model_for_weight_conversion`, which makes it a plain LoRA",
        )


def _modules_to_save(model: PreTrainedModel, parameters: Sequence[str], layers: Sequence[str]) -> list[str] | None:
    """The modules of these parameters; None if PEFT cannot save one of them as a whole."""
    owners = sorted({name.rpartition(".")[0] for name in parameters})
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    second_names = names - {name for name, _ in model.named_parameters()}
    tied_weights = {id(model.get_parameter(name)) for name in second_names}
    for owner in owners:
        module = model.get_submodule(owner)
        tied = any(id(p) in tied_weights for p in module.parameters())
        if not owner or tied or any(is_inside(f"{layer}.", [owner]) for layer in layers):
            return None
    return owners


def _preserves_target_names(config: LoraConfig, model: PreTrainedModel) -> bool:
    """Whether PEFT keeps the layers' names: in some mixtures of experts it mistakes dense layers for experts."""
    converted = copy.deepcopy(config)
    try:
        convert_peft_config_for_transformers(converted, model, None)
    except ValueError:
        return False
    return converted.target_modules == config.target_modules and (
        set(converted.target_parameters or ()) == set(config.target_parameters or ())
    )


def _int_if_integral(value: float) -> float:
    """Whole numbers as integers, which other readers of PEFT's format expect."""
    return int(value) if math.isclose(value, round(value)) else value

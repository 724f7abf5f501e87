"""Which tuning do these options ask for, and how does one leave in a folder and come back?

A folder that `save_tuning` wrote holds

    tuning.json           what the tuning is: its options, and the base it belongs to
    tuning.safetensors    its tensors
    adapter_config.json, adapter_model.safetensors    the same for PEFT, where PEFT has the method

and a folder with only PEFT's two files is read as well. Nothing in a folder is unpickled, and nothing in it runs.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from postgrad.config.renamed_keys import upgrade_tuning_options
from postgrad.errors import TuningError, suggest_nearest
from postgrad.tuning.tuning import PeftFolder, Tuning, TuningExport

FORMAT = 1
DESCRIPTION, TENSORS = "tuning.json", "tuning.safetensors"
PEFT_DESCRIPTION, PEFT_TENSORS = "adapter_config.json", "adapter_model.safetensors"

KINDS = (
    "full",
    "head",
    "blocks",
    "bias",
    "norm",
    "adapter",
    "prefix",
    "p-tuning-v2",
    "prompt",
    "p-tuning",
    "instruction-prompt",
    "lora",
    "osf",
    "expand",
)


def attach(
    model: PreTrainedModel,
    options: Mapping[str, Any],
    *,
    seed: int = 0,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Tuning:
    """The tuning that `options` ask for: `kind`, and keyword arguments of its class; attached.

    `seed` is what fresh tensors are drawn from, unless the options have one of their own. Raises `TuningError` for a kind
    or an option that there is not, naming the nearest.
    """
    given = upgrade_tuning_options(options)
    kind = given.pop("kind", None)
    make = _get_tuning_class(kind)
    known = set(inspect.signature(make).parameters) - {"model", "tokenizer", "kind"}
    for name in given:
        if name not in known:
            raise TuningError(
                f"`{kind}` has no option '{name}'",
                where=f"tuning.{name}",
                expected=", ".join(sorted(known - {"seed"})) or "no options at all",
                hint=suggest_nearest(name, known),
            )
    arguments = {"seed": seed, **given, "tokenizer": tokenizer, "kind": kind}
    takes = inspect.signature(make).parameters
    return make(model, **{name: value for name, value in arguments.items() if name in takes})


def write_tuning(
    folder: Path, options: Mapping[str, Any], state: Mapping[str, Tensor], base: Mapping[str, Any]
) -> None:
    """Write the options and tensors of a tuning into the existing `folder`; `base` says what it sits on.

    Of the base, `name` and `fingerprint` are looked at when it is read. Raises `OSError` when a file cannot be written.
    """
    count = sum(t.numel() for t in state.values())
    _write_json(
        folder / DESCRIPTION,
        {"format": FORMAT, "options": dict(options), "base": dict(base), "parameters": count},
    )
    _write_tensors(folder / TENSORS, state)


def save_tuning(tuning: Tuning, folder: Path, base: Mapping[str, Any]) -> None:
    """Write what `tuning` publishes into the existing `folder`, and the same in PEFT's format where PEFT can load it."""
    published = tuning.export()
    write_tuning(folder, published.options, published.state, base)
    peft = tuning.peft()
    if peft is not None:
        _write_json(folder / PEFT_DESCRIPTION, {**peft.config, "base_model_name_or_path": base.get("name")})
        _write_tensors(folder / PEFT_TENSORS, peft.state)


def load_tuning(
    model: PreTrainedModel,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    fingerprint: str | None = None,
    force: bool = False,
) -> Tuning:
    """Attach the tuning that `folder` holds: one of ours, or PEFT's two files alone (LoRA, prompts, prefixes).

    `fingerprint` is that of `model`. Raises `TuningError` when it is not the recorded one (unless `force`), and for a folder
    that holds no tuning, or one that cannot be read.
    """
    if not (folder / DESCRIPTION).exists():
        return _load_peft(model, folder)
    description = _read_description(folder)
    base = description["base"]
    recorded = base.get("fingerprint")
    if not force and None not in (fingerprint, recorded) and fingerprint != recorded:
        raise TuningError(
            f"the tuning belongs to another base: {base.get('name')} with the fingerprint {recorded}, "
            f"and this model's is {fingerprint}",
            where=str(folder),
            expected="the base that it was trained on",
            hint="put that base back, or name the one at hand as `base` to take it all the same",
        )
    state = _read_tensors(folder / TENSORS)
    return _load_or_detach(attach(model, description["options"], tokenizer=tokenizer), state)


def read_export(folder: Path) -> TuningExport:
    """The options and tensors that a folder of ours holds. Raises `TuningError` when they cannot be read."""
    return TuningExport(upgrade_tuning_options(_read_description(folder)["options"]), _read_tensors(folder / TENSORS))


def _read_description(folder: Path) -> dict[str, Any]:
    """What `write_tuning` said of a tuning. Raises `TuningError` when it cannot be read, or was written otherwise."""
    said = _read_json(folder / DESCRIPTION)
    if said.get("format") != FORMAT or not all(isinstance(said.get(part), dict) for part in ("options", "base")):
        raise TuningError(
            f"the description has the format {said.get('format')!r}",
            where=str(folder / DESCRIPTION),
            expected=f"format {FORMAT}, with options and a base",
            hint="read it with the version that wrote it",
        )
    return said


def _load_or_detach(tuning: Tuning, state: Mapping[str, Tensor]) -> Tuning:
    """`tuning` with `state` taken over; detached again when it does not fit."""
    try:
        tuning.load(state)
    except TuningError:
        tuning.detach()
        raise
    return tuning


def _load_peft(model: PreTrainedModel, folder: Path) -> Tuning:
    """The tuning that PEFT's own two files describe."""
    if not (folder / PEFT_DESCRIPTION).exists():
        raise TuningError(
            "there is no tuning in this folder",
            where=str(folder),
            expected=f"{DESCRIPTION} and {TENSORS}, or {PEFT_DESCRIPTION} and {PEFT_TENSORS}",
        )
    found = PeftFolder(_read_json(folder / PEFT_DESCRIPTION), _read_tensors(folder / PEFT_TENSORS))
    return _get_peft_importer(found.config.get("peft_type"), folder)(model, found.config, found.state)


def _get_tuning_class(kind: object) -> Callable[..., Tuning]:
    """The class of a kind; only its own module is imported. Raises `TuningError` for a kind that there is not."""
    match kind:
        case "full":
            from postgrad.tuning.weight_subsets import FullFinetuning

            return FullFinetuning
        case "head":
            from postgrad.tuning.weight_subsets import HeadFinetuning

            return HeadFinetuning
        case "blocks":
            from postgrad.tuning.weight_subsets import BlockFinetuning

            return BlockFinetuning
        case "bias":
            from postgrad.tuning.weight_subsets import BitFit

            return BitFit
        case "norm":
            from postgrad.tuning.weight_subsets import NormFinetuning

            return NormFinetuning
        case "adapter":
            from postgrad.tuning.adapter import Adapter

            return Adapter
        case "prefix" | "p-tuning-v2":
            from postgrad.tuning.prefix import Prefix

            return Prefix
        case "prompt" | "p-tuning" | "instruction-prompt":
            from postgrad.tuning.prompt import PromptTuning

            return PromptTuning
        case "lora":
            from postgrad.tuning.lora import LoraAdapter

            return LoraAdapter
        case "osf":
            from postgrad.tuning.osf import OrthogonalSubspace

            return OrthogonalSubspace
        case "expand":
            from postgrad.tuning.block_expansion import BlockExpansion

            return BlockExpansion
    raise TuningError(
        "no `kind` is said" if kind is None else f"there is no kind '{kind}'",
        where="tuning.kind",
        expected=", ".join(KINDS),
        hint=suggest_nearest(str(kind), KINDS),
    )


def _get_peft_importer(peft_type: object, folder: Path) -> Callable[..., Tuning]:
    """What makes a tuning of a PEFT folder of this type. Raises `TuningError` for a type that is not read here."""
    match peft_type:
        case "LORA":
            from postgrad.tuning.lora import from_peft

            return from_peft
        case "PROMPT_TUNING" | "P_TUNING":
            from postgrad.tuning.prompt import from_peft

            return from_peft
        case "PREFIX_TUNING":
            from postgrad.tuning.prefix import from_peft

            return from_peft
    raise TuningError(
        f"PEFT's {peft_type} is not read here",
        where=str(folder / PEFT_DESCRIPTION),
        expected="LORA, PROMPT_TUNING, P_TUNING or PREFIX_TUNING",
        hint="merge it into its base with PEFT, and start from the merged model",
    )


def _write_json(path: Path, description: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(description, indent=2, sort_keys=True) + "\n")


def _write_tensors(path: Path, state: Mapping[str, Tensor]) -> None:
    # Each tensor its own storage, whatever it was a view of.
    save_file({name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}, path)


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises `TuningError` for anything else."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise TuningError(f"the file cannot be read: {error}", where=str(path), expected="a JSON object") from error
    if not isinstance(found, dict):
        raise TuningError("the file holds no JSON object", where=str(path), expected="a JSON object")
    return found


def _read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Raises `TuningError` when it is not there, or is no such file."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise TuningError(f"the tensors cannot be read: {error}", where=str(path), expected="safetensors") from error

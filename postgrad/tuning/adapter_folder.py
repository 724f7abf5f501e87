"""Reading and writing the folder of a tuning.

A folder that `save_tuning` writes contains

    tuning.json           the tuning's options, and its base
    tuning.safetensors    its tensors
    adapter_config.json, adapter_model.safetensors    the same for PEFT, if PEFT has the method

A folder with only PEFT's two files can be loaded as well. Nothing is unpickled, and no code in a folder runs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from postgrad.config.renamed_keys import upgrade_tuning_options
from postgrad.errors import PostgradError, TuningError, first_line
from postgrad.models.finite import refuse_non_finite
from postgrad.storage.read_json import read_json
from postgrad.tuning.attach import attach
from postgrad.tuning.tuning import Tuning, TuningExport, load_or_detach

FORMAT = 1
DESCRIPTION, TENSORS = "tuning.json", "tuning.safetensors"
PEFT_DESCRIPTION, PEFT_TENSORS = "adapter_config.json", "adapter_model.safetensors"


def write_tuning(
    folder: Path, options: Mapping[str, Any], state: Mapping[str, Tensor], base: Mapping[str, Any]
) -> None:
    """Write the options and tensors of a tuning into the existing `folder`; `base` describes the model below it.

    Reading uses `name` and `fingerprint` of the base. Raises `OSError` if a file cannot be written.
    """
    write_description(folder, options, state, base)
    _write_tensors(folder / TENSORS, state)


def write_description(
    folder: Path, options: Mapping[str, Any], state: Mapping[str, Tensor], base: Mapping[str, Any]
) -> None:
    """Write the options of a tuning, whose tensors (`state`, perhaps in shards) are written as `TENSORS`."""
    count = sum(t.numel() for t in state.values())
    description = {"format": FORMAT, "options": dict(options), "base": dict(base), "parameters": count}
    _write_json(folder / DESCRIPTION, description)


def save_tuning(tuning: Tuning, folder: Path, base: Mapping[str, Any], *, for_peft: bool = True) -> None:
    """Write a tuning's export into the existing `folder`; with `for_peft` also in PEFT's format, if PEFT can load it."""
    export = tuning.export()
    write_tuning(folder, export.options, export.state, base)
    peft = tuning.peft() if for_peft else None
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
    """Attach the tuning in `folder`: one of ours, or PEFT's two files alone (LoRA, prompts, prefixes).

    Raises `TuningError` if `fingerprint`, that of `model`, is not the recorded one (unless `force`), and for a folder without
    a readable tuning.
    """
    if not (folder / DESCRIPTION).exists():
        return _load_peft(model, folder)
    description = _read_description(folder)
    base = description.base
    recorded = base.get("fingerprint")
    if not force and None not in (fingerprint, recorded) and fingerprint != recorded:
        raise TuningError(
            f"the tuning belongs to the base {base.get('name')} with the fingerprint {recorded}, "
            f"but this model's is {fingerprint}",
            where=str(folder),
            expected="the base that it was trained on",
            hint="restore that base, or set `base` to use this one anyway",
        )
    state = _read_tensors(folder / TENSORS)
    with _as_tuning_error(folder / DESCRIPTION):
        tuning = attach(model, description.options, tokenizer=tokenizer)
        load_or_detach(tuning, state)
    return tuning


def read_export(folder: Path) -> TuningExport:
    """The options and tensors in one of our folders. Raises `TuningError` if they cannot be read."""
    return TuningExport(_read_description(folder).options, _read_tensors(folder / TENSORS))


@dataclass(frozen=True)
class _Description:
    """The contents of `tuning.json`."""

    format: int
    options: dict[str, Any] = field(default_factory=dict)
    base: dict[str, Any] = field(default_factory=dict)


def _read_description(folder: Path) -> _Description:
    """The contents of `tuning.json`, with this version's option names; an unreadable file or format is a `TuningError`."""
    description = read_json(folder / DESCRIPTION, _Description, error=TuningError)
    if description.format != FORMAT:
        raise TuningError(
            f"the description has the format {description.format}",
            where=str(folder / DESCRIPTION),
            expected=f"format {FORMAT}, with options and a base",
            hint="read it with the version that wrote it",
        )
    return replace(description, options=upgrade_tuning_options(description.options))


def _load_peft(model: PreTrainedModel, folder: Path) -> Tuning:
    if not (folder / PEFT_DESCRIPTION).exists():
        raise TuningError(
            "there is no tuning in this folder",
            where=str(folder),
            expected=f"{DESCRIPTION} and {TENSORS}, or {PEFT_DESCRIPTION} and {PEFT_TENSORS}",
        )
    config = read_json(folder / PEFT_DESCRIPTION, dict, error=TuningError)
    state = _read_tensors(folder / PEFT_TENSORS)
    importer = _get_peft_importer(config.get("peft_type"), folder)
    with _as_tuning_error(folder / PEFT_DESCRIPTION):
        return importer(model, config, state)


@contextmanager
def _as_tuning_error(file: Path) -> Iterator[None]:
    """Inside, any error is one of the options in `file`: they may have any type and value, and fit another model."""
    try:
        yield
    except PostgradError:
        raise
    except Exception as error:
        raise TuningError(
            f"its options do not fit this model or the tensors beside it: {first_line(error)}",
            where=str(file),
            expected="the options and tensors of one tuning, and the base that it was trained on",
        ) from error


def _get_peft_importer(peft_type: object, folder: Path) -> Callable[..., Tuning]:
    """The reader of PEFT folders of this type. Raises `TuningError` for an unsupported one."""
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
        f"PEFT's {peft_type} is not supported",
        where=str(folder / PEFT_DESCRIPTION),
        expected="LORA, PROMPT_TUNING, P_TUNING or PREFIX_TUNING",
        hint="merge it into its base with PEFT, and start from the merged model",
    )


def _write_json(path: Path, description: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(description, indent=2, sort_keys=True) + "\n")


def _write_tensors(path: Path, state: Mapping[str, Tensor]) -> None:
    # Cloned: safetensors refuses tensors that share storage.
    save_file({name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}, path)


def _read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Raises `TuningError` if it cannot be read, or one of them is not finite."""
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError, ValueError) as error:
        raise TuningError(f"the tensors cannot be read: {error}", where=str(path), expected="safetensors") from error
    refuse_non_finite(tensors.items(), "the tuning", where=str(path), error=TuningError)
    return tensors

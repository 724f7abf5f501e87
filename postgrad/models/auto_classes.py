"""Transformers' Auto classes: the only place that opens configurations, tokenizers and models.

No code of a model's repository runs, and nobody is asked whether it may: `trust_remote_code` is False everywhere, and a model
that needs such code is a `ModelError`. A configuration chooses no attention kernel, and an `adapter_config.json` beside a
model is not followed.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file
from transformers.utils import logging as transformers_logging

from postgrad.errors import ModelError, PostgradError, first_line
from postgrad.models.config_limits import check_config_numbers
from postgrad.models.tokenizer_limits import check_tokenizer_file, check_tokenizer_speed
from postgrad.storage.read_json import read_json

transformers_logging.disable_progress_bar()

ADDED_TOKEN_SETTINGS = ("add_bos_token", "add_eos_token")
"""Settings of a tokenizer that transformers 4 obeyed for some families, and transformers 5 ignores."""

_NO_CODE: dict[str, Any] = {"trust_remote_code": False}
# Transformers looks for an adapter beside a model, to load it and the base that it names; this subfolder has none.
_NO_ADAPTER: dict[str, Any] = {"adapter_kwargs": {"subfolder": "no-adapter"}}
_IMPLEMENTATIONS = ("attn_implementation", "experts_implementation")


def load_config(name_or_path: str, where: str = "model") -> PreTrainedConfig:
    """The configuration in a folder or file, or of a Hub name.

    `where`: the key or option of the name, for errors. Raises `ModelError` for one that cannot be read, needs code of its own
    repository, or has impossible numbers.
    """
    problem = f"{name_or_path} has no readable configuration"
    with _as_model_error(problem, where, "a config.json of an architecture in transformers"):
        file = _find_file(name_or_path, "config.json")
        raw: dict[str, Any] = read_json(file, dict, error=ModelError) if file else {}
        if not file or "configuration_files" in raw:  # which names another file for some versions of transformers
            raw, _ = PreTrainedConfig.get_config_dict(name_or_path)
        _refuse_foreign_code(raw, name_or_path, where)
        check_config_numbers(raw, name_or_path, where)
        config: Any = AutoConfig.from_pretrained(name_or_path, **_NO_CODE)
        architectures = config.architectures or []
        if not isinstance(architectures, list) or not all(isinstance(each, str) for each in architectures):
            raise ModelError(
                f"{name_or_path} has the architectures {config.architectures}", where=where, expected="a list of names"
            )
        for name in _IMPLEMENTATIONS:
            setattr(config, f"_{name}", None)
        for part in {id(part): part for part in (config, config.get_text_config())}.values():
            pad, vocab_size = getattr(part, "pad_token_id", None), getattr(part, "vocab_size", None)
            if isinstance(pad, int) and isinstance(vocab_size, int) and pad >= vocab_size:
                part.pad_token_id = None  # of a token that was added to the tokenizer alone: no model could be made
        return config


def load_tokenizer_files(name_or_path: str, where: str = "model") -> PreTrainedTokenizerBase:
    """The tokenizer in a folder, or of a Hub name.

    Raises `ModelError` for one that cannot be read, is not fast, needs code of its own repository, or exceeds the limits of
    `tokenizer_limits`.
    """
    problem = f"no tokenizer could be loaded from {name_or_path}"
    with _as_model_error(problem, where, "tokenizer.json beside the model"):
        file = _find_file(name_or_path, "tokenizer_config.json")
        settings: dict[str, Any] = read_json(file, dict, error=ModelError) if file else {}
        _refuse_foreign_code(settings, name_or_path, where, "tokenizer_config.json")
        tokenizer_json = _find_file(name_or_path, "tokenizer.json")
        if tokenizer_json is not None:
            check_tokenizer_file(tokenizer_json, where)
        has_config = _find_file(name_or_path, "config.json") is not None
        # Transformers would read the configuration too, before it is checked.
        options = {"config": load_config(name_or_path, where)} if has_config else {}
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, **options, **_NO_CODE)
        if not isinstance(tokenizer, PreTrainedTokenizerBase) or not tokenizer.is_fast:
            raise ModelError(f"{name_or_path} has no fast tokenizer", where=where, expected="a tokenizer.json")
        # Every text is encoded as a whole, whatever an earlier call has stored.
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()
        # Transformers drops these settings unread where there is a tokenizer.json; see `ignored_token_settings`.
        tokenizer.init_kwargs |= {name: settings[name] for name in ADDED_TOKEN_SETTINGS if name in settings}
        check_tokenizer_speed(tokenizer, name_or_path, where)
        return tokenizer


def load_generation_config(name_or_path: str) -> GenerationConfig:
    """The generation configuration of a model, or what its configuration says of generation."""
    with _as_model_error(f"{name_or_path} has no readable generation configuration", "model", "generation_config.json"):
        if _find_file(name_or_path, "generation_config.json") is None:
            return GenerationConfig.from_model_config(load_config(name_or_path))
        return GenerationConfig.from_pretrained(name_or_path, **_NO_CODE)


def load_model_files(
    model_class: Any, name_or_path: str | None, config: PreTrainedConfig, **options: Any
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """A model of `model_class` (an Auto class or a class of models) with the weights of a folder, and what they lack.

    Without a name the weights are `state_dict` of the options. Only safetensors are read.
    """
    return model_class.from_pretrained(
        name_or_path,
        config=config,
        use_safetensors=True,
        output_loading_info=True,
        **options,
        **_NO_CODE,
        **_NO_ADAPTER,
    )


def make_model(auto_class: Any, config: PreTrainedConfig, **options: Any) -> PreTrainedModel:
    """A model of a configuration, with random weights."""
    return auto_class.from_config(config, **options, **_NO_CODE)


def make_meta_model(config: PreTrainedConfig, auto_class: Any = AutoModel) -> PreTrainedModel:
    """The backbone of a configuration, without memory for its weights. Raises `ModelError` where there is none.

    `auto_class`: for a family whose backbone has no class of its own.
    """
    with (
        _as_model_error(f"no {config.model_type} can be made", "model", "a complete configuration"),
        torch.device("meta"),
    ):
        return make_model(AutoModel if type(config) in AutoModel._model_mapping else auto_class, config)


@contextmanager
def _as_model_error(problem: str, where: str, expected: str) -> Iterator[None]:
    """Inside, any error of transformers or of compiled code is a `ModelError`, and their warnings are silent."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except (PostgradError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of the package tokenizers is no Exception
        raise ModelError(f"{problem}: {first_line(error)}", where=where, expected=expected) from error


def find_weight_files(name_or_path: str) -> list[Path]:
    """The safetensors files of a folder or Hub name that transformers reads; empty where there are none."""
    if single := _find_file(name_or_path, SAFE_WEIGHTS_NAME):
        return [single]
    index = _find_file(name_or_path, SAFE_WEIGHTS_INDEX_NAME)
    names = read_json(index, _WeightIndex, error=ModelError).weight_map.values() if index else ()
    files = [_find_file(name_or_path, name) for name in sorted(set(names))]
    return [file for file in files if file]


@dataclass(frozen=True)
class _WeightIndex:
    """The index of several weight files."""

    weight_map: dict[str, str]


def _find_file(name_or_path: str, file: str) -> Path | None:
    """A file of a folder, or of a Hub name (from its cache, or downloaded); None where there is none."""
    path = Path(name_or_path)
    if path.exists():
        found = path if path.is_file() else path / file
        return found if found.exists() else None
    cached = cached_file(
        name_or_path,
        file,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return Path(cached) if cached else None


def _refuse_foreign_code(raw: Mapping[str, Any], name: str, where: str, file: str = "config.json") -> None:
    """Raise `ModelError` for a configuration that names code of a repository, or a kernel of one."""
    for key, value in _iter_items(raw):
        if key == "auto_map" and value:
            known = raw.get("model_type") in CONFIG_MAPPING
            raise ModelError(
                f"{name} has code of its own (auto_map in {file}), which is never run",
                where=where,
                expected="an architecture and a tokenizer that transformers itself has",
                hint=f"transformers has {raw['model_type']} itself: remove `auto_map` to load it with that"
                if known
                else "convert the model to an architecture of transformers; for a tokenizer.json, remove `auto_map`",
            )
        if key.removeprefix("_") in _IMPLEMENTATIONS and "/" in str(value):
            raise ModelError(
                f"{name} names compiled code of another repository ({key}: {value}), which is never run",
                where=where,
                expected="an implementation that transformers itself has",
                hint=f"remove `{key}` from {file}",
            )


def _iter_items(raw: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The keys and values of a configuration and of those inside it."""
    for key, value in raw.items():
        yield str(key), value
        if isinstance(value, Mapping):
            yield from _iter_items(value)

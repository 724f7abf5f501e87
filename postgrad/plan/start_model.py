"""The start model of a stage: an existing one, or a new one with a vocabulary, a configuration and random weights.

A new model is cached as a plain Hugging Face folder under the fingerprint of all that determines it, so later code treats it
like any other. It is a function of the stage and its texts: made again, it has the same bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from postgrad.config import stage as s
from postgrad.config.objectives import NextTokenObjective
from postgrad.data.tokens.train_vocabulary import VocabularySource, train_vocabulary
from postgrad.errors import ModelError, StageError
from postgrad.hardware import machine
from postgrad.models.auto_classes import load_config
from postgrad.models.families import SpecialTokens, count_weights, parse_model_name, solve_config
from postgrad.models.from_scratch import init_model, make_tokenizer, select_special_tokens, set_dropout, set_token_ids
from postgrad.models.location import ModelLocation, locate_model, refuse_missing_folder
from postgrad.models.model_sizes import get_model_sizes
from postgrad.models.pretrained import load_tokenizer
from postgrad.models.published_vocabulary import publish_pretrained
from postgrad.plan.held_out_files import inherit_row_format
from postgrad.plan.row_renderers import make_row_template
from postgrad.plan.sources import ProgressCallback, SourceSpec, held_out_share, make_text_files
from postgrad.storage.atomic import remove_folder
from postgrad.storage.file_lock import file_lock
from postgrad.storage.fingerprint import fingerprint
from postgrad.storage.verification import is_intact

_FORMAT = 1
_MIN_POSITIONS = 512
_WEIGHT_BYTES = 4
"""Bytes of a weight in fp32, in which a model is initialised."""
_IGNORED_CONFIG_KEYS = ("transformers_version", "_name_or_path", "dtype", "architectures")
"""Keys of a configuration without an effect on the model."""


def resolve_start_model(
    stage: s.Stage, root: Path, cache: Path, progress: ProgressCallback | None = None
) -> ModelLocation:
    """The start model of a stage; a new one is initialized, or taken from the cache.

    Raises `ModelError` or `StageError` for an impossible new model, `DataError` for texts without a vocabulary.
    """
    if isinstance(stage.model, str):
        return locate_model(stage.model, root, stage.base)
    return _make_new_model(stage, stage.model, root, cache, progress)


def _make_new_model(
    stage: s.Stage, spec: s.FreshModel, root: Path, cache: Path, progress: ProgressCallback | None
) -> ModelLocation:
    """Initialize the new model of a stage in the cache."""
    family = parse_model_name(spec.from_scratch)[0] if spec.from_scratch else None
    config = None if spec.config is None else _load_config(spec.config, root)
    tokenizer = _resolve_tokenizer(stage, spec.tokenizer, select_special_tokens(config, family), root, cache, progress)
    if spec.from_scratch:
        positions = max(_MIN_POSITIONS, stage.data.sequence_length)
        config = solve_config(spec.from_scratch, vocabulary=len(tokenizer), positions=positions)
    assert config is not None
    if isinstance(spec.tokenizer, s.NewTokenizer):
        config.get_text_config().vocab_size = len(tokenizer)
    vocab_size = get_model_sizes(config).vocab_size
    if len(tokenizer) > vocab_size:
        raise ModelError(
            f"the tokenizer has {len(tokenizer):,} tokens and the configuration {vocab_size:,} embeddings",
            where="model.config",
            expected="a configuration for this tokenizer",
            hint="name the tokenizer that belongs to it, or train a new one",
        )
    if spec.dropout is not None:
        set_dropout(config, spec.dropout)
    set_token_ids(config, tokenizer)
    _check_memory(config)
    identity = [_FORMAT, {k: v for k, v in config.to_dict().items() if k not in _IGNORED_CONFIG_KEYS}, stage.seed]
    key = fingerprint([*identity, tokenizer.backend_tokenizer.to_str()])
    folder = cache.resolve() / "fresh" / key
    with file_lock(cache / "locks" / f"{key}.lock"):
        if not is_intact(folder, cache):
            if folder.exists():
                remove_folder(folder)
            model = init_model(config, stage.seed)
            publish_pretrained(folder, model, tokenizer, dtype=torch.float32)
    name = spec.from_scratch or f"a new {spec.config}"
    return replace(
        locate_model(str(folder), root),
        name=name,
        scratch_recipe=_describe_new_model(spec, config, tokenizer, stage.seed),
    )


def _check_memory(config: PreTrainedConfig) -> None:
    """Raise `ModelError` for a new model whose weights exceed the free memory."""
    weights, free = count_weights(config), machine.available_memory()
    if free is not None and _WEIGHT_BYTES * weights > free:
        raise ModelError(
            f"the new model has {weights:,} weights, {_WEIGHT_BYTES * weights:,} bytes, and {free:,} bytes of memory are free",
            where="model",
            expected="a model that fits this machine",
        )


def _load_config(name: str, root: Path) -> PreTrainedConfig:
    """A configuration from a file, a folder or the Hub."""
    path = (root / Path(name).expanduser()).resolve()
    if not path.exists():
        expected = "a config.json, a folder with one, or a Hub name (owner/name)"
        refuse_missing_folder(name, root, where="model.config", expected=expected)
    return load_config(str(path) if path.exists() else name, "model.config")


def _resolve_tokenizer(
    stage: s.Stage,
    spec: s.AnyTokenizer,
    special_tokens: SpecialTokens,
    root: Path,
    cache: Path,
    progress: ProgressCallback | None,
) -> PreTrainedTokenizerBase:
    """The tokenizer of a new model: an existing one, or one trained on the stage's training documents."""
    if isinstance(spec, str):
        folder = (root / Path(spec).expanduser()).resolve()
        if not folder.is_dir():
            expected = "the folder of a tokenizer, or a Hub name (owner/name)"
            refuse_missing_folder(spec, root, where="model.tokenizer", expected=expected)
        return load_tokenizer(ModelLocation(spec, folder if folder.is_dir() else None))
    if spec.vocab_size < 256 + len(special_tokens.tokens):
        raise StageError(
            f"{spec.vocab_size} tokens are too few for 256 bytes and {len(special_tokens.tokens)} special tokens",
            where="model.tokenizer.vocab_size",
            expected=f"at least {256 + len(special_tokens.tokens)}",
        )
    sources: list[VocabularySource] = []
    specs: dict[str, SourceSpec] = {}
    for i, source in enumerate(stage.data.sources):
        where = f"data.sources[{i}]"
        if source.seen_so_far:
            raise StageError(
                "a new model has no training data to replay", where=where, expected="a source with a `path`"
            )
        config = source.model_dump()
        files = make_text_files(source.name, config, root, where)
        specs[source.name] = SourceSpec(
            source.name,
            source.name,
            source.role,
            1.0,
            source.held_out,
            source.max_passes,
            files,
            make_row_template(config),
            None,
            NextTokenObjective(kind="next-token"),  # not used here
            (),
        )
        sources.append(VocabularySource(files, lambda n, source=source: held_out_share(stage, source, n)))
    held_out_files = [
        make_text_files(item.name, inherit_row_format(item, role, specs), root, f"evaluation.{role}")
        for role, item in stage.evaluation.held_out_files()
    ]
    held_out_files += [
        make_text_files(task.name, {**task.model_dump(), "hub": None}, root, f"evaluation.tasks[{i}]")
        for i, task in enumerate(stage.evaluation.tasks)
    ]
    names = [source.name for source in stage.data.sources]
    mixing = stage.data.mixing
    vocabulary = train_vocabulary(
        sources,
        lambda counts: stage.resolve_shares(dict(zip(names, counts, strict=True))),
        shares_key=[[s.share for s in stage.data.sources], mixing.model_dump(mode="json") if mixing else None],
        size=spec.vocab_size,
        special_tokens=special_tokens.tokens,
        held_out_sources=held_out_files,
        cache=cache,
        progress=(lambda done, total: progress("vocabulary", done, total)) if progress else None,
    )
    return make_tokenizer(vocabulary, special_tokens)


def _describe_new_model(
    spec: s.FreshModel, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, seed: int
) -> Mapping[str, Any]:
    """A new model as plain data, for the record."""
    return {
        "requested": spec.model_dump(mode="json"),
        "weights": count_weights(config),
        "tokenizer": spec.tokenizer
        if isinstance(spec.tokenizer, str)
        else f"{spec.tokenizer.kind}, trained on the training documents",
        "vocab_size": len(tokenizer),
        "seed": seed,
        "config": {k: v for k, v in config.to_diff_dict().items() if k not in ("transformers_version", "dtype")},
    }


def new_model_note(start_model: ModelLocation, stage: s.Stage) -> str:
    """A note on a new model: its weights and vocabulary, which may be smaller than requested."""
    assert start_model.scratch_recipe is not None
    recipe, config = start_model.scratch_recipe, stage.model
    assert isinstance(config, s.FreshModel)
    short = ""
    if isinstance(config.tokenizer, s.NewTokenizer) and recipe["vocab_size"] < config.tokenizer.vocab_size:
        short = f" (of {config.tokenizer.vocab_size:,} requested; no further pair occurs twice in the text)"
    return (
        f"{start_model.name} is randomly initialized: {recipe['weights']:,} weights (seed {recipe['seed']}), "
        f"a vocabulary of {recipe['vocab_size']:,} tokens ({recipe['tokenizer']}){short}"
    )

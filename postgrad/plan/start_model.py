"""Which model does a stage begin with? One that is there, or one made anew: a vocabulary, a configuration, random weights.

What is made lies in the cache as a plain Hugging Face folder under the fingerprint of all that decides it, so nothing behind
it knows that it is new. It is a function of the stage and its texts: thrown away, it comes again with the same bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig, PreTrainedTokenizerBase

from postgrad.config import stage as s
from postgrad.config.objectives import NextTokenObjective
from postgrad.data.tokens.tokenize import file_lock
from postgrad.data.tokens.train_vocabulary import VocabularySource, train_vocabulary
from postgrad.errors import CheckpointError, ModelError, StageError
from postgrad.models.from_scratch import (
    SpecialTokens,
    count_weights,
    init_model,
    make_tokenizer,
    parse_model_name,
    select_special_tokens,
    set_dropout,
    set_token_ids,
    solve_config,
)
from postgrad.models.pretrained import ModelLocation, load_tokenizer, locate_model, refuse_foreign_code, save_pretrained
from postgrad.plan.held_out_sets import inherit_row_format
from postgrad.plan.sources import ProgressCallback, SourceSpec, held_out_share, make_row_template, make_text_files
from postgrad.storage.atomic import publish_folder, remove_folder, verify
from postgrad.storage.fingerprint import fingerprint

_FORMAT = 1
_MIN_POSITIONS = 512
_IGNORED_CONFIG_KEYS = ("transformers_version", "_name_or_path", "dtype", "architectures")
"""Of a configuration: what says nothing of the model that is made from it."""


def resolve_start_model(
    stage: s.Stage, root: Path, cache: Path, progress: ProgressCallback | None = None
) -> ModelLocation:
    """The model that a stage begins with; a new one is made, or found in the cache.

    Raises `ModelError` or `StageError` for what cannot be made, `DataError` for texts from which no vocabulary can be learnt.
    """
    if isinstance(stage.model, str):
        return locate_model(stage.model, root, stage.base)
    return _make_new_model(stage, stage.model, root, cache, progress)


def _make_new_model(
    stage: s.Stage, spec: s.FreshModel, root: Path, cache: Path, progress: ProgressCallback | None
) -> ModelLocation:
    """The new model of a stage, in the cache."""
    family = parse_model_name(spec.from_scratch)[0] if spec.from_scratch else None
    config = None if spec.config is None else _load_config(spec.config, root)
    tokenizer = _resolve_tokenizer(stage, spec.tokenizer, select_special_tokens(config, family), root, cache, progress)
    new = isinstance(spec.tokenizer, s.NewTokenizer)
    if spec.from_scratch:
        positions = max(_MIN_POSITIONS, stage.data.sequence_length)
        config = solve_config(spec.from_scratch, vocabulary=len(tokenizer), positions=positions)
    assert config is not None
    if new:
        config.vocab_size = len(tokenizer)
    if len(tokenizer) > config.vocab_size:
        raise ModelError(
            f"the tokenizer has {len(tokenizer):,} tokens and the configuration {config.vocab_size:,} embeddings",
            where="model.config",
            expected="a configuration for this tokenizer",
            hint="name the tokenizer that belongs to it, or let a new one be learnt",
        )
    if spec.dropout is not None:
        set_dropout(config, spec.dropout)
    set_token_ids(config, tokenizer)
    decides = [_FORMAT, {k: v for k, v in config.to_dict().items() if k not in _IGNORED_CONFIG_KEYS}, stage.seed]
    key = fingerprint([*decides, tokenizer.backend_tokenizer.to_str()])
    place = cache.resolve() / "fresh" / key
    (cache / "locks").mkdir(parents=True, exist_ok=True)
    with file_lock(cache / "locks" / f"{key}.lock"):
        if not _is_intact(place):
            model = init_model(config, stage.seed)
            publish_folder(place, lambda staged: save_pretrained(model, tokenizer, staged, dtype=torch.float32))
    name = spec.from_scratch or f"a new {spec.config}"
    return replace(
        locate_model(str(place), root),
        name=name,
        scratch_recipe=_describe_new_model(spec, config, tokenizer, stage.seed),
    )


def _is_intact(path: Path) -> bool:
    """Whether a made model is there as it was written; what is broken is cleared away."""
    if not path.exists():
        return False
    try:
        verify(path)
    except CheckpointError:
        remove_folder(path)
        return False
    return True


def _load_config(name: str, root: Path) -> PreTrainedConfig:
    """A configuration from a file, a folder or the Hub."""
    here = (root / Path(name).expanduser()).resolve()
    if not here.exists() and (name.startswith((".", "/", "~")) or name.count("/") > 1 or name.endswith(".json")):
        raise ModelError(
            f"there is no {name}",
            where="model.config",
            expected="a config.json, a folder that has one, or a Hub name (owner/name)",
        )
    try:
        config = AutoConfig.from_pretrained(str(here) if here.exists() else name)
    except Exception as error:
        raise ModelError(
            f"no configuration could be read from {name}: {(str(error).strip().splitlines() or ['?'])[0]}",
            where="model.config",
            expected="a config.json of an architecture that transformers has",
        ) from error
    refuse_foreign_code(config, name)
    return config


def _resolve_tokenizer(
    stage: s.Stage,
    spec: s.AnyTokenizer,
    marks: SpecialTokens,
    root: Path,
    cache: Path,
    progress: ProgressCallback | None,
) -> PreTrainedTokenizerBase:
    """The tokenizer of a new model: one that is there, or one learnt from what the stage trains on."""
    if isinstance(spec, str):
        folder = (root / Path(spec).expanduser()).resolve()
        return load_tokenizer(ModelLocation(spec, folder if folder.is_dir() else None))
    if spec.vocab_size < 256 + len(marks.tokens):
        raise StageError(
            f"{spec.vocab_size} tokens have no room for 256 bytes and {len(marks.tokens)} special tokens",
            where="model.tokenizer.vocab_size",
            expected=f"at least {256 + len(marks.tokens)}",
        )
    portions: list[VocabularySource] = []
    wanted: dict[str, SourceSpec] = {}
    for i, source in enumerate(stage.data.sources):
        where = f"data.sources[{i}]"
        if source.seen_so_far:
            raise StageError(
                "a new model has seen nothing that could be replayed", where=where, expected="a source with a `path`"
            )
        given = source.model_dump()
        files = make_text_files(source.name, given, root, where)
        wanted[source.name] = SourceSpec(
            source.name,
            source.name,
            source.role,
            1.0,
            source.held_out,
            source.max_passes,
            files,
            make_row_template(given),
            None,
            NextTokenObjective(kind="next-token"),  # no rows are made of it here
            (),
        )
        portions.append(VocabularySource(files, lambda n, source=source: held_out_share(stage, source, n)))
    away = [
        make_text_files(item.name, inherit_row_format(item, role, wanted), root, f"evaluation.{role}")
        for role, item in stage.evaluation.held_out_files()
    ]
    away += [
        make_text_files(task.name, {**task.model_dump(), "hub": None}, root, f"evaluation.tasks[{i}]")
        for i, task in enumerate(stage.evaluation.tasks)
    ]
    names = [source.name for source in stage.data.sources]
    mixing = stage.data.mixing
    written = train_vocabulary(
        portions,
        lambda counts: stage.resolve_shares(dict(zip(names, counts, strict=True))),
        shares_key=[[s.share for s in stage.data.sources], mixing.model_dump(mode="json") if mixing else None],
        size=spec.vocab_size,
        special_tokens=marks.tokens,
        held_out_sources=away,
        cache=cache,
        progress=(lambda done, total: progress("for a vocabulary", done, total)) if progress else None,
    )
    return make_tokenizer(written, marks)


def _describe_new_model(
    spec: s.FreshModel, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, seed: int
) -> Mapping[str, Any]:
    """What a record says of a new model."""
    learnt = None if isinstance(spec.tokenizer, str) else spec.tokenizer
    return {
        "requested": spec.model_dump(mode="json"),
        "weights": count_weights(config),
        "tokenizer": f"{learnt.kind}, learnt from the training documents" if learnt else spec.tokenizer,
        "vocab_size": len(tokenizer),
        "seed": seed,
        "config": {k: v for k, v in config.to_diff_dict().items() if k not in ("transformers_version", "dtype")},
    }


def new_model_note(start_model: ModelLocation, stage: s.Stage) -> str:
    """A line about a new model: its weights, and a vocabulary that came out smaller than was asked for."""
    assert start_model.scratch_recipe is not None
    made, asked = start_model.scratch_recipe, stage.model
    assert isinstance(asked, s.FreshModel)
    short = ""
    if isinstance(asked.tokenizer, s.NewTokenizer) and made["vocab_size"] < asked.tokenizer.vocab_size:
        short = f" ({asked.tokenizer.vocab_size:,} were asked for; the text has no more pairs that occur twice)"
    return (
        f"{start_model.name} is new: {made['weights']:,} random weights (seed {made['seed']}), "
        f"{made['vocab_size']:,} tokens ({made['tokenizer']}){short}"
    )


def suggest_new_model(name: str, size: int) -> s.FreshModel:
    """A new model for so many bytes of text: its vocabulary grows with the text, one token for 500 bytes, up to 32,000."""
    parse_model_name(name)
    vocabulary = min(32_000, max(1000, round(size / 500 / 500) * 500))
    return s.FreshModel(from_scratch=name, tokenizer=s.NewTokenizer(vocab_size=vocabulary))

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
from postgrad.data.tokens.tokenize import one_at_a_time
from postgrad.data.tokens.train_vocabulary import Portion, learn_vocabulary
from postgrad.errors import CheckpointError, ModelError, StageError
from postgrad.models.from_scratch import (
    Marks,
    draw,
    family_and_weights,
    fit,
    make_tokenizer,
    marks_for,
    solved,
    weights_of,
    with_dropout,
)
from postgrad.models.pretrained import Start, load_tokenizer, locate, refuse_foreign_code, save_pretrained
from postgrad.plan.held_out_sets import worded
from postgrad.plan.sources import Progress, Wanted, files_of, held_out_share, wording_of
from postgrad.storage.atomic import publish, remove, verify
from postgrad.storage.fingerprint import fingerprint

_FORMAT = 1
_LEAST_POSITIONS = 512
_PLAIN = ("transformers_version", "_name_or_path", "dtype", "architectures")
"""Of a configuration: what says nothing of the model that is made from it."""


def start_of(stage: s.Stage, root: Path, cache: Path, progress: Progress | None = None) -> Start:
    """The model that a stage begins with; a new one is made, or found in the cache.

    Raises `ModelError` or `StageError` for what cannot be made, `DataError` for texts from which no vocabulary can be learnt.
    """
    if isinstance(stage.model, str):
        return locate(stage.model, root, stage.base)
    return _made(stage, stage.model, root, cache, progress)


def _made(stage: s.Stage, asked: s.FreshModel, root: Path, cache: Path, progress: Progress | None) -> Start:
    """The new model of a stage, in the cache."""
    family = family_and_weights(asked.fresh)[0] if asked.fresh else None
    config = None if asked.config is None else _named_config(asked.config, root)
    tokenizer = _tokenizer(stage, asked.tokenizer, marks_for(config, family), root, cache, progress)
    new = isinstance(asked.tokenizer, s.NewTokenizer)
    if asked.fresh:
        positions = max(_LEAST_POSITIONS, stage.data.sequence_length)
        config = solved(asked.fresh, vocabulary=len(tokenizer), positions=positions)
    assert config is not None
    if new:
        config.vocab_size = len(tokenizer)
    if len(tokenizer) > config.vocab_size:
        raise ModelError(
            f"the tokenizer has {len(tokenizer):,} tokens and the configuration {config.vocab_size:,} embeddings",
            where="model.config",
            expected="a configuration for this tokenizer",
            way_out="name the tokenizer that belongs to it, or let a new one be learnt",
        )
    if asked.dropout is not None:
        with_dropout(config, asked.dropout)
    fit(config, tokenizer)
    decides = [_FORMAT, {k: v for k, v in config.to_dict().items() if k not in _PLAIN}, stage.seed]
    key = fingerprint([*decides, tokenizer.backend_tokenizer.to_str()])
    place = cache.resolve() / "fresh" / key
    (cache / "locks").mkdir(parents=True, exist_ok=True)
    with one_at_a_time(cache / "locks" / f"{key}.lock"):
        if not _whole(place):
            model = draw(config, stage.seed)
            publish(place, lambda staged: save_pretrained(model, tokenizer, staged, dtype=torch.float32))
    name = asked.fresh or f"a new {asked.config}"
    return replace(locate(str(place), root), name=name, made=_description(asked, config, tokenizer, stage.seed))


def _whole(place: Path) -> bool:
    """Whether a made model is there as it was written; what is broken is cleared away."""
    if not place.exists():
        return False
    try:
        verify(place)
    except CheckpointError:
        remove(place)
        return False
    return True


def _named_config(name: str, root: Path) -> PreTrainedConfig:
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


def _tokenizer(
    stage: s.Stage, asked: s.AnyTokenizer, marks: Marks, root: Path, cache: Path, progress: Progress | None
) -> PreTrainedTokenizerBase:
    """The tokenizer of a new model: one that is there, or one learnt from what the stage trains on."""
    if isinstance(asked, str):
        folder = (root / Path(asked).expanduser()).resolve()
        return load_tokenizer(Start(asked, folder if folder.is_dir() else None))
    if asked.vocabulary < 256 + len(marks.tokens):
        raise StageError(
            f"{asked.vocabulary} tokens have no room for 256 bytes and {len(marks.tokens)} special tokens",
            where="model.tokenizer.vocabulary",
            expected=f"at least {256 + len(marks.tokens)}",
        )
    portions: list[Portion] = []
    wanted: dict[str, Wanted] = {}
    for i, source in enumerate(stage.data.sources):
        where = f"data.sources[{i}]"
        if source.seen_so_far:
            raise StageError(
                "a new model has seen nothing that could be replayed", where=where, expected="a source with a `path`"
            )
        given = source.model_dump()
        files = files_of(source.name, given, root, where)
        wanted[source.name] = Wanted(
            source.name,
            source.name,
            source.role,
            1.0,
            source.held_out,
            source.max_passes,
            files,
            wording_of(given),
            None,
            NextTokenObjective(kind="next-token"),  # no rows are made of it here
            (),
        )
        portions.append(Portion(files, lambda n, source=source: held_out_share(stage, source, n)))
    away = [
        files_of(item.name, worded(item, role, wanted), root, f"evaluation.{role}")
        for role, item in stage.evaluation.files()
    ]
    away += [
        files_of(task.name, {**task.model_dump(), "hub": None}, root, f"evaluation.tasks[{i}]")
        for i, task in enumerate(stage.evaluation.tasks)
    ]
    names = [source.name for source in stage.data.sources]
    mixing = stage.data.mixing
    written = learn_vocabulary(
        portions,
        lambda counts: stage.shares(dict(zip(names, counts, strict=True))),
        rule=[[s.share for s in stage.data.sources], mixing.model_dump(mode="json") if mixing else None],
        size=asked.vocabulary,
        special=marks.tokens,
        away=away,
        cache=cache,
        progress=(lambda done, total: progress("for a vocabulary", done, total)) if progress else None,
    )
    return make_tokenizer(written, marks)


def _description(
    asked: s.FreshModel, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, seed: int
) -> Mapping[str, Any]:
    """What a record says of a new model."""
    learnt = None if isinstance(asked.tokenizer, str) else asked.tokenizer
    return {
        "asked": asked.model_dump(mode="json"),
        "weights": weights_of(config),
        "tokenizer": f"{learnt.kind}, learnt from the training documents" if learnt else asked.tokenizer,
        "vocabulary": len(tokenizer),
        "seed": seed,
        "config": {k: v for k, v in config.to_diff_dict().items() if k not in ("transformers_version", "dtype")},
    }


def made_note(start: Start, stage: s.Stage) -> str:
    """A line about a new model: its weights, and a vocabulary that came out smaller than was asked for."""
    assert start.made is not None
    made, asked = start.made, stage.model
    assert isinstance(asked, s.FreshModel)
    short = ""
    if isinstance(asked.tokenizer, s.NewTokenizer) and made["vocabulary"] < asked.tokenizer.vocabulary:
        short = f" ({asked.tokenizer.vocabulary:,} were asked for; the text has no more pairs that occur twice)"
    return (
        f"{start.name} is new: {made['weights']:,} random weights (seed {made['seed']}), "
        f"{made['vocabulary']:,} tokens ({made['tokenizer']}){short}"
    )


def suggested(name: str, size: int) -> s.FreshModel:
    """A new model for so many bytes of text: its vocabulary grows with the text, one token for 500 bytes, up to 32,000."""
    family_and_weights(name)
    vocabulary = min(32_000, max(1000, round(size / 500 / 500) * 500))
    return s.FreshModel(fresh=name, tokenizer=s.NewTokenizer(vocabulary=vocabulary))

"""Keys and values of stage and study files that had another name, and translation between the names.

A path lists the earlier keys from the root, without the indices of lists; `*` stands for the name of an arm. Where only some
kinds of a mapping had a key, its new name is given by kind.

An earlier name in a file is an error that states the new one. What earlier versions wrote themselves (records, plans, tuning
folders) is translated when it is read. Fingerprints are taken over the earlier names, so a rename changes no fingerprint and
a run or a study of an earlier version goes on.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from postgrad.errors import StageError

NewName = str | Mapping[str, str]
"""A new name, or the new name by the `kind` of the mapping that holds the key."""

_ROW_KEYS = {"only": "filter", "documents": "document_unit"}
_TEMPLATE_KEYS = {**_ROW_KEYS, "words": "label_words"}
_SOURCE_KEYS: dict[str, NewName] = {
    **_TEMPLATE_KEYS,
    "stands_for": "prior_tokens",
    "select.like": {"dsir": "target"},
    **{f"select.like.{key}": name for key, name in _ROW_KEYS.items()},
    "select.between": {"perplexity": "quantiles"},
    "select.tokens": {"perplexity": "max_tokens"},
}
_HELD_OUT_KEYS = {**_TEMPLATE_KEYS, "like": "same_format_as"}

STAGE_KEYS: Mapping[str, NewName] = {
    "model.fresh": "from_scratch",
    "model.tokenizer.vocabulary": "vocab_size",
    "data.when_short": "on_exhausted",
    "data.shifts": "curriculum",
    **{f"data.sources.{key}": name for key, name in _SOURCE_KEYS.items()},
    "batch.sequences": "global_batch_size",
    "batch.micro": "micro_batch_size",
    "optimizer.decay_tables": "decay_embeddings",
    "optimizer.clip": "max_grad_norm",
    "optimizer.update": "sparse_update",
    "optimizer.loss_adaptive.start": "initial_share",
    "objectives.cache.draws": "samples",
    "objectives.cache.temper": "sampling_power",
    "objectives.new_tokens": {"on-policy": "max_new_tokens"},
    "penalties.normalise": {"anchor": "normalize"},
    "penalties.only": {"anchor": "targets"},
    "tuning.also": "also_train",
    "tuning.form": {"lora": "variant", "adapter": "variant"},
    "tuning.quantise": {"lora": "quantization"},
    "tuning.leave_out": {"adapter": "skip_layers"},
    "tuning.names": {"blocks": "targets", "bias": "targets"},
    "tuning.start": {
        "prompt": "init",
        "instruction-prompt": "init",
        "p-tuning": "init",  # in the options of a tuning folder alone
        "prefix": "init_text",
        "p-tuning-v2": "init_text",
    },
    "tuning.text": {"prompt": "init_text", "instruction-prompt": "init_text"},
    "tuning.labels": {"prompt": "init_labels"},
    "tuning.scale": {"prompt": "init_scale", "instruction-prompt": "init_scale"},
    "tuning.demonstrations.by": "sampler",
    "tuning.demonstrations.tokens": "max_tokens",
    **{f"evaluation.{role}.{key}": n for role in ("retained", "learned", "test") for key, n in _HELD_OUT_KEYS.items()},
    "evaluation.during_tokens": "eval_tokens",
    "evaluation.realign_steps": "relearning_steps",
    **{f"evaluation.tasks.{key}": name for key, name in _TEMPLATE_KEYS.items()},
    "evaluation.tasks.shown": "few_shot",
    "evaluation.tasks.shown.by": "sampler",
    "evaluation.tasks.by": "normalization",
    "evaluation.tasks.answered": "scoring",
    "evaluation.tasks.most_tokens": "max_new_tokens",
    "evaluation.tasks.during": "during_training",
    "save.choose.by": "metric",
    "save.choose.gain": "min_delta",
    "save.choose.enough": "stop_at",
    "save.choose.at_least": "burn_in",
}
"""Earlier paths of a stage file: the key's new name."""

STAGE_VALUES: Mapping[str, Mapping[str, str]] = {
    "schedule.kind": {"then": "piecewise"},
    "optimizer.update.kind": {"momentum": "mofo", "magnitude": "migu"},
    "penalties.storage": {"mapped": "mmap"},
    "tuning.demonstrations.by": {"seed": "random"},
    "evaluation.tasks.shown.by": {"seed": "random"},
    "evaluation.tasks.answered": {"choose": "multiple-choice", "write": "generate"},
}
"""Earlier paths of a stage file: the new names of values."""

_STAGES_OF_A_STUDY = ("stage", "arms.*", "arms.*.parts", "base.pretrain")
_STUDY_TEXTS: Mapping[str, Mapping[str, NewName]] = {
    "old": _SOURCE_KEYS,
    "new": _SOURCE_KEYS,
    "retained": _HELD_OUT_KEYS,
    "learned": _HELD_OUT_KEYS,
}

STUDY_KEYS: Mapping[str, NewName] = {
    "against": "baseline",
    "self_made": "generated_replay",
    "self_made.longest": "max_tokens",
    "arms.*.parts": "stages",
    "arms.*.blend.of": "arm",
    "claims.say": "statement",
    "claims.than": "compared_with",
    "claims.on": "loss",
    "claims.at_most": "max_difference",
    "claims.removes": "min_removed",
    **{f"{text}.{key}": name for text, keys in _STUDY_TEXTS.items() for key, name in keys.items()},
    **{f"{stage}.{key}": name for stage in _STAGES_OF_A_STUDY for key, name in STAGE_KEYS.items()},
}
"""Earlier paths of a study file: the key's new name."""

STUDY_VALUES: Mapping[str, Mapping[str, str]] = {
    "arms.*.replay_from": {"self-made": "generated"},
    **{f"{stage}.{path}": names for stage in _STAGES_OF_A_STUDY for path, names in STAGE_VALUES.items()},
}
"""Earlier paths of a study file: the new names of values."""


class _Rename(NamedTuple):
    """An earlier name in a file: where it is, the name, and the new one."""

    path: str
    name: str
    new_name: str


class _Names:
    """The renames of a sort of file, in both directions."""

    def __init__(self, keys: Mapping[str, NewName], values: Mapping[str, Mapping[str, str]]) -> None:
        self.values = values
        self.new_names: dict[str, dict[str, NewName]] = {}
        for path, name in keys.items():
            parent, _, key = path.rpartition(".")
            self.new_names.setdefault(parent, {})[key] = name

    def renames(self, parent: str, kind: object) -> dict[str, str]:
        """Earlier key: new key, of a mapping at the earlier path `parent`."""
        names = self.new_names.get(parent, {}).items()
        by_key = {key: name if isinstance(name, str) else name.get(str(kind)) for key, name in names}
        return {key: name for key, name in by_key.items() if name is not None}

    def translate(self, node: Any, path: str, *, backward: bool = False) -> Any:
        """A copy of plain data with the new names; `backward`: with the earlier ones. `path` is the earlier one of `node`."""
        if isinstance(node, list | tuple):
            return [self.translate(item, path, backward=backward) for item in node]
        if not isinstance(node, Mapping):
            values = self.values.get(path, {})
            if backward:
                values = {new: earlier for earlier, new in values.items()}
            return values.get(node, node) if isinstance(node, str) else node
        renames = self.renames(path, node.get("kind"))
        earlier_names = {new: earlier for earlier, new in renames.items()}
        out = {}
        for key, value in node.items():
            earlier = earlier_names.get(key, key)
            translated = self.translate(value, _child_path(path, earlier), backward=backward)
            out[earlier if backward else renames.get(earlier, key)] = translated
        return out

    def earlier_names(self, node: Any, path: str, label: str = "") -> list[_Rename]:
        """The earlier names in plain data; `label` is the path of `node` as the file has it."""
        if isinstance(node, list | tuple):
            return [rename for i, item in enumerate(node) for rename in self.earlier_names(item, path, f"{label}[{i}]")]
        if not isinstance(node, Mapping):
            new_value = self.values.get(path, {}).get(node) if isinstance(node, str) else None
            return [_Rename(label, node, new_value)] if new_value else []
        renames = self.renames(path, node.get("kind"))
        earlier_names = {new: earlier for earlier, new in renames.items()}
        out = []
        for key, value in node.items():
            here = f"{label}.{key}" if label else str(key)
            if key in renames:
                out.append(_Rename(here, key, renames[key]))
            out += self.earlier_names(value, _child_path(path, earlier_names.get(key, key)), here)
        return out


def _child_path(path: str, key: object) -> str:
    return "arms.*" if path == "arms" else f"{path}.{key}" if path else str(key)


_STAGE_NAMES, _STUDY_NAMES = _Names(STAGE_KEYS, STAGE_VALUES), _Names(STUDY_KEYS, STUDY_VALUES)


def refuse_earlier_stage_names(raw: Any, where: str) -> None:
    """Raise `StageError` when a stage as plain data has a key or a value by its earlier name."""
    _refuse(_STAGE_NAMES.earlier_names(raw, ""), where)


def refuse_earlier_study_names(raw: Any, where: str) -> None:
    """Raise `StageError` when a study as plain data has a key or a value by its earlier name."""
    _refuse(_STUDY_NAMES.earlier_names(raw, ""), where)


def _refuse(renames: list[_Rename], where: str) -> None:
    if not renames:
        return
    first, *others = renames
    more = "; also rename " + ", ".join(f"{path} to `{new}`" for path, _, new in others) if others else ""
    raise StageError(
        f"`{first.name}` was renamed to `{first.new_name}`",
        where=f"{where}: {first.path}",
        hint=f"write `{first.new_name}`{more}",
    )


def upgrade_stage(raw: Mapping[str, Any]) -> dict[str, Any]:
    """A stage that any version recorded, with the names of this one."""
    return _STAGE_NAMES.translate(raw, "")


def upgrade_tuning_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a tuning folder that any version wrote, with the names of this one."""
    return _STAGE_NAMES.translate(options, "tuning")


def upgrade_source(raw: Mapping[str, Any]) -> dict[str, Any]:
    """A source that any version recorded, with the names of this one."""
    return _STAGE_NAMES.translate(raw, "data.sources")


def with_fingerprint_names(raw: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """A stage, or the part at the earlier `path`, with the names that fingerprints are taken over: the earlier ones."""
    return _STAGE_NAMES.translate(raw, path, backward=True)

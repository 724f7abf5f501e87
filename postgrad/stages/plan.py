"""What will a stage do? Everything that follows from the stage, the texts and the tokenizer, before a weight is touched."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoConfig, PreTrainedTokenizerBase

from postgrad import schedules
from postgrad.data.formats import read_documents
from postgrad.data.mixture import Mixture, Segment, row_rates, seen_weights
from postgrad.data.overlap import OverlapReport, overlap
from postgrad.data.pack import PackedRows, held_out_mask
from postgrad.data.sources import HubRows, find_files
from postgrad.data.sources import Source as Files
from postgrad.data.store import TokenStore
from postgrad.data.tokenize import Encoder, build_store
from postgrad.errors import DataError, ModelError, StageError
from postgrad.evaluation.likelihood import HeldOut
from postgrad.lineage.fingerprint import fingerprint
from postgrad.lineage.record import PLAN, read_record, seen_so_far, with_stage
from postgrad.models.pretrained import Start, load_tokenizer, locate
from postgrad.publish import write_atomically
from postgrad.stages import stage as s
from postgrad.training.state import read_progress

Progress = Callable[[str, int, int], None]
"""Told a source's name, bytes done and bytes in all."""

_HELD_OUT_DOCUMENTS = 200


@dataclass(frozen=True)
class Leaf:
    """A source as it is read: a replay of everything seen becomes one leaf for each origin."""

    name: str
    source: str
    role: str
    part: float
    """Its share of the source: 1, or less when the source is a replay of everything seen."""
    held_out: float
    max_passes: float
    files: Files
    store: TokenStore
    stands_for: int | None


@dataclass(frozen=True)
class Plan:
    """What a stage will do."""

    stage: s.Stage
    root: Path
    output: Path
    start: Start
    tokenizer: PreTrainedTokenizerBase
    vocabulary: int
    context: int
    leaves: tuple[Leaf, ...]
    rows: tuple[PackedRows, ...]
    mixture: Mixture
    steps: int
    tokens: int
    schedule: schedules.Schedule
    held_out: tuple[HeldOut, ...]
    seen: dict[str, dict[str, Any]]
    overlap: dict[str, dict[str, Any]]
    notes: tuple[str, ...]

    @property
    def sources(self) -> list[str]:
        """Names of the leaves, in the order of the mixture."""
        return [leaf.name for leaf in self.leaves]

    def trained_per_row(self) -> list[float]:
        """Mean trained tokens in a row of each source."""
        return [r.ledger.trained / len(r) for r in self.rows]

    def counts(self) -> tuple[int, ...]:
        """Rows of each source that the stage reads."""
        first = self.stage.data.skip_steps * self.mixture.block
        before, after = self.mixture.counts(first), self.mixture.counts(first + self.steps * self.mixture.block)
        return tuple(b - a for a, b in zip(before, after, strict=True))

    def as_record(self) -> dict[str, Any]:
        """The plan as plain data: what is shown, and what a resumed run is held against."""
        counts, per_row = self.counts(), self.trained_per_row()
        trained = [round(c * t) for c, t in zip(counts, per_row, strict=True)]
        return {
            "steps": self.steps,
            "rows": self.steps * self.mixture.block,
            "sequence_length": self.stage.data.sequence_length,
            "tokens": sum(trained),
            "sources": [
                {
                    "name": leaf.name,
                    "role": leaf.role,
                    "share": t / max(sum(trained), 1),
                    "rows": c,
                    "trained": t,
                    "passes": c / len(r),
                    "available": r.ledger.trained,
                    "documents": len(leaf.store),
                    "kind": leaf.store.kind,
                }
                for leaf, c, t, r in zip(self.leaves, counts, trained, self.rows, strict=True)
            ],
        }

    def fingerprints(self) -> dict[str, Any]:
        """Of everything that goes into the run besides the start model."""
        return {
            "stage": self.stage.fingerprint(),
            "data": {leaf.name: leaf.store.fingerprint for leaf in self.leaves},
            "sets": {h.name: h.fingerprint for h in self.held_out},
        }


def make_plan(stage: s.Stage, root: Path, cache: Path, progress: Progress | None = None) -> Plan:
    """Read and tokenise the texts (or find them in the cache) and work out the stage.

    Paths in the stage are relative to `root`, the stage file's folder. Raises the error of whatever is impossible.
    """
    start = locate(stage.model, root)
    tokenizer = load_tokenizer(start)
    config = AutoConfig.from_pretrained(start.source)
    vocabulary = int(config.vocab_size)
    encoder = make_encoder(tokenizer, vocabulary, stage.data.eos)
    limit = getattr(config, "max_position_embeddings", None)
    length = stage.data.sequence_length
    if limit and length > limit:
        raise StageError(
            f"rows of {length:,} tokens do not fit the model, which has {limit:,} positions",
            where="data.sequence_length",
            expected=f"at most {limit:,}",
        )
    if stage.max_forgetting is not None and not _has_retained(stage):
        raise _no_gate()
    seen = _seen(start)
    notes: list[str] = []
    leaves = _leaves(stage, root, seen, encoder, cache, progress)
    held_out, tables = _held_out(stage, root, leaves, seen, encoder, cache, progress, notes)
    if stage.max_forgetting is not None and not any(h.role == "retained" for h in held_out):
        raise _no_gate()  # a replay source so small that nothing of it fell into the held-out share
    excluded = np.unique(np.concatenate([t["digest"] for t in tables])) if tables else None
    rows = tuple(
        PackedRows(
            leaf.store,
            length,
            held_out=leaf.held_out,
            excluded=excluded,
            max_document_tokens=stage.data.max_document_tokens,
        )
        for leaf in leaves
    )
    for leaf, packed in zip(leaves, rows, strict=True):
        if not packed.ledger.trained:
            raise DataError(
                f"nothing of '{leaf.name}' is left to train on: {packed.ledger.read:,} tokens read, "
                f"{packed.ledger.held_out:,} held out, {packed.ledger.dropped:,} dropped",
                where=leaf.files.where,
                expected="documents of at least two tokens that are not in a held-out set",
            )
        if packed.ledger.dropped:
            notes.append(
                f"{leaf.name}: {packed.ledger.dropped:,} tokens are dropped "
                "(copies of held-out documents, or documents of one token)"
            )
    steps, mixture, tokens = _mixture(stage, leaves, rows, notes, start)
    schedule = make_schedule(stage.schedule, steps, tokens, start)
    return Plan(
        stage=stage,
        root=root,
        output=(root / (stage.output or f"runs/{stage.name}")).resolve(),
        start=start,
        tokenizer=tokenizer,
        vocabulary=vocabulary,
        context=length,
        leaves=tuple(leaves),
        rows=rows,
        mixture=mixture,
        steps=steps,
        tokens=tokens,
        schedule=schedule,
        held_out=tuple(held_out),
        seen=seen,
        overlap=_overlaps(stage, root, leaves, held_out, cache, notes),
        notes=tuple(notes),
    )


def make_encoder(tokenizer: PreTrainedTokenizerBase, vocabulary: int, eos: str | None = None) -> Encoder:
    """The tokenizer as a value: its JSON, the BOS it sets by itself (if it does), the EOS, and the model's vocabulary.

    Raises `ModelError` when the tokenizer does not fit the model or names no EOS.
    """
    if len(tokenizer) > vocabulary:
        raise ModelError(
            f"the tokenizer has {len(tokenizer):,} tokens and the model {vocabulary:,} embeddings",
            where="model",
            expected="a tokenizer that belongs to the model",
            way_out="use the model's own tokenizer, or resize the model's embeddings first",
        )
    if eos is None:
        eos_id = tokenizer.eos_token_id
        if eos_id is None:
            raise ModelError(
                "the tokenizer names no end-of-text token",
                where="data.eos",
                expected="the token that ends a document, such as '<|endoftext|>'",
            )
    else:
        eos_id = tokenizer.convert_tokens_to_ids(eos)
        if eos_id is None or (eos_id == tokenizer.unk_token_id and eos != tokenizer.unk_token):
            raise StageError(f"{eos!r} is not a token of this tokenizer", where="data.eos")
    # What the tokenizer itself puts before a text is what the model was trained on.
    first = tokenizer("a")["input_ids"][:1]
    bos = tokenizer.bos_token_id if tokenizer.bos_token_id is not None and first == [tokenizer.bos_token_id] else None
    assert isinstance(eos_id, int)
    return Encoder(tokenizer.backend_tokenizer.to_str(), bos, eos_id, vocabulary)


def _has_retained(stage: s.Stage) -> bool:
    """Whether a retained set can be had: named, or held out of a replay source."""
    return bool(stage.evaluation.retained) or any(
        # What the origins of a replay of everything hold out is known later.
        source.seen_so_far or (source.role == "replay" and source.held_out != 0)
        for source in stage.data.sources
    )


def _no_gate() -> StageError:
    return StageError(
        "there is no retained set to hold the gate against",
        where="max_forgetting",
        way_out="name old text under evaluation.retained, or give a source with role: replay a `held_out` share",
    )


def _leaves(
    stage: s.Stage,
    root: Path,
    seen: dict[str, dict[str, Any]],
    encoder: Encoder,
    cache: Path,
    progress: Progress | None,
) -> list[Leaf]:
    leaves: list[Leaf] = []
    for i, source in enumerate(stage.data.sources):
        where = f"data.sources[{i}]"
        if source.seen_so_far:
            if not seen:
                raise StageError(
                    f"nothing is recorded of what {stage.model} has seen",
                    where=f"{where}.seen_so_far",
                    expected="a start model that is a run folder of an earlier stage",
                    way_out="give the old text itself as `path`",
                )
            weights = seen_weights({key: entry["tokens"] for key, entry in seen.items()}, 1.0)
            for key, weight in weights.items():
                origin = seen[key]["origin"]
                files = _files(f"{source.name}/{seen[key]['name']}", origin, Path(origin["root"]), where)
                store = _store(files, encoder, cache, progress, stage.data.workers)
                leaves.append(
                    Leaf(
                        files.name,
                        source.name,
                        "replay",
                        weight,
                        origin["held_out"],
                        source.max_passes,
                        files,
                        store,
                        None,
                    )
                )
            continue
        files = _files(source.name, source.model_dump(), root, where)
        store = _store(files, encoder, cache, progress, stage.data.workers)
        held_out = source.held_out
        if held_out is None:
            named = stage.evaluation.retained if source.role == "replay" else stage.evaluation.learned
            held_out = 0.0 if named else min(0.1, max(0.005, _HELD_OUT_DOCUMENTS / max(len(store), 1)))
        leaves.append(
            Leaf(
                source.name,
                source.name,
                source.role,
                1.0,
                held_out,
                source.max_passes,
                files,
                store,
                source.stands_for,
            )
        )
    return leaves


def _seen(start: Start) -> dict[str, dict[str, Any]]:
    """What the start model has consumed: all of its run, or, for a checkpoint, what was consumed up to there."""
    if start.run is None or start.folder is None:
        return {}
    if (start.folder / "state.json").exists():
        planned = json.loads((start.run / PLAN).read_text())
        trained = read_progress(start.folder).trained_by_source
        return with_stage(planned["seen_before"], consumed(planned["leaves"], trained))
    return seen_so_far(read_record(start.run))


def leaves_of(plan: Plan) -> list[dict[str, Any]]:
    """What a later stage needs to know of each leaf to replay it."""
    return [
        {
            "name": leaf.name,
            "fingerprint": leaf.store.fingerprint,
            "stands_for": leaf.stands_for or 0,
            "origin": origin_of(leaf),
        }
        for leaf in plan.leaves
    ]


def consumed(leaves: list[dict[str, Any]], trained: dict[str, int]) -> list[dict[str, Any]]:
    """The tokens of each leaf, as `with_stage` takes them."""
    return [
        {
            "fingerprint": leaf["fingerprint"],
            "name": leaf["name"].split("/")[-1],
            "tokens": trained[leaf["name"]] + leaf["stands_for"],
            "origin": leaf["origin"],
        }
        for leaf in leaves
    ]


def origin_of(leaf: Leaf) -> dict[str, Any]:
    """What a later stage needs to read the same documents again."""
    hub = leaf.files.hub
    return {
        "path": leaf.files.path,
        "hub": hub.name if hub else None,
        "subset": hub.subset if hub else None,
        "split": hub.split if hub else "train",
        "revision": hub.revision if hub else None,
        "columns": dict(leaf.files.columns),
        "documents": leaf.files.documents,
        "root": str(leaf.files.root),
        "held_out": leaf.held_out,
    }


def _files(name: str, source: dict[str, Any], root: Path, where: str) -> Files:
    hub = None
    if source["hub"]:
        hub = HubRows(source["hub"], source["subset"], source["split"], source["revision"])
    return Files(name, source["path"], hub, source["columns"], source["documents"], root, where)


def _store(files: Files, encoder: Encoder, cache: Path, progress: Progress | None, workers: int | None) -> TokenStore:
    report = (lambda done, total: progress(files.name, done, total)) if progress else None
    return build_store(files, encoder, cache, report, workers)


def _held_out(
    stage: s.Stage,
    root: Path,
    leaves: Sequence[Leaf],
    seen: dict[str, dict[str, Any]],
    encoder: Encoder,
    cache: Path,
    progress: Progress | None,
    notes: list[str],
) -> tuple[list[HeldOut], list[np.ndarray]]:
    """The sets to be scored, and the document tables of all held-out text (training copies are dropped)."""
    sets: list[HeldOut] = []
    tables: list[np.ndarray] = []
    limit = stage.evaluation.max_tokens
    listed = [("retained", item) for item in stage.evaluation.retained]
    listed += [("learned", item) for item in stage.evaluation.learned]
    for role, item in listed:
        files = held_out_files(item, root, f"evaluation.{role}")
        store = _store(files, encoder, cache, progress, stage.data.workers)
        sets.append(held_out_set(item.name, role, store, np.arange(len(store)), limit, encoder, notes))
        tables.append(np.asarray(store.documents))
    for leaf in leaves:
        if not leaf.held_out:
            continue
        before = seen.get(leaf.store.fingerprint)
        if before and before["origin"]["held_out"] < leaf.held_out:
            notes.append(
                f"{leaf.name}: an earlier stage trained on part of what is held out now "
                f"({before['origin']['held_out']:.1%} was held out then); its scores look better than they are"
            )
        table = np.asarray(leaf.store.documents)
        chosen = np.flatnonzero(held_out_mask(table["digest"], leaf.held_out))
        role = "retained" if leaf.role == "replay" else "learned"
        name = leaf.name.replace("/", "-")
        if any(h.name == name for h in sets):
            raise StageError(
                f"a held-out file and the held-out part of a source are both called '{name}'", where="evaluation"
            )
        if not len(chosen):
            notes.append(
                f"{leaf.name}: no document fell into the held-out share of {leaf.held_out:.1%} ({len(table)} documents); "
                "it is not measured (a text file can be cut into more documents with `documents: passages`)"
            )
            continue
        sets.append(held_out_set(name, role, leaf.store, chosen, limit, encoder, notes))
        tables.append(table[chosen])
    if not sets:
        raise StageError(
            "no held-out text: what is learnt and forgotten could not be measured",
            where="evaluation",
            way_out="name files under evaluation.retained and evaluation.learned, or leave out `held_out: 0` of the sources",
        )
    if not any(h.role == "retained" for h in sets):
        notes.append("no retained set: forgetting is not measured (name old text under evaluation.retained)")
    return sets, tables


def held_out_files(item: s.HeldOutFile, root: Path, where: str) -> Files:
    """A held-out file as a source."""
    return Files(item.name, item.path, None, item.columns, item.documents, root, where)


def held_out_set(
    name: str,
    role: str,
    store: TokenStore,
    chosen: np.ndarray,
    limit: int,
    encoder: Encoder,
    notes: list[str],
) -> HeldOut:
    """Documents of a store as a set to be scored, in the order of their content hash, up to about `limit` tokens."""
    table = np.asarray(store.documents)[chosen]
    order = chosen[np.argsort(table["digest"], kind="stable")]
    documents: list[np.ndarray] = []
    sizes: list[int] = []
    digests: list[int] = []
    total = 0
    for document in order:
        ids = np.asarray(store.read(int(document))).astype(np.int64)
        ids = ids[:-1] if len(ids) and ids[-1] == encoder.eos else ids
        if len(ids) < 2:
            continue
        documents.append(ids)
        sizes.append(int(store.documents["bytes"][document]))
        digests.append(int(store.documents["digest"][document]))
        total += len(ids)
        if total >= limit:
            break
    if not documents:
        raise DataError(f"no document of the held-out set '{name}' has two tokens", where=f"evaluation.{role}")
    if len(documents) < len(order) and total >= limit:
        notes.append(
            f"{name}: {len(documents):,} of {len(order):,} documents are scored (evaluation.max_tokens: {limit:,})"
        )
    identity = fingerprint([[int(d) for d in np.sort(table["digest"])], limit, encoder.fingerprint])
    found = HeldOut(name, role, tuple(documents), np.array(sizes, np.int64), identity, np.array(digests, np.uint64))
    return found.first(limit)


def _overlaps(
    stage: s.Stage, root: Path, leaves: Sequence[Leaf], held_out: Sequence[HeldOut], cache: Path, notes: list[str]
) -> dict[str, dict[str, Any]]:
    """13-gram overlap of each held-out file with the training text (a source's own split is exact by construction)."""
    if stage.data.overlap == "off":
        return {}
    out: dict[str, dict[str, Any]] = {}
    for role in ("retained", "learned"):
        for item in getattr(stage.evaluation, role):
            found = _overlap_with(item, root, role, leaves, cache)
            out[item.name] = found
            if found["half"]:
                message = (
                    f"{item.name}: {found['half']:,} of {found['documents']:,} held-out documents share at least half of "
                    f"their 13-grams with the training text"
                )
                if stage.data.overlap == "refuse":
                    raise DataError(
                        message, where=f"evaluation.{role}", way_out="remove them, or set data.overlap: report"
                    )
                notes.append(message)
    return out


def _overlap_with(item: s.HeldOutFile, root: Path, role: str, leaves: Sequence[Leaf], cache: Path) -> dict[str, Any]:
    files = held_out_files(item, root, f"evaluation.{role}")
    key = fingerprint([str(files), sorted(leaf.store.fingerprint for leaf in leaves), _stamp(files)])
    place = cache / "overlap" / f"{key}.json"
    if place.exists():
        return json.loads(place.read_text())
    report: OverlapReport = overlap(
        read_documents(files), (document for leaf in leaves for document in read_documents(leaf.files))
    )
    found = {
        "documents": report.documents,
        "duplicates": report.duplicates,
        "any": report.touched,
        "half": report.half,
    }
    write_atomically(place, json.dumps(found))
    return found


def _stamp(files: Files) -> list[list[Any]]:
    if files.path is None:
        return []
    return [[str(p), p.stat().st_size, p.stat().st_mtime_ns] for p in find_files(files.path, files.root, files.where)]


def _phases(
    stage: s.Stage, leaves: Sequence[Leaf], per_row: Sequence[float], tokens: int, start: Start
) -> list[tuple[float, tuple[float, ...]]]:
    """`(point, shares)`: from which part of the stage on which shares of the leaves hold."""

    def leaf_shares(by_source: dict[str, float]) -> tuple[float, ...]:
        """Shares of sources as shares of leaves (a replay of everything keeps its inner proportions)."""
        return tuple(leaf.part * by_source.get(leaf.source, 0.0) for leaf in leaves)

    plain = {source.name: share for source, share in zip(stage.data.sources, stage.shares(), strict=True)}
    phases = [(0.0, leaf_shares(plain))]
    rough = max(1, round(tokens / (stage.batch.sequences * float(np.mean(per_row)))))
    for shift in stage.data.shifts:
        if shift.at is not None:
            point = s.in_steps(shift.at, rough, tokens) / rough
        else:
            assert shift.at_rate is not None
            curve = make_schedule(stage.schedule, rough, tokens, start)
            point = schedules.first_step_at_or_below(curve, shift.at_rate, rough) / rough
        if not phases[-1][0] < point < 1:
            raise StageError(
                f"a change of shares lies at {point:.1%} of the stage",
                where="data.shifts",
                expected="points in ascending order, inside the stage",
            )
        phases.append((point, leaf_shares(shift.shares)))
    return phases


def _budget(stage: s.Stage, leaves: Sequence[Leaf], per_row: Sequence[float], start: Start) -> int:
    """The stage's trained tokens: as given, or as many as hold the `new_tokens` that are asked for."""
    if stage.tokens is not None:
        return stage.tokens
    assert stage.new_tokens is not None
    tokens = float(stage.new_tokens)
    for _ in range(20):  # points that are given in tokens move with the budget; this settles in a few rounds
        phases = _phases(stage, leaves, per_row, round(tokens), start)
        until = [*(point for point, _ in phases[1:]), 1.0]
        share_of_new = sum(
            (end - point) * sum(share for share, leaf in zip(shares, leaves, strict=True) if leaf.role == "new")
            for (point, shares), end in zip(phases, until, strict=True)
        )
        if share_of_new <= 0:
            raise StageError("the new sources have no share", where="new_tokens")
        tokens = stage.new_tokens / share_of_new
    return round(tokens)


def _mixture(
    stage: s.Stage, leaves: Sequence[Leaf], rows: Sequence[PackedRows], notes: list[str], start: Start
) -> tuple[int, Mixture, int]:
    """Steps, the mixture, and the budget in trained tokens."""
    block = stage.batch.sequences
    per_row = [r.ledger.trained / len(r) for r in rows]
    sizes = [len(r) for r in rows]
    tokens = _budget(stage, leaves, per_row, start)
    phases = _phases(stage, leaves, per_row, tokens, start)
    first = stage.data.skip_steps
    segments: list[Segment] = []
    begin = 0
    for (point, shares), until in zip(phases, [*(p for p, _ in phases[1:]), 1.0], strict=True):
        rates = row_rates(shares, per_row)
        trained = sum(rate * each for rate, each in zip(rates, per_row, strict=True))
        segments.append(Segment((first + begin) * block if segments else 0, rates))
        begin += max(1, round((until - point) * tokens / (block * trained)))
    steps = begin

    caps = [int(leaf.max_passes * size) for leaf, size in zip(leaves, sizes, strict=True)]
    short = _first_short(Mixture(stage.seed, sizes, segments, block), caps, first, steps)
    if short is not None and stage.data.when_short != "repeat":
        leaf = leaves[short]
        asked = Mixture(stage.seed, sizes, segments, block).counts((first + steps) * block)[short] / sizes[short]
        met = (
            f"'{leaf.name}' would be read {asked:.1f} times; its max_passes is {leaf.max_passes:g} "
            f"({rows[short].ledger.trained:,} trained tokens a pass)"
        )
        if stage.data.when_short == "refuse":
            raise DataError(
                met,
                where=leaf.files.where,
                way_out="give more text, a smaller share or budget, a higher max_passes, or set data.when_short",
            )
        steps, segments = _cut_short(stage, leaves, sizes, segments, caps, block, first, steps)
        notes.append(f"{met}; data.when_short: {stage.data.when_short}")
    mixture = Mixture(stage.seed, sizes, segments, block)
    if not steps:
        raise DataError(
            "nothing is left to read", where="data", way_out="raise max_passes, or set data.when_short: repeat"
        )
    before, after = mixture.counts(first * block), mixture.counts((first + steps) * block)
    tokens = round(sum((b - a) * each for a, b, each in zip(before, after, per_row, strict=True)))
    return steps, mixture, tokens


def _first_short(mixture: Mixture, caps: Sequence[int], first: int, steps: int) -> int | None:
    counts = mixture.counts((first + steps) * mixture.block)
    over = [k for k, (count, cap) in enumerate(zip(counts, caps, strict=True)) if count > cap]
    return max(over, key=lambda k: counts[k] / max(caps[k], 1)) if over else None


def _cut_short(
    stage: s.Stage,
    leaves: Sequence[Leaf],
    sizes: Sequence[int],
    segments: list[Segment],
    caps: Sequence[int],
    block: int,
    first: int,
    steps: int,
) -> tuple[int, list[Segment]]:
    """End the stage, or hand a spent source's share to the others, at the last step at which no cap is passed."""
    while True:
        mixture = Mixture(stage.seed, sizes, segments, block)

        def fits(step: int, mixture: Mixture = mixture) -> bool:
            return all(c <= cap for c, cap in zip(mixture.counts((first + step) * block), caps, strict=True))

        if fits(steps):
            return steps, segments
        low, high = 0, steps
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        if stage.data.when_short == "stop" or not fits(0):  # what is skipped has already used a source up
            return low, segments
        begin = (first + low) * block
        spent = {k for k, (c, cap) in enumerate(zip(mixture.counts(begin + block), caps, strict=True)) if c > cap}

        def without(segment: Segment, at: int, spent: set[int] = spent) -> Segment:
            rates = tuple(0.0 if k in spent else rate for k, rate in enumerate(segment.rates))
            if not sum(rates):
                raise DataError(
                    "every source is spent before the stage ends",
                    where="data",
                    way_out="raise max_passes, lower the budget, or set data.when_short: stop",
                )
            return Segment(at, tuple(rate / sum(rates) for rate in rates))

        before = [x for x in segments if x.start < begin]
        current = [x for x in segments if x.start <= begin][-1]
        later = [without(x, x.start) for x in segments if x.start > begin]
        segments = [*before, without(current, begin), *later]


def make_schedule(spec: s.AnySchedule, steps: int, tokens: int, start: Start) -> schedules.Schedule:
    """The learning rate of each step, as a pure function."""

    def length(text: str) -> float:
        return s.in_steps(text, steps, tokens)

    match spec:
        case s.Constant():
            _inside(steps, warmup=length(spec.warmup))
            return schedules.then(
                (schedules.linear(0.0, spec.peak), length(spec.warmup)),
                (schedules.constant(spec.peak), steps),
            )
        case s.Decay():
            shape = "cosine" if spec.kind == "rewarm" else spec.kind
            _above_zero(shape, spec.floor)
            _inside(steps, warmup=length(spec.warmup))
            return schedules.rewarm(
                steps=steps, peak=spec.peak, floor=spec.floor, warmup=length(spec.warmup), start=spec.start, shape=shape
            )
        case s.FromFloor():
            _above_zero(spec.shape, spec.floor)
            return schedules.then((schedules.SHAPES[spec.shape](spec.start, spec.floor), steps))
        case s.Infinite():
            warmup, cooldown, until = length(spec.warmup), length(spec.cooldown), length(spec.constant_until)
            if warmup + cooldown > until or until > steps:
                raise StageError(
                    f"warm-up and cooldown end at step {warmup + cooldown:.0f}, the constant phase at {until:.0f}, "
                    f"the stage at {steps}",
                    where="schedule.constant_until",
                    expected="warm-up + cooldown <= constant_until <= 100%",
                )
            return schedules.infinite(
                steps=steps,
                peak=spec.peak,
                constant_rate=spec.constant,
                floor=spec.floor,
                warmup=warmup,
                cooldown=cooldown,
                constant_until=until,
                cooldown_shape=spec.cooldown_shape,
                timescale=spec.timescale,
            )
        case s.Wsd():
            _inside(steps, warmup=length(spec.warmup), decay=length(spec.decay))
            return schedules.wsd(
                steps=steps,
                peak=spec.peak,
                floor=spec.floor,
                warmup=length(spec.warmup),
                decay=length(spec.decay),
                shape=spec.shape,
            )
        case s.Anneal():
            rate = spec.start if spec.start is not None else _rate_at(start)
            return schedules.then((schedules.SHAPES[spec.shape](rate, spec.floor), steps))
        case s.Then():
            given = [length(p.length) if p.length is not None else None for p in spec.pieces]
            rest = steps - sum(g for g in given if g is not None)
            _inside(steps, pieces=steps - rest)
            pieces = []
            for piece, own in zip(spec.pieces, given, strict=True):
                if piece.shape == "constant":
                    curve = schedules.constant(piece.start)
                else:
                    assert piece.end is not None
                    _above_zero(piece.shape, min(piece.start, piece.end))
                    curve = schedules.SHAPES[piece.shape](piece.start, piece.end)
                pieces.append((curve, max(rest, 0) if own is None else own))
            return schedules.then(*pieces)


def _inside(steps: int, **lengths: float) -> None:
    """Refuse phases that do not fit the stage together: one of them would be cut without a word."""
    if sum(lengths.values()) > steps + 1e-6:
        names = " and ".join(f"{name} ({length:,.0f} steps)" for name, length in lengths.items())
        raise StageError(
            f"longer than the stage's {steps:,} steps: {names}",
            where=f"schedule.{next(iter(lengths))}",
            expected=f"at most {steps:,} steps, or 100%",
        )


def _above_zero(shape: str, floor: float) -> None:
    if shape in ("exponential", "inverse-linear") and floor <= 0:
        raise StageError(f"an {shape} decay never reaches 0", where="schedule.floor", expected="a floor above zero")


def _rate_at(start: Start) -> float:
    """The learning rate that held at the checkpoint a stage starts from."""
    if start.folder is not None and (start.folder / "state.json").exists():
        return read_progress(start.folder).rate
    raise StageError(
        "the rate to anneal from is not known: the stage does not start from a checkpoint",
        where="schedule.start",
        way_out="name a checkpoint (runs/.../checkpoints/step-...) as `model`, or give `start`",
    )

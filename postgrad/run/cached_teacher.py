"""How is a teacher asked once, beforehand, about all rows that a stage will read? Part by part, so that it can be stopped.

What is kept of its distribution p (softened by the temperature) at each label is one of two, as `linear_divergence` takes it:
ids drawn from p^temper with their counts, weighted back, and the entropy of p; or the k likeliest ids and the mass of the rest.

Legend: N labels, V vocabulary, S draws, K ids kept.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from postgrad.config.objectives import DistillObjective, SampledCache, TopKCache, names_of
from postgrad.data.layouts.rows import IGNORED, Row
from postgrad.data.loading.batch import collate
from postgrad.data.loading.mixture import derived
from postgrad.data.loading.teacher_cache import Told, Word, digest_of
from postgrad.data.random_streams import Draws
from postgrad.distributed.world import World
from postgrad.hardware.execution import Execution
from postgrad.objectives.linear_loss import logits_of, products
from postgrad.objectives.teacher import Online
from postgrad.plan.plan import Plan
from postgrad.plan.teachers import name_of
from postgrad.run.online_teacher import other
from postgrad.storage.fingerprint import fingerprint

_LOGITS_AT_ONCE = 1 << 22
_FORMAT = 1


@dataclass(frozen=True)
class Asked:
    """One source about whose rows a teacher is asked once."""

    number: int
    """Of the objective."""
    leaf: int
    told: Told
    spec: DistillObjective

    def key(self, row: int, position: int, drawn: bool) -> int:
        """By what a row is found: its number, or the position that decides what is drawn in it."""
        return position if drawn else row


def asked_once(plan: Plan) -> list[Asked]:
    """Every source of every objective with a cache."""
    out: list[Asked] = []
    for number, teacher in plan.teachers.items():
        spec = plan.objectives[number]
        if not isinstance(spec, DistillObjective) or spec.cache == "none":
            continue
        for k, weighed in enumerate(plan.weighed):
            if number in weighed:
                keys, rows = _keys(plan, k), plan.rows[k]
                description = {
                    "format": _FORMAT,
                    "teacher": name_of(teacher),
                    "asked": spec.cache.model_dump(),
                    "temperature": spec.temperature,
                    "seed": plan.stage.seed,
                    "rows": _rows_key(plan, k),
                }
                told = Told.of(plan.cache / "told", description, keys, rows.ledger.trained / max(len(rows), 1))
                out.append(Asked(number, k, told, spec))
    return out


def _keys(plan: Plan, k: int) -> np.ndarray:
    """The rows of a source that the stage will read, each once: by number, or by position where something is drawn in them."""
    block, first = plan.mixture.block, plan.stage.data.skip_steps
    found: list[np.ndarray] = []
    for step in range(first, first + plan.steps):
        sources, rows = plan.mixture.rows(step)
        mine = np.flatnonzero(sources == k)
        found.append(step * block + mine if plan.rows[k].drawn else rows[mine])
    return np.unique(np.concatenate(found))


def _rows_key(plan: Plan, k: int) -> str:
    """Of all that decides a source's rows."""
    leaf, rows = plan.leaves[k], plan.rows[k]
    return fingerprint(
        [
            leaf.store.fingerprint,
            rows.layout,
            len(rows),
            dataclasses.asdict(rows.ledger),
            plan.context,
            leaf.wanted.objective.model_dump(mode="json"),
            dataclasses.asdict(plan.reading.frame),
            leaf.held_out,
            plan.stage.data.max_document_tokens,
            # What is drawn in a row depends on its number, its position and the seed.
            [plan.stage.seed, plan.mixture.block] if rows.drawn else None,
        ]
    )


def told_by_leaf(plan: Plan) -> list[dict[str, Told]]:
    """What the loader looks up: for each source, by the name of the objective."""
    names, out = names_of(plan.objectives), [dict[str, Told]() for _ in plan.leaves]
    for asked in asked_once(plan):
        out[asked.leaf][names[asked.number]] = asked.told
    return out


def ask(plan: Plan, execution: Execution, world: World) -> Iterator[str]:
    """Ask the teachers about all rows that are not told of yet; yields what it is at. What is there already is kept."""
    teachers: dict[str, Online] = {}
    for asked in asked_once(plan):
        missing = world.gathered(asked.told.missing())[0]
        assert isinstance(missing, list)
        start = plan.teachers[asked.number]
        for part in missing:
            yield f"asking {start.name} about {plan.leaves[asked.leaf].name}, part {part + 1} of {asked.told.parts}"
            if name_of(start) not in teachers:
                teachers[name_of(start)] = other(plan, start, asked.number, execution, world)
            teacher = teachers[name_of(start)]
            keys = asked.told.keys_of(part)
            rows = [_row(plan, asked.leaf, int(key)) for key in keys]
            words = _asked_together(plan, asked, teacher, rows, keys, execution.micro, world)
            if world.main:
                asked.told.write(part, words, [digest_of(row) for row in rows], vocabulary=plan.vocabulary)
            world.wait()


def _row(plan: Plan, k: int, key: int) -> Row:
    """A row by its key."""
    rows = plan.rows[k]
    if rows.drawn:
        return rows.at(plan.mixture.at(key)[1], key)
    return rows.at(key, 0)


def _asked_together(
    plan: Plan, asked: Asked, teacher: Online, rows: Sequence[Row], keys: np.ndarray, micro: int, world: World
) -> list[Word]:
    """Every rank asks about some batches, all equally many, for a sharded teacher is gathered by all ranks together."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].inputs["input_ids"]))
    batches = [order[i : i + micro] for i in range(0, len(order), micro)]
    while len(batches) % world.size:
        batches.append(batches[-1])
    mine: dict[int, Word] = {}
    for batch in batches[world.rank :: world.size]:
        words = words_of(plan, asked, teacher, [rows[i] for i in batch], [int(keys[i]) for i in batch], world.device)
        mine.update(zip(batch, words, strict=True))
    told: dict[int, Word] = {}
    for theirs in world.gathered(mine):
        assert isinstance(theirs, dict)
        told.update(theirs)
    return [told[i] for i in range(len(rows))]


@torch.no_grad()
def words_of(
    plan: Plan, asked: Asked, teacher: Online, rows: Sequence[Row], keys: Sequence[int], device: torch.device
) -> list[Word]:
    """What a teacher says of some rows."""
    batch = collate(rows, [asked.leaf] * len(rows), pad=plan.reading.pad).to(device)
    answer = teacher(batch)
    head = answer.output.head
    assert head is not None, "only a language model is asked beforehand"
    draws = Draws(derived(plan.stage.seed, 0x7E11))
    out: list[Word] = []
    for i, (row, key) in enumerate(zip(rows, keys, strict=True)):
        place_N = torch.from_numpy(np.flatnonzero(row.labels != IGNORED)).to(device)
        if answer.place_BT is not None:
            place_N = answer.place_BT[i, place_N]
        uniform_NS = None
        if isinstance(asked.spec.cache, SampledCache):
            uniform_NS = draws.at(key, 0).random((len(place_N), asked.spec.cache.draws))
        hidden_ND = answer.output.hidden[i][place_N.clamp(min=0)]
        said: list[Word] = []
        size = max(1, _LOGITS_AT_ONCE // len(head.weight_VD))
        for begin in range(0, len(hidden_ND), size):
            part = hidden_ND[begin : begin + size]
            product_NV = part.new_empty(len(part), len(head.weight_VD))
            products(part, head, product_NV)
            logits_NV = torch.empty_like(product_NV, dtype=torch.float32)
            logits_of(product_NV, head, logits_NV)
            logits_NV /= asked.spec.temperature
            if uniform_NS is None:
                assert isinstance(asked.spec.cache, TopKCache)
                said.append(likeliest(logits_NV, asked.spec.cache.k))
            else:
                assert isinstance(asked.spec.cache, SampledCache)
                said.append(drawn(logits_NV, uniform_NS[begin : begin + size], asked.spec.cache.temper))
        out.append(_joined(said, (place_N < 0).cpu().numpy()))
    return out


def _joined(parts: Sequence[Word], silent_N: np.ndarray) -> Word:
    """The words of a row as one; a label that the teacher has no place for has no ids."""
    if not parts:
        return Word(np.empty(0, np.int64), np.empty(0, np.uint8), np.empty(0, np.int64), np.empty(0, np.float32))
    word = Word(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))
    if not silent_N.any():
        return word
    kept_E = ~np.repeat(silent_N, word.counts_N)
    return Word(word.ids_E[kept_E], word.weights_E[kept_E], np.where(silent_N, 0, word.counts_N), word.said_N)


def likeliest(logits_NV: Tensor, k: int) -> Word:
    """The k likeliest ids with their probabilities, and the mass of all others, summed over them."""
    shares_NV = logits_NV.softmax(-1)
    weights_NK, ids_NK = shares_NV.topk(min(k, shares_NV.shape[1]))
    rest_N = shares_NV.scatter_(1, ids_NK, 0.0).sum(-1)
    counts_N = np.full(len(ids_NK), ids_NK.shape[1], np.int64)
    # As halves: what is lost of a probability is less than a two-thousandth of it.
    weights = weights_NK.flatten().to(torch.float16).cpu().numpy()
    return Word(ids_NK.flatten().cpu().numpy(), weights, counts_N, rest_N.cpu().numpy())


def drawn(logits_NV: Tensor, uniform_NS: np.ndarray, temper: float) -> Word:
    """Ids drawn from softmax(logits)^temper by uniform numbers, and the entropy of softmax(logits).

    A count is kept when ids are drawn as they are; else count / draws times p / p^temper, which is without bias.
    """
    log_p_NV = logits_NV.log_softmax(-1)
    entropy_N = -(log_p_NV.exp() * log_p_NV).sum(-1)
    log_t_NV = log_p_NV if temper == 1.0 else (log_p_NV * temper).log_softmax(-1)
    # In double precision: a sum of many small shares, in which a rare id must not get lost.
    sums_NV = log_t_NV.double().exp().cumsum(-1)
    at_NS = torch.from_numpy(uniform_NS).to(sums_NV.device) * sums_NV[:, -1:]
    ids_NS = torch.searchsorted(sums_NV, at_NS, right=True).clamp(max=sums_NV.shape[1] - 1).sort(-1).values
    new_NS = torch.ones_like(ids_NS, dtype=torch.bool)
    new_NS[:, 1:] = ids_NS[:, 1:] != ids_NS[:, :-1]
    first_E = new_NS.flatten().nonzero().flatten()
    counts_E = torch.diff(first_E, append=first_E.new_tensor([new_NS.numel()]))
    ids_E, counts_N = ids_NS.flatten()[first_E], new_NS.sum(-1)
    weights: np.ndarray = counts_E.to(torch.uint8).cpu().numpy()
    if temper != 1.0:
        row_E = torch.repeat_interleave(counts_N)
        back_E = (log_p_NV[row_E, ids_E] - log_t_NV[row_E, ids_E]).exp()
        weights = (counts_E / uniform_NS.shape[1] * back_E).float().cpu().numpy()
    return Word(ids_E.cpu().numpy(), weights, counts_N.cpu().numpy(), entropy_N.cpu().numpy())


@dataclass(frozen=True)
class Cost:
    """What asking once costs: labels in all, bytes for each, seconds in all; `there`: it has been done."""

    labels: int
    bytes_per_label: float
    seconds: float
    there: bool

    def as_dict(self) -> dict[str, Any]:
        """As plain data."""
        return dataclasses.asdict(self)


def cost_of(plan: Plan, asked: Asked, teacher: Online, micro: int) -> Cost:
    """Estimated from one batch of the rows themselves."""
    keys = asked.told.keys[:: max(1, len(asked.told.keys) // micro)][:micro]
    rows = [_row(plan, asked.leaf, int(key)) for key in keys]
    begin = time.perf_counter()
    device = next(teacher.model.parameters()).device
    words = words_of(plan, asked, teacher, rows, [int(key) for key in keys], device)
    seconds = time.perf_counter() - begin
    labels = sum(len(word.counts_N) for word in words)
    id_bytes = 2 if plan.vocabulary <= 1 << 16 else 4
    size = sum(len(word.ids_E) * (id_bytes + word.weights_E.itemsize) + len(word.counts_N) * 3 for word in words)
    each = plan.rows[asked.leaf].ledger.trained / max(len(plan.rows[asked.leaf]), 1)
    total = round(each * len(asked.told.keys))
    there = not asked.told.missing()
    return Cost(total, size / max(labels, 1), 0.0 if there else seconds / max(labels, 1) * total, there)

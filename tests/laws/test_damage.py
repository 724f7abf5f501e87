"""Law: damage to any file of a run or a cache is found, or has no effect.

Kinds of damage x files x commands. A command on damaged files either gives the result of undamaged ones, or ends in an error
of ours that names a file of the run, or its page says which file is damaged. A command on a damaged cache always gives the
result of an undamaged one. Nothing else counts as found, least of all a traceback.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from postgrad.commands.compare import compare_runs
from postgrad.commands.evaluate import evaluate
from postgrad.commands.lineage import trace_lineage
from postgrad.commands.load_model import load_model
from postgrad.commands.pages import write_page
from postgrad.config.stage_file import parse_stage
from postgrad.data.tokens import source_files
from postgrad.data.tokens import store as store_module
from postgrad.errors import PostgradError
from postgrad.lineage import metrics
from postgrad.lineage.record import read_record, write_record
from postgrad.lineage.saved_plan import read_plan, write_plan
from postgrad.plan.plan import Plan, make_plan
from postgrad.reports.pages.rewrite_report import rewrite_report
from postgrad.run.events import RunFinished
from postgrad.run.run import run_stage
from postgrad.storage import array_files, checked_files, verification
from postgrad.storage.fingerprint import model_fingerprint
from tests.tiny_lineage import LineageRuns, tiny_stage

MODELS_OF = {"model/config.json", "model/model.safetensors", "model/tokenizer.json", "model/manifest.json"}
RUN_FILES = [
    "plan.json", "record.json", "metrics.jsonl", "stage.yaml", "scores/before.npz", "scores/after.npz", "scores/start.npz",
    "scores/samples-before.json", *sorted(MODELS_OF),
]  # fmt: skip

Damage = Callable[[bytes, random.Random, Path], bytes | None]
"""The damaged content from the content, and the same file of another run; None: the file is removed."""


def flip(content: bytes, rng: random.Random, _: Path) -> bytes:
    changed = bytearray(content)
    changed[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    return bytes(changed)


DAMAGES: dict[str, Damage] = {
    "flip": flip,
    "half": lambda content, rng, other: content[: len(content) // 2],
    "cut": lambda content, rng, other: content[: -rng.randint(1, 8)],
    "empty": lambda content, rng, other: b"",
    "missing": lambda content, rng, other: None,
    "swapped": lambda content, rng, other: other.read_bytes(),
    "longer": lambda content, rng, other: content + b"\0",
}

REPLACED: dict[str, Callable[[Path], None]] = {"pipe": os.mkfifo, "folder": os.mkdir}
"""What is there in place of the file; a command that opened a pipe would wait for ever."""
KINDS = (*DAMAGES, *REPLACED)
CACHE_KINDS = (*DAMAGES, "pipe")
"""A folder in place of a file of the cache is an error that names it: nothing removes folders that it did not make."""


@contextmanager
def damaged(path: Path, kind: str, seed: str, other: Path) -> Iterator[bool]:
    """Inside, the file is damaged; False where the damage changes nothing."""
    content = path.read_bytes()
    changed = None if kind in REPLACED else DAMAGES[kind](content, random.Random(seed), other)
    if changed == content:
        yield False
        return
    path.unlink()
    if kind in REPLACED:
        REPLACED[kind](path)
    elif changed is not None:
        path.write_bytes(changed)
    try:
        yield True
    finally:
        if path.is_dir():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


@dataclass
class Sweep:
    """Two runs of a lineage, and commands on them."""

    runs: LineageRuns
    stage: dict[str, Any]
    """Of the second run."""
    undamaged: dict[str, str] = field(default_factory=dict)

    def plan(self, raw: dict[str, Any]) -> Plan:
        return make_plan(parse_stage(raw, "test"), self.runs.folder, self.runs.cache)

    # --- commands: the result as text ---

    def record(self, run: Path) -> str:
        return json.dumps(read_record(run).as_json())

    def report(self, run: Path) -> str:
        return rewrite_report(run).read_text()

    def compare(self, run: Path) -> str:
        found = compare_runs([self.runs.naive, self.runs.replay])
        page = write_page(found, run.parent / "comparison.html")
        return json.dumps(found.as_dict()) + page.read_text()

    def lineage(self, run: Path) -> str:
        return json.dumps(trace_lineage(self.runs.replay, cache=self.runs.cache).as_json())

    def load(self, run: Path) -> str:
        loaded = load_model(str(run))
        digest = hashlib.sha256()
        for name, tensor in loaded.model.state_dict().items():
            digest.update(name.encode() + tensor.numpy().tobytes())
        ids = loaded.tokenizer("one and two = x7 * 33;")["input_ids"]
        return json.dumps([digest.hexdigest(), ids, loaded.model.config.to_diff_dict()], default=str)

    def train(self, run: Path) -> str:
        """Repeat the command of a finished run; without a record it measures the model again."""
        last = list(run_stage(self.plan(self.stage), command="t", cache=self.runs.cache))[-1]
        assert isinstance(last, RunFinished)
        found = last.record.as_json()
        return json.dumps([found[key] for key in ("id", "status", "fingerprints", "token_ledger", "scores", "changes")])

    def child(self, run: Path) -> str:
        """Plan a stage that starts from the run and replays what it has seen."""
        sources = [{"name": "seen", "seen_so_far": True, "share": 1.0}]
        raw = {**self.stage, "model": str(run), "output": str(run.parent / "child"), "name": "child"}
        plan = self.plan({**raw, "data": {"sequence_length": 32, "sources": sources}})
        return json.dumps([plan.as_record().as_json(), plan.fingerprints()])

    def saved_plan(self, run: Path) -> str:
        return json.dumps(read_plan(run).as_json())

    # --- the sweep ---

    def outcome(self, command: str, run: Path) -> str:
        return getattr(self, command)(run)

    def try_damage(self, command: str, run: Path, file: str, kind: str, seed: int) -> str:
        """What is wrong with the outcome on damaged files: empty when nothing is."""
        key = f"{command} {run.name}"
        if key not in self.undamaged:
            self.undamaged[key] = self.outcome(command, run)
        saved = self.runs.folder / "saved"
        if command == "train":  # which writes
            shutil.copytree(run, saved)
        try:
            with damaged(run / file, kind, f"{kind} {file} {seed}", self.runs.naive / file) as has_changed:
                return self.judge(key, lambda: self.outcome(command, run), run) if has_changed else ""
        finally:
            if command == "train":
                shutil.rmtree(run)
                saved.rename(run)

    def judge(self, key: str, command: Callable[[], str], run: Path) -> str:
        try:
            found = command()
        except PostgradError as error:
            return "" if str(run) in str(error) else f"{key}: an error that names no file: {error}"
        except Exception as error:
            return f"{key}: {type(error).__name__}: {error}"
        # A run without a record is one that has not ended.
        is_told = "A file of the run is damaged" in found or "This run is not finished" in found
        return "" if is_told or found == self.undamaged[key] else f"{key}: another result"


COMMANDS = ("record", "report", "compare", "lineage", "load", "train", "child", "saved_plan")


@pytest.fixture(scope="module")
def sweep(runs: LineageRuns, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    """A copy of the lineage, in which the parents are those of the copy."""
    home = tmp_path_factory.mktemp("damaged")
    copies = [Path(shutil.copytree(run, home / run.name)) for run in (runs.first, runs.naive, runs.replay)]
    first, naive, replay = copies
    for run in (naive, replay):
        record = read_record(run)
        record.parents = [parent.model_copy(update={"path": str(first)}) for parent in record.parents]
        record.model.source = str(first / "model")
        write_record(run, record)
    saved = read_plan(replay)
    stage = {**saved.stage, "model": str(first), "output": str(replay)}
    saved.stage, saved.fingerprints["stage"] = stage, parse_stage(stage, "test").fingerprint()
    write_plan(replay, saved)
    record.fingerprints.stage = saved.fingerprints["stage"]
    write_record(replay, record)
    return Sweep(LineageRuns(home, runs.cache, first, naive, replay), stage)


def cases(count: int, seed: int) -> list[tuple[str, str, str, str, int]]:
    """Some of all combinations: command, run, file, kind of damage, and the number of the try."""
    tries = {"flip": 3}
    everything = [
        (command, run, file, kind, number)
        for command, run, file, kind in product(COMMANDS, ("first", "replay"), RUN_FILES, KINDS)
        for number in range(tries.get(kind, 1))
    ]
    return random.Random(seed).sample(everything, min(count, len(everything)))


def failures(sweep: Sweep, tried: list[tuple[str, str, str, str, int]]) -> list[str]:
    found = [(case, sweep.try_damage(case[0], getattr(sweep.runs, case[1]), *case[2:])) for case in tried]
    return [f"{' '.join(map(str, case))}: {problem}" for case, problem in found if problem]


def test_damage_to_a_run_is_found_or_without_effect(sweep: Sweep) -> None:
    assert failures(sweep, cases(60, 0)) == []


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_all_damage_to_a_run_is_found_or_without_effect(sweep: Sweep) -> None:
    tried = cases(10**6, 0)
    assert len([case for case in tried if case[3] == "flip"]) >= 200
    found = failures(sweep, tried)
    assert not found, "\n".join(found)


# --- mutants: without a guard the same damage is not found ---


def patched(monkeypatch: pytest.MonkeyPatch, guard: str) -> None:
    """Take one guard away."""
    match guard:
        case "checksums":
            for module in (checked_files, metrics):
                monkeypatch.setattr(module, "find_damage", lambda document, owner="": "")
        case "verification":
            monkeypatch.setattr(verification, "verify_files", lambda folder, entries, cache: None)
        case "owners":
            monkeypatch.setattr(array_files, "find_other_owner", lambda own, owner: "")


MUTANTS: dict[str, list[tuple[str, str, str, str, int]]] = {
    "checksums": [("record", "replay", "record.json", "flip", n) for n in range(20)],
    "verification": [("load", "replay", "model/model.safetensors", "flip", n) for n in range(3)],
    "owners": [("compare", "replay", "scores/after.npz", "swapped", 0)],
}


@pytest.mark.parametrize("guard", MUTANTS)
def test_without_a_guard_damage_is_not_found(sweep: Sweep, guard: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = MUTANTS[guard]
    found = failures(sweep, tried)
    assert not found, "\n".join(found)
    patched(monkeypatch, guard)
    assert failures(sweep, tried)


# --- caches ---


@dataclass
class CacheSweep:
    """Work that fills a cache of every kind and reads it again."""

    base: Path
    home: Path

    @property
    def cache(self) -> Path:
        return self.home / "cache"

    def work(self) -> str:
        """What follows from the files of the cache: a plan with a new model, and scores."""
        source = {"name": "new", "path": str(self.base / "new.jsonl"), "select": [{"kind": "duplicates"}]}
        raw = tiny_stage(self.base, self.home / "run", data={"sequence_length": 32, "sources": [source]})
        raw["model"] = {"from_scratch": "llama-100k", "tokenizer": {"vocab_size": 300}}
        plan = make_plan(parse_stage(raw, "test"), self.home, self.cache)
        store = plan.data.sources[0].store
        tokens = [store.read(i).tolist() for i in range(len(store))]
        scores = evaluate(str(self.base / "base"), [str(self.base / "old-heldout.jsonl")], cache=self.cache)
        start = plan.model.start.folder
        assert start is not None
        facts = [plan.fingerprints(), plan.as_record().as_json(), model_fingerprint(start), tokens, plan.notes]
        overlaps = {name: each.as_json() for name, each in plan.data.overlaps.items()}
        return json.dumps([facts, overlaps, scores.as_dict()])

    def files(self) -> list[Path]:
        return sorted(p for p in self.cache.rglob("*") if p.is_file() and "locks" not in p.parts)


def try_cache_damage(sweep: CacheSweep, path: Path, kind: str, undamaged: str) -> str:
    neighbours = [p for p in sweep.files() if p.suffix == path.suffix and p != path]
    with damaged(path, kind, f"{kind} {path.name}", (neighbours or [path])[0]):
        try:
            return "" if sweep.work() == undamaged else "another result"
        except Exception as error:
            return f"{type(error).__name__}: {error}"


@pytest.fixture(scope="module")
def cache_sweep(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[CacheSweep]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(source_files, "_CLOCK_GRAIN_NS", 0)  # the hashes of files this young are cached too
        yield CacheSweep(base, tmp_path_factory.mktemp("cached"))


def cache_failures(sweep: CacheSweep, kinds: list[str], every: int = 1) -> list[str]:
    undamaged = sweep.work()
    assert sweep.work() == undamaged
    found = {"stores", "selection", "contamination", "vocabularies", "fresh", "scores", "hashes.json"}
    assert found <= {path.name for path in sweep.cache.iterdir()}
    tried = list(product(sweep.files(), kinds))[::every]
    problems = [(path, kind, try_cache_damage(sweep, path, kind, undamaged)) for path, kind in tried]
    return [f"{path.relative_to(sweep.cache)} {kind}: {problem}" for path, kind, problem in problems if problem]


def test_damage_to_a_cache_changes_nothing(cache_sweep: CacheSweep) -> None:
    assert cache_failures(cache_sweep, list(CACHE_KINDS), every=13) == []


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_no_damage_to_a_cache_changes_anything(cache_sweep: CacheSweep) -> None:
    assert cache_failures(cache_sweep, list(CACHE_KINDS)) == []


def test_a_cache_that_is_not_verified_gives_another_result(
    cache_sweep: CacheSweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    undamaged = cache_sweep.work()
    tokens = next(path for path in cache_sweep.files() if path.name == "tokens.bin")
    monkeypatch.setattr(store_module, "verify_files", lambda folder, entries, cache: None)
    assert try_cache_damage(cache_sweep, tokens, "swapped", undamaged) or try_cache_damage(
        cache_sweep, tokens, "flip", undamaged
    )

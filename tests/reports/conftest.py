"""A made-up run: a record and metrics rows as a stage writes them, for every test of the reports."""

import copy
import math
import random
from collections.abc import Iterable, Iterator, Sequence

import pytest

from postgrad.lineage.matrix import Lineage
from postgrad.lineage.metrics import MetricsRow, parse_row
from postgrad.lineage.record import Record, parse_record
from postgrad.reports.pages import comparison_page, lineage_page, run_page

STAGE = """name: medicine
model: ./base
tokens: 20M
data:
  sequence_length: 1024
  sources:
    - {name: papers, path: data/medical/*.jsonl, share: 0.90}
    - {name: replay, path: data/general.parquet, share: 0.10, role: replay}
schedule: {kind: rewarm, peak: 2.0e-5, floor: 2.0e-6, warmup: 1%}
evaluation:
  retained: [data/general-heldout.jsonl]
  learned: [data/medical-heldout.jsonl]
"""


def as_record(raw: dict) -> Record:
    return parse_record(raw, "record.json")


def as_rows(rows: Iterable[dict]) -> Iterator[MetricsRow]:
    return map(parse_row, rows)


def draw_run(raw: dict, rows: Iterable[dict]) -> str:
    return run_page.run_page(as_record(raw), as_rows(rows))


def draw_comparison(raws: Sequence[dict], rows: Sequence[Iterable[dict]], title: str, baseline: str | None) -> str:
    records = [as_record(raw) for raw in raws]
    return comparison_page.comparison_page(records, [as_rows(each) for each in rows], title, baseline)


def draw_lineage(raw: dict) -> str:
    return lineage_page.lineage_page(Lineage.model_validate(raw))


def make_score(nats: float, documents: int) -> dict:
    return {
        "nats": nats,
        "perplexity": math.exp(nats),
        "bits_per_byte": nats / math.log(2) / 4.12,
        "tokens": documents * 812,
        "bytes": documents * 3345,
        "documents": documents,
        "low": nats - 0.041,
        "high": nats + 0.043,
    }


RELEARNING = {
    "steps": 20,
    "learning_rate": 2e-5,
    "tokens": 640_000,
    "sets": {
        "general": {
            "documents": 402,
            "tokens": 300_000,
            "forgotten": {"value": 0.412, "low": 0.39, "high": 0.434},
            "remaining": {"value": 0.081, "low": 0.06, "high": 0.1},
            "recovered": {"value": 0.331, "low": 0.31, "high": 0.35},
            "start_model_change": {"value": -0.012, "low": -0.02, "high": -0.004},
            "recovered_share": {"value": 0.803, "low": 0.76, "high": 0.85},
        },
        "code": {
            "documents": 90,
            "tokens": 80_000,
            "forgotten": {"value": 0.001, "low": -0.01, "high": 0.012},
            "remaining": {"value": 0.0, "low": -0.01, "high": 0.01},
            "recovered": {"value": 0.001, "low": -0.01, "high": 0.01},
            "start_model_change": {"value": -0.01, "low": -0.02, "high": 0.0},
            "recovered_share": None,
        },
    },
}


DUPLICATES = {
    "kind": "duplicates",
    "description": "documents that share less than 80 % of their runs of five words with one before",
    "before": {"documents": 9000, "tokens": 30_100_000},
    "after": {"documents": 8400, "tokens": 27_900_000},
    "unit": "",
    "score_bounds": None,
    "score_histogram": None,
    "kept": [{"text": "A trial of two drugs.", "value": None}],
    "dropped": [{"text": "A trial of three drugs.", "value": None, "duplicate_of": "A trial of two drugs, again."}],
}
DSIR = {
    "kind": "dsir",
    "description": "50 % of the documents, those most like papers-heldout.jsonl",
    "before": {"documents": 8400, "tokens": 27_900_000},
    "after": {"documents": 4200, "tokens": 18_600_000},
    "unit": "nats/n-gram",
    "score_bounds": None,
    "score_histogram": {"bin_edges": [-1.0, 0.0, 1.0], "kept": [0, 4200], "dropped": [4100, 100]},
    "kept": [{"text": "Background: we asked 20 women.", "value": 0.151}],
    "dropped": [{"text": "Once upon a time.", "value": -1.104}],
}


def make_record(name: str = "medicine", forgetting: float = 0.0104, gain: float = 0.3312) -> dict:
    start = {"general": 2.4418, "code": 1.8127, "papers": 2.3104}
    move = {"general": forgetting, "code": forgetting * 0.4 - 0.003, "papers": -gain}
    before = {k: make_score(v, 812) for k, v in start.items()}
    after = {k: make_score(v + move[k], 812) for k, v in start.items()}
    wide = {"general": 0.0061, "code": 0.0093, "papers": 0.0187}
    changes = {}
    for k in start:
        low, high = move[k] - wide[k], move[k] + wide[k]
        role = "learned" if k == "papers" else "retained"
        if role == "learned":
            said = "learnt" if high < 0 else "no evidence"
        else:
            said = "forgot" if low > 0.02 else "kept" if high < 0.02 else "no evidence"
        changes[k] = {
            "role": role,
            "difference": move[k],
            "low": low,
            "high": high,
            "bits_per_byte_difference": after[k]["bits_per_byte"] - before[k]["bits_per_byte"],
            "share_of_range": move[k] / 9.2,
            "relative_difference": move[k] / start[k],
            "units": "documents" if k != "code" else "windows",
            "unit_count": 812,
            "verdict": said,
        }
    return {
        "format": 2,
        "id": f"id-{name}",
        "name": name,
        "status": "finished",
        "created": "2026-11-20T09:12:44+00:00",
        "finished": "2026-11-20T11:58:02+00:00",
        "command": "postgrad train medicine.yaml",
        "stage_yaml": STAGE,
        "stage": {"name": name, "tokens": 20_000_000},
        "model": {
            "start_model": "./base",
            "parameters": 134_515_008,
            "vocab_size": 49_152,
            "context_length": 1024,
        },
        "fingerprints": {
            "start_model": "9f2c61a0d7b84e55" * 4,
            "tokenizer": "11ab" * 16,
            "data": {"papers": "77d1" * 16, "replay": "04fe" * 16},
        },
        "parents": [{"path": "runs/base", "name": "base", "fingerprint": "9f2c61a0d7b84e55" * 4}],
        "versions": {"postgrad": "0.1.0", "python": "3.12.4", "torch": "2.13.0", "transformers": "5.23.0"},
        "machine": {"cpu": "16-core workstation", "cores": 16, "memory": "64 GB", "device": "cpu"},
        "execution": {
            "dtype": "bfloat16",
            "compile": True,
            "attention": "sdpa",
            "threads": 16,
            "reasons": {
                "dtype": "bf16 products are 5.1 x as fast here",
                "compile": "pays for itself after 40 of 1,221 steps",
                "threads": "one per physical core",
            },
        },
        "relearning": copy.deepcopy(RELEARNING),
        "plan": {
            "steps": 1221,
            "rows": 19_532,
            "sequence_length": 1024,
            "tokens": 20_000_000,
            "sources": [
                {
                    "name": "papers",
                    "role": "new",
                    "share": 0.9,
                    "rows": 17_579,
                    "trained_tokens": 18_000_000,
                    "passes": 0.74,
                    "available_tokens": 24_310_221,
                    "selection": [dict(DUPLICATES), dict(DSIR)],
                },
                {
                    "name": "replay",
                    "role": "replay",
                    "share": 0.1,
                    "rows": 1_953,
                    "trained_tokens": 2_000_000,
                    "passes": 0.02,
                    "available_tokens": 101_220_417,
                },
            ],
        },
        "token_ledger": {
            "papers": {
                "read": 25_010_331,
                "held_out": 612_004,
                "dropped": 88_106,
                "truncated": 0,
                "placed": 24_310_221,
                "padding": 1_204,
                "trained": 17_998_712,
                "context": 0,
            },
            "replay": {
                "read": 101_900_000,
                "held_out": 640_112,
                "dropped": 39_471,
                "truncated": 0,
                "placed": 101_220_417,
                "padding": 3_310,
                "trained": 2_001_288,
                "context": 0,
            },
        },
        "totals": {
            "steps": 1221,
            "tokens": 20_000_000,
            "seconds": 9918.4,
            "tokens_per_second": 2016.5,
            "sources": [
                {
                    "name": "papers",
                    "role": "new",
                    "share": 0.8999356,
                    "trained_tokens": 17_998_712,
                    "rows": 17_578,
                    "passes": 0.7404,
                },
                {
                    "name": "replay",
                    "role": "replay",
                    "share": 0.1000644,
                    "trained_tokens": 2_001_288,
                    "rows": 1_954,
                    "passes": 0.0198,
                },
            ],
        },
        "schedule_curve": [[s, learning_rate(s)] for s in range(0, 1222, 3)],
        "scores": {"before": before, "after": after},
        "changes": changes,
        "retention_gate": {
            "max_forgetting": 0.02,
            "loss_rise_limit": 0.05,
            "worst": {
                "set": "general",
                "relative_difference": move["general"],
                "relative_high": changes["general"]["high"],
            },
            "passed": changes["general"]["high"] < 0.02,
        },
        "contamination": {"general": {"documents": 812, "duplicates": 0, "any_overlap": 3, "half_overlap": 0}},
        "samples": [
            {
                "set": "papers",
                "prompt": "The most common side effect of metformin is",
                "reference": " gastrointestinal upset, which usually resolves within weeks.",
                "before": " the fact that it is a very common side effect.",
                "after": " gastrointestinal intolerance, including nausea and diarrhoea.",
            },
            {
                "set": "general",
                "prompt": "On the first morning of the fair,",
                "reference": " the square was already full before the bells had finished ringing.",
                "before": " the streets were full of people, and the smell of bread came from every door.",
                "after": " the streets were full of people, and the smell of bread came out of the doors.",
            },
        ],
    }


def learning_rate(step: int) -> float:
    if step < 12:
        return 2e-5 * step / 12
    return 2e-6 + 0.9e-5 * (1 + math.cos(math.pi * (step - 12) / 1209)) * 1.0


def make_metrics(record: dict, steps: int = 1221, seed: int = 0, evaluations: int = 26) -> list[dict]:
    """Noisy but plausible rows: a forgetting peak right after the switch that then heals."""
    dice = random.Random(seed)
    per_step = 20_000_000 // steps
    early = [round(steps * 0.02 * i / 6) for i in range(7)]
    at = sorted({*early, *(round(steps * i / (evaluations - 7)) for i in range(1, evaluations - 6))})
    end = {k: c["difference"] for k, c in record["changes"].items()}
    result: list[dict] = []
    for step in range(steps + 1):
        t = step / steps
        if step in at:
            sets = {}
            for k, c in record["changes"].items():
                change = end[k] * (1 - math.exp(-t * 5)) / (1 - math.exp(-5))
                if c["role"] == "retained" and step:
                    peak = min(t / 0.008, 1) * math.exp(-t * 9)
                    change += abs(end["general"]) * 3.2 * peak + dice.gauss(0, 0.0006)
                wide = 0 if not step else (0.004 if c["role"] == "retained" else 0.014) + 0.002 * t
                sets[k] = {
                    "role": c["role"],
                    "nats": record["scores"]["before"][k]["nats"] + change,
                    "change": change,
                    "low": change - wide,
                    "high": change + wide,
                }
            result.append({"kind": "evaluation", "step": step, "trained_tokens": step * per_step, "sets": sets})
        if step == steps:
            break
        papers = 2.31 - 0.33 * (1 - math.exp(-t * 4)) + dice.gauss(0, 0.05)
        replay = 2.43 + 0.03 * math.exp(-t * 8) + dice.gauss(0, 0.12)
        result.append(
            {
                "kind": "step",
                "step": step + 1,
                "trained_tokens": (step + 1) * per_step,
                "loss": 0.9 * papers + 0.1 * replay,
                "losses_by_objective": {"next-token": 0.9 * papers + 0.1 * replay},
                "loss_sums_by_source": {
                    "papers": [papers * per_step * 0.9, round(per_step * 0.9)],
                    "replay": [replay * per_step * 0.1, round(per_step * 0.1)],
                },
                "learning_rate": learning_rate(step),
                "grad_norm": 0.9 + 0.4 * math.exp(-t * 30) + abs(dice.gauss(0, 0.1)) + (4.2 if step == 700 else 0),
                "seconds": 8.1 * (step + 1),
            }
        )
    return result


def make_tree() -> dict:
    names = ["base", "papers", "law", "march"]
    matrix = [
        [2.4418, 2.3104, 2.6210, 2.5100],
        [2.4522, 1.9792, 2.6011, 2.5320],
        [2.4610, 2.0051, 2.1170, 2.5402],
        [2.4705, 2.0193, 2.1502, None],
    ]
    return {
        "stages": [
            {
                "name": n,
                "path": f"runs/{n}",
                "model": "./base",
                "created": "2026-11-20T09:12:44",
                "tokens": 20_000_000 * (i > 0),
            }
            for i, n in enumerate(names)
        ],
        "sets": [
            {"name": "general", "learnt_at": 0},
            {"name": "papers", "learnt_at": 1},
            {"name": "law", "learnt_at": 2},
            {"name": "news", "learnt_at": 0},
        ],
        "R": matrix,
        "summary": {
            "ACC": 2.2133,
            "BWT": 0.0367,
            "FWT": -0.0199,
            "forgetting": 0.0367,
            "denominators": {"BWT": "T-1 = 3", "FWT": "T-1 = 3", "ACC": "T = 3", "forgetting": "T-1 = 3"},
        },
    }


ARMS = (
    ("no replay", 0.1213, 0.3391),
    ("replay 5 %", 0.0312, 0.3367),
    ("replay 10 %", 0.0104, 0.3312),
    ("anchor", 0.0461, 0.2480),
    ("replay 10 % + distill", 0.0049, 0.3205),
)


@pytest.fixture(scope="session")
def _record() -> dict:
    return make_record()


@pytest.fixture
def record(_record: dict) -> dict:
    return copy.deepcopy(_record)


@pytest.fixture(scope="session")
def metrics(_record: dict) -> list[dict]:
    return make_metrics(_record)


@pytest.fixture
def arms() -> list[dict]:
    return [make_record(name, forgetting, gain) for name, forgetting, gain in ARMS]


@pytest.fixture
def tree() -> dict:
    return make_tree()

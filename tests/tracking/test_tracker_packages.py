"""The trackers themselves, read back with their own packages, where these are installed."""

from __future__ import annotations

import shutil
import struct
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from postgrad.commands.track import track_run
from postgrad.lineage.record import RECORD, Record, read_record
from tests.tiny_lineage import LineageRuns

pytestmark = pytest.mark.filterwarnings("ignore")  # of packages that are not ours


@pytest.fixture
def run(runs: LineageRuns, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of a finished run, for which every tracker keeps what it writes in a temporary folder."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.chdir(tmp_path)
    ignore = shutil.ignore_patterns("checkpoints", "model", "tracking")
    return Path(shutil.copytree(runs.replay, tmp_path / "replay", ignore=ignore))


@pytest.fixture
def record(run: Path) -> Record:
    return read_record(run)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def forwarded_twice(run: Path, kind: str, address: str | None = None) -> None:
    first, again = (track_run(run, [kind], address=address).trackers[0] for _ in range(2))
    assert first.sent == first.points == again.points > 0 and again.sent == 0 and again.is_finished


def test_tensorboard_reads_the_events(run: Path, record: Record) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    (run / RECORD).rename(run / "aside")
    track_run(run, ["tensorboard"])
    folder = run / "tracking" / "tensorboard"
    (file,) = folder.iterdir()
    size = file.stat().st_size
    with file.open("ab") as torn:
        torn.write(file.read_bytes()[-300:] + b"\x01\x02\x03")  # a process killed within its next write
    (run / "aside").rename(run / RECORD)
    assert track_run(run, ["tensorboard"]).trackers[0].sent == 1 and file.stat().st_size > size
    assert track_run(run, ["tensorboard"]).trackers[0].sent == 0
    events = accumulator.EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0}).Reload()
    losses = events.Scalars("train/loss")
    assert [event.step for event in losses] == list(range(1, record.totals.steps + 1))
    (result,) = events.Scalars("results/old-heldout/change")
    assert result.value == pytest.approx(record.changes["old-heldout"].difference, rel=1e-6)
    (text,) = events.Tensors("results/text_summary")
    assert b"## Learned and kept" in text.tensor_proto.string_val[0]


def test_mlflow_keeps_the_metrics(run: Path, record: Record, tmp_path: Path) -> None:
    mlflow = pytest.importorskip("mlflow")
    address = f"sqlite:///{tmp_path / 'mlflow.db'}"
    forwarded_twice(run, "mlflow", address)
    client = mlflow.MlflowClient(tracking_uri=address)
    experiment = client.get_experiment_by_name("postgrad")
    (found,) = client.search_runs([experiment.experiment_id])
    history = client.get_metric_history(found.info.run_id, "train/loss")
    assert sorted(metric.step for metric in history) == list(range(1, record.totals.steps + 1))
    assert found.data.params["schedule.kind"] == "rewarm" and found.info.status == "FINISHED"
    assert [item.path for item in client.list_artifacts(found.info.run_id)] == ["report.html"]


def test_trackio_keeps_the_metrics(run: Path, record: Record) -> None:
    pytest.importorskip("trackio")
    forwarded_twice(run, "trackio")
    from trackio.sqlite_storage import SQLiteStorage

    rows = SQLiteStorage.get_logs("postgrad", f"{record.name}-{record.id[:6]}")
    assert [row["step"] for row in rows if "train/loss" in row] == list(range(1, record.totals.steps + 1))


def log_records(data: bytes) -> Iterator[bytes]:
    """The records of W&B's file: a head of seven bytes, then blocks of 32 KiB as in a log of LevelDB."""
    at, parts = 7, b""
    while at + 7 <= len(data):
        if (rest := 32768 - at % 32768) < 7:
            at += rest
            continue
        length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


def test_wandb_writes_its_own_log_offline(run: Path, record: Record) -> None:
    pytest.importorskip("wandb")
    forwarded_twice(run, "wandb")
    from wandb.proto import wandb_internal_pb2

    steps = []
    for file in (run / "tracking" / "wandb").glob("offline-run-*/*.wandb"):
        for data in log_records(file.read_bytes()):
            message = wandb_internal_pb2.Record()
            message.ParseFromString(data)
            keys = {item.key or "/".join(item.nested_key): item.value_json for item in message.history.item}
            if "train/loss" in keys:
                steps.append(int(keys["step"]))
    assert steps == list(range(1, record.totals.steps + 1))

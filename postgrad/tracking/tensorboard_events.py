"""TensorBoard: one event file for a run. The cursor holds its size, so what a killed process wrote later is cut off."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from postgrad.config.trackers import TensorBoardConfig
from postgrad.errors import ServiceError
from postgrad.lineage.record import Record
from postgrad.reports.pages.model_card import card_body
from postgrad.tracking.points import Point
from postgrad.tracking.tracker import TrackedRun, TrackerMemory


class TensorBoardTracker:
    """Appends events to a file that TensorBoard reads."""

    def __init__(self, run: TrackedRun, config: TensorBoardConfig, memory: TrackerMemory) -> None:
        from tensorboard.summary.writer.record_writer import RecordWriter

        self.run, self.memory = run, memory
        folder = Path(config.address) / run.display_name if config.address else run.tracking_folder / "tensorboard"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"events.out.tfevents.{int(run.created)}.postgrad.{run.id[:12]}"
        size, known = path.stat().st_size if path.exists() else 0, int(memory.get("bytes", 0))
        if size < known:
            cursor = run.tracking_folder
            raise ServiceError(
                f"{path.name} has {size:,} bytes, and {known:,} were written",
                where=str(path),
                hint=f"delete it and its cursor in {cursor} to write the whole run again",
            )
        self._file = path.open("ab")
        self._file.truncate(known)
        self._file.seek(known)
        self._writer = RecordWriter(self._file)
        if not known:
            self._write(run.created, file_version="brain.Event:2")
            settings = "".join(f"    {key}: {value}\n" for key, value in run.settings.items())
            self._write_text(run.created, 0, "stage", settings)

    def missing_points(self, points: Sequence[Point]) -> Sequence[Point]:
        """All: an interrupted send was cut off."""
        return points

    def send(self, points: Sequence[Point]) -> None:
        """Append scalars and sync."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        for point in points:
            values = [Summary.Value(tag=name, simple_value=value) for name, value in point.values.items()]
            self._write(point.seconds, step=point.step, summary=Summary(value=values))
        self._sync()

    def finish(self, record: Record, page: Path | None, results: Point) -> None:
        """Append the results as text."""
        self._write_text(results.seconds, results.step, "results", card_body(record))
        self._sync()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _sync(self) -> None:
        self._writer.flush()
        os.fsync(self._file.fileno())
        self.memory["bytes"] = self._file.tell()

    def _write_text(self, seconds: float, step: int, tag: str, text: str) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
        from tensorboard.compat.proto.tensor_pb2 import TensorProto
        from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
        from tensorboard.compat.proto.types_pb2 import DT_STRING

        shape = TensorShapeProto(dim=[TensorShapeProto.Dim(size=1)])
        tensor = TensorProto(dtype=DT_STRING, string_val=[text.encode()], tensor_shape=shape)
        metadata = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="text"))
        value = Summary.Value(tag=f"{tag}/text_summary", metadata=metadata, tensor=tensor)
        self._write(seconds, step=step, summary=Summary(value=[value]))

    def _write(self, seconds: float, **event: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        self._writer.write(Event(wall_time=seconds, **event).SerializeToString())

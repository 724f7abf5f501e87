"""The first line of a written stage file, which names the JSON Schema of stages for editors."""

from __future__ import annotations

from pathlib import Path

from postgrad.storage.atomic import write_atomically

STAGE_SCHEMA = Path(__file__).with_name("stage.schema.json")
"""Shipped with the package; `docs/make_stage_reference.py` writes it."""


_COPY = ".postgrad/stage.schema.json"
"""The copy beside a stage: editors read it relative to the file, so it moves to other machines with the stage."""


def write_stage_file(path: Path, text: str) -> None:
    """Write a stage file atomically, with the line that editors with a YAML language server read, and the schema it names."""
    write_atomically(path.parent / _COPY, STAGE_SCHEMA.read_bytes())
    write_atomically(path, f"# yaml-language-server: $schema={_COPY}\n{text}")

"""A stage file of any size, depth or absurdity is refused with its key or line and the limit, before anything is allocated."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from postgrad.config.stage_file import load_stage, parse_stage, read_stage
from postgrad.errors import StageError
from postgrad.storage import read_yaml as yaml_reader
from postgrad.storage.read_yaml import read_yaml
from postgrad.studies.study import load_study
from tests.config.test_stage import GOOD, changed

MULTIPLYING = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 30)
)
MERGING = "a0: &a0 {x: 1, y: 2}\n" + "".join(f"a{n}: &a{n} {{<<: [*a{n - 1}, *a{n - 1}]}}\n" for n in range(1, 40))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (MULTIPLYING, r"stage\.yaml:5: .*more than 20,000 values"),
        (MERGING, r"stage\.yaml:12: .*more than 20,000 values"),
        ("a: &a [1, *a]", r"stage\.yaml:1: .*the alias \*a is part of what it stands for"),
        ("a: &a {b: *a}", r"the alias \*a is part of"),
        ("[" * 100_000, r"stage\.yaml:1: .*nested more than 50 levels"),
        ("{a: " * 100_000, r"nested more than 50 levels"),
        ("".join(" " * n + f"a{n}:\n" for n in range(500)), r"stage\.yaml:50: .*nested more than 50 levels"),
        ("- " * 100_000, r"nested more than 50 levels"),
        ("name: " + "9" * 5000, r"a value of 5,000 characters that is no text"),
        ("name: 1" + ":59" * 5000, r"a value of 15,001 characters"),
        ("name: !!int '1" + ":59" * 5000 + "'", r"a value of 15,001 characters"),
        ("#" * 2**21, r"the file has more than 1,048,576 bytes"),
        ("name: 2024-13-45", r"month must be in"),
        ("? [a, b]\n: c", r"not YAML: found unhashable key"),
    ],
)
@pytest.mark.parametrize("kind", [load_stage, load_study])
def test_what_yaml_may_hold_is_limited(tmp_path: Path, text: str, problem: str, kind: Any) -> None:
    (tmp_path / "stage.yaml").write_text(text)
    with pytest.raises(StageError, match=problem):
        kind(tmp_path / "stage.yaml")


def test_aliases_that_do_not_multiply_are_kept() -> None:
    names = ", ".join(f"k{n}: *many" for n in range(40))
    raw = read_yaml(f"a: &many [{'1, ' * 400}]\nb: {{<<: {{x: 1}}, {names}}}")
    assert len(raw["a"]) == 400 and len(raw["b"]) == 41


def test_without_the_limits_aliases_multiply(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutant, on few levels."""
    monkeypatch.setattr(yaml_reader, "MAX_NODES", 2**62)
    raw = read_yaml("".join(MULTIPLYING.splitlines(keepends=True)[:4]))
    assert len([item for a in raw["a3"] for b in a for c in b for item in c]) == 10_000


def test_values_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(yaml_reader, "MAX_NODES", 100)
    assert len(read_yaml(f"[{'x,' * 99}]")) == 99
    with pytest.raises(yaml.YAMLError, match="more than 100 values"):
        read_yaml(f"[{'x,' * 100}]")


def test_an_override_is_no_deeper_than_a_file(tmp_path: Path) -> None:
    (tmp_path / "stage.yaml").write_text("name: x")
    with pytest.raises(StageError, match="the override has 30,001 levels"):
        read_stage(tmp_path / "stage.yaml", ["a." * 30_000 + "a=1"])
    assert read_stage(tmp_path / "stage.yaml", ["a=" + "[" * 1000])["a"] == "[" * 1000  # text, as any other


def test_a_pipe_is_no_stage_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "stage.yaml")
    for path in (tmp_path / "stage.yaml", Path("/dev/zero")):
        with pytest.raises(StageError, match="not a regular file"):
            load_stage(path)
    with pytest.raises(StageError, match="embedded null byte"):
        load_stage(Path("a\0b.yaml"))


@pytest.mark.parametrize(
    ("key", "value", "limit"),
    [
        ("tokens", 1e300, "1000000000000000"),
        ("tokens", "9e400", "20M"),
        ("tokens", float("nan"), "20M"),
        ("seed", 2**64, "9223372036854775808"),
        ("seed", -1, "0"),
        ("data.sequence_length", 10**9, "1048576"),
        ("data.sequence_length", True, "a number is expected"),
        ("data.workers", 10**9, "1000000"),
        ("data.sources.0.max_passes", float("inf"), "finite"),
        ("data.sources.0.share", float("nan"), "finite"),
        ("batch.global_batch_size", 10**12, "1000000"),
        ("batch.micro_batch_size", 1e9, "1000000"),
        ("compute.threads", 1e9, "1000000"),
        ("tuning", {"kind": "lora", "rank": 10**9}, "65536"),
        ("tuning", {"kind": "adapter", "size": 10**9}, "65536"),
        ("tuning", {"kind": "prefix", "length": 10**9}, "65536"),
        ("tuning", {"kind": "p-tuning", "template": "{1000000000} {x}"}, "65,536"),
        ("tuning", {"kind": "expand", "blocks": 10**9}, "100"),
        ("objectives", [{"kind": "text-to-text", "target_length": 10**9}], "1000000"),
        ("objectives", [{"kind": "on-policy", "max_new_tokens": 10**9}], "1000000"),
        ("model", {"from_scratch": "llama-1M", "tokenizer": {"vocab_size": 10**9}}, "1000000"),
        ("schedule.peak", float("inf"), "finite"),
        ("schedule.peak", float("nan"), "finite"),
        ("schedule.warmup", "1e400%", "at most"),
        ("schedule.warmup", 10**30, "a length"),
        ("evaluation.every", "9" * 50 + " steps", "at most"),
        ("evaluation.relearning_steps", 10**12, "1000000"),
        ("save.keep", 10**12, "1000000"),
        ("name", "..", "letters, digits"),
        ("name", ".", "letters, digits"),
        ("name", "a/b", "letters, digits"),
        ("name", "a\n", "letters, digits"),
        ("name", "x" * 300, "100 characters"),
        ("data.sources.0.name", "..", "letters, digits"),
        ("evaluation.retained", [{"name": "..", "path": "a.txt"}], "letters, digits"),
        ("data.sources.0.path", "a\0b", "a NUL character"),
        ("output", "runs/a\0b", "a NUL character"),
        ("model", "\0", "a NUL character"),
        ("data.sources.0.columns", {"text": "\0"}, "a NUL character"),
        ("tuning", {"kind": "lora", "targets": ["a\0"]}, "a NUL character"),
    ],
)
def test_an_absurd_value_is_refused_with_its_key(key: str, value: Any, limit: str) -> None:
    with pytest.raises(StageError, match=limit) as caught:
        parse_stage(changed({key: value}, GOOD), "test.yaml")
    parts = [part for part in key.split(".") if not part.isdigit()]
    assert all(part in str(caught.value) for part in parts), caught.value

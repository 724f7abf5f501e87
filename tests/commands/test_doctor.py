"""The doctor names what is missing and how to install it, and asks no network by itself."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest
from huggingface_hub import HfApi, constants

from postgrad.commands import doctor
from postgrad.commands.doctor import check_machine


def test_this_machine_is_described_without_the_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setenv("POSTGRAD_CACHE", str(tmp_path / "not" / "there"))
    report = check_machine()
    assert report.device and report.cores and report.bf16_speedup and report.hub is None
    assert report.cache_free_bytes > 0 and not (tmp_path / "not").exists()
    assert "torch" in report.versions and json.dumps(report.as_dict())
    assert "Hub:       not asked" in report.text()


def test_what_is_missing_is_named_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_is_installed", lambda package: package not in ("torch", "wandb"))
    monkeypatch.setattr(doctor, "_versions", dict)
    report = check_machine()
    missing = {requirement.purpose: requirement for requirement in report.requirements if requirement.missing}
    assert set(missing) == {"train, eval, generate and all others", "track: wandb"} and report.device is None
    assert missing["track: wandb"].hint == "pip install 'postgrad[wandb]'"
    assert "lacks wandb" in report.text()


def test_a_hub_that_does_not_answer_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_measure_device", dict)
    assert check_machine(hub=True).hub == "off: HF_HUB_OFFLINE is set"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)

    def refuse(*_: object, **__: object) -> None:
        raise ConnectionError("no route to the host")

    monkeypatch.setattr(HfApi, "list_models", refuse)
    monkeypatch.setattr(HfApi, "whoami", refuse)
    assert "does not answer" in (check_machine(hub=True).hub or "")

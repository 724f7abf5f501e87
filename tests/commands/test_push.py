"""A model reaches the Hub whole, with its card; what nobody else could load, or what forgot too much, does not."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import ModelCard, constants

from postgrad.commands import push
from postgrad.commands.push import push_model
from postgrad.errors import ModelError, ServiceError, StageError
from postgrad.lineage.record import RetentionGate, WorstSet, read_record, write_record
from postgrad.reports.pages.model_card import CARD
from tests.commands.fake_hub import FakeHub, serve_hub
from tests.tiny_lineage import LineageRuns

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # huggingface_hub's use of httpx


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with serve_hub() as hub:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        monkeypatch.setattr(push, "HfApi", lambda: huggingface_hub.HfApi(endpoint=hub.endpoint, token=hub.token))
        yield hub


@pytest.fixture
def run(runs: LineageRuns, tmp_path: Path) -> Path:
    return Path(shutil.copytree(runs.replay, tmp_path / "replay", ignore=shutil.ignore_patterns("checkpoints")))


def test_every_file_arrives_with_a_card(hub: FakeHub, run: Path, tmp_path: Path) -> None:
    result = push_model(run, "team/medicine", license_name="apache-2.0", private=True)
    files = hub.repositories["team/medicine"]
    assert result.is_private and hub.private["team/medicine"] and not result.gate_failed
    model = {path.name: path.read_bytes() for path in (run / "model").iterdir() if path.name != CARD}
    assert {name: data for name, data in files.items() if name not in (CARD, ".gitattributes")} == model
    (tmp_path / "card.md").write_bytes(files[CARD])
    card = ModelCard.load(tmp_path / "card.md")
    assert card.data.license == "apache-2.0" and card.data.library_name == "transformers"
    assert "license" not in ModelCard.load(run / "model" / CARD).data.to_dict()


def test_the_card_in_the_folder_is_pushed_as_it_was_edited(hub: FakeHub, run: Path) -> None:
    with (run / "model" / CARD).open("a") as card:
        card.write("\nA word of mine.\n")
    assert push_model(run, "me/medicine").is_private is False
    assert hub.repositories["me/medicine"][CARD].endswith(b"A word of mine.\n")


def test_nothing_on_the_hub_is_overwritten_without_a_flag(hub: FakeHub, run: Path) -> None:
    hub.repositories["me/other"], hub.private["me/other"] = {CARD: b"theirs"}, False
    with pytest.raises(StageError, match="exists and has 1 files"):
        push_model(run, "me/other")
    assert hub.repositories["me/other"] == {CARD: b"theirs"}
    push_model(run, "me/other", update=True)
    assert hub.repositories["me/other"][CARD] != b"theirs"


def test_a_model_whose_gate_failed_is_pushed_by_force_only(hub: FakeHub, run: Path) -> None:
    record = read_record(run)
    worst = WorstSet(set="old-heldout", relative_difference=0.3, relative_high=0.4)
    gate = RetentionGate(max_forgetting=0.02, worst=worst, passed=False)
    write_record(run, record.model_copy(update={"status": "gate-failed", "retention_gate": gate}))
    (run / "model" / CARD).unlink()
    with pytest.raises(StageError, match=r"retention gate of .* failed"):
        push_model(run, "me/medicine")
    assert not hub.repositories
    assert push_model(run, "me/medicine", force=True).gate_failed
    assert b"retention gate **failed**" in hub.repositories["me/medicine"][CARD]


@pytest.mark.parametrize("name", ["medicine", "a/b/c", "a/ b", "/b", "a/", "https://hub/a/b", "a/b\n"])
def test_a_repository_has_an_owner_and_a_name(hub: FakeHub, run: Path, name: str) -> None:
    with pytest.raises(StageError, match="no name of a repository"):
        push_model(run, name)


def test_what_is_no_folder_or_cannot_be_loaded_elsewhere_is_refused(hub: FakeHub, runs: LineageRuns, run: Path) -> None:
    with pytest.raises(ModelError, match="is a model of the Hub already"):
        push_model("someone/base", "me/medicine")
    with pytest.raises(StageError, match="is not a run"):
        push_model(run / "model", "me/medicine", license_name="mit")
    assert not hub.repositories


def test_errors_of_the_hub_name_what_to_do(hub: FakeHub, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(push, "HfApi", lambda: huggingface_hub.HfApi(endpoint=hub.endpoint, token="hf_" + "y" * 20))
    with pytest.raises(ServiceError, match="hf auth login"):
        push_model(run, "me/medicine")
    monkeypatch.setattr(push, "HfApi", lambda: huggingface_hub.HfApi(endpoint="http://127.0.0.1:9", token="x"))
    with pytest.raises(ServiceError, match="check the connection"):
        push_model(run, "me/medicine")

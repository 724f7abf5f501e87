"""Push a run's published model, or an exported folder, to the Hugging Face Hub."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import LocalTokenNotFoundError

from postgrad.commands.results import Result
from postgrad.errors import ModelError, PostgradError, ServiceError, StageError, first_line
from postgrad.foreign_text import mask_secrets
from postgrad.lineage.record import RECORD, Record, read_record
from postgrad.lineage.tree import read_ancestors
from postgrad.models.location import ModelLocation, locate_model
from postgrad.reports.pages.model_card import CARD, card_options, model_card
from postgrad.storage.read_json import MAX_BYTES, read_file

_REPOSITORY = r"[A-Za-z0-9](?:[\w.-]*[A-Za-z0-9])?/[A-Za-z0-9_](?:[\w.-]{0,94}[A-Za-z0-9_])?"


@dataclass(frozen=True)
class PushedModel(Result):
    """A model on the Hub."""

    repository: str
    url: str
    """Of the commit."""
    is_private: bool | None
    """None: the server did not say."""
    files: tuple[str, ...]
    bytes: int
    gate_failed: bool
    """The retention gate failed, and the model was pushed by `force`."""


def push_model(
    model: Path | str,
    repository: str,
    *,
    force: bool = False,
    update: bool = False,
    private: bool | None = None,
    license_name: str | None = None,
) -> PushedModel:
    """Upload the model of a finished run, or a folder, with its model card, to `owner/name` on the Hub.

    `force`: although the retention gate failed. `update`: into a repository that has files. `private`: of a new repository;
    by default what the Hub makes it, which is public unless the owner's settings say otherwise. Raises `StageError` for what
    is refused before anything is sent, and `ServiceError` for what the Hub refuses.
    """
    if not re.fullmatch(_REPOSITORY, repository, re.ASCII):
        raise StageError(f"{repository!r} is no name of a repository", where="REPOSITORY", expected="owner/name")
    start = locate_model(str(model), Path.cwd(), where="push")
    folder, record = _require_folder(start), _find_record(start)
    gate_failed = record is not None and record.status == "gate-failed"
    if gate_failed and not force:
        raise StageError(
            f"the retention gate of {model} failed: it forgot more than `max_forgetting` or `max_ability_drop` allows",
            where="push",
            hint=f"see {start.run}/report.html; --force pushes it all the same, and its model card says so",
        )
    operations = [
        CommitOperationAdd(str(path.relative_to(folder)), str(path))
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != CARD
    ]
    if (card := _make_card(start, folder, record, license_name)) is not None:
        operations.append(CommitOperationAdd(CARD, card.encode()))
    with _hub_errors(repository):
        api = HfApi()
        _refuse_existing(api, repository, update)
        api.create_repo(repository, private=private, exist_ok=True)
        title = f"{record.name if record else folder.name}, by postgrad"
        commit = api.create_commit(repository, operations, commit_message=title)
        is_private = api.model_info(repository).private
    names = tuple(operation.path_in_repo for operation in operations)
    size = sum(operation.upload_info.size for operation in operations)
    return PushedModel(repository, commit.commit_url, is_private, names, size, gate_failed)


def _require_folder(start: ModelLocation) -> Path:
    """The folder to upload. Raises `ModelError` for one that nobody else could load."""
    if start.folder is None:
        raise ModelError(f"{start.name} is a model of the Hub already", where="push", expected="a run or a folder")
    if start.base is not None and start.full_model.folder is not None:
        raise ModelError(
            f"{start.name} is an adapter of {start.full_model.folder.name}, a folder of this machine",
            where="push",
            expected="an adapter of a model on the Hub, or a full model",
            hint=f"postgrad export {start.name} FOLDER merges the two; then push FOLDER",
        )
    return start.folder


def _find_record(start: ModelLocation) -> Record | None:
    """The record whose scores are those of the folder: a run's, for its published model."""
    run = start.run
    is_published = run is not None and start.folder == run / "model" and (run / RECORD).exists()
    return read_record(run) if run is not None and is_published else None


def _make_card(start: ModelLocation, folder: Path, record: Record | None, license_name: str | None) -> str | None:
    """The card in the folder, which may have been edited; a new one when there is none, or a license is named."""
    if license_name is not None and record is None:
        raise StageError(f"{start.name} is not a run", where="--license", hint=f"name the license in {folder / CARD}")
    if record is None or start.run is None or ((folder / CARD).exists() and license_name is None):
        card = folder / CARD
        return read_file(card, MAX_BYTES, error=StageError).decode(errors="replace") if card.exists() else None
    return mask_secrets(model_card(record, read_ancestors(start.run, record), card_options(folder, license_name)))


def _refuse_existing(api: HfApi, repository: str, update: bool) -> None:
    """Raise `StageError` for a repository that has files, unless they may be replaced."""
    if update or not api.repo_exists(repository):
        return
    siblings = [file.rfilename for file in api.model_info(repository).siblings or ()]
    if any(name != ".gitattributes" for name in siblings):
        raise StageError(
            f"{repository} exists and has {len(siblings)} files",
            where="push",
            hint="choose another name, or add --update for a commit on top of them",
        )


@contextmanager
def _hub_errors(repository: str) -> Iterator[None]:
    """Inside, what the Hub or the network refuses is a `ServiceError`."""
    try:
        yield
    except PostgradError:
        raise
    except (OSError, ValueError, RuntimeError) as error:  # those of huggingface_hub and its HTTP client
        status = getattr(getattr(error, "response", None), "status_code", None)
        hint = "check the connection and HF_ENDPOINT; the same command tries again"
        if status in (401, 403) or isinstance(error, LocalTokenNotFoundError):
            hint = f"log in with `hf auth login`, with a token that may write to {repository.partition('/')[0]}"
        raise ServiceError(first_line(error), where=repository, hint=hint) from error
    except Exception as error:
        if not type(error).__module__.startswith(("httpx", "huggingface_hub", "httpcore")):
            raise
        raise ServiceError(first_line(error), where=repository, hint="check the connection and HF_ENDPOINT") from error

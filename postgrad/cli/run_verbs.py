"""Verbs that look after runs and this machine: track, push, runs, watch, doctor."""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from postgrad.cli.options import Json, License, print_result, require_training
from postgrad.errors import StageError


def track(
    run: Annotated[Path, typer.Argument(help="A run folder; the run may be going on, stopped or finished.")],
    to: Annotated[
        list[str] | None,
        typer.Option(help="tensorboard, wandb, mlflow or trackio; may be repeated. Default: `track` of the stage."),
    ] = None,
    project: Annotated[str | None, typer.Option(help="Project (MLflow: experiment). Default: postgrad.")] = None,
    address: Annotated[
        str | None, typer.Option(help="Server, tracking URI, Space or folder. Default: as for the key `track`.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Send a run's metrics, results and page to experiment trackers; what they have already is not sent again."""
    from postgrad.cli.render import tracking_text
    from postgrad.commands.track import track_run

    result = track_run(run, to or (), project=project, address=address)
    print_result(result, as_json, tracking_text(result))


def push(
    model: Annotated[str, typer.Argument(help="A finished run, or an exported folder.")],
    repository: Annotated[str, typer.Argument(help="The repository on the Hugging Face Hub, owner/name.")],
    private: Annotated[
        bool | None,
        typer.Option("--private/--public", help="Of a new repository. Default: the Hub's, which is public."),
    ] = None,
    license_name: License = None,
    force: Annotated[bool, typer.Option("--force", help="Although the retention gate failed.")] = False,
    update: Annotated[bool, typer.Option("--update", help="Commit on top of a repository that has files.")] = False,
    as_json: Json = False,
) -> None:
    """Upload a model with its model card to the Hugging Face Hub."""
    require_training()
    from postgrad.cli.render import push_text
    from postgrad.commands.push import push_model

    result = push_model(
        model, repository, force=force, update=update, private=private, license_name=license_name
    )  # fmt: skip
    print_result(result, as_json, push_text(result))


def runs(
    folder: Annotated[Path, typer.Argument(help="A folder with run folders.")] = Path("runs"),
    clean: Annotated[
        bool,
        typer.Option("--clean", help="Remove checkpoints and remains that finished runs no longer need; asks first."),
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="With --clean: do not ask.")] = False,
    as_json: Json = False,
) -> None:
    """List runs with their state, what they learned and forgot, and their size."""
    from postgrad.cli.render import runs_text
    from postgrad.commands.list_runs import clean_runs, list_runs
    from postgrad.hardware.memory import format_bytes

    found = list_runs(folder)
    if not clean:
        print_result(found, as_json, runs_text(found))
        return
    removable = [path for run in found.runs for path in run.removable]
    if removable and not yes:
        if as_json or not sys.stdin.isatty():
            raise StageError("nobody can be asked here", where="--clean", hint="add --yes")
        listed = "\n".join(f"  {path}" for path in removable)
        uses = "only branches, `moments: keep` and blend --average need them"
        question = f"{listed}\nRemove these, {format_bytes(found.removable_bytes)} ({uses})?"
        if not typer.confirm(question):
            raise typer.Exit(3)
    freed = clean_runs(found)
    text = f"removed {len(removable)} folders, {format_bytes(freed)}\nnext: postgrad runs {folder}"
    print_result({"removed": [str(path) for path in removable], "bytes": freed}, as_json, text)


def watch(
    folder: Annotated[Path, typer.Argument(help="A run folder, or a folder with run folders.")] = Path("runs"),
    port: Annotated[int, typer.Option(help="Port on this machine; 0 takes a free one.", min=0, max=65535)] = 8642,
    open_browser: Annotated[bool, typer.Option("--open", help="Open the address in a browser.")] = False,
    as_json: Json = False,
) -> None:
    """Show runs in a browser while they go on: their pages on this machine's loopback address, until Ctrl-C."""
    from postgrad.commands.watch import PageServer

    with PageServer(folder, port) as server:
        text = f"{folder}: {server.url} (only on this machine; Ctrl-C ends the server, not the runs)"
        print_result({"url": server.url}, as_json, text)
        sys.stdout.flush()
        if open_browser:
            typer.launch(server.url)
        with suppress(KeyboardInterrupt):
            server.serve()


def doctor(
    hub: Annotated[bool, typer.Option("--hub", help="Also ask the Hugging Face Hub (uses the network).")] = False,
    as_json: Json = False,
) -> None:
    """Check this machine and installation: versions, device, memory, bf16, compiler, disk, and what each verb lacks."""
    from postgrad.commands.doctor import check_machine

    result = check_machine(hub=hub)
    print_result(result, as_json, f"{result.text()}\nnext: postgrad demo")

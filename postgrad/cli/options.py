"""What the verbs of the command line share: options, renamed options, and how a result is printed. Imports nothing heavy."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from postgrad.cli.terminal import guard_streams
from postgrad.errors import MissingExtra, StageError

if TYPE_CHECKING:
    from postgrad.commands.results import Result

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Base = Annotated[
    str | None,
    typer.Option(help="Base model of an adapter's folder, if it has moved."),
]
Tasks = Annotated[
    Path | None,
    typer.Option(help="Evaluate the tasks of this YAML file: a list as under evaluation.tasks."),
]
Abilities = Annotated[
    str | None,
    typer.Option(help="Generated probes of abilities: all, or names such as copying,format,language."),
]
Items = Annotated[int, typer.Option(min=1, help="With --abilities: probes of each ability.")]
StageFile = Annotated[Path, typer.Argument(help="The stage file (YAML).")]
Overrides = Annotated[list[str] | None, typer.Argument(help="Any number of overrides, key.sub=value.")]
ModelArgument = Annotated[str, typer.Argument(help="A model folder, run, checkpoint or Hub name.")]
Report = Annotated[Path | None, typer.Option(help="Write an HTML page here.")]
License = Annotated[
    str | None,
    typer.Option("--license", help="License that the model card names, such as apache-2.0. Default: none."),
]
Context = Annotated[
    int | None,
    typer.Option(help="Tokens the model reads at once. Default: its own limit, up to 1024."),
]
DocumentUnit = Annotated[
    str, typer.Option(help="What a document is in a text file: auto, file, passages, paragraphs, lines.")
]
TextColumn = Annotated[str | None, typer.Option(help="The column that holds the text.")]

RENAMED_OPTIONS: Mapping[str, Mapping[str, str]] = {
    "restore": {"--until": "--min-recovered", "--keep": "--self-distill-share", "--rate": "--learning-rate"},
    "eval": {"--documents": "--document-unit", "--harness-tasks": "--harness-include"},
    "compare": {"--on": "--text"},
    "synthesize": {
        "--longest": "--max-tokens",
        "--beginning": "--prompt-tokens",
        "--at-once": "--batch-size",
        "--most-repeated": "--max-repetition",
        "--alike": "--dedup-threshold",
        "--shown": "--shots",
        "--keep": "--diverse-share",
    },
    "blend": {"--sweep": "--weights", "--by": "--granularity", "--choose": "--weight"},
    "importance": {"--documents": "--document-unit", "--onto": "--accumulate"},
    "generate": {"--tokens": "--max-new-tokens", "--beside": "--compare-with"},
    "export": {"--with": "--merge-with", "--how": "--method"},
}
"""Options of earlier versions, by verb, with their names now."""


class Verb(TyperCommand):
    """A command whose renamed options are errors that name the new option."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Raise `StageError` for a renamed option."""
        renamed = RENAMED_OPTIONS.get(self.name or "", {})
        for word in args:
            option = word.split("=", 1)[0]
            if option in renamed:
                raise StageError("no such option", where=option, hint=f"it is now {renamed[option]}")
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Run the verb with guarded streams."""
        with guard_streams():
            return super().invoke(ctx)


def require_training() -> None:
    """Raise `MissingExtra` when the packages that train are not installed."""
    for package in ("torch", "transformers", "safetensors", "tokenizers"):
        if find_spec(package) is None:
            raise MissingExtra(f"this command needs {package}", hint="pip install 'postgrad[train]'")


def check_report(report: Path | None) -> None:
    """Raise `StageError` for a page that would be a folder, before anything is measured."""
    if report and report.is_dir():
        raise StageError(f"{report} is a folder", where="--report", expected="a file for the page")


def command_line(*words: object) -> str:
    """A command as a shell reads it."""
    return shlex.join(["postgrad", *map(str, words)])


def this_command() -> str:
    """The command that was called."""
    return shlex.join(["postgrad", *sys.argv[1:]])


def stage_command(verb: str, stage: Path, overrides: Sequence[str] | None) -> str:
    """A verb on a stage with its overrides."""
    return command_line(verb, stage, *(overrides or []))


def print_result(result: Result | Mapping[str, object], as_json: bool, text: str) -> None:
    """Print a result as JSON, or in words."""
    if as_json:
        text = json.dumps(result if isinstance(result, Mapping) else result.as_dict(), indent=1)
    print(text)

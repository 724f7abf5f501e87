"""The command line: verbs that parse options, call one function of the library and render its result.

Exit codes: 0 done, 1 something failed, 2 bad usage or bad input, 3 stopped by the user, 4 the retention gate failed.
Nothing heavy is imported before a verb needs it.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from typing import Annotated

import typer

from postgrad.cli import measure_verbs, model_verbs, run_verbs, stage_verbs
from postgrad.cli.options import Verb
from postgrad.cli.streams import lasting_streams, stop_on_signals
from postgrad.cli.terminal import guard_streams
from postgrad.errors import InterruptError, PostgradError
from postgrad.version import __version__

_FIRST_RANK_SECONDS = 5.0
"""How long another rank waits for the first one to print an error of planning."""

app = typer.Typer(
    name="postgrad",
    help="Continue a language model's training on new text without forgetting, and measure both.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

for name, verb in (
    ("demo", stage_verbs.demo),
    ("init", stage_verbs.init),
    ("check", stage_verbs.check),
    ("train", stage_verbs.train),
    ("restore", stage_verbs.restore),
    ("advise", stage_verbs.advise),
    ("keep", stage_verbs.keep),
    ("eval", measure_verbs.evaluate),
    ("compare", measure_verbs.compare),
    ("shift", measure_verbs.shift),
    ("synthesize", model_verbs.synthesize),
    ("grow", model_verbs.grow),
    ("blend", model_verbs.blend),
    ("study", stage_verbs.study),
    ("probe", measure_verbs.probe),
    ("lineage", measure_verbs.lineage),
    ("report", stage_verbs.report),
    ("importance", measure_verbs.importance),
    ("generate", model_verbs.generate),
    ("export", model_verbs.export),
    ("push", run_verbs.push),
    ("track", run_verbs.track),
    ("runs", run_verbs.runs),
    ("watch", run_verbs.watch),
    ("doctor", run_verbs.doctor),
):
    app.command(name=name, cls=Verb)(verb)


@app.callback(invoke_without_command=True)
def _global_options(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        print(f"postgrad {__version__}")
        raise typer.Exit


def main() -> None:
    """Run the command line; errors of postgrad are printed without a traceback."""
    with stop_on_signals(), lasting_streams() as output_error:
        try:
            _run_guarded(app)
        finally:
            if error := output_error():
                print(f"error: standard output: {error.strerror}; the result is incomplete", file=sys.stderr)
                raise SystemExit(1)


def _run_guarded(run: Callable[[], object]) -> None:
    try:
        run()
    except PostgradError as error:
        if _is_reported_here(error):
            _print_error(f"error: {error}")
        raise SystemExit(error.exit_code) from None
    except SystemExit as ended:
        if ended.code == 130:  # typer's exit code for Ctrl-C
            print("stopped", file=sys.stderr)
            raise SystemExit(3) from None
        raise
    except (MemoryError, RuntimeError) as error:
        from postgrad.hardware.memory import is_out_of_memory

        if not is_out_of_memory(error):
            raise
        detail = (str(error).strip().splitlines() or ["no detail"])[0]
        print(
            f"error: out of memory: {detail}\n  hint:     a smaller model or batch, or shorter texts", file=sys.stderr
        )
        raise SystemExit(1) from None
    except OSError as error:  # a file that vanished, or that may not be read
        _print_error(f"error: {error.filename or 'the system'}: {error.strerror or error}")
        raise SystemExit(1) from None


def _is_reported_here(error: PostgradError) -> bool:
    """Whether this process prints an error: of several, one does.

    Before they form a group, each plans the stage by itself, and most likely all of them meet the same error. The first rank
    prints it and ends, and `torchrun` then stops the others; one of them prints its own when it is still there after a while.
    """
    rank = int(os.environ.get("RANK", "0"))
    if error.reported_by is not None or rank == 0:
        return error.reported_by in (None, rank)
    if isinstance(error, InterruptError):  # each rank was stopped
        return False
    try:
        time.sleep(_FIRST_RANK_SECONDS)
    except KeyboardInterrupt:  # the signal of `torchrun`
        return False
    return True


def _print_error(text: str) -> None:
    with guard_streams():
        print(text, file=sys.stderr)


if __name__ == "__main__":
    main()

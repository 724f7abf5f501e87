"""Few-shot demonstrations of tasks: training rows, without copies of test rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from postgrad.config.tasks import TaskConfig
from postgrad.data.read.documents import detect_kind, read_examples
from postgrad.data.read.examples import Example
from postgrad.data.read.files import RawSource
from postgrad.data.render.demonstrations import Demonstrations, RetrievalMethod
from postgrad.data.render.renderer import Renderer
from postgrad.data.tokens.store import digest
from postgrad.errors import DataError
from postgrad.plan.prompt_format import PromptFormat

_RETRIEVAL_METHODS: Mapping[str, RetrievalMethod] = {"random": "once", "balanced": "balanced", "bm25": "bm25"}

LocatedExample = tuple[Example, str]
"""An example and its location, such as `file:line`."""


def add_location(error: DataError, location: str) -> DataError:
    """The error with the location of its row, unless it has one."""
    return DataError(error.problem, where=error.where or location, expected=error.expected, hint=error.hint)


def read_task_rows(files: RawSource, where: str) -> list[LocatedExample]:
    """All rows of a file. Raises `DataError` for a file without any."""
    rows = list(read_examples(files))
    if not rows:
        raise DataError("the file has no rows", where=where, expected="rows with answers, labels or choices")
    return rows


def make_demonstration_pool(
    task: TaskConfig,
    test_files: RawSource,
    test_rows: Sequence[LocatedExample],
    prompt_format: PromptFormat,
    where: str,
) -> tuple[list[LocatedExample], list[str]]:
    """Training rows for demonstrations, each once and none a copy of a test row; with a note on removed copies."""
    if task.few_shot is None or not task.shots:
        return [], []
    files = replace(test_files, name=f"{task.name}.shown", path=task.few_shot.path, where=where)
    test_kind, kind = detect_kind(test_files), detect_kind(files)
    if kind != test_kind:
        raise DataError(
            f"demonstrations are rows of kind `{kind}`, and test rows of kind `{test_kind}`",
            where=where,
            expected="rows of the same kind",
        )
    test_digests = {mark for example, _ in test_rows for mark in _row_digests(example, prompt_format)}
    pool: list[LocatedExample] = []
    pool_digests: set[int] = set()
    copies = 0
    for example, location in read_task_rows(files, where):
        try:
            digests = _row_digests(example, prompt_format)
        except DataError as error:
            raise add_location(error, location) from None
        if test_digests & digests:
            copies += 1
        elif not pool_digests & digests:
            pool.append((example, location))
            pool_digests |= digests
    if len(pool) < task.shots:
        raise DataError(
            f"{task.shots} shots need as many rows, and there are {len(pool):,}"
            + (f" ({copies:,} more are copies of test rows)" if copies else ""),
            where=where,
            expected="at least as many different training rows as shots",
            hint="take demonstrations from another file than the test file" if copies else "",
        )
    return pool, [f"{task.name}: {copies:,} copies of test rows are not used as demonstrations"] if copies else []


def _row_digests(example: Example, prompt_format: PromptFormat) -> set[int]:
    """Hashes of which one in common makes two rows copies: of the whole row, and of its question as rendered."""
    return {digest(example.text.encode()), digest(prompt_format.question(example).encode())}


def make_demonstration_samplers(
    task: TaskConfig, renderer: Renderer, pool: Sequence[LocatedExample]
) -> list[Callable[[Example], Sequence[Example]]]:
    """For each prompt seed, the function that draws a row's demonstrations."""
    if task.few_shot is None or not task.shots:
        return [lambda _: ()]
    examples, method = [example for example, _ in pool], _RETRIEVAL_METHODS[task.few_shot.sampler]
    return [
        Demonstrations(renderer, examples, task.shots, method, 0, len, seed=seed).select for seed in range(task.seeds)
    ]

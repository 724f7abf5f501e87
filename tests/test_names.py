"""Definitions carry nouns and verbs of the field, not everyday words."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "postgrad"

EVERYDAY = frozenset(
    [
        "about",
        "afterwards",
        "alike",
        "alone",
        "answering",
        "apart",
        "asked",
        "asking",
        "behind",
        "beside",
        "besides",
        "between",
        "carried",
        "choosing",
        "drawn",
        "drifting",
        "found",
        "given",
        "gone",
        "held",
        "kept",
        "knew",
        "left",
        "looked",
        "looks",
        "made",
        "meant",
        "met",
        "moving",
        "opened",
        "parted",
        "plainly",
        "reading",
        "said",
        "says",
        "settled",
        "shown",
        "sitting",
        "spoken",
        "standing",
        "stands",
        "taken",
        "telling",
        "told",
        "wanted",
        "weighed",
        "wished",
        "wish",
        "wishes",
        "worded",
        "worth",
    ]
)
"""Words that a definition may not consist of: they stand where the field has a noun."""

PRIVATE_IDIOM = frozenset(
    ["told", "said", "asked", "meant", "besides", "beside", "stands", "wanted", "wished", "worded", "weighed"]
)
"""Words that a definition may not contain."""

ALLOWED = frozenset({"kept", "left"})
"""Plain terms among them: documents that are kept and dropped, the left side of a chart or of padding."""


def definitions(source: str) -> Iterator[tuple[str, int]]:
    """Names of classes, functions, methods, parameters, and fields of classes, with their lines."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ClassDef):
            yield node.name, node.lineno
            for item in node.body:
                if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
                    yield item.target.id, item.lineno
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name, node.lineno
            arguments = node.args
            for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs):
                yield argument.arg, argument.lineno


def everyday_names(source: str) -> list[str]:
    """Definitions that are named by everyday words."""
    return [f"{line}: {name}" for name, line in definitions(source) if is_everyday(name)]


def is_everyday(name: str) -> bool:
    words = [word.lower() for word in name.strip("_").split("_")]
    bare = "_".join(word for word in words if len(word) > 1 or len(words) == 1)  # shape suffixes have one letter
    return (bare in EVERYDAY and bare not in ALLOWED) or bool(PRIVATE_IDIOM & set(words))


def test_definitions_are_named_in_the_fields_words() -> None:
    found = [
        f"{path.relative_to(PACKAGE)}:{name}"
        for path in sorted(PACKAGE.rglob("*.py"))
        for name in (*everyday_names(path.read_text()), *([path.stem] if is_everyday(path.stem) else []))
    ]
    assert not found, "\n".join(found)


def test_everyday_names_are_found() -> None:
    source = "class Told:\n    met: int\n\n    def wanted(self, besides): ...\n\n\ndef read_hidden_states(): ...\n"
    assert [name.partition(": ")[2] for name in everyday_names(source)] == ["Told", "met", "wanted", "besides"]


def test_class_names_stand_for_one_thing_each() -> None:
    places: dict[str, list[str]] = {}
    for path in PACKAGE.rglob("*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef):
                places.setdefault(node.name, []).append(str(path.relative_to(PACKAGE)))
    shared = {name: files for name, files in places.items() if len(files) > 1}
    assert len(shared) <= 4, shared


def test_file_names_are_used_once() -> None:
    """But where the folder is the subject: the verb of `commands/` and its page, say."""
    subjects = {"commands", "cli", "pages", "sections", "charts", "check"}
    places: dict[str, list[Path]] = {}
    for path in PACKAGE.rglob("*.py"):
        if path.name != "__init__.py" and path.parent.name not in subjects:
            places.setdefault(path.name, []).append(path.relative_to(PACKAGE))
    assert {name: files for name, files in places.items() if len(files) > 1} == {}

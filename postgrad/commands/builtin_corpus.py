"""Built-in corpora: texts and rows of every kind, made offline from the running Python installation.

Old text: English documentation (the language reference that `help()` shows, and docstrings). New text: the standard library's
source code with its docstrings and comments taken out; whole modules are held out, so that no document's neighbour is trained
on. Rows: what a function does, which part of the library it is from, which words of its docstring are its parameters.
"""

from __future__ import annotations

import ast
import dis
import io
import json
import random
import re
import sysconfig
import tokenize
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import CodeType
from typing import Any

from postgrad.storage.atomic import write_atomically
from postgrad.storage.checked_files import read_cached_json, write_checked_json

_DOCUMENT_CHARACTERS = 2000
_HELD_OUT_EVERY = 15
_SKIPPED_FOLDERS = "site-packages dist-packages test tests idlelib lib2to3 pydoc_data encodings __pycache__"
_LISTING_CHARACTERS = 16_000
"""Maximum characters of a module's bytecode listing, which is several times as long as its source."""


def write_texts(folder: Path) -> dict[str, int]:
    """Write old and new text, each split into training and held-out documents; returns their characters."""
    done = folder / "sizes.json"
    if known := read_cached_json(done, dict[str, int]):
        return known
    texts: dict[str, list[str]] = {"old": [], "old-heldout": [], "new": [], "new-heldout": []}
    for number, _, source, module in _parsed_modules():
        held = _held_out_suffix(number)
        texts[f"old{held}"] += extract_docstrings(module)
        texts[f"new{held}"] += split_documents(strip_prose(source))
    texts["old"] += language_reference()
    sizes = {"old": 0, "new": 0}
    for name, documents in texts.items():
        unique = list(dict.fromkeys(documents))
        write_atomically(folder / f"{name}.jsonl", _json_lines(unique[:120] if "heldout" in name else unique))
        sizes[name.split("-")[0]] += sum(map(len, unique))
    write_checked_json(done, sizes)
    return sizes


def write_corpus(folder: Path) -> dict[str, int]:
    """Write four kinds of text, each split into training and held-out documents; returns their characters.

    `old`: documentation. `comments`: what is said beside code, prose of another kind. `code`: code without prose, also as three
    parts. `listing`: what the interpreter makes of it. Whole modules are held out of all kinds alike.
    """
    done = folder / "kinds.json"
    if known := read_cached_json(done, dict[str, int]):
        return known
    kinds = ("old", "comments", "code", "listing")
    texts: dict[str, list[str]] = {f"{kind}{held}": [] for kind in kinds for held in ("", "-heldout")}
    texts |= {f"code-{part}": [] for part in (1, 2, 3)}
    for number, _, source, module in _parsed_modules():
        held = _held_out_suffix(number)
        code = split_documents(strip_prose(source))
        texts[f"old{held}"] += extract_docstrings(module)
        texts[f"comments{held}"] += split_documents(extract_comments(source))
        texts[f"code{held}"] += code
        if not held:
            texts[f"code-{number % 3 + 1}"] += code
        texts[f"listing{held}"] += split_documents(disassemble(source))
    texts["old"] += language_reference()
    sizes = {}
    for name, documents in texts.items():
        unique = list(dict.fromkeys(documents))
        # Of a module's neighbouring documents few are scored, so that many modules are.
        kept = _subsample(unique, 150) if "heldout" in name else unique
        write_atomically(folder / f"{name}.jsonl", _json_lines(kept))
        sizes[name] = sum(map(len, kept))
    write_checked_json(done, sizes)
    return sizes


def is_builtin_corpus(folder: Path) -> bool:
    """Whether a folder is a complete output of `write_corpus`, so that overwriting it loses nothing of the user's."""
    return (folder / "kinds.json").exists()


def _held_out_suffix(number: int) -> str:
    """Whole modules are held out, so that no document's neighbour is trained on."""
    return "" if number % _HELD_OUT_EVERY else "-heldout"


def _subsample(documents: list[str], limit: int) -> list[str]:
    """At most so many documents, evenly spaced."""
    stride = max(1, -(-len(documents) // limit))
    return documents[::stride]


def extract_comments(source: str) -> str:
    """The comments of a module that have lines of their own, block by block."""
    found = [line.strip().lstrip("#").strip() for line in source.splitlines() if line.strip().startswith("#")]
    return "\n".join(line for line in found if re.search(r"[A-Za-z]{3}.* [a-z]{2}", line))


def disassemble(source: str) -> str:
    """The beginning of a module's bytecode, one instruction per line, without addresses."""
    lines: list[str] = []
    inside = [compile(source, "module", "exec")]
    size = 0
    while inside and size < _LISTING_CHARACTERS:
        code = inside.pop(0)
        lines.append(f"{code.co_name}:")
        for instruction in dis.get_instructions(code):
            shown = "" if " at 0x" in instruction.argrepr else instruction.argrepr[:60]
            lines.append(f"{instruction.opname} {shown}".rstrip())
            size += len(lines[-1])
        inside += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    return "\n".join(lines)


def _json_lines(documents: list[str]) -> str:
    return "".join(json.dumps({"text": d}, ensure_ascii=False) + "\n" for d in documents)


def standard_library_files() -> list[Path]:
    """The source files of the running Python's standard library, without tests and installed packages."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = set(_SKIPPED_FOLDERS.split())
    return [p for p in sorted(root.rglob("*.py")) if not skipped & set(p.relative_to(root).parts)]


def _parsed_modules() -> Iterator[tuple[int, Path, str, ast.Module]]:
    """Each module that this Python can parse: its number among all, its file, its source and its syntax tree."""
    for number, path in enumerate(standard_library_files()):
        try:
            source = path.read_text("utf-8")
            module = ast.parse(source)
        except (SyntaxError, ValueError, UnicodeDecodeError, RecursionError):
            continue
        yield number, path, source, module


def language_reference() -> list[str]:
    """The language reference shown by `help('if')`."""
    try:
        from pydoc_data.topics import topics as known
    except ImportError:  # some distributions leave it out
        return []
    return [piece for text in known.values() for piece in split_documents(text)]


def extract_docstrings(module: ast.Module) -> list[str]:
    """The docstrings of a module that are prose of some length."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = [ast.get_docstring(node) for node in ast.walk(module) if isinstance(node, kinds)]
    return [piece for text in found if text and len(text) > 200 for piece in split_documents(text)]


def strip_prose(source: str) -> str:
    """Source code without comments and docstrings."""
    kept: list[tokenize.TokenInfo] = []
    try:
        tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
    except (tokenize.TokenError, IndentationError):
        return ""
    fresh = True
    for token in tokens:
        if token.type == tokenize.COMMENT:
            continue
        if token.type == tokenize.STRING and fresh:
            continue
        if token.type not in (tokenize.NL, tokenize.INDENT, tokenize.DEDENT):
            fresh = token.type == tokenize.NEWLINE
        kept.append(token)
    lines: dict[int, list[str]] = {}
    column: dict[int, int] = {}
    for token in kept:
        if token.type in (tokenize.INDENT, tokenize.DEDENT, tokenize.NEWLINE, tokenize.NL, tokenize.ENDMARKER):
            continue
        row, begin = token.start
        gap = begin - column.get(row, 0)
        lines.setdefault(row, []).append(" " * max(gap, 0) + token.string)
        column[row] = token.end[1] if token.end[0] == row else begin
    return "\n".join("".join(parts).rstrip() for _, parts in sorted(lines.items()))


def split_documents(text: str) -> list[str]:
    """Pieces of about 2,000 characters, cut at line ends."""
    pieces, piece, size = [], [], 0
    for line in text.splitlines():
        piece.append(line)
        size += len(line) + 1
        if size > _DOCUMENT_CHARACTERS:
            pieces.append("\n".join(piece).strip())
            piece, size = [], 0
    if size > 200:
        pieces.append("\n".join(piece).strip())
    return [p for p in pieces if p]


# -- rows -------------------------------------------------------------------------------------------------------------

LIBRARY_PARTS: Mapping[str, str] = {
    "network": "http urllib email socket ssl ftplib imaplib smtplib poplib xmlrpc socketserver",
    "files": "os shutil pathlib zipfile tarfile glob tempfile gzip bz2 lzma posixpath ntpath",
    "numbers": "statistics decimal _pydecimal fractions random datetime _pydatetime calendar numbers",
    "concurrency": "asyncio threading concurrent multiprocessing queue subprocess sched selectors",
    "language": "ast inspect dis tokenize typing types importlib pdb bdb traceback unittest",
}
"""Parts of the standard library by the first names of their modules: the classes of the labelled rows."""
_MIN_SUMMARY, _MAX_SUMMARY = 20, 200


@dataclass(frozen=True)
class DocumentedFunction:
    """A documented function: its module, signature, and the first sentence of its docstring."""

    module: str
    name: str
    parameters: tuple[str, ...]
    summary: str
    description: str
    """The first paragraph of its docstring."""
    held_out: bool


Rows = Iterator[tuple[DocumentedFunction, dict[str, Any]]]
"""Rows with the functions that they are of."""


@cache
def documented_functions() -> tuple[DocumentedFunction, ...]:
    """The documented functions of the standard library, without duplicates; a fifth of them is held out."""
    return tuple({function.summary: function for function in _iter_functions()}.values())


def _iter_functions() -> Iterator[DocumentedFunction]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for _, path, _, module in _parsed_modules():
        named = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
        for name, node in _qualified_functions(module):
            if node.name.startswith("_"):
                continue
            about = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
            says = re.split(r"(?<=[a-z)`'\"])\. ", about)[0].rstrip(".")
            if _MIN_SUMMARY <= len(says) <= _MAX_SUMMARY:
                arguments = (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
                parameters = tuple(a.arg for a in arguments if a.arg not in ("self", "cls"))
                held_out = zlib.crc32(f"{named}.{name}".encode()) % 5 == 0
                yield DocumentedFunction(named, name, parameters, f"{says}.", about, held_out)


def _qualified_functions(module: ast.Module) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """The functions and methods of a module by qualified name; the first of each name."""
    seen: set[str] = set()
    inside: list[tuple[str, ast.AST]] = [("", module)]
    while inside:
        before, node = inside.pop(0)
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef):
                inside.append((f"{before}{child.name}.", child))
            elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                name = before + child.name
                if name not in seen:
                    seen.add(name)
                    yield name, child


def _instruction_rows(functions: Sequence[DocumentedFunction], _: random.Random) -> Rows:
    for f in functions:
        yield f, {"instruction": f"What does {f.module}.{f.name} do?", "output": f.summary}


def _labelled_rows(functions: Sequence[DocumentedFunction], _: random.Random) -> Rows:
    part = {module: name for name, modules in LIBRARY_PARTS.items() for module in modules.split()}
    for f in functions:
        if (name := part.get(f.module.split(".")[0])) is not None:
            yield f, {"text": f.description, "label": name}


def _tagged_rows(functions: Sequence[DocumentedFunction], _: random.Random) -> Rows:
    for f in functions:
        words = re.findall(r"\w+|[^\w\s]", f.description)
        tags = ["B-PARAMETER" if word in f.parameters else "O" for word in words]
        if "B-PARAMETER" in tags and len(words) <= 60:
            yield f, {"tokens": words, "tags": tags}


def _pair_rows(functions: Sequence[DocumentedFunction], _: random.Random) -> Rows:
    for f in functions:
        signature = f"{f.name.rpartition('.')[2]}({', '.join(f.parameters)})"
        yield f, {"source": f"summarise: def {signature}", "target": f.summary}


def _choice_rows(functions: Sequence[DocumentedFunction], rng: random.Random) -> Rows:
    for f in functions:
        others = [other.summary for other in rng.sample(functions, 6) if other.summary != f.summary][:3]
        options = [*others, f.summary]
        rng.shuffle(options)
        question = f"What does {f.module}.{f.name} do?"
        yield f, {"question": question, "choices": options, "answer": options.index(f.summary)}


ROW_GENERATORS = {
    "instructions": _instruction_rows,
    "labelled": _labelled_rows,
    "tagged": _tagged_rows,
    "pairs": _pair_rows,
    "choices": _choice_rows,
}
"""Row makers by the name of their files: NAME.train.jsonl, NAME.valid.jsonl, NAME.test.jsonl."""


def write_rows(folder: Path, name: str) -> None:
    """Write the rows `name` in three files; held-out functions alternate between validation and test."""
    places = {part: folder / f"{name}.{part}.jsonl" for part in ("train", "valid", "test")}
    if all(place.exists() for place in places.values()):
        return
    known = documented_functions()
    lines: dict[str, list[str]] = {part: [] for part in places}
    for number, (f, row) in enumerate(ROW_GENERATORS[name](known, random.Random(0))):
        part = ("valid" if number % 2 else "test") if f.held_out else "train"
        lines[part].append(json.dumps(row, ensure_ascii=False))
    for part, place in places.items():
        random.Random(1).shuffle(lines[part])
        write_atomically(place, "".join(line + "\n" for line in lines[part]))

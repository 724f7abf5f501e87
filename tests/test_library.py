"""The Python library: light to import, complete, documented, and free of untyped dictionaries; its page and notebook run."""

from __future__ import annotations

import ast
import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import postgrad

ROOT = Path(__file__).parents[1]
HEAVY = {
    "torch",
    "transformers",
    "tokenizers",
    "numpy",
    "datasets",
    "pyarrow",
    "safetensors",
    "scipy",
    "sklearn",
    "pydantic",
}


def run(program: str, folder: Path, **environment: str) -> str:
    """The output of a program in a process of its own."""
    settings = {**os.environ, "PYTHONPATH": str(ROOT), "POSTGRAD_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=folder, env={**settings, **environment}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_import_is_light(tmp_path: Path) -> None:
    program = "import sys, postgrad; assert postgrad.__all__; print(sorted(set({}) & set(sys.modules)))"
    assert run(program.format(sorted(HEAVY)), tmp_path).strip() == "[]"
    loaded = run("import sys, postgrad; postgrad.train; print('torch' in sys.modules)", tmp_path)
    assert loaded.strip() == "True"  # the same check finds torch once a name needs it


def test_editors_see_every_name() -> None:
    """The block for type checkers and the table for lazy loading list the same names of the same modules."""
    tree = ast.parse(inspect.getsource(postgrad))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    typed = {
        alias.name: node.module.removeprefix("postgrad.")
        for node in block.body
        if isinstance(node, ast.ImportFrom) and node.module
        for alias in node.names
    }
    assert typed == postgrad._MODULES
    assert set(postgrad.__all__) == {*typed, "__version__"} == set(dir(postgrad))
    with pytest.raises(AttributeError, match="no attribute 'polish'"):
        postgrad.polish  # noqa: B018


@pytest.mark.parametrize("name", [name for name in postgrad.__all__ if name != "__version__"])
def test_what_is_public_is_documented_and_typed(name: str) -> None:
    value: Any = getattr(postgrad, name)
    if inspect.isfunction(value):
        signature = str(inspect.signature(value))
        assert value.__doc__ and "->" in signature
        assert "dict[str, Any]" not in signature and "Any" not in signature, signature
        assert not re.search(r"\bprint\(", inspect.getsource(inspect.getmodule(value) or value))
    elif inspect.isclass(value):
        assert value.__doc__
        if value.__module__.startswith("postgrad.commands"):
            for field, annotation in inspect.get_annotations(value).items():
                assert "Any" not in str(annotation), f"{name}.{field}: {annotation}"


@pytest.fixture
def texts(base: Path, tmp_path: Path) -> Path:
    """A working directory with the files that the page names."""
    for entry in base.iterdir():
        os.symlink(entry, tmp_path / entry.name)
    return tmp_path


def test_the_snippets_of_the_page_run(texts: Path) -> None:
    page = (ROOT / "docs" / "python.md").read_text()
    snippets = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    out = run("\n".join(snippets), texts)
    assert "nats per token" in out and "LlamaForCausalLM causal" in out and (texts / "code-model").exists()
    listed = set(re.findall(r"`(\w+)`", page[page.index("## Everything") :]))
    functions = {name for name in postgrad.__all__ if inspect.isfunction(getattr(postgrad, name))}
    assert listed >= functions - {"finish"}


@pytest.mark.slow
def test_the_notebook_runs(tmp_path: Path) -> None:
    """With a hundredth of its tokens."""
    cells = json.loads((ROOT / "examples" / "forgetting.ipynb").read_text())["cells"]
    assert not any(cell.get("outputs") for cell in cells)
    program = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    out = run(program, tmp_path, FORGETTING_FOLDER=str(tmp_path / "demo"), FORGETTING_SCALE="0.01")
    assert (
        "english: replay - naive" in out and "bits per byte" in out and (tmp_path / "demo" / "comparison.html").exists()
    )

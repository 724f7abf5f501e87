"""No code of a model's repository runs, and nobody is asked whether it may.

Each folder has a module that leaves a file when it runs, and standard input says yes.
"""

from __future__ import annotations

import ast
import builtins
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import dynamic_module_utils

import postgrad
from postgrad.errors import ModelError
from postgrad.models import auto_classes
from postgrad.models.location import ModelLocation
from postgrad.models.pretrained import detect_task, load_model, load_tokenizer, save_pretrained
from tests.conftest import make_llama, make_tokenizer

PACKAGE = Path(postgrad.__file__).parent
ONLY_PLACE = "models/auto_classes.py"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model folder with modules that leave `ran` beside it; a question is answered with yes."""
    save_pretrained(make_llama(), make_tokenizer(), tmp_path / "m", dtype=torch.float32)
    mark = f"import pathlib; pathlib.Path({str(tmp_path / 'ran')!r}).touch()\n"
    for name in ("own.py", "custom_generate/generate.py"):
        (tmp_path / "m" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "m" / name).write_text(
            f"{mark}from transformers import LlamaConfig as Own, LlamaForCausalLM as Model\n"
        )
    monkeypatch.setattr(builtins, "input", lambda *_: "y")
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    return tmp_path / "m"


def change(path: Path, **changes: Any) -> None:
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**content, **changes}))


FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "an unknown architecture": ("config.json", {"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}),
    "a known architecture": ("config.json", {"auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Model"}}),
    "code of another repository": ("config.json", {"auto_map": {"AutoConfig": "owner/name--own.Own"}}),
    "a configuration inside": ("config.json", {"text_config": {"auto_map": {"AutoConfig": "own.Own"}}}),
    "a tokenizer": ("tokenizer_config.json", {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": [None, "own.Own"]}}),
    "a tokenizer, earlier format": ("tokenizer_config.json", {"tokenizer_class": "Own", "auto_map": [None, "own.Own"]}),
    "an attention kernel": ("config.json", {"attn_implementation": "owner/kernel"}),
    "an attention kernel, other key": ("config.json", {"_attn_implementation": "owner/kernel:forward"}),
    "a kernel of experts": ("config.json", {"experts_implementation": {"": "owner/kernel"}}),
}  # fmt: skip

OPENERS: dict[str, Callable[[ModelLocation], object]] = {
    "config.json": load_model,
    "tokenizer_config.json": load_tokenizer,
}


@pytest.mark.parametrize("form", FORMS)
def test_a_model_that_names_code_is_refused(form: str, folder: Path) -> None:
    file, changes = FORMS[form]
    change(folder / file, **changes)
    start = ModelLocation("m", folder)
    with pytest.raises(ModelError, match="never run") as caught:
        OPENERS[file](start)
    assert caught.value.hint
    if file == "config.json":
        for opener in (detect_task, load_tokenizer):
            with pytest.raises(ModelError, match="never run"):
                opener(start)
    assert not (folder.parent / "ran").exists()


def test_code_for_generation_beside_a_model_does_not_run(folder: Path) -> None:
    model: Any = load_model(ModelLocation("m", folder))
    model.generate(torch.ones(1, 2, dtype=torch.long), max_new_tokens=1, pad_token_id=0)
    assert not (folder.parent / "ran").exists()


def test_a_configuration_chooses_no_implementation(folder: Path) -> None:
    change(folder / "config.json", attn_implementation="flash_attention_2")
    assert load_model(ModelLocation("m", folder)).config._attn_implementation == "sdpa"


def test_an_adapter_beside_a_model_is_not_loaded_by_transformers(folder: Path) -> None:
    """Transformers would load the adapter, and for a folder without config.json the base that it names."""
    (folder / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": "owner/name", "peft_type": "LORA"})
    )
    loaded = load_model(ModelLocation("m", folder))
    assert torch.equal(loaded.get_input_embeddings().weight, make_llama().get_input_embeddings().weight)


def test_without_the_guards_the_code_runs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutant: transformers asks, the answer is yes, and the module runs."""
    file, changes = FORMS["an unknown architecture"]
    change(folder / file, **changes)
    monkeypatch.setattr(auto_classes, "_refuse_foreign_code", lambda *_: None)
    with pytest.raises(ModelError, match="custom code"):
        detect_task(ModelLocation("m", folder))
    assert not (folder.parent / "ran").exists()
    monkeypatch.setattr(auto_classes, "_NO_CODE", {})
    monkeypatch.setattr(transformers.LlamaConfig, "_auto_class", None)  # which loading by code sets for good
    detect_task(ModelLocation("m", folder))
    assert (folder.parent / "ran").exists()


OPENING = {"from_pretrained", "from_config", "_from_config", "get_config_dict", "hf_hub_download", "snapshot_download"}
AUTO = {
    "AutoConfig",
    "AutoTokenizer",
    "AutoProcessor",
    "PeftModel",
    "PeftConfig",
    "AutoPeftModel",
    "pipeline",
}


def opening_places(source: str) -> Iterator[int]:
    """Lines of a module that open a model's files by transformers, PEFT or the Hub."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and node.attr in OPENING:
            owner = node.value
            if not (isinstance(owner, ast.Call) and isinstance(owner.func, ast.Name) and owner.func.id == "super"):
                yield node.lineno
        elif isinstance(node, ast.ImportFrom) and any(alias.name in AUTO | OPENING for alias in node.names):
            yield node.lineno


def test_one_place_opens_models() -> None:
    places = {
        f"{file.relative_to(PACKAGE)}:{line}"
        for file in PACKAGE.rglob("*.py")
        for line in opening_places(file.read_text())
    }
    assert {place.rpartition(":")[0] for place in places} == {ONLY_PLACE}, sorted(places)


@pytest.mark.parametrize(
    "source",
    ["AutoModel.from_pretrained(x)", "cls().from_config(c)", "from transformers import AutoConfig"],
)
def test_the_search_finds_another_place(source: str) -> None:
    assert list(opening_places(source)) == [1]


def test_the_only_place_passes_no_code_everywhere() -> None:
    calls = [
        node
        for node in ast.walk(ast.parse((PACKAGE / ONLY_PLACE).read_text()))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in OPENING - {"get_config_dict"}
    ]
    assert len(calls) == 5
    for call in calls:
        assert any(k.arg is None and isinstance(k.value, ast.Name) and k.value.id == "_NO_CODE" for k in call.keywords)
    assert auto_classes._NO_CODE == {"trust_remote_code": False}

"""Broken and hostile folders of models and tunings: each ends in an error of ours that names the file, and soon."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from postgrad.errors import ModelError, PostgradError, TuningError
from postgrad.models import config_limits
from postgrad.models.location import locate_model
from postgrad.models.pretrained import load_tokenizer, save_pretrained
from postgrad.tuning.adapter_folder import save_tuning
from postgrad.tuning.attach import attach
from postgrad.tuning.open_model import open_model
from tests.conftest import make_llama, make_tokenizer
from tests.tiny_models import bert_tokenizer, make_bert, make_t5, t5_tokenizer

FRAME = {"prefix_ids": [], "separator_ids": [], "suffix_ids": []}


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, a LoRA of ours, and the same as PEFT's two files alone; an encoder and an encoder-decoder."""
    folder = tmp_path_factory.mktemp("shelf")
    save_pretrained(make_llama(), make_tokenizer(), folder / "base", dtype=torch.float32)
    for name, make, tokenizer in (("bert", make_bert, bert_tokenizer()), ("t5", make_t5, t5_tokenizer())):
        save_pretrained(make(len(tokenizer)), tokenizer, folder / name, dtype=torch.float32)
    tuning = attach(make_llama(), {"kind": "lora", "rank": 2})
    (folder / "ours").mkdir()
    base = {"name": str(folder / "base"), "relative": "../base", "task": "causal", "frame": FRAME, "base_of_base": None}
    save_tuning(tuning, folder / "ours", base)
    (folder / "peft").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / "peft" / name).write_bytes((folder / "ours" / name).read_bytes())
    return folder


def copy(folder: Path, to: Path) -> Path:
    """A copy of a folder beside a copy of the base."""
    for source in (folder, folder.parent / "base"):
        (to / source.name).mkdir(parents=True, exist_ok=True)
        for file in source.iterdir():
            (to / source.name / file.name).write_bytes(file.read_bytes())
    return to / folder.name


def open_all(folder: Path) -> None:
    """Open a folder as a model, and run it."""
    start = locate_model(str(folder), folder.parent)
    load_tokenizer(start)
    opened = open_model(start)
    ids = torch.ones(1, 4, dtype=torch.long)
    decoder = {"decoder_input_ids": ids} if opened.model.config.is_encoder_decoder else {}
    with torch.no_grad():
        opened.model(input_ids=ids, **decoder)


def change(file: str, *path: str | int, to: Any) -> Callable[[Path], None]:
    """A change of one value in a JSON file; the value `KeyError` removes it."""

    def apply(folder: Path) -> None:
        content = json.loads((folder / file).read_text())
        place = content
        for key in path[:-1]:
            place = place[key]
        if to is KeyError:
            del place[path[-1]]
        else:
            place[path[-1]] = to
        (folder / file).write_text(json.dumps(content))

    return apply


def write(file: str, data: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / file).write_bytes(data) and None


def cut(file: str) -> Callable[[Path], None]:
    return lambda folder: (folder / file).write_bytes((folder / file).read_bytes()[:-7]) and None


OURS, PEFT, CONFIG = "tuning.json", "adapter_config.json", "config.json"
NESTED = b'{"a": ' + b"[" * 5000 + b"]" * 5000 + b"}"
FORMS: dict[str, tuple[str, Callable[[Path], None]]] = {
    # a description of ours
    "no JSON": ("ours", write(OURS, b"{")),
    "a list": ("ours", write(OURS, b"[]")),
    "a number": ("ours", write(OURS, b"7")),
    "no bytes": ("ours", write(OURS, b"")),
    "no text": ("ours", write(OURS, bytes(range(128, 256)))),
    "nested": ("ours", write(OURS, NESTED)),
    "no base": ("ours", change(OURS, "base", to=KeyError)),
    "a base that is text": ("ours", change(OURS, "base", to="../base")),
    "a base that is a list": ("ours", change(OURS, "base", to=[])),
    "a base without a name": ("ours", change(OURS, "base", "name", to=KeyError)),
    "a name that is a number": ("ours", change(OURS, "base", "name", to=1)),
    "a relative path that is a number": ("ours", change(OURS, "base", "relative", to=1)),
    "a NUL in the path": ("ours", change(OURS, "base", "relative", to="a\0b")),
    "a long path": ("ours", change(OURS, "base", "relative", to="a" * 5000)),
    "its own base": ("ours", change(OURS, "base", "relative", to="../ours")),
    "an unknown task": ("ours", change(OURS, "base", "task", to="sing")),
    "a frame that is a list": ("ours", change(OURS, "base", "frame", to=[1])),
    "ids that are text": ("ours", change(OURS, "base", "frame", "prefix_ids", to=["a"])),
    "a task layer that is text": ("ours", change(OURS, "base", "layer", to="x")),
    "a task layer without labels": ("ours", change(OURS, "base", "layer", to={"problem": "x", "pad": 0, "seed": 0})),
    "no options": ("ours", change(OURS, "options", to=KeyError)),
    "options that are a list": ("ours", change(OURS, "options", to=[])),
    "an unknown kind": ("ours", change(OURS, "options", "kind", to="sing")),
    "a kind that is a number": ("ours", change(OURS, "options", "kind", to=3)),
    "a kind that is a list": ("ours", change(OURS, "options", "kind", to=["lora"])),
    "a rank that is text": ("ours", change(OURS, "options", "rank", to="2")),
    "a rank below zero": ("ours", change(OURS, "options", "rank", to=-2)),
    "a rank of a billion": ("ours", change(OURS, "options", "rank", to=10**9)),
    "a rank pattern of a billion": ("ours", change(OURS, "options", "rank_pattern", to={"q_proj": 10**9})),
    "targets that are numbers": ("ours", change(OURS, "options", "targets", to=[1, 2])),
    "an alpha that is a list": ("ours", change(OURS, "options", "alpha", to=[1])),
    "tensors cut off": ("ours", cut("tuning.safetensors")),
    "tensors of no bytes": ("ours", write("tuning.safetensors", b"")),
    "a header of a terabyte": ("ours", write("tuning.safetensors", (1 << 40).to_bytes(8, "little") + b"{}")),
    "a header that is no JSON": ("ours", write("tuning.safetensors", (4).to_bytes(8, "little") + b"abcd")),
    # PEFT's
    "PEFT: no JSON": ("peft", write(PEFT, b"{")),
    "PEFT: a list": ("peft", write(PEFT, b"[]")),
    "PEFT: no base": ("peft", change(PEFT, "base_model_name_or_path", to=KeyError)),
    "PEFT: base null": ("peft", change(PEFT, "base_model_name_or_path", to=None)),
    "PEFT: base a number": ("peft", change(PEFT, "base_model_name_or_path", to=3)),
    "PEFT: itself": ("peft", change(PEFT, "base_model_name_or_path", to="../peft")),
    "PEFT: no type": ("peft", change(PEFT, "peft_type", to=KeyError)),
    "PEFT: a type that is a list": ("peft", change(PEFT, "peft_type", to=["LORA"])),
    "PEFT: rank of a billion": ("peft", change(PEFT, "r", to=10**9)),
    "PEFT: rank as text": ("peft", change(PEFT, "r", to="2")),
    "PEFT: no rank": ("peft", change(PEFT, "r", to=KeyError)),
    "PEFT: alpha as text": ("peft", change(PEFT, "lora_alpha", to="x")),
    "PEFT: alpha pattern a list": ("peft", change(PEFT, "alpha_pattern", to=["x"])),
    "PEFT: alpha pattern no expression": ("peft", change(PEFT, "alpha_pattern", to={"(": 1})),
    "PEFT: dropout 2": ("peft", change(PEFT, "lora_dropout", to=2)),
    "PEFT: task a list": ("peft", change(PEFT, "task_type", to=["CAUSAL_LM"])),
    "PEFT: prompt of a billion": ("peft", lambda f: write(PEFT, json.dumps({"peft_type": "PROMPT_TUNING",
        "num_virtual_tokens": 10**9, "base_model_name_or_path": "../base"}).encode())(f)),
    "PEFT: prompt without a length": ("peft", lambda f: write(PEFT, json.dumps({"peft_type": "PROMPT_TUNING",
        "base_model_name_or_path": "../base"}).encode())(f)),
    # a model's
    "config: no JSON": ("base", write(CONFIG, b"{")),
    "config: a list": ("base", write(CONFIG, b"[]")),
    "config: no bytes": ("base", write(CONFIG, b"")),
    "config: nested": ("base", write(CONFIG, NESTED)),
    "config: a repeated key": ("base", write(CONFIG, b'{"model_type": "llama", "model_type": "bert"}')),
    "config: no type": ("base", change(CONFIG, "model_type", to=KeyError)),
    "config: type a number": ("base", change(CONFIG, "model_type", to=1)),
    "config: type a list": ("base", change(CONFIG, "model_type", to=["llama"])),
    "config: architectures text": ("base", change(CONFIG, "architectures", to=5)),
    "config: architectures of numbers": ("base", change(CONFIG, "architectures", to=[5])),
    "config: architectures a mapping": ("base", change(CONFIG, "architectures", to={"": None})),
    "config: a trillion layers": ("base", change(CONFIG, "num_hidden_layers", to=10**12)),
    "config: 900 layers": ("base", change(CONFIG, "num_hidden_layers", to=900)),
    "config: layers below zero": ("base", change(CONFIG, "num_hidden_layers", to=-1)),
    "config: layers as text": ("base", change(CONFIG, "num_hidden_layers", to="2")),
    "config: layers half": ("base", change(CONFIG, "num_hidden_layers", to=1.5)),
    "config: a trillion tokens": ("base", change(CONFIG, "vocab_size", to=10**12)),
    "config: 50 million tokens": ("base", change(CONFIG, "vocab_size", to=50_000_000)),
    "config: no tokens": ("base", change(CONFIG, "vocab_size", to=0)),
    "config: tokens null": ("base", change(CONFIG, "vocab_size", to=None)),
    "config: wide": ("base", change(CONFIG, "intermediate_size", to=60_000_000)),
    "config: no heads": ("base", change(CONFIG, "num_attention_heads", to=0)),
    "config: a billion heads": ("base", change(CONFIG, "num_attention_heads", to=10**9)),
    "config: a trillion positions": ("base", change(CONFIG, "max_position_embeddings", to=10**12)),
    "config: positions as text": ("base", change(CONFIG, "max_position_embeddings", to="many")),
    "config: a billion labels": ("base", change(CONFIG, "num_labels", to=10**9)),
    "config: unknown activation": ("base", change(CONFIG, "hidden_act", to="sing")),
    "config: rope of nothing": ("base", change(CONFIG, "rope_parameters", to={"rope_type": "sing"})),
    "config: dtype": ("base", change(CONFIG, "dtype", to="load")),
    "weights cut off": ("base", cut("model.safetensors")),
    "weights of no bytes": ("base", write("model.safetensors", b"")),
    "tokenizer: no JSON": ("base", write("tokenizer.json", b"{")),
    "tokenizer: a list": ("base", write("tokenizer.json", b"[]")),
    "tokenizer: no model": ("base", change("tokenizer.json", "model", to=KeyError)),
    "tokenizer: normalizer a list": ("base", change("tokenizer.json", "normalizer", to=[])),
    "tokenizer: settings a list": ("base", write("tokenizer_config.json", b"[]")),
    "tokenizer: class a list": ("base", change("tokenizer_config.json", "tokenizer_class", to=[1])),
    "tokenizer: tokens a number": ("base", change("tokenizer_config.json", "added_tokens_decoder", to=1)),
    "tokenizer: EOS a list": ("base", change("tokenizer_config.json", "eos_token", to=[1])),
}  # fmt: skip
HARMLESS = {"config: architectures text", "config: dtype", "tokenizer: no model"}
"""Forms that may also open: transformers has a default for the value."""


def test_the_folders_themselves_open(shelf: Path) -> None:
    for name in ("base", "ours", "peft", "bert", "t5"):
        open_all(shelf / name)


@pytest.mark.parametrize("name", FORMS)
def test_a_broken_folder_is_an_error_of_ours(name: str, shelf: Path, tmp_path: Path) -> None:
    kind, apply = FORMS[name]
    folder = copy(shelf / kind, tmp_path)
    apply(folder)
    if name in HARMLESS:
        try:
            open_all(folder)
        except PostgradError:
            return
    else:
        with pytest.raises(PostgradError):
            open_all(folder)


def test_the_cause_is_named(shelf: Path, tmp_path: Path) -> None:
    cases = {
        "config: a trillion layers": r"num_hidden_layers: 1,000,000,000,000",
        "config: 900 layers": r"900 layers",
        "config: 50 million tokens": r"weights.*bytes",
        "a rank of a billion": r"rank",
        "PEFT: rank of a billion": r"adapter_config\.json says 1000000000",
        "its own base": r"each other's base",
        "a frame that is a list": r"tuning\.json: base: frame",
    }
    for i, (name, message) in enumerate(cases.items()):
        kind, apply = FORMS[name]
        folder = copy(shelf / kind, tmp_path / str(i))
        apply(folder)
        with pytest.raises(PostgradError, match=message):
            open_all(folder)


def test_tunings_on_each_other(shelf: Path, tmp_path: Path) -> None:
    for name, other in (("one", "two"), ("two", "three"), ("three", "one")):
        copy(shelf / "ours", tmp_path / name)
        change(OURS, "base", "relative", to=f"../../{other}/ours")(tmp_path / name / "ours")
    with pytest.raises(ModelError, match="each other's base models"):
        locate_model(str(tmp_path / "one" / "ours"), tmp_path)


def test_a_base_is_found_relative_to_the_working_directory(
    shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PEFT writes the name that the user typed, from where the training ran."""
    folder = copy(shelf / "peft", tmp_path / "out" / "run")
    (tmp_path / "out" / "run" / "base").rename(tmp_path / "models-base")
    change(PEFT, "base_model_name_or_path", to="models-base")(folder)
    monkeypatch.chdir(tmp_path)
    start = locate_model("out/run/peft", tmp_path)
    assert start.base is not None and start.base.folder == tmp_path / "models-base"
    monkeypatch.chdir(shelf)
    with pytest.raises(ModelError, match="does not exist"):
        locate_model(str(folder / ".." / "peft"), Path("/"))


def test_a_configuration_beside_an_adapter(shelf: Path, tmp_path: Path) -> None:
    """Trainers copy the base's config.json into an adapter's folder, which stays an adapter; with weights it is neither."""
    folder = copy(shelf / "peft", tmp_path)
    (folder / "config.json").write_bytes((tmp_path / "base" / "config.json").read_bytes())
    assert locate_model(str(folder), tmp_path).base is not None
    (folder / "model.safetensors").write_bytes((tmp_path / "base" / "model.safetensors").read_bytes())
    with pytest.raises(ModelError, match=r"a full model .* and an adapter"):
        locate_model(str(folder), tmp_path)


def test_an_adapter_with_added_tokens_is_refused(shelf: Path, tmp_path: Path) -> None:
    folder = copy(shelf / "peft", tmp_path)
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors["base_model.model.model.embed_tokens.weight"] = torch.zeros(322, 32)
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(TuningError, match="322 rows and its base's 320: tokens were added"):
        open_all(folder)


# --- any change of a valid folder -------------------------------------------------------------------------------------

_SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-2, 5), st.sampled_from([2**31, 10**9, 10**12, -(10**9), 1e300, 0.5]),
    st.text(max_size=8), st.sampled_from(["\0", "../ours", "../peft", "llama", "bert", "a" * 5000]),
)  # fmt: skip
_VALUES = st.recursive(
    _SCALARS, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=5), v, max_size=3)
)
_PLACES = {
    "ours": (OURS, "tuning.safetensors"),
    "peft": (PEFT, "adapter_model.safetensors"),
    **dict.fromkeys(
        ("base", "bert", "t5"),
        (CONFIG, "tokenizer.json", "tokenizer_config.json", "generation_config.json", "model.safetensors"),
    ),
}


def paths(value: Any, path: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    """The places in a JSON value, at most 20 in each list or object."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(inner for key, item in list(items)[:20] for inner in paths(item, (*path, key)))]


def is_json(content: bytes) -> bool:
    try:
        return json.loads(content) is not None
    except (ValueError, RecursionError):
        return False


def mutate(data: st.DataObject, file: Path) -> None:
    """One change of a file: a value of a JSON file, or bytes."""
    content = file.read_bytes()
    if file.suffix == ".json" and is_json(content) and data.draw(st.integers(0, 9)):
        found = paths(json.loads(content))
        path = data.draw(st.sampled_from(found))
        to = data.draw(st.sampled_from([KeyError]) | _VALUES) if path else data.draw(_VALUES)
        if path:
            parent = json.loads(content)
            for key in path[:-1]:
                parent = parent[key]
            to = KeyError if to is KeyError and not isinstance(parent, list) else None if to is KeyError else to
            change(file.name, *path, to=to)(file.parent)
        else:
            file.write_text(json.dumps(to))
        return
    begin = data.draw(st.integers(0, max(0, len(content) - 1)))
    size = data.draw(st.integers(0, 64))
    file.write_bytes(content[:begin] + data.draw(st.binary(max_size=16)) + content[begin + size :])


def check_mutation(data: st.DataObject, shelf: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    kind = data.draw(st.sampled_from(list(_PLACES)))
    folder = copy(shelf / kind, tmp_path_factory.mktemp("mutated"))
    for _ in range(data.draw(st.integers(1, 2))):
        file = folder / data.draw(st.sampled_from(_PLACES[kind]))
        if file.exists():
            mutate(data, file)
    with contextlib.suppress(PostgradError):
        open_all(folder)


_SETTINGS = {"deadline": None, "derandomize": True, "suppress_health_check": list(HealthCheck)}


@settings(max_examples=50, **_SETTINGS)
@given(data=st.data())
def test_any_change_ends_in_success_or_an_error_of_ours(
    data: st.DataObject, shelf: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    check_mutation(data, shelf, tmp_path_factory)


@pytest.mark.slow
@pytest.mark.timeout(7200)
@settings(max_examples=2000, **_SETTINGS)
@given(data=st.data())
def test_two_thousand_changes(data: st.DataObject, shelf: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    check_mutation(data, shelf, tmp_path_factory)


def test_without_the_limits_an_absurd_size_is_not_an_error_of_the_configuration(
    shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mutant: no limit on numbers."""
    folder = copy(shelf / "base", tmp_path)
    change(CONFIG, "num_labels", to=50)(folder)
    monkeypatch.setattr(config_limits, "_LIMITS", ((config_limits._LIMITS[0][0], 40), *config_limits._LIMITS[1:]))
    open_all(folder)
    monkeypatch.setattr(config_limits, "_LIMITS", ((config_limits._LIMITS[1][0], 40), *config_limits._LIMITS))
    with pytest.raises(ModelError, match="num_labels: 50"):
        open_all(folder)


HEAD = {
    "format": 1,
    "reads": {"layers": [2], "pooling": "mean", "head": "linear"},
    "labels": ["a", "b"],
    "problem": None,
}
BROKEN_HEADS: dict[str, dict[str, Any]] = {
    "another format": {"format": 2},
    "a format as text": {"format": "1"},
    "no layers": {"reads": {"layers": []}},
    "layers as text": {"reads": {"layers": "2"}},
    "a layer that does not exist": {"reads": {"layers": [7]}},
    "a layer below zero": {"reads": {"layers": [-9]}},
    "a million layers": {"reads": {"layers": [0] * 10**6}},
    "an unknown pooling": {"reads": {"layers": [2], "pooling": "sing"}},
    "a width of a trillion": {"reads": {"layers": [2], "head": "mlp", "width": 10**12, "depth": 1}},
    "a thousand tanh layers": {"reads": {"layers": [2], "head": "mlp", "width": 8, "depth": 1000}},
    "a dropout of 2": {"reads": {"layers": [2], "dropout": 2}},
    "nothing to read": {"reads": None},
}


@pytest.mark.parametrize("name", BROKEN_HEADS)
def test_a_broken_task_layer_is_an_error_of_ours(name: str, shelf: Path, tmp_path: Path) -> None:
    folder = copy(shelf / "base", tmp_path)
    (folder / "task_layer.json").write_text(json.dumps({**HEAD, **BROKEN_HEADS[name]}))
    with pytest.raises(ModelError, match=r"task_layer\.json|task layer"):
        open_model(locate_model(str(folder), tmp_path))

"""Merging runs of one start, and means of checkpoints that stand for a decay: the written model is the formula's."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from postgrad.cli.main import app
from postgrad.cli.render import blend_text
from postgrad.commands import blend_models
from postgrad.commands.blend import AverageOptions, Blend, MergeOptions, blend
from postgrad.commands.pages import write_page
from postgrad.errors import ModelError, PostgradError, StageError
from postgrad.models.pretrained import save_pretrained
from postgrad.optim.decay_weights import decay_weights
from tests.commands.test_blend import trained
from tests.conftest import make_llama, make_tokenizer
from tests.tiny_lineage import LineageRuns, tiny_stage


def weights(folder: Path) -> dict[str, Tensor]:
    return dict(AutoModelForCausalLM.from_pretrained(folder).named_parameters())


def merged(runs: LineageRuns, *models: object, sweep: tuple[float, ...] = (0, 1), **options: Any) -> Blend:
    names = {"weight", "max_forgetting", "out", "average", "granularity"}
    merge = MergeOptions(tuple(map(str, models)), **{k: v for k, v in options.items() if k not in names})
    rest = {key: value for key, value in options.items() if key in names}
    return blend(runs.naive, weights=sweep, merge=merge, cache=runs.cache, **rest)


def plain_folder(folder: Path, seed: int, **config: Any) -> Path:
    """A model without a record."""
    save_pretrained(make_llama(seed, **config), make_tokenizer(), folder, dtype=torch.float32)
    return folder


@pytest.fixture(scope="module")
def steady(base: Path, tmp_path_factory: pytest.TempPathFactory, runs: LineageRuns) -> Path:
    """A run with all its checkpoints, at a constant rate up to step 8."""
    folder = tmp_path_factory.mktemp("steady") / "run"
    stage = tiny_stage(
        base, folder,
        data={"sequence_length": 32, "sources": [{"name": "new", "path": str(base / "new.jsonl")}]},
        schedule={"kind": "wsd", "peak": 1e-2, "floor": 1e-3, "warmup": "2 steps", "decay": "4 steps"},
        save={"every": "2 steps", "keep": "all"},
    )  # fmt: skip
    return trained(stage, runs.cache)


def test_what_another_run_learnt_is_added_at_its_weight(runs: LineageRuns, tmp_path: Path) -> None:
    found = merged(runs, f"{runs.replay}=0.5", weight=1, out=tmp_path / "out")
    start, one, two = (weights(run / "model") for run in (runs.first, runs.naive, runs.replay))
    for name, tensor in weights(tmp_path / "out").items():
        torch.testing.assert_close(tensor, one[name] + 0.5 * (two[name] - start[name]))
    assert [point.name for point in found.points] == ["0", "1"] and found.ends[0].model_weights == (1.0, 0.5)
    assert set(found.points[1].changes) == {"old-heldout", "new-heldout"}  # the sets of both, each text once


def test_every_method_and_weight_is_an_end_and_the_best_of_all_is_written(runs: LineageRuns, tmp_path: Path) -> None:
    found = merged(
        runs, f"{runs.replay}=0,1", methods=("linear", "ties"), max_forgetting=9.0,
        block_weights=(1.0, 0.5), out=tmp_path / "best",
    )  # fmt: skip
    names = [f"{method} two=1 replay={weight}" for method in ("linear", "ties") for weight in (0, 1)]
    assert [end.name for end in found.ends] == names
    assert [point.name for point in found.points] == ["0", *(f"{name} at 1" for name in names)]
    assert found.chosen == min(found.points, key=lambda point: point.mean_change("learned") or 0)
    write_page(found, tmp_path / "page.html")
    assert all(name in (tmp_path / "page.html").read_text() for name in names)


def test_the_next_command_of_a_merge_writes_a_model(runs: LineageRuns, tmp_path: Path) -> None:
    asked: dict[str, Any] = {"methods": ("dare_ties", "slerp"), "density": 0.5, "seed": 3, "start": str(runs.first)}
    for number, bound in enumerate((None, 1.0)):
        found = merged(runs, f"{runs.replay}=0.5,1", sweep=(0, 0.5), max_forgetting=bound, **asked)
        words = shlex.split(blend_text(found, None).rsplit("next: postgrad ", 1)[1])
        words[-1] = str(tmp_path / str(number))
        done = CliRunner().invoke(app, words, env={"POSTGRAD_CACHE": str(runs.cache)}, catch_exceptions=False)
        assert done.exit_code == 0 and f"wrote {words[-1]}" in done.output
        chosen = found.chosen or found.points[-1]
        assert f"{words[-1]}: {chosen.name if bound else '0.5'}" in done.output


def test_weights_of_blocks_are_spread_from_the_first_to_the_last(runs: LineageRuns, tmp_path: Path) -> None:
    merged(runs, block_weights=(1.0, 0.0), weight=1, out=tmp_path / "out")
    start, end, found = weights(runs.first / "model"), weights(runs.naive / "model"), weights(tmp_path / "out")
    for name, tensor in found.items():
        assert torch.equal(tensor, (start if ".layers.1." in name else end)[name])


def test_a_start_that_is_not_the_ancestor_is_refused(
    runs: LineageRuns, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for options, says in (
        ({"start": str(runs.replay)}, r"two was not trained from .*replay, but from .*one <- .*base"),
        ({"start": str(plain_folder(tmp_path / "x", 5))}, "their fingerprints differ"),
    ):
        with pytest.raises(ModelError, match=says):
            merged(runs, runs.first, **options)
    merged(runs, start=str(base / "base"))  # an ancestor further back
    other = plain_folder(tmp_path / "other", 9)
    with pytest.raises(ModelError, match=r"weights of .*other are not near those of .*one \(cosine -?0.0"):
        merged(runs, other)
    near = tmp_path / "near"
    save_pretrained(
        AutoModelForCausalLM.from_pretrained(runs.replay / "model"), make_tokenizer(), near, dtype=torch.float32
    )
    assert "nothing records what" in merged(runs, near).notes[0]
    assert merged(runs, other, is_forced=True).points
    monkeypatch.setattr(blend_models, "_refuse_unrelated", lambda *of: None)
    assert merged(runs, other).points  # without its guard the merge goes on


def test_models_that_do_not_fit_are_refused_by_name(runs: LineageRuns, tmp_path: Path) -> None:
    wider = plain_folder(tmp_path / "wider", 0, intermediate_size=80)
    grown = plain_folder(tmp_path / "grown", 0, vocab_size=330)
    deeper = plain_folder(tmp_path / "deeper", 0, num_hidden_layers=3)
    split = plain_folder(tmp_path / "split", 0, tie_word_embeddings=not make_llama().config.tie_word_embeddings)
    for folder, says in (
        (wider, r"model.layers.0.mlp.\w+.weight is \(.*\) in .*two and \(.*\) in .*wider"),
        (grown, r"model.embed_tokens.weight is \(320, 32\) in .*two and \(330, 32\) in .*grown"),
        (deeper, r"deeper.*layers.2.*|layers.2.* is missing in .*two"),
        (split, r"lm_head.weight is .*missing"),
    ):
        with pytest.raises(ModelError, match=says):
            merged(runs, folder)
    spoken = tmp_path / "spoken"
    save_pretrained(
        AutoModelForCausalLM.from_pretrained(runs.naive / "model"), make_tokenizer(), spoken, dtype=torch.float32
    )
    file = spoken / "tokenizer.json"
    content = json.loads(file.read_text())
    ids = content["model"]["vocab"]
    ids["a"], ids["b"] = ids["b"], ids["a"]
    file.write_text(json.dumps(content))
    with pytest.raises(ModelError, match=r"token \d+ is 'a' in .*two and 'b' in .*spoken"):
        merged(runs, spoken)


def test_a_chat_template_comes_with_the_model_that_has_one(runs: LineageRuns, tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    chat, out = tmp_path / "chat", tmp_path / "out"
    save_pretrained(AutoModelForCausalLM.from_pretrained(runs.replay / "model"), tokenizer, chat, dtype=torch.float32)
    merged(runs, chat, weight=1, out=out)
    assert (out / "chat_template.jinja").read_text() == tokenizer.chat_template


def test_a_lora_run_is_merged_first(steady: Path, base: Path, runs: LineageRuns, tmp_path: Path) -> None:
    data = {"sequence_length": 32, "sources": [{"name": "new", "path": str(base / "new.jsonl")}]}
    lora = trained(
        tiny_stage(base, tmp_path / "lora", data=data, tuning={"kind": "lora", "rank": 2}, tokens=1000), runs.cache
    )
    merge = MergeOptions((str(lora),))
    blend(steady, weights=[1.0], merge=merge, weight=1.0, out=tmp_path / "out", cache=runs.cache)
    start, full = weights(base / "base"), weights(steady / "model")
    found = weights(tmp_path / "out")
    norm = next(name for name in found if "norm" in name)
    torch.testing.assert_close(found[norm], full[norm])  # the adapter has no norms
    query = next(name for name in found if "q_proj" in name)
    assert not torch.equal(found[query], full[query]) and not torch.equal(found[query], start[query])


def test_the_mean_of_checkpoints_has_the_weights_of_the_decay(
    steady: Path, runs: LineageRuns, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = [2, 4, 6, 8]
    states = [weights(steady / "checkpoints" / f"step-{step:08d}") for step in steps]

    def written(out: Path) -> dict[str, Tensor]:
        average = AverageOptions((4,), ("1-sqrt",), until=steps[-1])
        blend(steady, weights=[1.0], average=average, weight=1.0, out=out, cache=runs.cache)
        return weights(out)

    def expected(name: str) -> Tensor:
        return sum(w * t[name].double() for w, t in zip(decay_weights(steps, "1-sqrt"), states, strict=True)).float()

    found = written(tmp_path / "out")
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected(name))
    monkeypatch.setattr(blend_models, "decay_weights", lambda steps, *of: [1 / len(steps)] * len(steps))
    plain = written(tmp_path / "plain")
    assert any((plain[name] - expected(name)).abs().max() > 1e-4 for name in plain)


def test_one_run_gives_several_anneals(steady: Path, runs: LineageRuns) -> None:
    average = AverageOptions((1, 2, 4), ("1-sqrt", "cosine"), until=8)
    found = blend(steady, weights=[1.0], average=average, cache=runs.cache)
    assert [end.name for end in found.ends] == [
        "average 1 1-sqrt", "average 2 1-sqrt", "average 2 cosine", "average 4 1-sqrt", "average 4 cosine"
    ]  # fmt: skip
    changes = [point.changes["new-heldout"].change.difference for point in found.points]
    assert len(set(changes)) == len(changes)


def test_a_rate_that_falls_is_no_constant_phase(steady: Path, runs: LineageRuns) -> None:
    for average, says in (
        (AverageOptions((3,), ("cosine",)), r"of the last 3 checkpoints is not constant: 0.0\d+ to 0.001"),
        (AverageOptions((5,), until=8), r"has 4 checkpoints up to step 8"),
    ):
        with pytest.raises(StageError, match=says):
            blend(steady, average=average, cache=runs.cache)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"methods": ("tyes",)}, "no method 'tyes'"),
        ({"methods": ("ties",), "density": 0.0}, "cannot keep 0 of the values"),
        ({"methods": ("model_stock",)}, "model_stock of 1 models"),
        ({"average": AverageOptions((2,), ("cosin",))}, "no decay 'cosin'"),
        ({"average": AverageOptions((2,), ("exponential",))}, "cannot be exponential"),
        ({"average": AverageOptions(())}, "a mean of no checkpoint"),
        ({"methods": ("linear", "ties"), "weight": 1}, "2 merges have the weight 1: linear, ties"),
    ],
)
def test_options_that_make_no_sense_are_refused(runs: LineageRuns, options: dict[str, Any], says: str) -> None:
    with pytest.raises(StageError, match=says):
        merged(runs, **options)


def test_models_and_weights_that_make_no_sense_are_refused(runs: LineageRuns, tmp_path: Path) -> None:
    for models, options, says in (
        ((f"{runs.replay}=half",), {}, "not a list of weights"),
        ((f"{runs.replay}=nan",), {}, "not a list of weights"),
        ((f"{runs.replay}=1e308",), {}, "not a list of weights"),
        ((runs.naive,), {}, "is named twice"),
        ((f"{runs.replay}=0.5",), {"methods": ("model_stock",)}, "has no weights of models"),
        ((f"{runs.replay}=-1",), {"methods": ("slerp",)}, "no negative weights"),
        ((runs.replay, runs.first), {"methods": ("slerp",)}, "slerp of 3 models"),
        ((tmp_path / "nowhere" / "at" / "all",), {}, "there is no folder"),
    ):
        with pytest.raises(PostgradError, match=says):
            merged(runs, *models, **options)
    for words in (["--decay", "cosine"], ["--until", "3"], ["--average", "2,x"], ["--average", "2", "--floor", "2"]):
        done = CliRunner().invoke(app, ["blend", str(runs.naive), *words])
        assert done.exit_code and words[-2] in str(done.exception) + done.output

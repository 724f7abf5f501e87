"""Every tuning as a stage: what moves, what it scores, where it stops and goes on, how it leaves and what stands on it."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from postgrad.check.check import check_stage
from postgrad.commands.evaluate import evaluate
from postgrad.commands.export import export_model
from postgrad.distributed.world import World
from postgrad.errors import StageError, TuningError
from postgrad.evaluation.before_after import read_scores
from postgrad.lineage.metrics import read_metrics
from postgrad.lineage.record import SetScore, read_record
from postgrad.models.location import locate_model
from postgrad.models.pretrained import load_pretrained
from postgrad.optim.optimizer import AdamW
from postgrad.run import training_session
from postgrad.run.tuned_model import make_tuned_model
from postgrad.training.checkpoint_state import read_progress
from postgrad.training.step import Run
from postgrad.tuning.adapter_folder import load_tuning, read_export
from postgrad.tuning.extra_trainable import base_parameter_name
from postgrad.tuning.open_model import open_model, start_fingerprint
from tests.conftest import make_llama, make_tokenizer, new_text, write_jsonl
from tests.tiny_stages import LENGTH, Workspace, make_workspace, run_interrupted, run_trace, save_model, train_for

SETS = ("old-heldout", "new-heldout")
BLOCKS, WIDTH, INNER, KEYS, VOCABULARY = 2, 32, 64, 16, 320
ATTENTION = {"q_proj": (WIDTH, WIDTH), "k_proj": (WIDTH, KEYS), "v_proj": (WIDTH, KEYS), "o_proj": (WIDTH, WIDTH)}
LINEAR = {**ATTENTION, "gate_proj": (WIDTH, INNER), "up_proj": (WIDTH, INNER), "down_proj": (INNER, WIDTH)}
"""Inputs and outputs of a block's linear layers."""
BLOCK = sum(inputs * outputs for inputs, outputs in LINEAR.values()) + 2 * WIDTH
NORMS = (2 * BLOCKS + 1) * WIDTH
OUTPUTS = BLOCKS * sum(outputs for _, outputs in LINEAR.values())


def low_rank(rank: int, layers: dict[str, tuple[int, int]] = LINEAR) -> int:
    """Numbers in A and B of all blocks."""
    return BLOCKS * rank * sum(inputs + outputs for inputs, outputs in layers.values())


def bottlenecks(size: int, places: int) -> int:
    """Numbers in the adapters of all blocks."""
    return BLOCKS * places * (2 * size * WIDTH + size + WIDTH)


def cell(inputs: int, hidden: int) -> int:
    """Numbers in an LSTM's cell."""
    return 4 * hidden * (inputs + hidden) + 8 * hidden


@dataclass(frozen=True)
class Case:
    """A tuning of the tiny Llama: how many numbers move, and which weights that the plain model has are others then."""

    tuning: dict[str, Any]
    count: int
    moves: tuple[str, ...] = ()
    model: str = "llama"
    changes: dict[str, Any] = field(default_factory=dict)


PLAIN = {
    "full": Case({"kind": "full", "layer_decay": 0.9}, BLOCKS * BLOCK + WIDTH + VOCABULARY * WIDTH, ("*",)),
    "head": Case({"kind": "head", "untie": True}, VOCABULARY * WIDTH, ("lm_head.weight",)),
    "blocks": Case({"kind": "blocks", "last": 1}, BLOCK + WIDTH, ("model.layers.1.*", "model.norm.weight")),
    "unfreezing": Case(
        {"kind": "blocks", "last": 2, "unfreeze_every": "3 steps"},
        BLOCKS * BLOCK + WIDTH,
        ("model.layers.*", "model.norm.weight"),
    ),
    "bias": Case({"kind": "bias"}, OUTPUTS, ("*.bias",), model="biased"),
    "norm": Case({"kind": "norm"}, NORMS, ("*norm.weight",)),
    "osf": Case(
        {"kind": "osf"},
        BLOCKS * sum(min(io) // 2 * (sum(io) + 1) for io in LINEAR.values()),
        ("*_proj.weight",),
    ),
    "expand": Case({"kind": "expand", "positions": [0]}, BLOCK, ("model.layers.1.*",)),
}
"""What leaves is a plain model."""
STANDING = {
    "adapter": Case({"kind": "adapter", "size": 4, "dropout": 0.1}, bottlenecks(4, 1)),
    "houlsby": Case({"kind": "adapter", "variant": "houlsby", "size": 4}, bottlenecks(4, 2) + NORMS, ("*norm.weight",)),
    "parallel": Case({"kind": "adapter", "variant": "parallel", "size": 4}, bottlenecks(4, 1)),
    "prefix": Case(
        {"kind": "prefix", "length": 3, "hidden": 8, "dropout": 0.1},
        3 * WIDTH + (WIDTH + 1) * 8 + 9 * BLOCKS * 2 * KEYS,
    ),
    "p-tuning-v2": Case({"kind": "p-tuning-v2", "length": 3}, 3 * BLOCKS * 2 * KEYS),
    "prompt": Case({"kind": "prompt", "length": 3}, 3 * WIDTH),
    "p-tuning": Case(
        {"kind": "p-tuning", "template": "{2} plus {1} {x}", "encoder": "mlp", "hidden": 8},
        3 * WIDTH + 8 * (WIDTH + 1) + WIDTH * 9,
    ),
    "lstm": Case(
        {"kind": "p-tuning", "template": "{3} {x}", "hidden": 8},
        3 * WIDTH + 2 * (cell(WIDTH, 8) + cell(16, 8)) + WIDTH * 17 + WIDTH * 33,
    ),
    "instruction-prompt": Case(
        {"kind": "instruction-prompt", "length": 3, "demonstrations": {"count": 1, "max_tokens": 16}},
        3 * WIDTH,
        changes={"sources": "completion", "tokens": 200},
    ),
}
"""What leaves is a small folder, whose tuning stands in the model when it is opened."""
ADAPTED = {
    "lora": Case({"kind": "lora", "rank": 2, "dropout": 0.1}, low_rank(2)),
    "rslora": Case({"kind": "lora", "rank": 2, "variant": "rslora", "targets": "attention"}, low_rank(2, ATTENTION)),
    "dora": Case({"kind": "lora", "rank": 2, "variant": "dora"}, low_rank(2) + OUTPUTS),
    "pissa": Case({"kind": "lora", "rank": 2, "variant": "pissa"}, low_rank(2)),
}
"""What leaves is a small folder, which becomes part of the weights when it is opened."""
CASES = PLAIN | STANDING | ADAPTED
WRAPPED = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # in PEFT


def mostly(*slow: str, among: Iterable[str] = CASES) -> Any:
    """Cases of which some are left to the slow sweep."""
    marked = [pytest.param(name, marks=pytest.mark.slow) if name in slow else name for name in among]
    return pytest.mark.parametrize("name", marked)


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    found = make_workspace(tmp_path_factory.mktemp("shelf"), tmp_path_factory.getbasetemp() / "cache")
    biased = make_llama(attention_bias=True, mlp_bias=True)
    torch.manual_seed(5)
    with torch.no_grad():  # biases that are zero have nothing to say
        for parameter in biased.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    save_model(biased, make_tokenizer(), found.folder / "biased")
    return found


def stage_of(shelf: Workspace, name: str, run: str | None = None, **changes: Any) -> dict[str, Any]:
    case = CASES[name]
    more = {"model": case.model, **case.changes, **changes}
    if isinstance(more.get("sources"), str):
        more["sources"] = [shelf.source(more["sources"])]
    return shelf.stage(run or name, case.tuning, **more)


def home_of(shelf: Workspace, name: str) -> Path:
    """The run of a case, carried out when it is first asked for."""
    return shelf.run(stage_of(shelf, name)).run_folder


def texts_by_hand(model: PreTrainedModel, file: str, behind: str = "") -> tuple[float, int]:
    """Nats and scored tokens of a file of short texts, each behind some words, with nothing of ours."""
    tokenizer = AutoTokenizer.from_pretrained(model.name_or_path)
    lead = tokenizer(behind)["input_ids"]
    nats, tokens = 0.0, 0
    for line in Path(file).read_text().splitlines():
        text = tokenizer(json.loads(line)["text"])["input_ids"]
        ids = torch.tensor([*lead, *text])
        with torch.no_grad():
            log_p = torch.log_softmax(model(input_ids=ids[None]).logits[0, :-1].double(), -1)
        nats -= float(log_p.gather(1, ids[1:, None])[len(lead) :].sum())
        tokens += len(text) - 1
    return nats, tokens


def agrees(shelf: Workspace, summaries: dict[str, SetScore], folder: Path, behind: str = "") -> None:
    """The scores are those of the plain model in a folder, by hand."""
    plain = AutoModelForCausalLM.from_pretrained(folder)
    for name in ("old", "new"):
        nats, tokens = texts_by_hand(plain, shelf.file(name, held_out=True), behind)
        found = summaries[f"{name}-heldout"]
        assert found.tokens == tokens
        assert found.nats == pytest.approx(nats / tokens, rel=1e-5)


def evaluated(shelf: Workspace, model: Path) -> dict[str, SetScore]:
    """What `postgrad eval` says of a model on both held-out texts; no scores are taken from a cache."""
    files = [shelf.file("old", held_out=True), shelf.file("new", held_out=True)]
    with tempfile.TemporaryDirectory() as fresh:
        (Path(fresh) / "stores").symlink_to(shelf.cache / "stores")
        scored = evaluate(str(model), files, context=LENGTH, cache=Path(fresh))
    return {name: SetScore.model_validate(score.as_dict()) for name, score in scored.sets.items()}


def weights_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def matching(names: Iterable[str], patterns: Iterable[str]) -> set[str]:
    return {name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)}


def logits(model: PreTrainedModel, before: Iterable[int] = ()) -> Tensor:
    ids = torch.tensor([[*before, *range(5, 25)]])
    with torch.no_grad():
        return model(input_ids=ids).logits[..., :VOCABULARY]


# -- what moves --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_what_is_to_move_moves_and_nothing_else(shelf: Workspace, name: str) -> None:
    before, after, run = train_for(shelf, stage_of(shelf, name), 4)
    assert {n for n in before if not torch.equal(before[n], after[n])} == {w.name for w in run.weights.entries}
    assert sum(m.numel() for m in run.weights.masters) == CASES[name].count
    if name not in PLAIN:
        base = load_pretrained(locate_model(str(shelf.folder / "llama"), shelf.folder)).model.state_dict()
        now = {base_parameter_name(n): tensor for n, tensor in after.items()}
        shared = base.keys() & now.keys()
        assert len(shared) == 2 * 9 + 2  # every weight of the base is there; the tied head comes once
        assert {n for n in shared if not torch.equal(base[n], now[n])} == matching(shared, CASES[name].moves)


def test_a_weight_that_moves_by_mistake_is_met(shelf: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutant of the test above: an optimizer that moves what is held fast by a hair."""
    move = AdamW.step

    def mutant(self: AdamW, rate: float) -> None:
        move(self, rate)
        with torch.no_grad():
            next(p for p in self.weights.model.parameters() if not p.requires_grad).add_(1e-6)

    monkeypatch.setattr(AdamW, "step", mutant)
    with pytest.raises(AssertionError):
        test_what_is_to_move_moves_and_nothing_else(shelf, "lora")


@pytest.mark.parametrize("name", [name for name in PLAIN if name not in ("head", "expand")])
def test_a_plain_model_leaves_with_what_moved(shelf: Workspace, name: str) -> None:
    folder = home_of(shelf, name) / "model"
    assert not (folder / "tuning.json").exists()
    old, new = weights_of(shelf.folder / CASES[name].model), weights_of(folder)
    assert old.keys() == new.keys()
    assert {n for n in old if not torch.equal(old[n], new[n])} == matching(old, CASES[name].moves)


def test_an_untied_head_leaves_beside_the_embedding(shelf: Workspace) -> None:
    folder = home_of(shelf, "head") / "model"
    old, new = weights_of(shelf.folder / "llama"), weights_of(folder)
    assert new.keys() - old.keys() == {"lm_head.weight"}
    assert all(torch.equal(old[n], new[n]) for n in old)
    assert not torch.equal(new["lm_head.weight"], new["model.embed_tokens.weight"])
    assert not json.loads((folder / "config.json").read_text())["tie_word_embeddings"]


def test_new_blocks_leave_between_the_old_ones(shelf: Workspace) -> None:
    folder = home_of(shelf, "expand") / "model"
    old, new = weights_of(shelf.folder / "llama"), weights_of(folder)
    assert json.loads((folder / "config.json").read_text())["num_hidden_layers"] == 3
    for name, tensor in old.items():
        assert torch.equal(tensor, new[name.replace("layers.1.", "layers.2.")]), name
    assert not torch.equal(new["model.layers.1.mlp.up_proj.weight"], old["model.layers.0.mlp.up_proj.weight"])


def test_blocks_thaw_one_after_the_other(shelf: Workspace) -> None:
    """Three steps with the top block alone, then with the one below; the newcomer's moments count from there."""
    home = shelf.run(stage_of(shelf, "unfreezing", "thawing", save={"every": "1 step", "keep": "all"})).run_folder
    start = weights_of(shelf.folder / "llama")
    lower = "model.layers.0.mlp.up_proj.weight"
    for step in (3, 4, 6):
        place = home / "checkpoints" / f"step-{step:08d}"
        updates = read_progress(place).updates
        assert updates["model.layers.1.mlp.up_proj.weight"] == step
        assert updates.get(lower, 0) == max(0, step - 3)
        assert torch.equal(load_file(place / "tuning.safetensors")[lower], start[lower]) == (step <= 3)


def test_rates_fall_from_the_top_down(shelf: Workspace) -> None:
    """The first step of Adam moves every weight by its rate, whatever the gradient."""
    raw = shelf.stage("decayed", {"kind": "full", "layer_decay": 0.5}, optimizer={"weight_decay": 0})
    before, after, _ = train_for(shelf, raw, 1)
    moves = {n: float((after[n] - before[n]).abs().max()) for n in before}
    assert moves["model.norm.weight"] == pytest.approx(1e-2, rel=1e-3)
    for block, share in ((1, 0.5), (0, 0.25)):
        assert moves[f"model.layers.{block}.mlp.up_proj.weight"] == pytest.approx(share * 1e-2, rel=1e-2)


# -- what it scores ------------------------------------------------------------------------------------------------------


@mostly("blocks", "houlsby", "parallel", "p-tuning-v2", "rslora")
def test_scores_are_those_of_the_start_and_of_what_leaves(shelf: Workspace, name: str) -> None:
    home = home_of(shelf, name)
    record = read_record(home)
    assert record.status == "finished"
    assert record.model.trainable == CASES[name].count
    # The words of a template stay without its vectors.
    agrees(shelf, record.scores.before, shelf.folder / CASES[name].model, "plus" if name == "p-tuning" else "")
    assert evaluated(shelf, home) == record.scores.after
    if name in PLAIN:
        agrees(shelf, record.scores.after, home / "model")
    # The first look, at no step, is at the start model, and the last one at what leaves.
    looks = [row for row in read_metrics(home / "metrics.jsonl") if row.kind == "evaluation"]
    for s in SETS:
        assert looks[0].sets[s].change == 0.0
        assert looks[0].sets[s].nats == pytest.approx(record.scores.before[s].nats, rel=1e-5)
        assert looks[-1].sets[s].nats == pytest.approx(record.scores.after[s].nats, rel=1e-4)
        assert record.scores.after[s] != record.scores.before[s]


def test_scores_of_another_model_would_not_pass(shelf: Workspace) -> None:
    after = read_record(home_of(shelf, "full")).scores.after
    with pytest.raises(AssertionError):
        agrees(shelf, after, home_of(shelf, "norm") / "model")


def test_documents_are_paired_under_a_soft_prompt(shelf: Workspace) -> None:
    """Long documents lose positions to the prompt; the start model reads them in the same windows without it."""
    write_jsonl(shelf.folder / "long.jsonl", new_text(6, 99))
    learned = {"every": "100%", "learned": [shelf.file("long")], "samples": 1}
    home = shelf.run(stage_of(shelf, "prompt", "long", evaluation=learned)).run_folder
    before, after = (read_scores(home / "scores" / f"{when}.npz")["long"] for when in ("before", "after"))
    assert len(before.nats_W) > len(before.bytes_N)  # some documents have several windows
    assert np.array_equal(before.tokens_W, after.tokens_W) and np.array_equal(before.document_W, after.document_W)
    sample, *_ = read_record(home).samples
    assert sample.before and sample.after


def test_the_gate_holds_for_a_tuning(shelf: Workspace) -> None:
    learnt = shelf.run(shelf.stage("learnt", sources=[shelf.source("old")], tokens=20 * 4 * LENGTH))
    for allowed, peak, status, verdict in (
        ("1%", 5e-2, "gate-failed", "forgot"),
        ("100%", 1e-3, "finished", "kept"),
    ):
        changes = {"model": str(learnt.run_folder), "schedule": {"kind": "constant", "peak": peak}}
        raw = stage_of(
            shelf, "lora", f"gate-{status}", sources=[shelf.source("new")], max_forgetting=allowed, **changes
        )
        done = shelf.run(raw)
        assert done.record.status == status
        assert done.record.retention_gate.passed == (status == "finished")
        assert done.record.changes["old-heldout"].verdict == verdict
        assert (done.run_folder / "model" / "tuning.json").exists()  # everything is kept


# -- stopped and resumed -------------------------------------------------------------------------------------------------


@mostly(
    *(set(CASES) - {"unfreezing", "osf", "expand", "adapter", "prefix", "lstm", "instruction-prompt", "lora", "pissa"})
)
def test_stopped_and_resumed_equals_never_stopped(shelf: Workspace, name: str) -> None:
    whole = home_of(shelf, name)
    parts = run_interrupted(shelf, stage_of(shelf, name, f"{name}-parts"))
    assert run_trace(parts.run_folder) == run_trace(whole)


BF16 = {"threads": 1, "dtype": "bfloat16", "compile": False}
BF16_CASES = ("lora", "adapter", "prefix", "lstm", "prompt", "dora", "unfreezing", "osf")


@mostly("adapter", "prefix", "prompt", "dora", "unfreezing", "osf", among=BF16_CASES)
def test_stopped_and_resumed_in_bf16_equals_never_stopped(shelf: Workspace, name: str) -> None:
    whole = shelf.run(stage_of(shelf, name, f"{name}-bf16", compute=BF16))
    parts = run_interrupted(shelf, stage_of(shelf, name, f"{name}-bf16-parts", compute=BF16))
    assert run_trace(parts.run_folder) == run_trace(whole.run_folder)
    assert run_trace(whole.run_folder) != run_trace(home_of(shelf, name))
    assert evaluated(shelf, whole.run_folder) == whole.record.scores.after


def losses_of(home: Path) -> list[float]:
    return [row.loss for row in read_metrics(home / "metrics.jsonl") if row.kind == "step"]


@mostly(*(set(CASES) - {"lora", "prefix"}))
def test_recomputed_activations_make_no_difference(shelf: Workspace, name: str) -> None:
    """Dropout draws again what it drew, and hooks that add something do so once more."""
    compute = {"threads": 1, "dtype": "float32", "compile": False, "activation_checkpointing": True}
    again = shelf.run(stage_of(shelf, name, f"{name}-again", compute=compute)).run_folder
    assert losses_of(again) == pytest.approx(losses_of(home_of(shelf, name)), rel=1e-6)
    assert len(set(losses_of(again))) > 1


@pytest.mark.parametrize("name", ["lora", "lstm"])
def test_a_resume_that_forgets_something_is_met(shelf: Workspace, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutants: moments that begin anew; a prompt whose encoder is lost, as where only its vectors are kept."""

    def forgetful(run: Run, folder: Path) -> None:
        kept = {n: p.detach().clone() for n, p in run.model.pretrained.named_parameters() if ".encoder." in n}
        restore(run, folder)
        with torch.no_grad():
            for n, p in kept.items():
                run.model.pretrained.get_parameter(n).copy_(p)
        if not kept:
            for optimizer in run.optimizer.inner:
                optimizer.state.clear()

    restore = training_session.restore_run
    monkeypatch.setattr(training_session, "restore_run", forgetful)
    parts = run_interrupted(shelf, stage_of(shelf, name, f"{name}-forgetful"))
    assert run_trace(parts.run_folder) != run_trace(home_of(shelf, name))


@mostly(
    "pissa", "prefix", "houlsby", "expand", among=["unfreezing", "lora", "pissa", "lstm", "prefix", "houlsby", "expand"]
)
def test_a_checkpoint_is_a_start(shelf: Workspace, name: str) -> None:
    """The last checkpoint scores as what left; an earlier one can be gone on from, with what was seen up to there."""
    home = home_of(shelf, name)
    after = read_record(home).scores.after
    earlier, last = sorted((home / "checkpoints").iterdir())
    found = evaluated(shelf, last)
    for s in SETS:
        assert found[s].nats == pytest.approx(after[s].nats, rel=1e-5)
    done = shelf.run(shelf.stage(f"from-{name}", {"kind": "lora", "rank": 1}, model=str(earlier)))
    assert done.record.scores.before == evaluated(shelf, earlier) != after
    assert done.record.parents[0].step == read_progress(earlier).step
    assert evaluated(shelf, done.run_folder) == done.record.scores.after
    seen = {entry.name: entry.tokens for entry in done.record.consumed.values()}
    assert seen["new"] > read_progress(earlier).trained_by_source["new"] > 0


# -- how it leaves -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*PLAIN, *ADAPTED, "prompt", "p-tuning", "lstm"])
def test_export_gives_a_plain_folder_with_equal_logits(shelf: Workspace, name: str, tmp_path: Path) -> None:
    home = home_of(shelf, name)
    opened = open_model(locate_model(str(home), shelf.folder))
    export_model(str(home), tmp_path / "plain", "auto")
    assert (tmp_path / "plain" / "config.json").exists() and not (tmp_path / "plain" / "tuning.json").exists()
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    expected = logits(opened.model, opened.frame.prefix_ids)
    assert torch.equal(logits(plain, opened.frame.prefix_ids), expected)
    start = load_pretrained(locate_model(str(shelf.folder / CASES[name].model), shelf.folder)).model
    assert not torch.allclose(
        logits(start), expected[:, len(opened.frame.prefix_ids) :], atol=1e-4
    )  # as it can be otherwise
    if opened.frame.prefix_ids:
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "plain")
        virtual = [i for i in opened.frame.prefix_ids if i >= VOCABULARY]
        assert len(virtual) == 3
        assert tokenizer.convert_ids_to_tokens(virtual) == [f"<|prompt-{i}|>" for i in range(3)]


@pytest.mark.parametrize("name", ["lora", "prompt"])
def test_export_writes_one_file_for_llama_cpp(shelf: Workspace, name: str, tmp_path: Path) -> None:
    home = home_of(shelf, name)
    opened = open_model(locate_model(str(home), shelf.folder))
    found = export_model(str(home), tmp_path / "plain.gguf", "auto")
    assert found.folder.is_file() and found.bytes == found.folder.stat().st_size and not found.has_card
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="plain.gguf")
    expected = logits(opened.model, opened.frame.prefix_ids)
    torch.testing.assert_close(logits(plain, opened.frame.prefix_ids)[..., : expected.shape[-1]], expected)
    assert found.virtual_tokens == tuple(f"<|prompt-{i}|>" for i in range(len(opened.frame.prefix_ids)))


@pytest.mark.parametrize("name", ["prefix", "p-tuning-v2", "adapter", "houlsby", "parallel"])
def test_export_refuses_what_cannot_become_weights(shelf: Workspace, name: str, tmp_path: Path) -> None:
    with pytest.raises(TuningError, match=r"no weight|weights") as met:
        export_model(str(home_of(shelf, name)), tmp_path / "plain", "auto")
    assert met.value.hint
    assert not (tmp_path / "plain").exists()


def test_a_merged_adapter_is_the_sum_of_its_products(shelf: Workspace, tmp_path: Path) -> None:
    home = home_of(shelf, "lora")
    export_model(str(home), tmp_path / "plain", "auto")
    old, new = weights_of(shelf.folder / "llama"), weights_of(tmp_path / "plain")
    state = load_file(home / "model" / "tuning.safetensors")
    for name in (f"model.layers.{i}.{part}" for i in range(BLOCKS) for part in ("self_attn.q_proj", "mlp.down_proj")):
        update = 2.0 * state[f"{name}.lora_B.weight"] @ state[f"{name}.lora_A.weight"]  # alpha is twice the rank
        torch.testing.assert_close(new[f"{name}.weight"], old[f"{name}.weight"] + update)
        assert update.abs().max() > 1e-3


@WRAPPED
@pytest.mark.parametrize("name", ["lora", "rslora", "dora", "pissa"])
def test_peft_reads_what_left(shelf: Workspace, name: str) -> None:
    folder = home_of(shelf, name) / "model"
    start = locate_model(str(shelf.folder / "llama"), shelf.folder)
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(start.name_or_path), folder).eval()
    ours = load_pretrained(start).model
    load_tuning(ours, folder)
    torch.testing.assert_close(logits(theirs), logits(ours), rtol=0, atol=1e-6)
    assert not torch.allclose(logits(ours), logits(load_pretrained(start).model), atol=1e-4)
    # PEFT finds the base by itself.
    base = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert Path(base) == shelf.folder / "llama"


@WRAPPED
def test_a_prompt_is_pefts_too(shelf: Workspace) -> None:
    folder = home_of(shelf, "prompt") / "model"
    opened = open_model(locate_model(str(folder), shelf.folder))
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(shelf.folder / "llama"), folder).eval()
    torch.testing.assert_close(logits(theirs), logits(opened.model, opened.frame.prefix_ids), rtol=0, atol=1e-6)


@WRAPPED
def test_a_folder_of_pefts_is_a_start(shelf: Workspace, tmp_path: Path) -> None:
    torch.manual_seed(3)
    base = AutoModelForCausalLM.from_pretrained(shelf.folder / "llama")
    theirs: Any = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False))
    theirs.eval()
    theirs.save_pretrained(tmp_path / "theirs")
    expected = {name: texts_by_hand(theirs, shelf.file(name, held_out=True)) for name in ("old", "new")}
    done = shelf.run(shelf.stage("on-theirs", {"kind": "lora", "rank": 1}, model=str(tmp_path / "theirs")))
    for name, (nats, tokens) in expected.items():
        assert done.record.scores.before[f"{name}-heldout"].nats == pytest.approx(nats / tokens, rel=1e-5)
    # What leaves sits on PEFT's folder, and comes back on it.
    assert evaluated(shelf, done.run_folder) == done.record.scores.after
    plain = shelf.run(shelf.stage("full-on-theirs", model=str(tmp_path / "theirs")))
    agrees(shelf, plain.record.scores.after, plain.run_folder / "model")


# -- what stands on what -------------------------------------------------------------------------------------------------


def stack(shelf: Workspace, *kinds: str) -> Path:
    """Runs of cases, each on the one before."""
    model, name = "llama", "stack"
    for kind in kinds:
        name = f"{name}-{kind}"
        place = shelf.run(stage_of(shelf, kind, name, model=model)).run_folder
        model = str(place)
    return Path(model)


@pytest.mark.parametrize(
    ("kinds", "standing"),
    [
        (("lora", "dora"), []),
        pytest.param(("blocks", "lora"), [], marks=pytest.mark.slow),
        (("prefix", "prompt", "adapter"), ["prefix", "prompt", "adapter"]),
        pytest.param(("adapter", "lora"), ["adapter"], marks=pytest.mark.slow),
        pytest.param(("prompt", "prompt"), ["prompt", "prompt"], marks=pytest.mark.slow),
        pytest.param(("prefix", "prefix"), ["prefix", "prefix"], marks=pytest.mark.slow),
    ],
)
def test_a_stage_stands_on_the_one_before(shelf: Workspace, kinds: tuple[str, ...], standing: list[str]) -> None:
    below, top = stack(shelf, *kinds[:-1]), stack(shelf, *kinds)
    record = read_record(top)
    assert record.scores.before == read_record(below).scores.after
    assert evaluated(shelf, top) == record.scores.after != record.scores.before
    opened = open_model(locate_model(str(top), shelf.folder))
    assert [tuning.kind for tuning in opened.tunings] == standing
    assert not standing or not any(p.requires_grad for p in opened.model.parameters())
    assert record.model.trainable == CASES[kinds[-1]].count
    assert record.parents[0].name == below.name
    parts = run_interrupted(shelf, stage_of(shelf, kinds[-1], f"{top.name}-parts", model=str(below)))
    assert run_trace(parts.run_folder) == run_trace(top)


def test_soft_prompts_stand_side_by_side(shelf: Workspace, tmp_path: Path) -> None:
    top = stack(shelf, "prompt", "prompt")
    opened = open_model(locate_model(str(top), shelf.folder))
    assert opened.frame.prefix_ids == tuple(range(VOCABULARY, VOCABULARY + 6))
    export_model(str(top), tmp_path / "plain", "auto")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert torch.equal(logits(plain, opened.frame.prefix_ids), logits(opened.model, opened.frame.prefix_ids))


def test_full_goes_on_from_an_adapter_that_becomes_weights(shelf: Workspace) -> None:
    top = stack(shelf, "lora", "full")
    assert not (top / "model" / "tuning.json").exists()
    agrees(shelf, read_record(top).scores.after, top / "model")
    assert read_record(top).scores.before == read_record(stack(shelf, "lora")).scores.after


@pytest.mark.parametrize("kind", ["full", "head", "blocks", "expand"])
def test_the_base_does_not_move_under_a_standing_tuning(shelf: Workspace, kind: str) -> None:
    below = stack(shelf, "adapter")
    with pytest.raises(TuningError, match="adapter") as met:
        shelf.run(stage_of(shelf, kind, f"{kind}-refused", model=str(below)))
    assert met.value.expected


def overlap(shelf: Workspace, run: Path, below: Path) -> float:
    """The penalty of O-LoRA at a strength of one, summed over the layers."""
    new, old = (read_export(place / "model").state for place in (run, below))
    return sum(float((old[n] @ new[n].T).abs().sum()) for n in new if n.endswith(".lora_A.weight"))


def test_orthogonal_adapters_keep_out_of_one_anothers_way(shelf: Workspace) -> None:
    below = stack(shelf, "lora")
    tuning = {"kind": "lora", "rank": 2}
    free = shelf.run(shelf.stage("free", tuning, model=str(below)))
    held = shelf.run(shelf.stage("held", {**tuning, "orthogonal": 0.5}, model=str(below)))
    assert overlap(shelf, held.run_folder, below) < 0.8 * overlap(shelf, free.run_folder, below)
    told = [row.penalties for row in read_metrics(held.run_folder / "metrics.jsonl") if row.kind == "step"]
    assert all(penalties["orthogonal"] > 0 for penalties in told)
    assert told[-1]["orthogonal"] < told[0]["orthogonal"]
    none = [row.penalties for row in read_metrics(free.run_folder / "metrics.jsonl") if row.kind == "step"]
    assert none == [{}] * len(none)
    # The first step's value is that of the adapter as it is drawn, and both runs draw the same.
    plan = shelf.plan(shelf.stage("drawn", tuning, model=str(below)))
    drawn = make_tuned_model(plan, World(torch.device("cpu"))).tuning.state()
    old = read_export(below / "model").state
    by_hand = sum(float((old[n] @ drawn[n].T).abs().sum()) for n in drawn if n.endswith(".lora_A.weight"))
    assert told[0]["orthogonal"] == pytest.approx(0.5 * by_hand, rel=1e-5)


def test_orthogonal_to_all_that_went_before(shelf: Workspace) -> None:
    """The third adapter keeps out of the way of the first, which is part of the weights by now, and of the second."""
    tuning = {"kind": "lora", "rank": 1, "orthogonal": 0.5, "targets": ["q_proj"]}
    one = stack(shelf, "lora")
    two = shelf.run(shelf.stage("orthogonal-two", tuning, model=str(one))).run_folder
    three = shelf.run(shelf.stage("orthogonal-three", tuning, model=str(two))).run_folder
    plan = shelf.plan(shelf.stage("drawn-three", tuning, model=str(two)))
    drawn = make_tuned_model(plan, World(torch.device("cpu"))).tuning.state()
    first, second = read_export(one / "model").state, read_export(two / "model").state
    by_hand = sum(
        float((torch.cat([first[n], second[n]]) @ drawn[n].T).abs().sum()) for n in drawn if n.endswith("A.weight")
    )
    told = next(row for row in read_metrics(three / "metrics.jsonl") if row.kind == "step")
    assert told.penalties["orthogonal"] == pytest.approx(0.5 * by_hand, rel=1e-5)


def test_nothing_to_be_orthogonal_to_is_told(shelf: Workspace) -> None:
    with pytest.raises(StageError, match="no earlier stage") as met:
        shelf.run(shelf.stage("first", {"kind": "lora", "rank": 2, "orthogonal": 0.5}))
    assert met.value.where == "tuning.orthogonal"


# -- a base that is another one ------------------------------------------------------------------------------------------


def test_a_tuning_on_another_base_is_refused(shelf: Workspace, tmp_path: Path) -> None:
    """Naming both fingerprints; a base that the user names is taken, and said."""
    base = tmp_path / "base"
    shutil.copytree(shelf.folder / "llama", base)
    home = shelf.run(stage_of(shelf, "lora", "moved-base", model=str(base), output=str(tmp_path / "run"))).run_folder
    recorded = json.loads((home / "model" / "tuning.json").read_text())["base"]["fingerprint"]
    state = weights_of(base)
    state["model.norm.weight"] = state["model.norm.weight"] * 2
    save_file(state, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(TuningError, match="belongs to the base") as met:
        open_model(locate_model(str(home), tmp_path))
    assert recorded in met.value.problem and start_fingerprint(locate_model(str(base), tmp_path)) in met.value.problem
    assert "`base`" in met.value.hint
    raw = shelf.stage(
        "on-it", {"kind": "lora", "rank": 1}, model=str(home), base=str(base), output=str(tmp_path / "on")
    )
    checked = check_stage(shelf.plan(raw), cache=shelf.cache)
    assert any("fingerprint differs" in note for note in checked["notes"])
    # A base of the same content at another place is the same base.
    shutil.copytree(shelf.folder / "llama", tmp_path / "other")
    moved = {**raw, "base": str(tmp_path / "other")}
    assert not any("fingerprint" in note for note in check_stage(shelf.plan(moved), cache=shelf.cache)["notes"])
    opened = open_model(locate_model(str(home), tmp_path, str(tmp_path / "other")))
    assert not opened.notes


def test_a_tuning_finds_its_base_again_where_both_were_moved(shelf: Workspace, tmp_path: Path) -> None:
    shutil.copytree(shelf.folder / "llama", tmp_path / "here" / "base")
    raw = stage_of(
        shelf, "prefix", "moving", model=str(tmp_path / "here" / "base"), output=str(tmp_path / "here" / "run")
    )
    after = shelf.run(raw).record.scores.after
    (tmp_path / "here").rename(tmp_path / "there")
    assert evaluated(shelf, tmp_path / "there" / "run") == after

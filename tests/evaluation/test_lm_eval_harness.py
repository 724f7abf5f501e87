"""Beside lm-eval: the same log-likelihoods and accuracies on few-shot prompts, and its tasks on models of ours."""

from __future__ import annotations

import json
import logging
import random
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from postgrad.errors import DataError, MissingExtra, ModelError, StageError
from postgrad.evaluation import lm_eval_harness as harness
from postgrad.evaluation.choices.loglikelihood import encode_items, score_choices
from postgrad.evaluation.lm_eval_harness import HarnessResults, run_harness
from postgrad.models.model import wrap_model
from postgrad.models.prefix_lm_attention import mark_prefix_lm
from postgrad.models.task import Task
from postgrad.plan.model_inputs import get_tokenizer_frame
from postgrad.tuning.attach import attach
from tests.conftest import make_llama, make_tokenizer
from tests.tiny_stages import make_t5, t5_tokenizer

WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
ROOM = 512


@pytest.fixture
def lm_eval() -> Iterator[Any]:
    """lm-eval's model class for Hugging Face models, and all that it warns of kept quiet."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = pytest.importorskip("lm_eval.models.huggingface", reason="lm-eval is not installed")
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        yield found.HFLM


def trained_a_little(model: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    """Weights far enough from zero that every token matters to what comes behind it."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter += 0.15 * torch.randn(parameter.shape, generator=generator)
    return model


def sorts() -> dict[str, tuple[PreTrainedModel, PreTrainedTokenizerFast, str]]:
    """A decoder and an encoder-decoder with their tokenizers."""
    t5 = t5_tokenizer()
    return {
        "decoder": (trained_a_little(make_llama(max_position_embeddings=ROOM)), make_tokenizer(), Task.CAUSAL),
        "encoder-decoder": (trained_a_little(make_t5(len(t5))), t5, Task.TEXT_TO_TEXT),
    }


def rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Sums in words, with four choices."""
    rng = random.Random(seed)
    out = []
    for _ in range(count):
        a, b = rng.randrange(5), rng.randrange(5)
        options = [
            f"{WORDS[i]} and {WORDS[j]}." if i % 2 else WORDS[i] for i, j in zip(range(4), range(3, 7), strict=True)
        ]
        rng.shuffle(options)
        out.append({"question": f"{WORDS[a]} and {WORDS[b]}", "options": options, "answer": rng.randrange(4)})
    return out


def few_shot(count: int, shots: int = 5) -> list[tuple[str, list[str]]]:
    """Questions behind the same demonstrations, and their choices."""
    shown = "".join(f"Q: {r['question']}\nA: {r['options'][r['answer']]}\n\n" for r in rows(shots, 1))
    return [(f"{shown}Q: {r['question']}\nA:", [f" {option}" for option in r["options"]]) for r in rows(count)]


@torch.no_grad()
def plain_loop(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, items: list[Any]) -> list[list[float]]:
    """With transformers alone: what is behind the question, one choice after the other."""
    out = []
    for context, choices in items:
        before = tokenizer(context)["input_ids"]
        found = []
        for choice in choices:
            if model.config.is_encoder_decoder:
                answer = tokenizer(choice, add_special_tokens=False)["input_ids"]
                begin = torch.tensor([[model.config.decoder_start_token_id, *answer[:-1]]])
                logits = model(input_ids=torch.tensor([before]), decoder_input_ids=begin).logits[0]
            else:
                whole = tokenizer(context + choice)["input_ids"]
                answer = whole[len(before) :]
                logits = model(input_ids=torch.tensor([before + answer])).logits[0, len(before) - 1 : -1]
            log_p = torch.log_softmax(logits.double(), -1)
            found.append(float(log_p[torch.arange(len(answer)), torch.tensor(answer)].sum()))
        out.append(found)
    return out


@pytest.mark.parametrize("sort", ["decoder", "encoder-decoder"])
def test_five_shot_log_likelihoods_are_those_of_a_plain_loop(sort: str) -> None:
    pretrained, tokenizer, task = sorts()[sort]
    items = few_shot(40)
    encoded = encode_items(tokenizer, get_tokenizer_frame(tokenizer), items, empty=0, separate=sort != "decoder")
    found = score_choices(wrap_model(pretrained, task), encoded, context=ROOM, pad=0)  # type: ignore[arg-type]
    wanted = plain_loop(pretrained, tokenizer, items)
    assert np.array(found.log_likelihoods) == pytest.approx(np.array(wanted), abs=1e-4)
    assert found.best_choices().tolist() == np.argmax(wanted, 1).tolist()
    assert len(set(found.best_choices().tolist())) > 1
    # The mutant: without its demonstrations a question has other answers.
    bare = encode_items(
        tokenizer,
        get_tokenizer_frame(tokenizer),
        [(c.rsplit("\n\n", 1)[1], o) for c, o in items],
        empty=0,
        separate=sort != "decoder",
    )
    alone = score_choices(wrap_model(pretrained, task), bare, context=ROOM, pad=0)  # type: ignore[arg-type]
    assert np.array(alone.log_likelihoods) != pytest.approx(np.array(wanted), abs=1e-2)


@pytest.mark.parametrize("sort", ["decoder", "encoder-decoder"])
def test_five_shot_log_likelihoods_are_those_of_lm_eval(sort: str, lm_eval: Any) -> None:
    from lm_eval.api.instance import Instance

    pretrained, tokenizer, task = sorts()[sort]
    data, items = rows(40), few_shot(40)
    pairs = [(context, choice) for context, choices in items for choice in choices]
    lm = lm_eval(pretrained, tokenizer=tokenizer, batch_size=8, max_length=ROOM)
    theirs = lm.loglikelihood(
        [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)], disable_tqdm=True
    )
    encoded = encode_items(tokenizer, get_tokenizer_frame(tokenizer), items, empty=0, separate=sort != "decoder")
    found = score_choices(wrap_model(pretrained, task), encoded, context=ROOM, pad=0)  # type: ignore[arg-type]
    assert np.concatenate(found.log_likelihoods) == pytest.approx(np.array([log_p for log_p, _ in theirs]), abs=1e-4)
    assert np.concatenate(found.greedy).tolist() == [greedy for _, greedy in theirs]
    best = np.array([log_p for log_p, _ in theirs]).reshape(-1, 4).argmax(1)
    right = np.array([row["answer"] for row in data])
    assert (found.best_choices() == right).mean() == (best == right).mean()


# -- lm-eval's tasks --------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two tasks over local files: one is answered by choosing, one by writing."""
    home = tmp_path / "tasks"
    home.mkdir()
    for name, seed in (("test", 0), ("train", 7)):
        (home / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(30, seed)))
    files = {"test": str(home / "test.jsonl"), "train": str(home / "train.jsonl")}
    shared = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": files, "cache_dir": str(tmp_path / "hub")},
        "test_split": "test",
        "fewshot_split": "train",
        "doc_to_text": "Q: {{question}}\nA:",
    }
    choosing = {
        **shared,
        "task": "sums",
        "output_type": "multiple_choice",
        "doc_to_choice": "options",
        "doc_to_target": "answer",
        "metric_list": [{"metric": m} for m in ("acc", "acc_norm", "acc_bytes", "acc_mutual_info")],
    }
    writing = {
        **shared,
        "task": "sums_written",
        "output_type": "generate_until",
        "doc_to_target": "{{options[answer]}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    for task in (choosing, writing):
        (home / f"{task['task']}.yaml").write_text(json.dumps(task))  # which is YAML
    return home


def ran(sort: str, tasks: list[str], **options: Any) -> HarnessResults:
    pretrained, tokenizer, task = sorts()[sort]
    return run_harness(wrap_model(pretrained, task), tokenizer, tasks, pad=0, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("sort", ["decoder", "encoder-decoder"])
def test_tasks_have_the_results_that_lm_eval_gives(sort: str, lm_eval: Any, folder: Path) -> None:
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    found = ran(sort, ["sums", "sums_written"], folder=folder, shots=3, context=ROOM)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before[:2]
    assert torch.equal(torch.get_rng_state(), before[2])
    pretrained, tokenizer, _ = sorts()[sort]
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    theirs = simple_evaluate(
        lm_eval(pretrained, tokenizer=tokenizer, batch_size=4, max_length=ROOM),
        tasks=["sums", "sums_written"],
        task_manager=manager,
        num_fewshot=3,
        log_samples=False,
    )["results"]
    assert [(r.task, r.metric) for r in found.results] == [
        *(("sums", metric) for metric in ("acc", "acc_norm", "acc_bytes", "acc_mutual_info")),
        ("sums_written", "exact_match"),
    ]
    for result in found.results:
        assert result.value == pytest.approx(theirs[result.task][f"{result.metric},none"])
        assert result.stderr == pytest.approx(theirs[result.task][f"{result.metric}_stderr,none"])
        assert (result.shots, result.items) == (3, 30)
    assert len({result.value for result in found.results[:4]}) > 1
    assert (found.truncated_prompts, found.requests) == (0, 30 * 8 + 30)
    assert {r.items for r in ran(sort, ["sums"], folder=folder, limit=5, context=ROOM).results} == {5}


def test_prompts_beyond_the_context_are_cut_as_lm_eval_cuts_them_and_counted(lm_eval: Any, folder: Path) -> None:
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    found = ran("decoder", ["sums"], folder=folder, shots=5, context=40)
    assert found.truncated_prompts > 100
    pretrained, tokenizer, _ = sorts()["decoder"]
    theirs = simple_evaluate(
        lm_eval(pretrained, tokenizer=tokenizer, batch_size=4, max_length=40),
        tasks=["sums"],
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        num_fewshot=5,
    )["results"]["sums"]
    assert [r.value for r in found.results] == [theirs[f"{r.metric},none"] for r in found.results]


def test_soft_prompts_stand_around_what_lm_eval_asks(lm_eval: Any) -> None:
    from lm_eval.api.instance import Instance

    pretrained, tokenizer, _ = sorts()["decoder"]
    attach(pretrained, {"kind": "prompt", "length": 3, "init": "normal"}, tokenizer=tokenizer)
    virtual = tuple(range(320, 323))

    def around(ids: Any) -> tuple[int, ...]:
        return (*virtual, *ids)

    lm = harness._make_lm(
        sys.modules[lm_eval.__module__], wrap_model(pretrained, Task.CAUSAL), tokenizer, 64, 0, around
    )
    assert (lm.total_length, lm.max_length) == (64, 61)
    items = few_shot(6, 0)
    pairs = [(context, choice) for context, choices in items for choice in choices]
    found = lm.loglikelihood(
        [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)], disable_tqdm=True
    )
    for (context, choice), (log_p, greedy) in zip(pairs, found, strict=True):
        before = tokenizer(context)["input_ids"]
        answer = tokenizer(context + choice)["input_ids"][len(before) :]
        with torch.no_grad():
            logits = pretrained(input_ids=torch.tensor([[*virtual, *before, *answer]])).logits[0]
        each = torch.log_softmax(logits[len(virtual) + len(before) - 1 : -1].double(), -1)
        assert log_p == pytest.approx(float(each[torch.arange(len(answer)), torch.tensor(answer)].sum()), abs=1e-4)
        assert greedy == (each.argmax(-1).tolist() == answer)
    # Written behind it too, for prompts of several lengths at once.
    wanted = {"until": ["\n\n\n"], "max_gen_toks": 5}
    written = lm.generate_until(
        [Instance("generate_until", {}, (context, wanted), i) for i, (context, _) in enumerate(items)],
        disable_tqdm=True,
    )
    for (context, _), text in zip(items, written, strict=True):
        ids = torch.tensor([[*virtual, *tokenizer(context)["input_ids"]]])
        alone = pretrained.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False, pad_token_id=0
        )
        assert text == tokenizer.decode(alone[0, ids.shape[1] :], skip_special_tokens=True)
    assert lm.request_count == len(pairs) + len(items)


# -- bad use ----------------------------------------------------------------------------------------------------------


def test_without_lm_eval(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(MissingExtra, match=r"--harness: tasks of lm-eval need[\s\S]*pip install 'postgrad\[harness\]'"):
        ran("decoder", ["sums"])


def test_a_task_that_there_is_not(lm_eval: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval.tasks import TaskManager

    def only_ours(include_path: str | None = None, include_defaults: bool = True) -> Any:
        return TaskManager(include_path=include_path, include_defaults=False)  # its own tasks take seconds to index

    with pytest.raises(StageError, match=r"no task 'sum'[\s\S]*did you mean 'sums'"):
        harness._make_task_manager(only_ours, ["sums", "sum"], folder)
    assert harness._make_task_manager(only_ours, ["sum*"], folder).all_tasks == ["sums", "sums_written"]


def test_data_that_is_not_there(lm_eval: Any, folder: Path) -> None:
    (folder / "test.jsonl").unlink()
    with pytest.raises(DataError, match=r"--harness: lm-eval could not run sums: .*test\.jsonl"):
        ran("decoder", ["sums"], folder=folder)


def test_an_answer_that_leaves_no_room_for_its_prompt(lm_eval: Any, folder: Path) -> None:
    with pytest.raises(DataError, match=r"an answer of \d+ tokens does not fit 2"):
        ran("decoder", ["sums"], folder=folder, context=2)


def test_a_prefix_language_model_is_not_let_write_causally(lm_eval: Any, folder: Path) -> None:
    pretrained, tokenizer, _ = sorts()["decoder"]
    mark_prefix_lm(pretrained.config, True)
    model = wrap_model(pretrained, Task.CAUSAL)
    with pytest.raises(ModelError, match="bidirectional attention over the prompt"):
        run_harness(model, tokenizer, ["sums_written"], pad=0, folder=folder)
    assert len(run_harness(model, tokenizer, ["sums"], pad=0, folder=folder, limit=3).results) == 4

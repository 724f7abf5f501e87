"""Every task as a stage: its scores are those of plain transformers, its loss and gradient too, and objectives mix."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
)

from postgrad.cli.render import evaluation_text
from postgrad.commands.evaluate import evaluate
from postgrad.commands.export import export_model
from postgrad.data.layouts.rows import IGNORED
from postgrad.data.loading.batch import Batch
from postgrad.distributed.world import World
from postgrad.errors import DataError, ModelError, StageError, TuningError
from postgrad.evaluation.before_after import read_scores, score_sets
from postgrad.hardware.execution import Execution
from postgrad.lineage.metrics import read_metrics
from postgrad.lineage.record import SetScore
from postgrad.models.location import locate_model
from postgrad.models.model import wrap_model
from postgrad.optim.optimizer import AdamW
from postgrad.plan import demonstration_pool
from postgrad.plan.objective_rows import make_rows
from postgrad.plan.plan import Plan
from postgrad.run.build import build_run, make_loader
from postgrad.run.losses import make_objectives
from postgrad.run.tuned_model import make_tuned_model
from postgrad.stats import bootstrap
from postgrad.training.step import Run, StepReport, train_step
from postgrad.tuning.open_model import open_model
from tests.tiny_stages import (
    LENGTH,
    QUICK_EVALUATION,
    Workspace,
    make_workspace,
    run_interrupted,
    run_trace,
    train_for,
    typed_scores,
    write_rows,
)

CPU = World(torch.device("cpu"))
CLASSIFY = [{"kind": "classify"}]


@dataclass(frozen=True)
class Case:
    """A task: the model, its rows, and how plain transformers scores a row of the file with what was published."""

    model: str
    rows: str
    auto: Any
    scored: Callable[[Any, Any, dict[str, Any]], tuple[list[float], Any, Any]]
    """`(nats of each label, what is said, what is meant)` of a row, by model and tokenizer."""
    objectives: tuple[dict[str, Any], ...] = ()
    source: dict[str, Any] = field(default_factory=dict)
    length: int = LENGTH
    tokens: int = 24
    metric: str = ""


def logits_of(model: Any, **inputs: Any) -> Tensor:
    with torch.no_grad():
        return model(**inputs).logits[0].double()


def class_by_hand(model: Any, tokenizer: Any, row: dict[str, Any]) -> tuple[list[float], Any, Any]:
    texts = [value for key, value in row.items() if key != "label"]
    if len(texts) == 2 and model.config.model_type != "bert":  # no separator of its own
        texts = ["\n".join(texts)]
    logits_C = logits_of(model, **tokenizer(*texts, return_tensors="pt"))
    meant = model.config.label2id[row["label"]]
    return [-float(torch.log_softmax(logits_C, -1)[meant])], int(logits_C.argmax()), meant


def multi_by_hand(model: Any, tokenizer: Any, row: dict[str, Any]) -> tuple[list[float], Any, Any]:
    logits_C = logits_of(model, **tokenizer(row["text"], return_tensors="pt"))
    meant_C = torch.tensor([float(name in row["labels"]) for name in model.config.id2label.values()])
    losses_C = functional.binary_cross_entropy_with_logits(logits_C, meant_C.double(), reduction="none")
    return [float(losses_C.mean())], (logits_C > 0).tolist(), meant_C.bool().tolist()


def number_by_hand(model: Any, tokenizer: Any, row: dict[str, Any]) -> tuple[list[float], Any, Any]:
    said = float(logits_of(model, **tokenizer(row["text"], return_tensors="pt"))[0])
    return [(said - row["label"]) ** 2], said, row["label"]


def tags_by_hand(model: Any, tokenizer: Any, row: dict[str, Any]) -> tuple[list[float], Any, Any]:
    text = tokenizer(" ".join(row["tokens"]), return_offsets_mapping=True, return_tensors="pt")
    offsets = text.pop("offset_mapping")[0].tolist()
    log_p = torch.log_softmax(logits_of(model, **text), -1)
    nats, said, meant, at = [], [], [], 0
    for word, tag in zip(row["tokens"], row["tags"], strict=True):
        place = next(i for i, (begin, end) in enumerate(offsets) if begin <= at < end)
        nats.append(-float(log_p[place, model.config.label2id[tag]]))
        said.append(int(log_p[place].argmax()))
        meant.append(model.config.label2id[tag])
        at += len(word) + 1
    return nats, said, meant


def continued(model: Any, tokenizer: Any, prompt: str, answer: str) -> tuple[list[float], Any, Any]:
    """The nats of an answer and its EOS behind a prompt, both being one text."""
    text = tokenizer(prompt + answer, return_offsets_mapping=True)
    ids = torch.tensor([*text["input_ids"], tokenizer.eos_token_id])
    answered = [end > len(prompt) for _, end in text["offset_mapping"]] + [True]
    log_p = torch.log_softmax(logits_of(model, input_ids=ids[None]), -1)
    return [-float(log_p[i - 1, ids[i]]) for i in range(1, len(ids)) if answered[i]], None, None


def completion_by_hand(model: Any, tokenizer: Any, row: dict[str, Any]) -> tuple[list[float], Any, Any]:
    return continued(model, tokenizer, row["prompt"], row["completion"])


def instruction_by_hand(model: Any, tokenizer: Any, row: dict[str, Any]) -> tuple[list[float], Any, Any]:
    return continued(model, tokenizer, f"### User:\n{row['instruction']}\n\n### Assistant:\n", row["output"])


def labelled_by_hand(model: Any, tokenizer: Any, row: dict[str, Any]) -> tuple[list[float], Any, Any]:
    return continued(model, tokenizer, f"{row['text']} is ", row["label"].upper())


def choice_by_hand(model: Any, tokenizer: Any, row: dict[str, Any]) -> tuple[list[float], Any, Any]:
    options = "\n".join(f"{letter}. {text}" for letter, text in zip("AB", row["choices"], strict=True))
    return continued(model, tokenizer, f"{row['question']}\n{options}\nAnswer: ", row["choices"][row["answer"]])


def told(tokenizer: Any, messages: list[dict[str, str]]) -> list[tuple[str, bool]]:
    """A conversation in the plain template, and what of it is answered."""
    names = {"user": "User", "assistant": "Assistant"}
    pieces: list[tuple[str, bool]] = []
    for i, message in enumerate(messages):
        pieces.append(("\n\n" * (i > 0) + f"### {names[message['role']]}:\n", False))
        answer = message["role"] == "assistant"
        pieces.append((message["content"] + tokenizer.eos_token * answer, answer))
    return pieces


def chat_by_hand(model: Any, tokenizer: Any, row: dict[str, Any]) -> tuple[list[float], Any, Any]:
    """Each answer with its EOS."""
    pieces = told(tokenizer, row["messages"])
    text = tokenizer("".join(piece for piece, _ in pieces), return_offsets_mapping=True)
    answered_C = [answer for piece, answer in pieces for _ in piece]
    ids = torch.tensor(text["input_ids"])
    log_p = torch.log_softmax(logits_of(model, input_ids=ids[None]), -1)
    asked = [i for i, (begin, end) in enumerate(text["offset_mapping"]) if any(answered_C[begin:end])]
    return [-float(log_p[i - 1, ids[i]]) for i in asked], None, None


def last_by_hand(model: Any, tokenizer: Any, row: dict[str, Any]) -> tuple[list[float], Any, Any]:
    """The last answer of a conversation, written by a decoder of its own."""
    *before, (answer, _) = told(tokenizer, row["messages"])
    source = tokenizer("".join(piece for piece, _ in before), return_tensors="pt")
    labels = tokenizer(answer, add_special_tokens=False, return_tensors="pt")["input_ids"]
    log_p = torch.log_softmax(logits_of(model, **source, labels=labels), -1)
    return (-log_p.gather(1, labels[0, :, None])[:, 0]).tolist(), None, None


def pair_by_hand(model: Any, tokenizer: Any, row: dict[str, Any]) -> tuple[list[float], Any, Any]:
    labels = tokenizer(row["target"], return_tensors="pt")["input_ids"]
    log_p = torch.log_softmax(logits_of(model, **tokenizer(row["source"], return_tensors="pt"), labels=labels), -1)
    return (-log_p.gather(1, labels[0, :, None])[:, 0]).tolist(), None, None


SEQUENCE, TOKENS = AutoModelForSequenceClassification, AutoModelForTokenClassification
LABELLED = {"kind": "labelled"}
CLASSIFIERS = {
    "bert class": Case("bert", "labelled", SEQUENCE, class_by_hand, CLASSIFY, LABELLED, metric="accuracy"),
    "bert two texts": Case("bert", "paired", SEQUENCE, class_by_hand, CLASSIFY, metric="accuracy"),
    "bert multi": Case("bert", "multi", SEQUENCE, multi_by_hand, CLASSIFY, LABELLED, metric="accuracy"),
    "bert number": Case("bert", "numbered", SEQUENCE, number_by_hand, CLASSIFY, LABELLED, metric="MSE"),
    "bert tags": Case("bert", "tagged", TOKENS, tags_by_hand, CLASSIFY, tokens=120, metric="accuracy"),
    "llama class": Case("llama", "labelled", SEQUENCE, class_by_hand, CLASSIFY, LABELLED, metric="accuracy"),
    "llama two texts": Case("llama", "paired", SEQUENCE, class_by_hand, CLASSIFY, metric="accuracy"),
    "llama tags": Case("llama", "tagged", TOKENS, tags_by_hand, CLASSIFY, tokens=120, metric="accuracy"),
    "t5 class": Case("t5", "labelled", SEQUENCE, class_by_hand, CLASSIFY, LABELLED, metric="accuracy"),
    "t5 number": Case("t5", "numbered", SEQUENCE, number_by_hand, CLASSIFY, LABELLED, metric="MSE"),
}
WRITERS = {
    "llama instruction": Case("llama", "instruction", AutoModelForCausalLM, instruction_by_hand, tokens=100),
    "llama completion": Case("llama", "completion", AutoModelForCausalLM, completion_by_hand, tokens=100),
    "llama chat": Case("llama", "chat", AutoModelForCausalLM, chat_by_hand, length=96, tokens=100),
    "llama labelled": Case(
        "llama",
        "labelled",
        AutoModelForCausalLM,
        labelled_by_hand,
        source={
            "kind": "labelled",
            "prompt": "{text} is",
            "answer": "{label}",
            "label_words": {"words": "WORDS", "sums": "SUMS"},
        },
        tokens=100,
    ),
    "llama choices": Case("llama", "choices", AutoModelForCausalLM, choice_by_hand, tokens=100),
    "t5 chat": Case(
        "t5", "chat", AutoModelForSeq2SeqLM, last_by_hand, ({"kind": "text-to-text"},), length=96, tokens=100
    ),
    "t5 pair": Case(
        "t5", "pair", AutoModelForSeq2SeqLM, pair_by_hand, ({"kind": "text-to-text", "target_length": 16},), tokens=100
    ),
}
BY_HAND = CLASSIFIERS | WRITERS


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workspace]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bootstrap, "DRAWS", 200)
        yield make_workspace(tmp_path_factory.mktemp("shelf"), tmp_path_factory.getbasetemp() / "cache")


def stage_of(
    shelf: Workspace, name: str, tuning: dict[str, Any] | None = None, run: str | None = None, **changes: Any
) -> dict[str, Any]:
    case = BY_HAND[name]
    return shelf.stage(
        (run or name).replace(" ", "-"),
        tuning,
        **{
            "model": case.model,
            "sources": [shelf.source(case.rows, **case.source)],
            "objectives": list(case.objectives),
            "data": {"sequence_length": case.length},
            "tokens": case.tokens,
            "evaluation": {**QUICK_EVALUATION, "learned": [shelf.file(case.rows, held_out=True)]},
            **changes,
        },
    )


def read_rows(path: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


# -- scores --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow) if n in ("llama two texts", "t5 number") else n for n in BY_HAND],
)
def test_a_task_is_learnt_and_scored_as_plain_transformers_scores_it(shelf: Workspace, name: str) -> None:
    case = BY_HAND[name]
    done = shelf.run(stage_of(shelf, name))
    held_out = f"{case.rows}-heldout"
    assert done.record.changes[held_out].difference < (0.1 if case.rows == "paired" else 0)
    folder = done.run_folder / "model"
    model, loading = case.auto.from_pretrained(folder, output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = [case.scored(model.eval(), tokenizer, row) for row in read_rows(shelf.file(case.rows, held_out=True))]
    nats = [nat for row, _, _ in found for nat in row]
    after = done.record.scores.after[held_out]
    assert (after.documents, after.tokens) == (len(found), len(nats))
    assert after.nats == pytest.approx(np.mean(nats), rel=1e-5)
    if case.metric:
        said, meant = (np.concatenate([np.ravel(row[i]) for row in found]) for i in (1, 2))
        right = np.mean((said - meant) ** 2) if case.metric == "MSE" else np.mean(said == meant)
        assert after.metrics[case.metric].value == pytest.approx(right, rel=1e-4)
        kept = read_scores(done.run_folder / "scores" / "after.npz")[held_out]
        both = sorted(
            zip(kept.labels_I.tolist(), kept.predictions_I.tolist(), strict=True)
        )  # in the order of their hashes
        assert np.allclose(both, sorted(zip(meant.tolist(), said.tolist(), strict=True)), atol=1e-4)


@pytest.mark.parametrize(
    "name", ["bert class", "bert multi", "bert number", "bert tags", "llama class", "t5 pair", "t5 chat"]
)
def test_what_left_is_scored_alike_outside_of_its_stage(shelf: Workspace, name: str, tmp_path: Path) -> None:
    """As a run, as a small folder on its base, and exported as a plain model."""
    file = shelf.file(BY_HAND[name].rows, held_out=True)

    def evaluated(model: Path) -> dict[str, Any]:
        length = BY_HAND[name].length
        found = evaluate(str(model), [file], context=length, cache=tmp_path / "scores")
        text = evaluation_text(found)
        assert all(f"    {metric} " in text for metric in next(iter(found.sets.values())).metrics)
        return {name: SetScore.model_validate(score.as_dict()) for name, score in found.sets.items()}

    for tuning in (None, {"kind": "lora", "rank": 1}):
        done = shelf.run(stage_of(shelf, name, tuning, f"{name}{' lora' if tuning else ''}"))
        assert typed_scores(evaluated(done.run_folder)) == done.record.scores.after
    export_model(str(done.run_folder), tmp_path / "plain", "auto")
    assert typed_scores(evaluated(tmp_path / "plain")) == done.record.scores.after


def test_labels_that_a_classifier_does_not_know_are_met(shelf: Workspace) -> None:
    file = write_rows(shelf.folder / "foreign.jsonl", [{"text": "six and one.", "label": "verse"}])
    run = shelf.run(stage_of(shelf, "bert class")).run_folder
    with pytest.raises(DataError, match="label 'verse' is none of the 2 known ones"):
        evaluate(str(run), [str(file)], context=LENGTH, cache=shelf.cache)


def test_a_classifier_leaves_with_its_labels(shelf: Workspace) -> None:
    folder = shelf.run(stage_of(shelf, "bert class")).run_folder / "model"
    config = json.loads((folder / "config.json").read_text())
    assert config["id2label"] == {"0": "sums", "1": "words"}
    assert config["problem_type"] == "single_label_classification"


TEXTS = {
    "bert masked": ("bert", AutoModelForMaskedLM, ()),
    "bert words": ("bert", AutoModelForMaskedLM, ({"kind": "masked", "share": 0.3, "whole_words": True},)),
    "t5 spans": ("t5", AutoModelForSeq2SeqLM, ()),
    "t5 text": ("t5", AutoModelForSeq2SeqLM, ({"kind": "text-to-text", "target_length": 24},)),
}


@pytest.mark.parametrize("name", TEXTS)
def test_text_is_learnt_by_encoders_and_encoder_decoders(shelf: Workspace, name: str) -> None:
    model, auto, objectives = TEXTS[name]
    raw = shelf.stage(name.replace(" ", "-"), model=model, objectives=list(objectives), tokens=200)
    done = shelf.run(raw)
    assert done.record.changes["new-heldout"].difference < 0
    plan, published = shelf.plan(raw), auto.from_pretrained(done.run_folder / "model")
    for held_out in plan.evaluation.sets:
        nats = tokens = 0
        for row in held_out.rows:
            inputs = {key: torch.from_numpy(value)[None] for key, value in row.inputs.items()}
            log_p = torch.log_softmax(logits_of(published, **inputs), -1)
            asked = np.flatnonzero(row.labels != IGNORED)
            nats -= float(log_p[asked, row.labels[asked]].sum())
            tokens += len(asked)
        after = done.record.scores.after[held_out.name]
        assert after.tokens == tokens == held_out.tokens
        assert after.nats == pytest.approx(nats / tokens, rel=1e-5)


def test_a_cloze_task_says_a_word_at_the_mask(shelf: Workspace) -> None:
    """Classes as words that a masked language model says: the mask stands in the template, beside trained vectors."""
    raw = stage_of(
        shelf,
        "bert class",
        {"kind": "p-tuning", "template": "{x} {2} [MASK]", "hidden": 8},
        "cloze",
        objectives=[{"kind": "masked"}],
        sources=[shelf.source("labelled", kind="labelled", label_words={"words": "yes", "sums": "no"})],
        evaluation={
            **QUICK_EVALUATION,
            "learned": [
                {
                    "name": "labelled-heldout",
                    "path": shelf.file("labelled", held_out=True),
                    "same_format_as": "labelled",
                }
            ],
        },
    )
    done, plan = shelf.run(raw), shelf.plan(raw)
    assert done.record.model.task == "masked"
    plain = AutoModelForMaskedLM.from_pretrained(shelf.folder / "bert").eval()
    tokenizer = AutoTokenizer.from_pretrained(shelf.folder / "bert")
    nats = []
    for row in read_rows(shelf.file("labelled", held_out=True)):
        text = tokenizer(f"{row['text']} [MASK]", return_tensors="pt")
        place = text["input_ids"][0].tolist().index(tokenizer.mask_token_id)
        word = tokenizer.convert_tokens_to_ids({"words": "yes", "sums": "no"}[row["label"]])
        nats.append(-float(torch.log_softmax(logits_of(plain, **text), -1)[place, word]))
    # Before: the same template without its vectors.
    before, after = (getattr(done.record.scores, when)["labelled-heldout"] for when in ("before", "after"))
    assert (before.nats, before.tokens) == (pytest.approx(np.mean(nats), rel=1e-5), len(nats))
    assert after.nats != before.nats
    (held_out,) = plan.evaluation.sets
    assert all(len(set(row.inputs["input_ids"]) & {len(tokenizer), len(tokenizer) + 1}) == 2 for row in held_out.rows)


def before_of(shelf: Workspace, raw: dict[str, Any]) -> tuple[float, float]:
    """What a stage says of its start model, and what the start model scores when nothing is kept."""
    done, plan = shelf.run(raw), shelf.plan(raw)
    opened = open_model(plan.model.start, plan.model.task, layer=plan.model.task_layer)
    found = score_sets(
        wrap_model(opened.model, plan.model.task),
        plan.evaluation.sets_before,
        context=plan.model.context_length,
        world=CPU,
    )
    (name,) = found
    return done.record.scores.before[name].nats, found[name].nats


def test_scores_that_are_kept_are_of_the_same_words_masks_and_layer(shelf: Workspace) -> None:
    """Stages that share a cache: other words in a template, other words for the labels, another seed."""

    def cloze(template: str, **words: str) -> dict[str, Any]:
        learned = {"name": "held", "path": shelf.file("labelled", held_out=True), "same_format_as": "labelled"}
        return stage_of(
            shelf,
            "bert class",
            {"kind": "p-tuning", "template": template, "hidden": 8},
            f"{template[4:7].strip()} {words['words']}",
            objectives=[{"kind": "masked"}],
            sources=[shelf.source("labelled", kind="labelled", label_words=words)],
            evaluation={**QUICK_EVALUATION, "learned": [learned]},
            tokens=8,
        )

    yes, six = {"words": "yes", "sums": "no"}, {"words": "six", "sums": "nine"}
    found = [
        before_of(shelf, cloze("{x} yes {1} [MASK]", **yes)),
        before_of(shelf, cloze("{x} no {1} [MASK]", **yes)),
        before_of(shelf, cloze("{x} no {1} [MASK]", **six)),
    ]
    found += [
        before_of(shelf, stage_of(shelf, "bert class", None, f"class-{seed}", seed=seed, tokens=8)) for seed in (0, 1)
    ]
    assert all(kept == anew for kept, anew in found)
    assert len(set(found)) == len(found)
    # Held-out text is masked alike whatever the stage's seed, so that stages can be held against each other.
    masked = [shelf.stage(f"masked-{seed}", model="bert", tokens=50, seed=seed) for seed in (0, 1)]
    one, other = (shelf.run(raw).record for raw in masked)
    assert one.scores.before == other.scores.before and one.scores.after != other.scores.after
    rows = [plan.evaluation.sets[0].rows for plan in map(shelf.plan, masked)]
    assert all(np.array_equal(a.labels, b.labels) for a, b in zip(*rows, strict=True))


# -- loss and gradient ---------------------------------------------------------------------------------------------------


def begun(shelf: Workspace, raw: dict[str, Any]) -> tuple[Run, list[Batch]]:
    """A run at its step 0, and the micro-batches of its first step."""
    plan = shelf.plan(raw)
    execution = Execution("float32", False, "sdpa", 1, 2, False, 0.0)
    subject = make_tuned_model(plan, CPU)
    subject.model.pretrained.set_attn_implementation("sdpa")
    return build_run(plan, subject, execution, CPU), make_loader(plan, execution, CPU).read_batches(1)


def plain_loss(run: Run, batch: Batch) -> Tensor:
    """The mean loss that transformers' own model gives for a batch."""
    labels: dict[str, Any] = {"labels": batch.labels}
    if type(run.model).__name__ == "CausalModel":  # transformers would shift labels that are shifted already
        labels |= {"shift_labels": batch.labels, "use_cache": False}
    return run.model.pretrained(**batch.inputs, **labels).loss


def gradients(run: Run) -> dict[str, Tensor]:
    found = {n: p.grad.clone() for n, p in run.model.pretrained.named_parameters() if p.grad is not None}
    run.model.pretrained.zero_grad()
    return found


def alike(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    size = max(float(t.abs().max()) for t in theirs.values())
    zero = torch.zeros(())
    return all(
        torch.allclose(ours.get(n, zero), theirs.get(n, zero), rtol=1e-3, atol=2e-6 * max(size, 1.0))
        for n in ours.keys() | theirs.keys()
    )


def stages(shelf: Workspace) -> dict[str, dict[str, Any]]:
    of_texts = {
        name: shelf.stage("loss", model=model, objectives=list(objectives))
        for name, (model, _, objectives) in TEXTS.items()
    }
    return {name: stage_of(shelf, name) for name in BY_HAND} | of_texts | {"llama text": shelf.stage("loss")}


@pytest.mark.parametrize("name", [*BY_HAND, *TEXTS, "llama text"])
def test_losses_and_gradients_are_those_of_transformers(shelf: Workspace, name: str) -> None:
    run, batches = begun(shelf, stages(shelf)[name])
    for batch in batches:
        loss, rows_B = run.objectives[0](run.model(**batch.inputs), batch)
        plain = plain_loss(run, batch)
        assert loss.item() / batch.label_count == pytest.approx(plain.item(), rel=1e-5)
        assert float(rows_B.sum()) == pytest.approx(loss.item(), rel=1e-5)
        (loss / batch.label_count).backward()
        ours = gradients(run)
        plain.backward()
        assert alike(ours, gradients(run))


def test_another_loss_would_not_pass(shelf: Workspace) -> None:
    """The mutants: the classes of one example as one decision each; a sum where transformers has a mean."""
    raw = stage_of(shelf, "bert multi")
    plan, (run, (batch, *_)) = shelf.plan(raw), begun(shelf, raw)
    plain = plain_loss(run, batch).item()
    for problem in ("number", "class"):
        with pytest.raises((AssertionError, RuntimeError, ValueError)):
            (objective,) = make_objectives(plan.objectives, problem)
            loss, _ = objective(run.model(**batch.inputs), batch)
            assert loss.item() / batch.label_count == pytest.approx(plain, rel=1e-5)
    loss, _ = run.objectives[0](run.model(**batch.inputs), batch)
    assert loss.item() != pytest.approx(plain, rel=1e-2)


# -- several at once -----------------------------------------------------------------------------------------------------


MIXED = {
    "llama": [{"kind": "next-token", "on": ["a"], "weight": 2.0}, {"kind": "next-token", "weight": 0.5}],
    "t5": [
        {"kind": "text-to-text", "on": ["a"], "weight": 2.0, "target_length": 16},
        {"kind": "span-corruption", "weight": 0.5},
    ],
    "bert": [{"kind": "masked", "on": ["a"], "weight": 2.0}, {"kind": "masked", "weight": 0.5}],
}
CLOZE = {"kind": "p-tuning", "template": "{x} {2} [MASK]", "hidden": 8}
"""An encoder decides by a word at the mask, beside words that are masked: a task layer would be another model."""


def mixed(shelf: Workspace, model: str, **changes: Any) -> dict[str, Any]:
    rows = {"llama": "completion", "t5": "pair", "bert": "labelled"}[model]
    said = {"kind": "labelled", "label_words": {"words": "yes", "sums": "no"}} if model == "bert" else {}
    tuning = {"tuning": CLOZE} if model == "bert" else {}
    sources = [
        {**shelf.source(rows), **said, "name": "a", "share": 0.4},
        shelf.source("old", share=0.6, role="replay"),
    ]
    learned = {"name": "a-heldout", "path": shelf.file(rows, held_out=True), "same_format_as": "a"}
    held_out = {"retained": [shelf.file("old", held_out=True)], "learned": [learned]}
    return shelf.stage(
        f"mixed-{model}",
        model=model,
        sources=sources,
        **{
            "tokens": 800,
            "evaluation": {**QUICK_EVALUATION, **held_out},
            "objectives": MIXED[model],
            **tuning,
            **changes,
        },
    )


def first_step(run: Run, batches: list[Batch], monkeypatch: pytest.MonkeyPatch) -> tuple[StepReport, dict[str, Tensor]]:
    """The report of a step, and the gradient that it would have moved the weights by."""
    met: dict[str, Tensor] = {}
    monkeypatch.setattr(AdamW, "step", lambda self, rate: met.update(gradients(run)))
    return train_step(run, batches), met


@pytest.mark.parametrize("model", MIXED)
def test_a_mixed_step_is_the_sum_of_its_objectives(
    shelf: Workspace, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each objective's sum over its own rows, times its weight, divided by the labels of the whole batch."""
    run, batches = begun(
        shelf,
        mixed(shelf, model, optimizer={"max_grad_norm": 1e9}, batch={"global_batch_size": 8, "micro_batch_size": 2}),
    )
    count = sum(batch.label_count for batch in batches)
    sums = {0: 0.0, 1: 0.0}
    expected: dict[str, Tensor] = {}
    for batch in batches:
        (number,) = batch.objectives
        assert {int(k) for k in batch.source_B} == {number}  # `a` comes first, and is named by the first
        loss = plain_loss(run, batch) * batch.label_count
        (loss * MIXED[model][number]["weight"] / count).backward()
        sums[number] += loss.item()
        for name, gradient in gradients(run).items():
            expected[name] = expected.get(name, 0) + gradient
    assert min(sums.values()) > 0
    report, met = first_step(run, batches, monkeypatch)
    assert alike(met, expected)
    assert report.loss == pytest.approx((2.0 * sums[0] + 0.5 * sums[1]) / count, rel=1e-5)
    for number, source in enumerate(("a", "old")):
        nats, tokens = report.losses_by_source[source]
        assert nats == pytest.approx(sums[number], rel=1e-5)
        assert tokens == sum(b.label_count for b in batches if b.objectives == (number,))
    # The mutant: the weights the other way round.
    run.objectives = run.objectives[::-1]
    _, swapped = first_step(run, batches, monkeypatch)
    assert not alike(swapped, expected)


def test_each_objective_is_told_by_a_name_of_its_own(shelf: Workspace) -> None:
    done = shelf.run(mixed(shelf, "llama"))
    row = next(row for row in read_metrics(done.run_folder / "metrics.jsonl") if row.kind == "step")
    assert len(row.losses_by_objective) == 2
    assert sum(row.losses_by_objective.values()) == pytest.approx(row.loss, rel=1e-6)


@pytest.mark.parametrize("model", ["llama", "t5", pytest.param("bert", marks=pytest.mark.slow)])
def test_shares_are_counted_in_what_is_trained(shelf: Workspace, model: str) -> None:
    done = shelf.run(mixed(shelf, model))
    a, old = done.record.totals.sources
    assert (a.share, old.share) == (pytest.approx(0.4, abs=0.08), pytest.approx(0.6, abs=0.08))
    plan = shelf.plan(mixed(shelf, model))
    counted = {"a": 0, "old": 0}
    for step in range(plan.steps):
        for i, (source, row) in enumerate(zip(*plan.data.mixture.rows(step), strict=True)):
            made = plan.data.rows[source].get_row(int(row), step * plan.data.mixture.block_size + i)
            assert made.label_count == int((made.labels != IGNORED).sum())
            counted[plan.data.source_names[source]] += made.label_count
    assert counted == {"a": a.trained_tokens, "old": old.trained_tokens}
    for row in read_metrics(done.run_folder / "metrics.jsonl"):
        if row.kind == "step":
            assert sum(tokens for _, tokens in row.loss_sums_by_source.values()) == row.tokens


def test_text_and_examples_share_rows_of_one_objective(shelf: Workspace) -> None:
    """Without `on` one objective serves both; the losses by source are those of transformers on the start model."""
    raw = mixed(shelf, "llama", objectives=[])
    run, batches = begun(shelf, raw)
    expected = {"a": 0.0, "old": 0.0}
    for batch in batches:
        with torch.no_grad():
            logits = run.model.pretrained(**batch.inputs, use_cache=False).logits.double()
        nats_BT = functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), reduction="none")
        for source, nats in zip(batch.source_B, nats_BT.view(batch.labels.shape).sum(1), strict=True):
            expected[run.sources[source]] += float(nats)
    done = shelf.run({**raw, "output": str(shelf.folder / "runs" / "together")})
    row = next(row for row in read_metrics(done.run_folder / "metrics.jsonl") if row.kind == "step")
    assert {name: nats for name, (nats, _) in row.loss_sums_by_source.items()} == pytest.approx(expected, rel=1e-5)


# -- one task after the other --------------------------------------------------------------------------------------------


def test_a_task_follows_another(shelf: Workspace) -> None:
    """Masked text, then a classifier on what it left; another stage of the same classes goes on with its task layer."""
    text = shelf.run(shelf.stage("first-text", model="bert", tokens=200))
    lora = {"kind": "lora", "rank": 2}
    one = shelf.run(stage_of(shelf, "bert class", lora, "then-class", model=str(text.run_folder)))
    two = shelf.run(stage_of(shelf, "bert class", {"kind": "adapter", "size": 4}, "again", model=str(one.run_folder)))
    assert two.record.scores.before == one.record.scores.after
    assert two.record.scores.after != two.record.scores.before
    # The backbone is the one that learnt the text; the task layer is the one of `one`.
    opened = open_model(locate_model(str(two.run_folder), shelf.folder))
    assert opened.task == "classify" and opened.layer is not None and opened.layer.labels == ("sums", "words")
    trained = AutoModelForMaskedLM.from_pretrained(text.run_folder / "model").state_dict()
    assert torch.equal(
        opened.model.state_dict()["bert.embeddings.word_embeddings.weight"],
        trained["bert.embeddings.word_embeddings.weight"],
    )
    # Other labels want another task layer, on the same backbone.
    other = shelf.run(stage_of(shelf, "bert tags", lora, "then-tags", model=str(one.run_folder)))
    assert other.record.model.task == "tag" and other.record.status == "finished"


@pytest.mark.parametrize(
    ("name", "tuning"),
    [
        ("bert class", {"kind": "lora", "rank": 2, "dropout": 0.1}),
        ("t5 pair", {"kind": "p-tuning", "template": "{2} {x}", "hidden": 8}),
    ],
)
def test_a_task_is_resumed_to_the_same_bits(shelf: Workspace, name: str, tuning: dict[str, Any]) -> None:
    tokens = 160 if name == "t5 pair" else 24
    whole = shelf.run(stage_of(shelf, name, tuning, f"{name} whole", tokens=tokens))
    parts = run_interrupted(shelf, stage_of(shelf, name, tuning, f"{name} parts", tokens=tokens))
    assert run_trace(parts.run_folder) == run_trace(whole.run_folder)


# -- what cannot be ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "kind", "needs", "way"),
    [
        ("llama", "masked", "an encoder", "next-token"),
        ("llama", "span-corruption", "an encoder-decoder", "next-token"),
        ("llama", "text-to-text", "an encoder-decoder", "next-token"),
        ("bert", "next-token", "a decoder", "masked"),
        ("bert", "text-to-text", "an encoder-decoder", "masked"),
        ("t5", "next-token", "a decoder", "span-corruption"),
        ("t5", "masked", "an encoder", "span-corruption"),
    ],
)
def test_an_objective_for_another_architecture_is_refused(
    shelf: Workspace, model: str, kind: str, needs: str, way: str
) -> None:
    with pytest.raises(StageError, match=f"{kind} needs {needs}") as met:
        shelf.plan(shelf.stage("other", model=model, objectives=[{"kind": kind}]))
    assert met.value.where == "objectives" and way in met.value.expected


def test_objectives_of_two_task_layers_are_refused(shelf: Workspace) -> None:
    sources = [shelf.source("old", share=0.5), shelf.source("labelled", "labelled", share=0.5)]
    two = [{"kind": "next-token", "on": ["old"]}, {"kind": "classify", "on": ["labelled"]}]
    with pytest.raises(StageError, match="next-token and classify need different models") as met:
        shelf.plan(shelf.stage("two-layers", sources=sources, objectives=two))
    assert "as text" in met.value.hint
    # The hint is one.
    learned = {"name": "old-heldout", "path": shelf.file("old", held_out=True), "same_format_as": "old"}
    plan = shelf.plan(shelf.stage("one-layer", sources=sources, evaluation={**QUICK_EVALUATION, "learned": [learned]}))
    assert plan.model.task == "causal" and [leaf.store.kind for leaf in plan.data.sources] == ["text", "labelled"]


def test_running_text_has_nothing_for_a_classifier(shelf: Workspace) -> None:
    with pytest.raises(StageError, match="'new' has rows of kind text, which classify does not support") as met:
        shelf.plan(shelf.stage("texts", model="bert", objectives=CLASSIFY))
    assert "masked" in met.value.expected and met.value.where == "data.sources[0]"


def test_a_source_that_two_objectives_name_is_refused(shelf: Workspace) -> None:
    two = [{"kind": "next-token", "on": ["new"]}, {"kind": "next-token", "on": ["new", "old"]}]
    with pytest.raises(StageError, match="two objectives name 'new'"):
        shelf.plan(shelf.stage("twice", objectives=two))
    none = [{"kind": "next-token", "on": ["new"]}]
    with pytest.raises(StageError, match="'old' has rows of kind text, which no objective names"):
        shelf.plan(shelf.stage("never", objectives=none))


def test_labels_that_nobody_listed_are_refused(shelf: Workspace) -> None:
    with pytest.raises(StageError, match="the label 'words', which is not listed") as met:
        shelf.plan(stage_of(shelf, "bert class", objectives=[{"kind": "classify", "labels": ["sums", "other"]}]))
    assert met.value.where == "objectives.labels"
    # Listed ones keep their order, and may be more than there are.
    listed = ["words", "rest", "sums"]
    plan = shelf.plan(stage_of(shelf, "bert class", objectives=[{"kind": "classify", "labels": listed}]))
    assert plan.model.task_layer is not None and plan.model.task_layer.labels == tuple(listed)


def test_a_label_that_only_the_held_out_rows_have_is_met(shelf: Workspace) -> None:
    file = write_rows(shelf.folder / "strange.jsonl", [{"text": "six and one.", "label": "verse"}])
    with pytest.raises(DataError, match="label 'verse', which no training row has") as met:
        shelf.plan(stage_of(shelf, "bert class", evaluation={**QUICK_EVALUATION, "learned": [str(file)]}))
    assert "strange.jsonl" in str(met.value)


def test_sources_that_are_labelled_in_two_ways_are_refused(shelf: Workspace) -> None:
    sources = [shelf.source("labelled", "labelled", share=0.5), shelf.source("multi", "labelled", share=0.5)]
    with pytest.raises((StageError, DataError), match="multi") as met:
        shelf.plan(stage_of(shelf, "bert class", sources=sources))
    assert met.value.expected


def test_vectors_behind_running_text_are_refused(shelf: Workspace) -> None:
    """No loss would reach them; behind a question they stand before its answer."""
    behind = {"kind": "p-tuning", "template": "{x} {3}"}
    with pytest.raises(StageError, match="after running text") as met:
        shelf.plan(shelf.stage("behind", behind))
    assert met.value.where == "tuning.template"
    plan = shelf.plan(stage_of(shelf, "llama completion", behind))
    first = plan.model.vocab_size
    row = plan.evaluation.sets[0].rows[0]
    places = [row.inputs["input_ids"].tolist().index(first + i) for i in range(3)]
    assert places == list(range(places[0], places[0] + 3))
    # The answer begins right behind them, and none of them is asked for.
    assert (row.labels[: places[-1]] == IGNORED).all() and row.labels[places[-1]] != IGNORED
    assert row.labels.max() < first


def test_demonstrations_need_examples(shelf: Workspace) -> None:
    with pytest.raises(StageError, match="no source has examples") as met:
        shelf.plan(shelf.stage("text-only", {"kind": "instruction-prompt"}))
    assert met.value.where == "tuning.demonstrations"


def test_demonstrations_are_for_models_that_write(shelf: Workspace) -> None:
    with pytest.raises(StageError, match="classify has none") as met:
        shelf.plan(stage_of(shelf, "bert class", {"kind": "instruction-prompt", "length": 2}))
    assert met.value.where == "tuning.demonstrations"


def test_demonstrations_are_of_the_questions_own_kind(shelf: Workspace) -> None:
    sources = [shelf.source("completion", share=0.5), shelf.source("chat", share=0.5)]
    tuning = {"kind": "instruction-prompt", "length": 2, "demonstrations": {"count": 1}}
    plan = shelf.plan(
        shelf.stage("two-kinds", tuning, sources=sources, evaluation=QUICK_EVALUATION, data={"sequence_length": 120})
    )
    for leaf, sign in zip(plan.data.sources, (False, True), strict=True):
        rows = make_rows(plan.objectives[0], leaf.store, plan.model.inputs, pack=False)
        texts = [plan.model.tokenizer.decode(rows.get_row(i, i).inputs["input_ids"][2:]) for i in range(len(rows))]
        assert all(("### User" in text) == sign for text in texts)


def test_biases_that_are_not_there_are_refused(shelf: Workspace) -> None:
    with pytest.raises(TuningError, match="has no biases") as met:
        shelf.run(shelf.stage("no-bias", {"kind": "bias"}))
    assert "norm" in met.value.hint


def test_a_classifier_has_no_words_to_go_on_with(shelf: Workspace) -> None:
    """What stood behind the words is gone with the task layer: it would have been random."""
    one = shelf.run(stage_of(shelf, "bert class"))
    with pytest.raises(ModelError, match="which would be random"):
        shelf.run(shelf.stage("back-to-text", model=str(one.run_folder), objectives=[{"kind": "masked"}]))


def test_a_standing_tuning_keeps_to_its_task(shelf: Workspace) -> None:
    below = shelf.run(shelf.stage("masked-adapter", {"kind": "adapter", "size": 4}, model="bert", tokens=100))
    with pytest.raises(TuningError, match="belongs to another task"):
        shelf.run(stage_of(shelf, "bert class", {"kind": "lora", "rank": 1}, "on-adapter", model=str(below.run_folder)))


# -- demonstrations ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["bm25", "embedding", "random"])
def test_only_training_rows_are_shown_before_a_question(
    shelf: Workspace, by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the question itself, nor what is held out of the source."""
    numbers = [{"prompt": f"{a} plus {b} =", "completion": f" {a * 10 + b}"} for a in range(12) for b in range(3)]
    source = {
        "name": "sums",
        "path": str(write_rows(shelf.folder / "sums.jsonl", numbers)),
        "held_out": 0.3,
        "max_passes": 100,
    }
    tuning = {"kind": "instruction-prompt", "length": 2, "demonstrations": {"count": 2, "sampler": by}}
    raw = shelf.stage(
        f"shown-{by}", tuning, sources=[source], evaluation=QUICK_EVALUATION, tokens=200, data={"sequence_length": 96}
    )
    plan = shelf.plan(raw)
    held, trained = read_before(plan)
    asked_held, asked_trained = ({asked for _, asked in part} for part in (held, trained))
    assert asked_held and asked_trained and not asked_held & asked_trained
    assert asked_held | asked_trained == {row["prompt"] + row["completion"] for row in numbers}
    for shown, asked in [*held, *trained]:
        assert len(shown) == 2 and asked not in shown and asked_held.isdisjoint(shown)
    assert shelf.run(raw).record.status == "finished"
    # The mutant: with nothing set apart, held-out rows are among those that are shown.
    monkeypatch.setattr(demonstration_pool, "held_out_mask", lambda digests, share: np.zeros(len(digests), bool))
    held, trained = read_before(shelf.plan({**raw, "seed": 1}))
    assert any(not asked_held.isdisjoint(shown) for shown, _ in [*held, *trained])


def read_before(plan: Plan) -> list[list[tuple[list[str], str]]]:
    """What is shown before each question, and the question with its answer: held out, and trained on."""
    (leaf,), (held_out,) = plan.data.sources, plan.evaluation.sets
    made = make_rows(plan.objectives[0], leaf.store, plan.model.inputs, held_out=leaf.held_out, pack=False)
    out = []
    for part in (held_out.rows, [made.get_row(i, i) for i in range(len(made))]):
        texts = [
            plan.model.tokenizer.decode([i for i in row.inputs["input_ids"] if i < plan.model.vocab_size])
            for row in part
        ]
        out.append([(text.split("\n\n")[:-1], text.split("\n\n")[-1]) for text in texts])
    return out


# -- every tuning under every task ---------------------------------------------------------------------------------------


TUNINGS: dict[str, dict[str, Any]] = {
    "full": {"kind": "full"},
    "head": {"kind": "head"},
    "bias": {"kind": "bias"},
    "norm": {"kind": "norm"},
    "blocks": {"kind": "blocks", "last": 1},
    "thaw": {"kind": "blocks", "last": 2, "unfreeze_every": "2 steps"},
    "pfeiffer": {"kind": "adapter", "size": 4, "dropout": 0.1},
    "houlsby": {"kind": "adapter", "variant": "houlsby", "size": 4},
    "parallel": {"kind": "adapter", "variant": "parallel", "size": 4},
    "prefix": {"kind": "prefix", "length": 3, "hidden": 8},
    "p-tuning-v2": {"kind": "p-tuning-v2", "length": 3},
    "prompt": {"kind": "prompt", "length": 3},
    "p-tuning": {"kind": "p-tuning", "template": "{2} {x} {1}", "hidden": 8},
    "lora": {"kind": "lora", "rank": 2, "dropout": 0.1},
    "dora": {"kind": "lora", "rank": 2, "variant": "dora"},
    "pissa": {"kind": "lora", "rank": 2, "variant": "pissa"},
    "osf": {"kind": "osf"},
    "expand": {"kind": "expand", "positions": [0]},
}
WIDE = {"bert masked": 200, "bert class": 24, "bert tags": 160, "t5 spans": 200, "t5 pair": 200, "t5 class": 24}
"""Tasks, and tokens for six steps of each."""
_LANGUAGE = ("bert masked", "t5 spans", "t5 pair")
FAST = {("bert class", "p-tuning")}
SWEEP = [
    pytest.param(task, tuning, id=f"{task} {tuning}", marks=() if (task, tuning) in FAST else pytest.mark.slow)
    for task in WIDE
    for tuning in TUNINGS
    if not (task.startswith("t5") and tuning == "bias")  # T5 has none
    if not (task.startswith("bert") and tuning == "expand")  # norms stand in the stream: no copy can be silent
]


@pytest.mark.parametrize(("task", "name"), SWEEP)
def test_a_tuning_serves_a_task(shelf: Workspace, task: str, name: str) -> None:
    """What is to move moves, nothing else does; it is learnt, resumed to the same bits, and gone on from."""
    tuning = {**TUNINGS[name], **({"untie": True} if name == "head" and task in _LANGUAGE else {})}
    changes: dict[str, Any] = {"tokens": WIDE[task]}
    if task in TEXTS:
        model, _, objectives = TEXTS[task]
        changes |= {"model": model, "objectives": list(objectives)}
    run = f"{task} {name}".replace(" ", "-")

    def stage(suffix: str, tuning: dict[str, Any], **more: Any) -> dict[str, Any]:
        if task in TEXTS:
            return shelf.stage(f"{run}-{suffix}", tuning, **{**changes, **more})
        return stage_of(shelf, task, tuning, f"{run}-{suffix}", **{**changes, **more})

    before, after, made = train_for(shelf, stage("moved", tuning), 6)
    moving = {w.name for w in made.weights.entries}
    assert {n for n in before if not torch.equal(before[n], after[n])} == moving
    whole = shelf.run(stage("whole", tuning))
    assert run_trace(run_interrupted(shelf, stage("parts", tuning)).run_folder) == run_trace(whole.run_folder)
    ((learned, change),) = [item for item in whole.record.changes.items() if item[1].role == "learned"]
    assert change.difference != 0
    following = shelf.run(
        stage(
            "next",
            {"kind": "lora", "rank": 1},
            model=str(whole.run_folder),
            objectives=changes.get("objectives", BY_HAND[task].objectives if task in BY_HAND else ()),
        )
    )
    found = following.record.scores.before[learned]
    assert found.nats == pytest.approx(whole.record.scores.after[learned].nats, rel=1e-5)

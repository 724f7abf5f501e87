"""Speed of scoring few-shot prompts, compared with lm-eval on the same model, items and prompts.

    python benchmarks/few_shot.py --json benchmarks/results/few_shot.json

The questions are sentences of the Python documentation that comes with the interpreter, each to be gone on with by its own
second half or one of three others (`words`), or by the letter before it (`letters`: answers of one token). Five
demonstrations stand before each question: the same ones for all (`shared`), or drawn anew for each (`own`), where there is
little to share. `--rows` takes multiple-choice rows of your own instead (`question`, `options`, `answer_index`).

Both sides get texts and give a log-likelihood and a greedy flag for each choice, tokenising included. lm-eval reads with the
batch size, of some, that is fastest for it in a first round. Rounds alternate; given are medians and ranges of items per
second, of how many times faster that is, by the clock and by the processor's own time (which a busy machine hardly
touches), and the largest difference of a log-likelihood. Without `--model` it is a Llama with random weights.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from arms import add_integer_options, median_and_range, provenance, run_rounds, settings, write_results
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from postgrad.cli.demo import write_random_model
from postgrad.commands.builtin_corpus import language_reference
from postgrad.evaluation.choices.loglikelihood import encode_items, score_choices
from postgrad.hardware import machine
from postgrad.models.model import wrap_model

CONTEXT = 2048


class Question(NamedTuple):
    """A question with its options, and the number of the right one."""

    text: str
    options: tuple[str, ...]
    answer: int


def documentation_questions(count: int, seed: int = 0) -> list[Question]:
    """Sentences of the language reference in two halves, each with three halves of others."""
    prose = " ".join(" ".join(language_reference()).split())
    found = [s.split() for s in re.findall(r"[A-Z][A-Za-z ,'()-]{100,220}\.", prose)]
    halves = [(" ".join(s[: len(s) // 2]), " ".join(s[len(s) // 2 :])) for s in found]
    rng = random.Random(seed)
    rng.shuffle(halves)
    out = []
    for i, (first, second) in enumerate(halves[:count]):
        others = rng.sample([other for j, (_, other) in enumerate(halves) if j != i], 3)
        answer = rng.randrange(4)
        out.append(Question(first, (*others[:answer], second, *others[answer:]), answer))
    return out


def read_questions(path: Path) -> list[Question]:
    """Multiple-choice rows of a file."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [Question(r["question"], tuple(r["options"]), int(r["answer_index"])) for r in rows if r.get("options")]


def format_question(question: Question, answers: str) -> tuple[str, list[str]]:
    """The prompt of a question, and the possible answers."""
    if answers == "words":
        return f"Question: {question.text}\nAnswer:", [f" {option}" for option in question.options]
    listed = "\n".join(f"{letter}. {option}" for letter, option in zip("ABCDEFGH", question.options, strict=False))
    return f"Question: {question.text}\n{listed}\nAnswer:", [
        f" {letter}" for letter in "ABCDEFGH"[: len(question.options)]
    ]


def make_prompts(
    questions: Sequence[Question], pool: Sequence[Question], shots: int, answers: str, demonstrations: str
) -> Any:
    """Each item's prompt with its choices."""
    rng = random.Random(1)
    fixed = rng.sample(pool, shots)
    out = []
    for question in questions:
        shown = fixed if demonstrations == "shared" else rng.sample(pool, shots)
        before = ""
        for example in shown:
            text, choices = format_question(example, answers)
            before += f"{text}{choices[example.answer]}\n\n"
        text, choices = format_question(question, answers)
        out.append((before + text, choices))
    return out


def random_model(folder: Path, hidden: int, layers: int) -> None:
    """A Llama with random weights, and a tokenizer that was trained on the documentation."""
    text = folder.with_suffix(".jsonl")
    text.write_text("".join(json.dumps({"text": topic}) + "\n" for topic in language_reference()))
    write_random_model(folder, text)
    vocabulary = len(AutoTokenizer.from_pretrained(folder))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=8 * hidden // 3 // 8 * 8,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        max_position_embeddings=CONTEXT,
        initializer_range=0.1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


ScoredChoices = list[list[tuple[float, bool]]]


def postgrad_scorer(folder: Path) -> Callable[[Any], ScoredChoices]:
    """This project's way."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = wrap_model(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), "causal")

    def score(items: Any) -> ScoredChoices:
        found = score_choices(model, encode_items(tokenizer, items), context=CONTEXT, pad=0)
        assert not found.too_long
        pairs = zip(found.log_p, found.greedy, strict=True)
        return [list(zip(log_p.tolist(), greedy.tolist(), strict=True)) for log_p, greedy in pairs]

    return score


def lm_eval_scorer(folder: Path, batch: int) -> Callable[[Any], ScoredChoices]:
    """lm-eval's."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    lm = HFLM(model, tokenizer=AutoTokenizer.from_pretrained(folder), batch_size=batch, max_length=CONTEXT)

    def score(items: Any) -> ScoredChoices:
        pairs = [(context, choice) for context, choices in items for choice in choices]
        requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
        answers = iter(lm.loglikelihood(requests, disable_tqdm=True))
        return [[next(answers) for _ in choices] for _, choices in items]

    return score


def time_scoring(score: Callable[[Any], ScoredChoices], items: Any) -> tuple[tuple[float, float], ScoredChoices]:
    """Seconds, seconds of the processor, and what was found."""
    begin, worked = time.perf_counter(), time.process_time()
    found = score(items)
    return (time.perf_counter() - begin, time.process_time() - worked), found


def compare_speed(folder: Path, items: Any, rounds: int, batches: Sequence[int]) -> dict[str, Any]:
    """Both sides in alternating rounds."""
    first, few = postgrad_scorer(folder), items[: max(2, len(items) // 4)]
    sizes = {batch: time_scoring(lm_eval_scorer(folder, batch), few)[0][1] for batch in batches}
    batch = min(sizes, key=sizes.__getitem__)
    second = lm_eval_scorer(folder, batch)
    off, greedy = 0.0, True
    first(few)
    both = list(
        run_rounds({"ours": lambda: time_scoring(first, items), "lm-eval": lambda: time_scoring(second, items)}, rounds)
    )
    for each in both:
        for a, b in zip(chain(*each["ours"][1]), chain(*each["lm-eval"][1]), strict=True):
            off, greedy = max(off, abs(a[0] - b[0])), greedy and a[1] == b[1]
    spent = [{name: seconds for name, (seconds, _) in each.items()} for each in both]
    return {
        "items_per_second": {name: median_and_range(len(items) / each[name][0] for each in spent) for name in spent[0]},
        "times_faster": median_and_range(each["lm-eval"][0] / each["ours"][0] for each in spent),
        "times_less_work": median_and_range(each["lm-eval"][1] / each["ours"][1] for each in spent),
        "lm_eval_batch": batch,
        "largest_difference": off,
        "greedy_alike": greedy,
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path)
    parser.add_argument("--rows", type=Path)
    add_integer_options(parser, items=40, shots=5, hidden=384, layers=6, rounds=3)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16])
    add_integer_options(parser, threads=machine.core_count())
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(options.threads)
    machine.tune_allocator()
    questions = read_questions(options.rows) if options.rows else documentation_questions(options.items + 100)
    items, pool = questions[: options.items], questions[options.items :]
    with tempfile.TemporaryDirectory() as name:
        folder = options.model or Path(name) / "model"
        if options.model is None:
            random_model(folder, options.hidden, options.layers)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        setting = {
            **settings(options),
            "items": len(items),
            "parameters": AutoModelForCausalLM.from_pretrained(folder).num_parameters(),
            "vocabulary": len(tokenizer),
            **provenance("lm-eval"),
        }
        found = []
        for demonstrations in ("shared", "own"):
            for answers in ("words", "letters"):
                made = make_prompts(items, pool, options.shots, answers, demonstrations)
                sizes = [len(tokenizer(context)["input_ids"]) for context, _ in made]
                row = {
                    "demonstrations": demonstrations,
                    "answers": answers,
                    "prompt_tokens": statistics.median(sizes),
                    **compare_speed(folder, made, options.rounds, options.batches),
                }
                found.append(row)
                (mine, *mine_range), (other, *other_range) = row["items_per_second"].values()
                faster, low, high = row["times_faster"]
                less, least, most = row["times_less_work"]
                print(
                    f"{demonstrations:<7} {answers:<8} {row['prompt_tokens']:>5.0f} tokens  "
                    f"ours {mine:>7.2f}/s ({mine_range[0]:.2f}-{mine_range[1]:.2f})  "
                    f"lm-eval {other:>6.2f}/s ({other_range[0]:.2f}-{other_range[1]:.2f}, batch {row['lm_eval_batch']})  "
                    f"{faster:>5.1f}x ({low:.1f}-{high:.1f}), processor {less:.1f}x ({least:.1f}-{most:.1f})  "
                    f"largest difference {row['largest_difference']:.1e}",
                    flush=True,
                )
    write_results(options.json, {"setting": setting, "rows": found})


if __name__ == "__main__":
    main()

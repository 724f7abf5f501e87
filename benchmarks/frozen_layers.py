"""Compare frozen layers as input of a tagger: the feature-based table of the BERT paper, on your tags.

    python benchmarks/frozen_layers.py --model MODEL --train tagged.jsonl --test tagged.jsonl \\
        --json benchmarks/results/frozen_layers.json

Devlin et al. 2019 (arXiv 1810.04805, section 5.3 and table 7) read one or several frozen layers of BERT at each word's first
token into a two-layer BiLSTM. Here too: the features of all layers come from one pass, and the head that a stage has with
`head: bilstm` is trained on each choice of them, some seeds each. The rate is the same for all, the epoch is chosen on a dev
part (a tenth of the training file), and the test part is answered once by what was chosen.

The intervals are over resampled test documents (the mean of the seeds' own); each seed's value stands beside them. What every
run said is kept beside the JSON file until it is deleted, so that a broken off benchmark goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from arms import add_integer_options, provenance, settings, write_results
from torch.nn import functional

from postgrad.commands.probe import FrozenFeatures, compute_frozen_features
from postgrad.data.layouts.rows import IGNORED
from postgrad.evaluation.classification_metrics import compare_metrics, compute_metrics, metric_values
from postgrad.evaluation.linear_probe import ProbeData, main_metric
from postgrad.models.task_head import Join, TaskHead, TaskHeadConfig


def layer_choices(states: int, width: int, depth: int, dropout: float) -> dict[str, TaskHeadConfig]:
    """The rows of the table, by name."""
    last = states - 1
    four = tuple(range(max(1, states - 4), states))

    def reads(layers: tuple[int, ...], join: Join = "concat") -> TaskHeadConfig:
        return TaskHeadConfig(layers, join, None, "bilstm", width, depth, dropout)

    return {
        "embeddings": reads((0,)),
        "last": reads((last,)),
        "second-to-last": reads((last - 1,)),
        "sum of last 4": reads(four, "sum"),
        "concat of last 4": reads(four),
        "mix of all": reads(tuple(range(states)), "mix"),
    }


class Sentences:
    """The items of a part as sentences: those states that are read, tags, and which words are real, in batches."""

    def __init__(self, items: ProbeData, layers: Sequence[int], most: int | None = None) -> None:
        self.items, self.layers = items, layers
        cuts = np.flatnonzero(np.diff(items.document_I)) + 1
        self.first = np.concatenate([[0], cuts])
        self.size = np.diff(np.concatenate([self.first, [len(items)]]))
        if most is not None and most < len(self.first):
            kept = np.sort(np.random.default_rng(0).permutation(len(self.first))[:most])
            self.first, self.size = self.first[kept], self.size[kept]

    def __len__(self) -> int:
        return len(self.first)

    def batch(self, chosen: np.ndarray) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
        """States, each (B, T, D), the mask and the tags (B, T) of some sentences."""
        longest = int(self.size[chosen].max())
        states_SID = self.items.states_SID
        out = np.zeros((len(self.layers), len(chosen), longest, states_SID.shape[2]), np.float32)
        tags = np.full((len(chosen), longest), IGNORED, np.int64)
        for i, sentence in enumerate(chosen):
            where = slice(self.first[sentence], self.first[sentence] + self.size[sentence])
            for place, layer in enumerate(self.layers):
                out[place, i, : self.size[sentence]] = states_SID[layer, where]
            tags[i, : self.size[sentence]] = self.items.labels[where]
        read = dict(zip(self.layers, torch.from_numpy(out), strict=True))
        every = [read.get(layer, torch.empty(0)) for layer in range(states_SID.shape[0])]
        return every, torch.from_numpy((tags != IGNORED).astype(np.int64)), torch.from_numpy(tags)


@torch.no_grad()
def predict_tags(reader: TaskHead, sentences: Sentences) -> np.ndarray:
    """The tag of every word."""
    reader.eval()
    said = []
    for begin in range(0, len(sentences), 64):
        states, mask, _ = sentences.batch(np.arange(begin, min(begin + 64, len(sentences))))
        said.append(reader(states, mask).argmax(-1)[mask.bool()].numpy())
    reader.train()
    return np.concatenate(said)


def train_tagger(
    frozen: FrozenFeatures, form: TaskHeadConfig, seed: int, options: argparse.Namespace
) -> dict[str, Any]:
    """Train one BiLSTM; its test predictions at the epoch with the best dev score."""
    torch.manual_seed(seed)
    reader = TaskHead(form, frozen.width, frozen.output_count)
    reader.draw_weights(0.02)
    optimizer = torch.optim.AdamW(reader.parameters(), lr=options.rate, weight_decay=0.01)
    train = Sentences(frozen.items["train"], form.layers, options.sentences)
    dev, test = (Sentences(frozen.items[part], form.layers) for part in ("dev", "test"))
    rng, begun = np.random.default_rng(seed), time.process_time()
    steps = options.epochs * -(-len(train) // options.batch)
    best: dict[str, Any] = {"dev": -1.0}
    step = 0
    for epoch in range(options.epochs):
        order = rng.permutation(len(train))
        for begin in range(0, len(order), options.batch):
            states, mask, tags = train.batch(order[begin : begin + options.batch])
            loss = functional.cross_entropy(reader(states, mask).flatten(0, 1), tags.flatten(), ignore_index=IGNORED)
            for group in optimizer.param_groups:
                group["lr"] = options.rate * (1 - step / steps)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(reader.parameters(), 1.0)
            optimizer.step()
            step += 1
        of_dev = frozen.items["dev"]
        name = main_metric(frozen.problem, frozen.labels)[0]
        found = metric_values("tags", predict_tags(reader, dev), of_dev.labels, of_dev.document_I, frozen.labels)[name]
        if found > best["dev"]:
            best = {"dev": found, "epoch": epoch + 1, "said": predict_tags(reader, test).tolist()}
    return {**best, "seed": seed, "seconds": round(time.process_time() - begun, 1)}


def table(frozen: FrozenFeatures, runs: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Each choice: the mean of its seeds, their intervals' mean, and the same for the change against the last layer."""
    test = frozen.items["test"]
    name = main_metric(frozen.problem, frozen.labels)[0]
    answered = test.labels, test.document_I, frozen.labels

    def mean(entries: list[dict[str, float]]) -> dict[str, float]:
        return {key: float(np.mean([entry[key] for entry in entries])) for key in entries[0]}

    out = []
    for choice, each in runs.items():
        found = [compute_metrics("tags", np.array(run["said"]), *answered)[name] for run in each]
        entry: dict[str, Any] = {"reads": choice, **mean(found), "seeds": [one["value"] for one in found]}
        entry |= {"epochs": [run["epoch"] for run in each], "processor_seconds": [run["seconds"] for run in each]}
        if choice != "last":
            pairs = zip(runs["last"], each, strict=False)
            entry["against_last"] = mean(
                [
                    compare_metrics("tags", np.array(last["said"]), np.array(other["said"]), *answered)[name]
                    for last, other in pairs
                ]
            )
        out.append(entry)
    return out


def main() -> None:
    """Train what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--train", required=True)
    parser.add_argument("--test", required=True)
    parser.add_argument("--cache", type=Path, default=Path(".cache"), help="where the features are kept")
    parser.add_argument("--sentences", type=int, help="train on so many of the training sentences")
    add_integer_options(parser, seeds=2, epochs=6, batch=32, width=768, depth=2, threads=1)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    frozen = compute_frozen_features(options.model, options.train, options.test, cache=options.cache)
    torch.set_num_threads(options.threads)
    said = options.json.with_suffix(".said.json")
    runs: dict[str, list[dict[str, Any]]] = json.loads(said.read_text()) if said.exists() else {}
    for seed in range(options.seeds):
        for choice, form in layer_choices(frozen.state_count, options.width, options.depth, options.dropout).items():
            if all(run["seed"] != seed for run in runs.setdefault(choice, [])):
                runs[choice].append(train_tagger(frozen, form, seed, options))
                said.write_text(json.dumps(runs))
                print(choice, seed, {k: v for k, v in runs[choice][-1].items() if k != "said"}, flush=True)
    found = table(frozen, runs)
    metric = main_metric(frozen.problem, frozen.labels)[0]
    print(f"\n{'reads':<18} {metric:>8}  {'95 %':>16}  {'against last':>12}  {'95 %':>18}  seeds")
    for entry in found:
        against = entry.get("against_last")
        change = f"{against['value']:>+12.3f}  {against['low']:+.3f} to {against['high']:+.3f}" if against else " " * 12
        seeds = " ".join(f"{value:.3f}" for value in entry["seeds"])
        interval = f"{entry['low']:.3f} to {entry['high']:.3f}"
        print(f"{entry['reads']:<18} {entry['value']:>8.3f}  {interval:>16}  {change:<32}  {seeds}")
    words = {part: len(items) for part, items in frozen.items.items()}
    write_results(
        options.json, {**provenance(), "options": settings(options), "metric": metric, "words": words, "table": found}
    )


if __name__ == "__main__":
    main()

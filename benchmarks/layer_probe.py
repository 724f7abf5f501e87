"""Time `postgrad probe` on all layers at once against one probe per layer.

    python benchmarks/layer_probe.py --model MODEL --train tagged.jsonl --test tagged.jsonl \\
        --documents 900 --test-documents 150 --json benchmarks/results/layer_probe.json

Two arms on the same first documents of the files, the same backbone, classifiers, penalties and steps:

    at once     `postgrad probe`: one pass of the backbone for all layers, all classifiers side by side
    one by one  the same for one view at a time, as separate runs per layer would do: a pass of the backbone for each view, and
                only the classifiers of that view

Every probe starts with an empty cache, and the scores of each view are compared between the arms. Times are processor seconds
(all threads), which other load on the machine affects least (on one core, as under `taskset -c 0`), and wall-clock seconds.
"At once" runs first, in the middle and last.
"""

from __future__ import annotations

import argparse
import gzip
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path

from arms import add_integer_options, provenance, write_results

from postgrad.commands.probe import LayerProbe, probe_layers
from postgrad.evaluation.linear_probe import View, make_views


def copy_first_rows(file: Path, count: int, target: Path) -> Path:
    """Write the first rows of a file to `target`."""
    opened = gzip.open if file.suffix == ".gz" else open
    with opened(file, "rt") as lines:
        target.write_text("".join(islice(lines, count)))
    return target


def time_probe(model: str, files: list[Path], views: list[View] | None) -> tuple[LayerProbe, dict[str, float]]:
    """Run a probe with an empty cache of features; the result and its duration in seconds."""
    with tempfile.TemporaryDirectory() as cache:
        begin, processor = time.perf_counter(), time.process_time()
        probe = probe_layers(model, str(files[0]), str(files[1]), views=views, cache=Path(cache))
        seconds = {"clock": time.perf_counter() - begin, "processor": time.process_time() - processor}
    print(views[0].name if views else "at once", seconds, probe.seconds, file=sys.stderr, flush=True)
    return probe, seconds


def view_score(probe: LayerProbe, name: str) -> float:
    """The test score of a view, by the probe's metric."""
    view = next(view for view in probe.views if view.name == name)
    return view.metrics[probe.metric].value


def main() -> None:
    """Run both arms and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True)
    add_integer_options(parser, documents=900, test_documents=150)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        files = [
            copy_first_rows(options.train, options.documents, Path(folder) / "train.jsonl"),
            copy_first_rows(options.test, options.test_documents, Path(folder) / "test.jsonl"),
        ]
        together = [time_probe(options.model, files, None)]
        views = make_views(together[0][0].layers + 1)
        alone = []
        for i, view in enumerate(views):
            alone.append(time_probe(options.model, files, [view]))
            if i == len(views) // 2:
                together.append(time_probe(options.model, files, None))
        together.append(time_probe(options.model, files, None))
    probe = together[0][0]
    differences = [
        abs(view_score(probe, view.name) - view_score(one, view.name))
        for view, (one, _) in zip(views, alone, strict=True)
    ]
    summed = {kind: sum(seconds[kind] for _, seconds in alone) for kind in ("processor", "clock")}
    middle = {kind: sorted(seconds[kind] for _, seconds in together)[1] for kind in ("processor", "clock")}
    result = {
        **provenance(),
        "rounds": len(together),
        "layers": probe.layers,
        "width": probe.width,
        "views": [view.name for view in views],
        "items": dict(probe.items),
        "documents": dict(probe.documents),
        "at_once": [seconds for _, seconds in together],
        "one_by_one": [seconds for _, seconds in alone],
        "at_once_parts": [one.seconds.as_dict() for one, _ in together],
        "one_by_one_parts": [one.seconds.as_dict() for one, _ in alone],
        "times_faster": {kind: summed[kind] / middle[kind] for kind in summed},
        "largest_difference": {"metric": probe.metric, "value": max(differences)},
    }
    print(f"{'':<12} {'processor s':>12} {'clock s':>10}")
    print(f"{'at once':<12} {middle['processor']:>12.1f} {middle['clock']:>10.1f}   (the median of three)")
    print(f"{'one by one':<12} {summed['processor']:>12.1f} {summed['clock']:>10.1f}   ({len(views)} views)")
    print(
        f"{result['times_faster']['processor']:.1f} x by the processor, {result['times_faster']['clock']:.1f} x by the clock; "
        f"{probe.metric} of a view differs by at most {max(differences):.4f}"
    )
    write_results(options.json, result)


if __name__ == "__main__":
    main()

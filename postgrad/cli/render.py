"""Results of commands in words, for a terminal: one function a result, the next command at its end."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from postgrad.commands.probe_page import probe_table
from postgrad.commands.weighted_models import parse_weighted_model
from postgrad.data.problem_type import ProblemType
from postgrad.foreign_text import plain_text
from postgrad.hardware.memory import format_bytes
from postgrad.reports.html.notation import HasEnds, format_interval, format_signed
from postgrad.reports.sections.ability_section import ability_score_table, comparison_ability_table
from postgrad.reports.sections.comparison_table import comparison_table
from postgrad.reports.sections.held_out_tables import class_score_tables
from postgrad.reports.sections.lineage_tables import lineage_summary_table, lineage_table
from postgrad.reports.sections.task_section import comparison_task_table, task_score_table

if TYPE_CHECKING:
    from postgrad.commands.advise import Advice
    from postgrad.commands.blend import Blend
    from postgrad.commands.compare import AbilityComparison, ModelComparison, RunComparison, TaskComparison
    from postgrad.commands.evaluate import TextEvaluation
    from postgrad.commands.evaluate_abilities import AbilityEvaluation
    from postgrad.commands.evaluate_harness import HarnessEvaluation
    from postgrad.commands.evaluate_tasks import TaskEvaluation
    from postgrad.commands.export import ExportedModel
    from postgrad.commands.generate import Generation
    from postgrad.commands.grow import GrownModel
    from postgrad.commands.importance import MeasuredImportance
    from postgrad.commands.init import WrittenStage
    from postgrad.commands.init_templates import WrittenTemplate
    from postgrad.commands.keep import KeepChoice
    from postgrad.commands.list_runs import RunList
    from postgrad.commands.probe import LayerProbe, LayerView
    from postgrad.commands.push import PushedModel
    from postgrad.commands.restore import RestoredRun
    from postgrad.commands.shift import MeasuredShift
    from postgrad.commands.synthesize import SynthesizedText
    from postgrad.commands.track import TrackingReport
    from postgrad.lineage.tree import Lineage
    from postgrad.penalties.importance_file import ImportanceMetadata

_PARTS_SHOWN = 6
_MAX_CLASSES = 20
_VIRTUAL_TOKENS_SHOWN = 4


def next_line(*words: object) -> str:
    """The command to run next, as the last line of a text."""
    return f"next: {shlex.join(['postgrad', *map(str, words)])}"


def _ends(entry: HasEnds, spec: str = "+.4f", to: str = " to ", unit: str = "document") -> str:
    """The ends of an interval, or that there is none."""
    return format_interval(entry.low, entry.high, lambda end: format(end, spec), to, unit)


def _page_lines(report: Path | None, *words: object) -> list[str]:
    """Where the page is, or the command that writes it."""
    return [f"report: {report}", "next: open it in a browser"] if report else [next_line(*words)]


# --- stages ---------------------------------------------------------------------------------------------


def stage_text(result: WrittenStage) -> str:
    """A stage file that was written, and the text that it trains on."""
    size = format_bytes(result.bytes)
    return "\n".join(
        [
            f"{result.data}: {result.documents:,} documents, {result.tokens:,} tokens, {size} ({result.kind})",
            *(f"  {i}. {sample}" for i, sample in enumerate(result.samples, 1)),
            *(f"note: {note}" for note in result.notes),
            f"wrote {result.stage}",
            next_line("check", result.stage),
        ]
    )


def template_text(result: WrittenTemplate) -> str:
    """The files of a strategy, and the commands to run."""
    lines = [*result.notes, *(f"wrote {path}" for path in result.files)]
    lines += ["run it:", *(f"  {command}" for command in result.commands), f"next: {result.commands[0]}"]
    return "\n".join(lines)


def restored_text(result: RestoredRun) -> str:
    """What was recovered, and what it cost."""
    target, request = result.target, result.request
    verdict = "" if result.enough else f"; the target was {request.min_recovered:.0%}, and more steps may reach it"
    lines = [
        f"{target.set_name}: {result.recovered:.1%} of the forgetting is recovered ({target.run_loss:.4f} -> "
        f"{result.nats:.4f} nats per token; {target.teacher_loss:.4f} before){verdict}"
    ]
    for name, cost in result.costs.items():
        lines.append(f"{name}: {cost:.1%} of the gain is lost, {request.max_cost:.0%} was allowed")
    return "\n".join([*lines, next_line("lineage", result.outcome.run_folder)])


def advice_text(result: Advice) -> str:
    """The advice, and the stage file that has it."""
    from postgrad.commands.advise import advice_lines

    return "\n".join(["", *advice_lines(result), "", f"stage: {result.stage}", next_line("train", result.stage)])


def choice_text(result: KeepChoice) -> str:
    """The choice, and the stage file that has it."""
    from postgrad.commands.keep import choice_lines

    return "\n".join(["", *choice_lines(result), "", f"stage: {result.stage}", next_line("train", result.stage)])


# --- scores ---------------------------------------------------------------------------------------------


def evaluation_text(result: TextEvaluation) -> str:
    """A model's scores on texts."""
    scored = "every token scored once"
    if result.is_prefix_lm:
        scored = "a prefix of each text read in both directions, every token after it scored once"
    lines = [
        f"{result.model}, {result.context} tokens of context, {scored}",
        f"  {'text':<24} {'nats/token':>10} {'95 % interval':>17} {'perplexity':>11} {'bits/byte':>10} "
        f"{'tokens':>11} {'documents':>10}",
    ]
    for name, score in result.sets.items():
        interval = _ends(score, ".4f", "–")
        lines.append(
            f"  {name:<24} {score.nats:>10.4f} {interval:>17} {score.perplexity:>11.2f} {score.bits_per_byte:>10.4f} "
            f"{score.tokens:>11,} {score.documents:>10,}"
        )
        if masked := score.pseudo_perplexity:
            lines.append(
                f"    masked one at a time: {masked.nats:.4f} nats/token ({_ends(masked, '.4f', '–')}), "
                f"pseudo-perplexity {masked.perplexity:.2f}, {masked.tokens:,} tokens"
            )
        if apart := score.unknown:
            lines.append(
                f"    unknown tokens apart: {apart.tokens:,} ({apart.share:.2%}), {apart.nats:.4f} nats each; no other figure "
                "counts them"
            )
        for metric, value in score.metrics.items():
            lines.append(f"    {metric} {value.value:.4f} ({_ends(value, '.4f', '–')})")
    for name, score in result.sets.items():
        if score.classes:
            lines += [f"\n{table.text()}" for table in class_score_tables(name, score, None, _MAX_CLASSES)]
    following = ["generate", result.model] if result.task.generates else ["export", result.model, "exported"]
    return "\n".join([*lines, next_line(*following)])


def task_evaluation_text(result: TaskEvaluation) -> str:
    """A model's scores on tasks."""
    table = task_score_table(result.tasks, f"{result.model} on the tasks of {result.file}").text(max_characters=100)
    following = next_line("compare", result.model, "another-model", "--tasks", result.file)
    return "\n".join([table, *result.notes, following])


def ability_evaluation_text(result: AbilityEvaluation) -> str:
    """A model's scores on generated probes."""
    table = ability_score_table(result.abilities, result.mean, f"Abilities of {result.model}").text()
    following = next_line("compare", result.model, "another-model", "--abilities", "all")
    return "\n".join([table, *result.notes, following])


def ability_comparison_text(result: AbilityComparison) -> str:
    """Models on the same generated probes."""
    first, *others = result.models
    blocks = [
        "\n".join([ability_score_table(each.abilities, each.mean, f"Abilities of {each.model}").text(), *each.notes])
        for each in (model.evaluation for model in result.models)
    ]
    lines = [f"each model paired with {first.evaluation.model}, probe by probe (change, 95 % interval)"]
    for model in others:
        name = model.evaluation.model
        for ability, changes in model.changes.items():
            lines += [
                f"  {name}, {ability}: {metric} {format_signed(change.difference)} ({_ends(change, '+.3f', unit='item')})"
                for metric, change in changes.items()
            ]
        if mean := model.mean_change:
            lines.append(f"  {name}, mean: {format_signed(mean.difference)} ({_ends(mean, '+.3f', unit='item')})")
    lines.append(next_line("generate", first.evaluation.model, "--compare-with", others[0].evaluation.model))
    return "\n\n".join([*blocks, "\n".join(lines)])


def harness_text(result: HarnessEvaluation) -> str:
    """A model's results on tasks of lm-eval, a line for each metric of each task."""
    width = max([4, *(len(row.task) for row in result.results)])
    lines = [
        f"{result.model} on tasks of lm-eval {result.lm_eval}",
        f"  {'task':<{width}} {'shots':>5} {'items':>7}  {'metric':<28} {'value':>8} {'stderr':>8}",
    ]
    for row in result.results:
        shots, items = ("" if number is None else f"{number:,}" for number in (row.shots, row.items))
        stderr = "" if row.stderr is None else f"{row.stderr:.4f}"
        lines.append(
            f"  {row.task:<{width}} {shots:>5} {items:>7}  {row.metric:<28} {row.value:>8.4f} {stderr:>8}".rstrip()
        )
    if result.truncated_prompts:
        lines.append(
            f"{result.truncated_prompts:,} of {result.requests:,} prompts were longer than the context and truncated on the "
            "left (by lm-eval)"
        )
    return "\n".join([*lines, next_line("generate", result.model)])


def model_comparison_text(result: ModelComparison) -> str:
    """Models on the same texts."""
    from postgrad.stats.forgetting import LossChange

    lines = [f"each model paired with {result.models[0]}, document by document"]
    name = ""
    for row in result.rows:
        if row.set != name:
            name = row.set
            lines.append(f"\n{name}")
            lines.append(f"  {'model':<32} {'nats/token':>10} {'bits/byte':>10}   change (95 % interval)")
        line = f"  {row.model:<32} {row.score.nats:>10.4f} {row.score.bits_per_byte:>10.4f}"
        if isinstance(row.change, LossChange):
            line += f"   {row.change.difference:+.4f} nats/token ({_ends(row.change)})"
        elif row.change is not None:
            difference, low, high = row.change.bits_per_byte
            ends = format_interval(low, high, "{:+.4f}".format)
            line += f"   {difference:+.4f} bits/byte ({ends}); another tokenizer"
        lines.append(line)
    return "\n".join([*lines, next_line("generate", result.models[0], "--compare-with", result.models[1])])


def run_comparison_text(result: RunComparison, report: Path | None) -> str:
    """Finished runs on their held-out sets and tasks."""
    records, names = list(result.records), result.names
    blocks = [comparison_table(records, names[0]).text()]
    if task_table := comparison_task_table(records):
        blocks.append(task_table.text())
    if ability_table := comparison_ability_table(records):
        blocks.append(ability_table.text())
    lines = ["\n\n".join(blocks)]
    tokens = [record.totals.tokens if record.totals else 0 for record in records]
    if max(tokens) > 1.02 * min(tokens):
        budgets = ", ".join(f"{name} {count:,} tokens" for name, count in zip(names, tokens, strict=True))
        lines.append(f"The budgets differ: {budgets}")
    for pair in result.paired:
        lines.append(f"{pair.set}: {pair.arm} - {pair.against} = {pair.difference:+.4f} nats/token ({_ends(pair)})")
    for task in result.paired_tasks:
        lines.append(
            f"{task.task}: {task.arm} - {task.against} = {task.difference:+.3f} {task.metric} "
            f"({_ends(task, '+.3f', unit='item')})"
        )
    if report:
        lines.append("")
    return "\n".join([*lines, *_page_lines(report, "compare", *result.runs, "--report", "compare.html")])


def task_comparison_text(result: TaskComparison) -> str:
    """Models on the same tasks."""
    first, *others = result.models
    blocks = [task_score_table(model.tasks, model.model).text(max_characters=100) for model in result.models]
    lines = [f"each model paired with {first.model}, item by item (metric: change, 95 % interval)"]
    for model in others:
        for name, changes in model.changes.items():
            if not changes:
                lines.append(f"  {model.model}, {name}: no shared item")
            for metric, change in changes.items():
                lines.append(
                    f"  {model.model}, {name}: {metric} {change.difference:+.3f} "
                    f"({_ends(change, '+.3f', unit='item')}), {model.shared_items[name]:,} items"
                )
    lines.append(next_line("generate", first.model, "--compare-with", others[0].model))
    return "\n\n".join([*blocks, "\n".join(lines)])


def lineage_text(result: Lineage, run: Path, report: Path | None) -> str:
    """The R matrix of a lineage, and its summary."""
    blocks = [lineage_table(result).text(), lineage_summary_table(result).text(max_characters=100)]
    last = "\n".join(_page_lines(report, "lineage", run, "--report", "lineage.html"))
    return "\n\n".join([*blocks, last]) if report else "\n\n".join(blocks) + f"\n{last}"


# --- measurements ---------------------------------------------------------------------------------------

_DISTANCE_TITLES = {
    "byte trigrams": "divergence of byte trigrams, bits",
    "tokens": "divergence of tokens, bits",
    "n-gram log-ratio": "log-ratio of n-grams, nats",
    "told apart": "classifier of passages, AUC",
}


def shift_text(result: MeasuredShift, report: Path | None) -> str:
    """How far new text is from old text, and the settings to begin with."""
    old, new, surprise = result.old, result.new, result.surprise
    lines = [
        f"{result.model}: the shift from old to new text is {result.strength}",
        f"  {'':<36} {'value':>8} {'95 % interval':>19} {'no shift':>9}",
    ]
    for name, distance in result.distances.items():
        lines.append(
            f"  {_DISTANCE_TITLES[name]:<36} {distance.value:>8.3f} {_ends(distance, '.3f'):>19} {distance.same:>9.3f}"
        )
    lines += [
        "",
        f"  {'':<36} {'old':>8} {'new':>8}",
        f"  {'bits per byte of the model':<36} {old.bits.value:>8.3f} {new.bits.value:>8.3f}   "
        f"new - old {surprise.value:+.3f} ({_ends(surprise, '+.3f')})",
        f"  {'bytes per token':<36} {old.fertility.bytes_per_token:>8.2f} {new.fertility.bytes_per_token:>8.2f}",
        f"  {'tokens per word':<36} {old.fertility.tokens_per_word:>8.2f} {new.fertility.tokens_per_word:>8.2f}",
        f"  {'unknown tokens':<36} {old.fertility.unknown:>8.2%} {new.fertility.unknown:>8.2%}",
        "",
        "to begin with:",
    ]
    for proposal in result.proposals:
        lines.append(f"  {proposal.what}: {proposal.value}")
        lines.append(f"    {proposal.reason} ({proposal.source})")
    if report:
        lines.append(f"report: {report}")
    words = ["--model", result.model, "--data", new.files[0], "--replay", old.files[0]]
    return "\n".join([*lines, next_line("init", "stage", *words)])


def probe_text(result: LayerProbe, report: Path | None) -> str:
    """What each layer of a model encodes about the labels."""
    items, unit = result.items, "words" if result.problem == ProblemType.TAGS else "texts"
    lines = [
        probe_table(result).text(),
        "",
        f"{items['train']:,} {unit} to train on, {items['dev']:,} to choose by, {items['test']:,} to test on; "
        f"{result.seconds.features:.1f} s for all features, {result.seconds.classifiers:.1f} s for all classifiers",
        *result.notes,
        f"best on dev: {result.best.name}; in a stage: {_objective_text(result.best, result)}",
    ]
    return "\n".join(
        [*lines, *_page_lines(report, "probe", result.model, result.train, result.test, "--report", "layers.html")]
    )


def _objective_text(best: LayerView, result: LayerProbe) -> str:
    """The objective of a stage that reads what a view reads."""
    layers = {"state": str(best.states[0]), "mix": "mix"}.get(best.kind, f"{{{best.kind}: {len(best.states)}}}")
    options = f", pooling: {result.pooling}" if result.pooling else ""
    options += f", stack: {result.stack}" if result.stack == "decoder" else ""
    return f"objectives: [{{kind: classify, layers: {layers}{options}}}]"


def importance_text(result: MeasuredImportance) -> str:
    """The importance of a model's weights, and the keys of a stage that use it."""
    from postgrad.penalties.importance_file import KIND_DESCRIPTIONS

    metadata = result.metadata
    lines = [
        f"{metadata.model}: {KIND_DESCRIPTIONS[metadata.kind]}",
        f"a mean over {metadata.tokens:,} {metadata.per}s"
        + (" (all of the files)" if result.is_text_exhausted else ""),
        "",
        *_convergence_lines(metadata),
        "",
        f"  {'weights':<44} {'numbers':>10} {'share':>7} {'mean / overall mean':>20}",
        *(
            f"  {part.part:<44} {part.weights:>10,} {part.share:>7.1%} {part.relative:>20.3g}"
            for part in result.parts[:_PARTS_SHOWN]
        ),
        "",
        f"mean importance {metadata.mean:.4g} per {metadata.per}",
    ]
    if metadata.onto:
        lines.append(f"added to {metadata.onto['decay']:g} x the importance measured on {metadata.onto['model']}")
    stage = (
        f"optimizer: {{sparse_update: {{kind: ssu, importance: {result.out}}}}}"
        if metadata.kind == "activation"
        else f"penalties: [{{kind: anchor, strength: auto, importance: {result.out}}}]"
    )
    return "\n".join([*lines, f"wrote {result.out}", f"next, in a stage that starts from {metadata.model}: {stage}"])


def _convergence_lines(metadata: ImportanceMetadata) -> list[str]:
    if not metadata.convergence:
        return ["a single batch gives no estimate of the error (use more --tokens, or a smaller --context)"]
    return [
        f"  {'labels':>10}  {'correlation of halves':>21}  {'error of their mean':>19}",
        *(
            f"  {int(row['labels']):>10,}  {row['correlation']:>21.3f}  {row['error']:>19.1%}"
            for row in metadata.convergence
        ),
    ]


# --- models and text ------------------------------------------------------------------------------------


def generation_text(result: Generation) -> str:
    """What each model generated, after the prompt that it continues."""
    texts = [result.prompt * item.continues_prompt + item.text for item in result.continuations]
    if len(texts) == 1:
        return texts[0]
    return "\n\n".join(f"[{item.model}]\n{text}" for item, text in zip(result.continuations, texts, strict=True))


def export_text(result: ExportedModel) -> str:
    """A plain folder or file, and what a reader has to know about it."""
    reader = "postgrad.load_classifier" if result.has_task_head else "plain transformers"
    lines = [f"{result.folder}: {result.dtype}, {result.bytes:,} bytes; {reader} reads the same logits"]
    lines += [f"note: {note}" for note in result.notes]
    if names := result.virtual_tokens:
        shown = "".join(names)
        if len(names) > _VIRTUAL_TOKENS_SHOWN:
            shown = f"{names[0]}{names[1]}... to ...{names[-1]}, {len(names)} in all"
        lines.append(f"its soft prompt is {shown}: put it before every text")
        lines.append(
            f"these tokens take up to {100 * result.virtual_share:.2g} % of the probability of a next token (measured); "
            "they are never generated, and a scorer should leave out their logits, the last ones"
        )
    if result.is_prefix_lm:
        from postgrad.models.prefix_lm_attention import PREFIX_LM_KEY

        lines.append(
            f"a prefix language model ({PREFIX_LM_KEY} in config.json): plain transformers does not read its prompts in both "
            "directions"
        )
    if result.is_gguf:
        return "\n".join([*lines, f"next: llama-cli -m {shlex.quote(str(result.folder))}"])
    verb = "generate" if result.task.generates else "eval"
    return "\n".join([*lines, next_line(verb, result.folder)])


def push_text(result: PushedModel) -> str:
    """Where a model is now, and who can see it."""
    seen = {True: "private", False: "public", None: "visibility unknown"}[result.is_private]
    lines = [f"{result.repository} ({seen}): {len(result.files)} files, {format_bytes(result.bytes)}"]
    if result.gate_failed:
        lines.append("warning: its retention gate failed; the model card says so")
    return "\n".join([*lines, f"commit: {result.url}", next_line("generate", result.repository)])


def tracking_text(result: TrackingReport) -> str:
    """What each tracker got, and how to see it."""
    lines = []
    for tracker in result.trackers:
        state = "" if tracker.is_finished else "; the run is not finished: the same command sends the rest"
        lines.append(f"{tracker.kind}: sent {tracker.sent:,} points, {tracker.points:,} in all{state}")
    return "\n".join([*lines, next_line("report", result.run)])


def runs_text(result: RunList) -> str:
    """The runs of a folder in a table."""
    if not result.runs:
        return f"{result.folder} has no runs\n{next_line('demo')}"
    following = (
        next_line("runs", result.folder, "--clean")
        if result.removable_bytes
        else next_line("lineage", result.runs[-1].run)
    )
    return f"{result.table().text()}\n{following}"


def blend_text(result: Blend, report: Path | None) -> str:
    """The models between a run's start and its ends, and the one that was chosen."""
    first = result.points[0].changes
    width = max(16, *(len(point.name) + 2 for point in result.points))
    lines = [
        f"between {result.start} (0) and {result.describe_end()} (1); change in nats/token from the start, 95 % interval",
        "  " + f"{'weight':<{width}}" + "".join(f"{f'{name} ({item.role})':>32}" for name, item in first.items()),
    ]
    for point in result.points:
        changes = [point.changes[name].change for name in first]
        cells = [f"{c.difference:+.4f} ({_ends(c)})" for c in changes]
        lines.append(f"  {point.name:<{width}}" + "".join(f"{cell:>32}" for cell in cells))
    lines += [f"note: {note}" for note in result.notes]
    if result.chosen:
        bound = result.max_forgetting
        reason = f", the most learning within {bound:.2%} of forgetting" if bound is not None else ""
        lines.append(f"chosen: {result.chosen.name}{reason}")
    lines.append("a blend trades learning for retention; it is no replacement for replay")
    if result.folder and result.chosen:
        lines.append(f"wrote {result.folder}: {result.chosen.name}")
    if report:
        lines.append(f"report: {report}")
    return "\n".join([*lines, next_line(*(["eval", result.folder] if result.folder else _blend_command(result)))])


def _blend_command(result: Blend) -> Sequence[object]:
    """The command that writes a model of this sweep: the one within the bound, or the middle one of the last end."""
    weights, bound, merge, average = result.weights, result.max_forgetting, result.merge, result.average
    ends = result.ends if bound is not None else result.ends[-1:]
    names = [result.run, *(parse_weighted_model(model, "--merge-with")[0] for model in merge.models)]
    run, *models = [
        name if set(own) == {1} else f"{name}={_joined(own)}"
        for name, own in zip(names, zip(*(end.model_weights for end in ends), strict=True), strict=True)
    ]
    methods = _joined(end.method for end in ends)
    options = {
        "--weights": _joined(weights),
        "--granularity": result.granularity if bound is not None and result.granularity != "model" else "",
        "--method": methods if methods != "linear" else "",
        "--density": f"{merge.density:g}" if "ties" in methods or "dare" in methods else "",
        "--seed": merge.seed or "",
        "--start": merge.start or "",
        "--block-weights": ",".join(f"{factor:g}" for factor in merge.block_weights),
    }
    if average:
        options |= {
            "--average": _joined(end.average or 0 for end in ends),
            "--decay": _joined(end.decay for end in ends),
            "--floor": f"{average.floor:g}" if average.floor else "",
            "--until": average.until or "",
        }
    words: list[object] = ["blend", run]
    for model in models:
        words += ["--merge-with", model]
    words += [word for option, value in options.items() if value != "" for word in (option, value)]
    words += ["--force"] if merge.is_forced else []
    words += ["--weight", f"{weights[len(weights) // 2]:g}"] if bound is None else ["--max-forgetting", f"{bound:g}"]
    return [*words, "--out", f"{result.run}-blend"]


def _joined(values: Iterable[float | str]) -> str:
    """Values of an option, each once, with commas between them."""
    return ",".join(dict.fromkeys(f"{value:g}" if isinstance(value, float | int) else value for value in values))


def grown_text(result: GrownModel) -> str:
    """A model with a larger vocabulary, and how to train it."""
    lines = [f"{result.folder}: {result.model} with {result.added:,} new tokens ({result.tokens:,} in all)"]
    for name, change in (("new", result.new), ("old", result.old)):
        if change:
            before, after = change.before, change.after
            fewer = 1 - before.bytes_per_token / after.bytes_per_token
            lines.append(
                f"  {name} text: {before.bytes_per_token:.2f} -> {after.bytes_per_token:.2f} bytes per token "
                f"({fewer:.0%} fewer tokens), {before.tokens_per_word:.2f} -> {after.tokens_per_word:.2f} tokens per word"
            )
    if result.old_bits:
        lines.append(f"  {result.old_bits.sentence()}")
    else:
        lines.append("  old text costs more before any training: --old FILE measures by how much")
    lines += [
        "  such as " + " ".join(plain_text(token) for token in result.first[:12]),
        f"train it in two stages: first `tuning: {{kind: blocks, all_but_first: {result.blocks}, embeddings: true}}`, "
        "then all weights;",
        "compare models of two vocabularies in bits per byte",
        next_line("eval", result.folder, "NEW"),
    ]
    return "\n".join(lines)


def synthesized_text(result: SynthesizedText, previews: Sequence[str]) -> str:
    """A file of generated text, and the source that replays it."""
    rejected = ", ".join(f"{count:,} {reason}" for reason, count in result.left_out.items()) or "none"
    return "\n".join(
        [
            *(["this text was already complete"] if result.already_complete else []),
            f"{result.file}: {result.documents:,} documents, {result.tokens:,} tokens, generated by {result.model}",
            f"  {result.ended / max(result.documents, 1):.0%} ended by themselves; rejected: {rejected}",
            *([f"  the {result.chosen:,} most diverse are kept"] if result.chosen is not None else []),
            *(f"  {number}. {text}" for number, text in enumerate(previews, 1)),
            *(_rewritten_sources(result) if result.forms else _replay_source(result)),
        ]
    )


def _replay_source(result: SynthesizedText) -> list[str]:
    words: Mapping[str, object] = {"--model": result.model, "--data": "NEW", "--replay": result.file}
    return [
        f"use it as a source: {{name: replay, path: {result.file}, share: 10%, role: replay}}",
        next_line("init", "stage", *(word for pair in words.items() for word in pair)),
    ]


def _rewritten_sources(result: SynthesizedText) -> list[str]:
    """A source for each form, and the task of closed-book questions."""
    lines = ["use them as sources beside the corpus, with shares of your choice:"]
    lines += [
        f"  {{name: {form}, path: {result.file}, filter: {{form: [{form}]}}, share: 20%}}    # {count:,} texts"
        for form, count in result.forms.items()
    ]
    if result.questions_file:
        lines.append(f"measure what is learnt with {result.questions:,} closed-book questions, under evaluation.tasks:")
        lines.append(f"  {{name: closed-book, path: {result.questions_file}, role: learned}}")
    return [*lines, next_line("init", "stage", "--model", result.model, "--data", result.file)]

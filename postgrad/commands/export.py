"""Export a run, checkpoint or adapter as a plain Hugging Face folder or a GGUF file, and verify its logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from postgrad.commands.results import Result
from postgrad.commands.weighted_models import parse_weighted_model
from postgrad.errors import ModelError, StageError
from postgrad.lineage.record import RECORD, read_record
from postgrad.models.gguf_file import GGUF_SUFFIX, read_gguf, require_gguf, write_gguf
from postgrad.models.layers import get_embedding_weight
from postgrad.models.location import TUNING_FILE, ModelLocation, locate_model
from postgrad.models.model import wrap_model
from postgrad.models.prefix_lm_attention import is_prefix_lm
from postgrad.models.pretrained import load_pretrained, load_tokenizer, stored_dtype
from postgrad.models.published_vocabulary import Vocabulary, publish_pretrained
from postgrad.models.task import Task
from postgrad.models.task_head import load_task_head_config
from postgrad.reports.pages.model_card import write_model_card
from postgrad.tuning.adapter_folder import read_export
from postgrad.tuning.open_model import LoadedModel, open_model, start_fingerprint


@dataclass(frozen=True)
class ExportedModel(Result):
    """A plain Hugging Face folder, or a GGUF file, whose logits equal those of its source."""

    folder: Path
    """The folder, or the file."""
    dtype: str
    bytes: int
    """Size of all files."""
    task: Task
    virtual_tokens: tuple[str, ...]
    """Tokens of a soft prompt, now in the vocabulary, to put before every text."""
    virtual_share: float
    """The largest share of the probability of a next token that these tokens take, measured; the soft prompt takes none."""
    is_prefix_lm: bool
    """Trained to read a prefix in both directions, which plain transformers does not."""
    has_task_head: bool
    """A classifier with a task head that only `postgrad.load_classifier` reads."""
    has_card: bool
    """A model card was written, `README.md`: the model is that of a finished run."""
    notes: tuple[str, ...] = ()
    """Of a GGUF file: texts for which llama.cpp gives other ids than the tokenizer."""

    @property
    def is_gguf(self) -> bool:
        """Whether it is a file for llama.cpp."""
        return self.folder.suffix == GGUF_SUFFIX


def export_model(
    model: str,
    folder: Path | str,
    dtype: str = "auto",
    base: str | None = None,
    merge_with: Sequence[str] = (),
    weight: float = 1.0,
    method: str = "cat",
    density: float | None = None,
    license_name: str | None = None,
) -> ExportedModel:
    """Publish a plain Hugging Face folder, or a file NAME.gguf, and compare its logits, read back, with the source's.

    Adapters are merged into the weights; a soft prompt becomes rows of the vocabulary, which every head gives a probability.
    `merge_with` (`RUN` or `RUN=WEIGHT`):
    low-rank adapters of the same base, merged with this one by `method` (cat, svd, linear, ties, dare_ties, ...).
    The published model of a run gets a model card, in which `license_name` is the license; the start model's is not copied.

    Raises `StageError` when `folder` exists, `TuningError` for a tuning that cannot be merged, `ModelError` when the logits
    differ (the folder is kept) or llama.cpp does not have the architecture or the tokenizer, `MissingExtra` without `gguf`.
    """
    folder = Path(folder)
    if folder.suffix == GGUF_SUFFIX:
        require_gguf()
    if folder.exists():
        raise StageError(f"{folder} already exists", where="export", hint="name a folder that does not exist")
    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise StageError(f"there is no dtype {dtype!r}", where="--dtype", expected="auto, float32, bfloat16 or float16")
    start = locate_model(str(model), Path.cwd(), base)
    target_dtype = stored_dtype(start) if dtype == "auto" else getattr(torch, dtype)
    opened = _merge_adapters(start, weight, merge_with, method, density) if merge_with else open_model(start)
    pretrained, tokenizer = opened.model, load_tokenizer(start)
    soft_prompt_ids = (*opened.frame.outer_ids, *opened.frame.prefix_ids)
    ids = torch.arange(16)[None] % get_embedding_weight(pretrained).shape[0]
    ids = torch.cat([torch.tensor([soft_prompt_ids], dtype=torch.long), ids], 1)
    before, unmerged = Vocabulary(dict(tokenizer.get_vocab())), _logits(pretrained, opened.task, ids)
    for tuning in opened.tunings:  # in order: the ids of a later prompt follow those of an earlier one
        tuning.merge(tokenizer)
    merged = _logits(pretrained, opened.task, ids)
    size = unmerged.shape[-1]
    _refuse_difference(merged[..., :size], unmerged, folder, tolerance=1e-3)
    for parameter in pretrained.parameters():  # not the buffers: rotary angles stay in full precision
        parameter.data = parameter.data.to(target_dtype)
    expected = _logits(pretrained, opened.task, ids)
    notes: list[str] = []
    if folder.suffix == GGUF_SUFFIX:
        notes += write_gguf(folder, pretrained, tokenizer, opened.task, target_dtype)
        reloaded = read_gguf(folder, pretrained, target_dtype)
    else:
        publish_pretrained(folder, pretrained, tokenizer, dtype=target_dtype, before=before)
        reloaded = load_pretrained(ModelLocation(str(folder), folder.resolve()), opened.task, dtype=target_dtype).model
    _refuse_difference(_logits(reloaded, opened.task, ids), expected, folder)
    return ExportedModel(
        folder,
        str(target_dtype).removeprefix("torch."),
        sum(p.stat().st_size for p in (folder.iterdir() if folder.is_dir() else [folder])),
        opened.task,
        tuple(tokenizer.convert_ids_to_tokens(list(soft_prompt_ids))),
        merged.softmax(-1)[..., size:].sum(-1).max().item(),
        is_prefix_lm(pretrained.config),
        load_task_head_config(folder) is not None,
        folder.is_dir() and not merge_with and _write_card(start, folder, license_name),
        tuple(notes),
    )


def _write_card(start: ModelLocation, folder: Path, license_name: str | None) -> bool:
    """Write the model card of a run's published model; a checkpoint has no scores of its own."""
    run = start.run
    if run is None or start.folder != run / "model" or not (run / RECORD).exists():
        return False
    return write_model_card(folder, run, read_record(run), license_name)


def _refuse_difference(logits: torch.Tensor, expected: torch.Tensor, folder: Path, tolerance: float = 0.0) -> None:
    difference = (logits - expected).abs().max().item()
    if not difference <= tolerance * max(1.0, expected.abs().max().item()):
        raise ModelError(f"the exported model's logits differ by {difference:.2g}", where=str(folder))


@torch.no_grad()
def _logits(model: torch.nn.Module, task: Task, ids: torch.Tensor) -> torch.Tensor:
    inputs = {"input_ids": ids}
    if task.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids.flip(1)
    return wrap_model(model, task)(**inputs).logits().float()  # type: ignore[bad-argument-type]


def _merge_adapters(
    start: ModelLocation, weight: float, others: Sequence[str], method: str, density: float | None
) -> LoadedModel:
    """The base of several low-rank adapters with their weighted sum merged into its weights."""
    from postgrad.tuning.merge_adapters import merge_adapters

    parts = [
        (start, weight),
        *((locate_model(name, Path.cwd()), share) for name, share in map(_parse_weighted_run, others)),
    ]
    bases = {start_fingerprint(part.base) if part.base else part.name for part, _ in parts}
    adapters = [
        (read_export(part.folder), share)
        for part, share in parts
        if part.folder and (part.folder / TUNING_FILE).exists()
    ]
    if len(bases) > 1 or start.base is None or len(adapters) < len(parts):
        raise StageError(
            f"{' and '.join(part.name for part, _ in parts)} are not adapters of one base model",
            where="--merge-with",
            expected="runs with `tuning: {kind: lora}` that started from the same model",
        )
    opened = open_model(start.base)
    merge_adapters(opened.model, adapters, method, density=density).merge()  # type: ignore[bad-argument-type]
    return opened


def _parse_weighted_run(text: str) -> tuple[str, float]:
    """`RUN=WEIGHT`, or a run alone, which has weight 1."""
    name, weights = parse_weighted_model(text, "--merge-with")
    if len(weights) > 1:
        raise StageError(f"{text!r} has {len(weights)} weights", where="--merge-with", expected="RUN=0.5")
    return name, weights[0]

# ruff: noqa: E501 (rows of a table)
"""Write docs/models.md from the outcomes of `python -m docs.make_models_table`.

Run it as `python -m docs.make_models_page OUTCOMES...`; the files have a line of JSON for each model type.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import transformers

PAGE = Path(__file__).parent / "models.md"
HEAD = """\
# Models

Every model type that transformers {version} maps to a causal, masked or encoder-decoder language model was built tiny from its
configuration, with random weights, by rules on the names of its fields (`tests/model_families.py`), and taken through a stage. This
page is generated: `python -m docs.make_models_table OUTCOMES`, then `python -m docs.make_models_page OUTCOMES`.

- **packed**: documents share a row, and do not see each other. **unpacked**: packed documents would, so each is a row of its own
  ([rows](data.md)). Other layouts are those of encoders and encoder-decoders.
- **loss**: the first step's loss equals the loss from the model's own logits, each document of the batch alone. So scales, caps,
  sinks and windows are right, and no document sees another.
- **resume**: a run that is interrupted behind a checkpoint ends with the weights of one that is not, to the bit.
- **LoRA**: a step of a LoRA adapter trains. **reload**: plain transformers reads the published model, and finds every weight.
- What was not tried is left empty. A model with an encoder's default is built as a decoder under a causal head (`is_decoder: true`).
- The packed way of recurrent layers, whose kernels take the borders of documents (`seq_idx`, `cu_seq_lens`), needs CUDA. It is
  tested with layers that take them, and on tensors without values, since no step may read a device for it. It is **not measured
  on a GPU**: there a probe decides, and `check` says which way it took.

{counts}
"""
MISSES = """\
## Guesses and misses

What was expected of each causal family was written down before it ran. What came out otherwise, on transformers {version}:

| model type | expected | found | source |
|---|---|---|---|
| `persimmon`, `gpt_bigcode`, `ctrl`, `doge` | leak | the first three keep packed documents apart; `doge` attends to later tokens with random weights | tried |
| `glm_moe_dsa`, `axk2`, `minimax_m3_vl_text` | leak by their sparse indexers | packed rows are kept apart at rows of 48 tokens | tried |
| `whisper`, `trocr`, `moshi`, `git`, `fuyu`, `phi4_multimodal`, `got_ocr2`, `hrm_text` | refused | their decoders train on text alone | tried |
| `afmoe` | packed | leaks | tried |
| `llama4_text` | packed | packed, once the forward pass of the whole model is used: its `base_model` is itself (`base_model_prefix` is `language_model`, the attribute `model`) | `models/llama4/modeling_llama4.py` |
| `deepseek_v3` with fewer key heads than heads | works | built, and its forward pass fails in attention; refused with that reason | tried |
| `dbrx` | packed | cannot be built from its own configuration: `attn_config` has no `rope_theta` | `models/dbrx` |
| `mixtral`, `granitemoe`, ... | resume | `save_pretrained` gives back the published names and one tensor for each expert; a resume read others | `core_model_loading.py` |
| `marian` | resume | its sinusoidal positions are parameters that no folder holds, and loading makes them trainable | `models/marian/modeling_marian.py` |
| `t5gemma` | publish | its output embedding is tied to the decoder's input embedding, and `get_input_embeddings` is the encoder's | `models/t5gemma/modeling_t5gemma.py` |
| `ibert` | resume | buffers hold ranges of activations that each step moves | `models/ibert/quant_modules.py` |
| `camembert` (masked) | resume | the saved name of the tied output embedding is not the first name of the parameter | tried |
| `qwen3_5`, `llama4` with images | kept whole | `AutoModelForCausalLM` reads the language part of such a folder alone, and saves that alone | `models/auto/modeling_auto.py` |
| `t5gemma` | plain head | caps its logits at 30 by default | `models/t5gemma/modeling_t5gemma.py` |
| `gpt_oss` in mxfp4 | saved by transformers as it was read | its dequantised weights get the names of quantised ones (`down_proj_blocks`), and nothing reads the folder; here it is a plain one | `core_model_loading.py` |
| `reformer` | refused | trains, in training mode alone; an adapter on frozen embeddings gets no gradient from its reversible layers | tried |
| `xlm` | masked | causal, with `causal: true` | tried |
| `jetmoe`, `zaya`, `hunyuan_v1_moe`, `longcat_flash` | a balancing loss | none, or not that of Switch Transformers | tried |
"""
TASKS = {"causal": "Decoders", "masked": "Encoders", "text-to-text": "Encoder-decoders"}
FULL_STOP = re.compile(r"\s+")


def render(outcomes: Sequence[dict[str, Any]]) -> str:
    """The page."""
    sections = []
    for task, title in TASKS.items():
        rows = sorted((o for o in outcomes if o["task"] == task), key=lambda o: o["model_type"])
        head = f"## {title}\n\n| model type | rows | loss | resume | LoRA | reload | reason |\n|---|---|---|---|---|---|---|\n"
        sections.append(head + "\n".join(map(_row, rows)) + "\n")
    causal = [o for o in outcomes if o["task"] == "causal"]
    return "\n".join(
        [
            HEAD.format(version=transformers.__version__, counts=_counts(causal)),
            *sections,
            MISSES.format(version=transformers.__version__),
        ]
    )


def status(outcome: dict[str, Any]) -> str:
    """The layout of a model type that trains; refused, or not built."""
    if "build" in outcome["problems"]:
        return "not built"
    return outcome["layout"] if "loss" in outcome["passed"] else "refused"


def _row(outcome: dict[str, Any]) -> str:
    def mark(name: str) -> str:
        return "yes" if name in outcome["passed"] else "no" if name in outcome["problems"] else ""

    problem = next(iter(outcome["problems"].values()), outcome["cause"])
    reason = FULL_STOP.sub(" ", re.sub(r"/\S+/model", "it", problem)).replace("|", "/")[:160]
    cells = [f"`{outcome['model_type']}`", status(outcome), *map(mark, ("loss", "resume", "lora", "reload")), reason]
    return f"| {' | '.join(cells)} |"


def _counts(causal: Sequence[dict[str, Any]]) -> str:
    found = Counter(map(status, causal))
    later = sum("what follows a text" in str(o["problems"]) for o in causal)
    built = len(causal) - found["not built"]
    trained = found["packed"] + found["unpacked"]
    return (
        f"Of {len(causal)} causal model types, {built} could be built; {trained} train ({trained / built:.0%}): {found['packed']} "
        f"packed, {found['unpacked']} unpacked. Of the {found['refused']} refused, {later} attend to later tokens."
    )


if __name__ == "__main__":
    lines = [line for path in sys.argv[1:] for line in Path(path).read_text().splitlines()]
    PAGE.write_text(render([json.loads(line) for line in lines]))

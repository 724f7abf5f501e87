#!/usr/bin/env bash
# transformers 5.23.0: a gpt-oss folder in MXFP4 that was dequantised on loading is saved as a folder that loses its experts.
#
# Without a GPU kernel `from_pretrained` dequantises MXFP4 weights into plain bf16 parameters, `experts.gate_up_proj` and
# `experts.down_proj`. Expected of `save_pretrained` then: a plain folder with these names, which gives the same logits.
# Seen: the plain bf16 tensors are written as `experts.gate_up_proj_blocks` and `experts.down_proj_blocks`, without scales, beside
# a configuration without a `quantization_config`. `from_pretrained` of that folder reports both experts' weights as missing,
# draws them at random, and the logits are others. Nothing but the loading report tells.
#
# Versions: transformers 5.23.0, accelerate 1.15.0, torch 2.13.0, Python 3.11 and 3.12. Exits with 1 when the behaviour is another one.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0 accelerate==1.15.0
"$folder/venv/bin/python" - "$folder" <<'PYTHON'
import json
import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GptOssConfig, set_seed

transformers.logging.set_verbosity_error()
set_seed(0)
folder = Path(sys.argv[1])
config = GptOssConfig(
    vocab_size=32, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
    head_dim=32, num_local_experts=2, num_experts_per_tok=1, max_position_embeddings=64, layer_types=["full_attention"],
)
AutoModelForCausalLM.from_config(config).save_pretrained(folder / "mxfp4")
tensors = load_file(folder / "mxfp4/model.safetensors")
generator = torch.Generator().manual_seed(0)
for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
    experts, inputs, outputs = tensors.pop(name).shape
    shape = (experts, outputs, inputs // 32)
    tensors[f"{name}_blocks"] = torch.randint(0, 256, (*shape, 16), generator=generator, dtype=torch.uint8)
    tensors[f"{name}_scales"] = torch.full(shape, 124, dtype=torch.uint8)
save_file(tensors, folder / "mxfp4/model.safetensors", {"format": "pt"})
settings = json.loads((folder / "mxfp4/config.json").read_text())
plain = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
settings["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": plain}
(folder / "mxfp4/config.json").write_text(json.dumps(settings))

ids = torch.arange(8)[None]
model = AutoModelForCausalLM.from_pretrained(folder / "mxfp4", dtype=torch.bfloat16).eval()
held = sorted(name for name, _ in model.named_parameters() if name.endswith("proj") and "experts" in name)
model.save_pretrained(folder / "saved")
written = sorted(name for name in load_file(folder / "saved/model.safetensors") if "experts" in name and "bias" not in name)
is_called_quantized = "quantization_config" in json.loads((folder / "saved/config.json").read_text())
again, report = AutoModelForCausalLM.from_pretrained(folder / "saved", dtype=torch.bfloat16, output_loading_info=True)
with torch.no_grad():
    is_equal = torch.equal(model(ids).logits, again.eval()(ids).logits)
print(f"held: {held}\nwritten: {written}\nquantization_config: {is_called_quantized}")
print(f"missing when read again: {sorted(report['missing_keys'])}\nlogits equal: {is_equal}")
layer = "model.layers.0.mlp.experts"
seen = (held, written, is_called_quantized, sorted(report["missing_keys"]), is_equal)
names = [f"{layer}.down_proj", f"{layer}.gate_up_proj"]
sys.exit(seen != (names, [f"{name}_blocks" for name in names], False, names, False))
PYTHON

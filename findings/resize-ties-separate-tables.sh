#!/usr/bin/env bash
# transformers 5.23.0: `resize_token_embeddings` ties an output head that `from_pretrained` had just kept apart.
#
# A folder whose configuration says `tie_word_embeddings: true` but whose file holds two different tables (an untied head that
# was trained, saved with an unchanged configuration) is loaded with both tables, and a warning says that they are not tied.
# Expected of a resize that only adds rows: the logits of the old tokens stay as they are.
# Seen: after `resize_token_embeddings` the head *is* the input embedding; the trained head is gone, and the logits of old tokens
# change. A model without the contradiction in its configuration keeps them.
#
# Versions: transformers 5.23.0, torch 2.13.0, Python 3.11 and 3.12. Exits with 1 when the behaviour is another one.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0
"$folder/venv/bin/python" - "$folder" <<'PYTHON'
import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, set_seed

set_seed(0)
config = LlamaConfig(
    vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, tie_word_embeddings=False
)
model = AutoModelForCausalLM.from_config(config).eval()
ids = torch.tensor([[1, 2, 3]])
results = {}
for says_tied in (False, True):
    folder = Path(sys.argv[1]) / f"tied-{says_tied}"
    model.save_pretrained(folder)
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "tie_word_embeddings": says_tied}))
    loaded = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        expected = model(ids).logits
        is_equal_loaded = torch.equal(loaded(ids).logits, expected)
        loaded.resize_token_embeddings(10, mean_resizing=False)
        is_equal_resized = torch.allclose(loaded(ids).logits[..., :8], expected, atol=1e-6)
    is_tied = loaded.lm_head.weight is loaded.model.embed_tokens.weight
    results[says_tied] = (is_equal_loaded, is_equal_resized, is_tied)
    print(
        f"tie_word_embeddings: {says_tied}; logits equal after loading: {is_equal_loaded}, after adding two rows: "
        f"{is_equal_resized}; one table afterwards: {is_tied}"
    )
sys.exit(results != {False: (True, True, False), True: (True, False, True)})
PYTHON

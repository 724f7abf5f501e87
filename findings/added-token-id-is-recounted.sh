#!/usr/bin/env bash
# tokenizers 0.23.3: the `id` of an entry of `added_tokens` in tokenizer.json is not what the loaded token has.
#
# A special token often stands directly behind the base vocabulary (Qwen, Llama 3, NeoX). A tool that adds a word to the model's
# vocabulary, behind that token, writes a file in which all ids are different: vocabulary 0, 1 and 3, special token 2.
# Expected: the special token keeps the id 2 that the file states.
# Seen: it is counted on from the size of the vocabulary and gets 3, the id of the new word. Nothing is said, two tokens share an
# id, no token has 2, and the next save writes 3. A vocabulary that also holds the special token, with its id, is read as written.
#
# Version: tokenizers 0.23.3, Python 3.11 and 3.12. Exits with 1 when the behaviour is another one.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check tokenizers==0.23.3
"$folder/venv/bin/python" - <<'PYTHON'
import json
import sys

from tokenizers import Tokenizer, models, pre_tokenizers

tokenizer = Tokenizer(models.WordLevel({"cat": 0, "dog": 1}, unk_token="cat"))
tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer.add_special_tokens(["<end>"])
stated = json.loads(tokenizer.to_str())
assert [(entry["content"], entry["id"]) for entry in stated["added_tokens"]] == [("<end>", 2)]

seen = {}
for name, words in {"word alone": {"zebra": 3}, "word and special token": {"zebra": 3, "<end>": 2}}.items():
    stated["model"]["vocab"] = {"cat": 0, "dog": 1, **words}
    loaded = Tokenizer.from_str(json.dumps(stated))
    (saved,) = json.loads(loaded.to_str())["added_tokens"]
    seen[name] = (loaded.token_to_id("<end>"), loaded.token_to_id("zebra"), saved["id"])
    print(f"{name} added to the vocabulary: <end> is {seen[name][0]} (the file says 2), zebra is {seen[name][1]}")
sys.exit(seen != {"word alone": (3, 3, 3), "word and special token": (2, 3, 2)})
PYTHON

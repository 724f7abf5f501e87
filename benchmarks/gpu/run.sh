#!/bin/sh
# All that a CUDA device is needed for, in at most 9 minutes: sh benchmarks/gpu/run.sh [FOLDER]
#
# Writes smoke.json, speed.json, memory.json, resume.json and paper.json into FOLDER (default: benchmarks/results/gpu); each part has
# a time limit of its own, and one that fails does not stop the others. Exits with 1 when one has failed.
#
# Needs torch with CUDA, transformers, accelerate (for Trainer), pytest (tests/tiny_stages makes the small models) and the
# dependencies in pyproject.toml. On a machine without a package index bring wheels of those that are missing, usually: pydantic,
# pydantic-core, annotated-types, typing-inspection, peft, bm25s, seqeval, rouge-score, absl-py, nltk.
set -u
here=$(cd "$(dirname "$0")" && pwd)
out=${1:-$here/../results/gpu}
python=${PYTHON:-python3}
mkdir -p "$out"
export PYTHONPATH="$here/../..:$here/..${PYTHONPATH:+:$PYTHONPATH}" TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
failed=0
part() {  # NAME SECONDS SCRIPT OPTIONS...
    name=$1 seconds=$2
    shift 2
    echo "== $name (at most $seconds s)"
    timeout "$seconds" "$python" "$@" --json "$out/$name.json" || { echo "== $name failed: exit $?"; failed=1; }
}
part smoke 150 "$here/smoke.py"
part speed 170 "$here/speed.py"
part memory 60 "$here/../memory_probe.py" --model llama-120M --rounds 1 --settings "full fp32" "full bf16" LoRA distilled
part resume 60 "$here/resume.py"
part paper 90 "$here/paper.py"
exit $failed

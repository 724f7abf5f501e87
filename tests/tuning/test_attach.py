"""Laws of attaching a tuning by its options."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from postgrad.config.tunings import known_tunings
from postgrad.errors import TuningError
from postgrad.tuning.attach import attach
from tests.tuning.checks import tokenizer
from tests.tuning.families import build_model


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"kind": "promt"}, r"(?s)tuning\.kind: unknown kind 'promt'.*did you mean 'prompt'"),
        ({"kind": 3}, "unknown kind '3'"),
        ({"length": 3}, "`kind` is missing"),
        (
            {"kind": "prompt", "lenght": 3},
            r"(?s)tuning\.lenght: `prompt` has no option 'lenght'.*did you mean 'length'",
        ),
        ({"kind": "adapter", "model": 3}, "no option 'model'"),
        ({"kind": "adapter", "tokenizer": None}, "no option 'tokenizer'"),
    ],
)
def test_an_unknown_word_is_told_with_the_nearest(options: dict[str, Any], says: str) -> None:
    model = build_model("llama", "lm")
    with pytest.raises(TuningError, match=says):
        attach(model, options)
    assert all(p.requires_grad for p in model.parameters())


def test_the_options_own_seed_comes_first() -> None:
    def vectors(options: dict[str, Any], seed: int) -> Tensor:
        return attach(build_model("llama", "lm"), {"kind": "prompt", "length": 3, **options}, seed=seed).state()[
            "vectors"
        ]

    assert torch.equal(vectors({}, 1), vectors({}, 1))
    assert not torch.equal(vectors({}, 1), vectors({}, 2))
    assert torch.equal(vectors({"seed": 1}, 2), vectors({}, 1))


def test_options_are_left_as_they_were() -> None:
    options = {"kind": "adapter", "size": 4}
    attach(build_model("llama", "lm"), options)
    assert options == {"kind": "adapter", "size": 4}


@pytest.mark.parametrize("kind", known_tunings())
def test_every_kind_answers_to_its_name(kind: str) -> None:
    model = build_model("bert" if kind == "bias" else "llama", "lm")
    options = {"blocks": {"last": 1}, "instruction-prompt": {"length": 4}}.get(kind, {})
    assert attach(model, {"kind": kind, **options}, tokenizer=tokenizer()).kind == kind


def test_peft_is_imported_only_for_what_needs_it() -> None:
    """It takes a second to import, and most runs have no use for it."""
    code = (
        "import sys; from tests.tuning.families import build_model; from postgrad.tuning.attach import attach; "
        "[attach(build_model('llama', 'lm'), {'kind': k}) for k in ('full', 'adapter', 'prefix', 'prompt')]; "
        "sys.exit('peft' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

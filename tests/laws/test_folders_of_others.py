"""The law: a folder means the same to PEFT, to transformers and here. It is compared by logits, or refused with a reason."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
)

from postgrad.commands.export import export_model
from postgrad.commands.grow import grow_vocabulary
from postgrad.commands.score_files import load_model_inputs
from postgrad.models.location import locate_model
from postgrad.models.model import wrap_model
from postgrad.models.pretrained import load_pretrained
from postgrad.plan.model_inputs import ModelInputs
from postgrad.tuning.open_model import LoadedModel, open_model
from postgrad.tuning.untie_embeddings import untie_output
from tests.conftest import make_llama, make_tokenizer, write_jsonl
from tests.tiny_stages import Workspace, bos_tokenizer, make_t5, make_workspace, save_model
from tests.tokenizer_forms import FORMS

TEXT = "one and two. six"
KINDS: dict[str, Callable[[str], Any]] = {
    "prompt": lambda task: PromptTuningConfig(task_type=task, num_virtual_tokens=3),
    "p-tuning": lambda task: PromptEncoderConfig(task_type=task, num_virtual_tokens=3, encoder_hidden_size=16),
    "prefix": lambda task: PrefixTuningConfig(task_type=task, num_virtual_tokens=3),
    "lora": lambda task: LoraConfig(task_type=task, r=2, init_lora_weights=False),
}
FAMILIES = {
    "llama": ("nothing", "bos", "two in front", "bos and eos", "metaspace"),
    "gpt2": ("nothing", "a bos without a name", "bos is eos"),
    "t5": ("T5",),
}
CASES = [(family, form, kind) for family, forms in FAMILIES.items() for form in forms for kind in KINDS
         if not (family == "t5" and kind == "prefix")]  # fmt: skip


def make_family(family: str, size: int) -> PreTrainedModel:
    if family == "llama":
        return make_llama(vocab_size=size)
    if family == "t5":
        return make_t5(size)
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=size, n_embd=32, n_layer=2, n_head=4, n_positions=128)).eval()


def saved_by_peft(folder: Path, family: str, form: str, kind: str) -> tuple[Path, PeftModel]:
    """A base and PEFT's folder on it, with weights that matter."""
    tokenizer = FORMS[form].make()
    save_model(make_family(family, len(tokenizer)), tokenizer, folder / "base")  # type: ignore[arg-type]
    auto = AutoModelForSeq2SeqLM if family == "t5" else AutoModelForCausalLM
    torch.manual_seed(1)
    theirs = get_peft_model(
        auto.from_pretrained(folder / "base"), KINDS[kind]("SEQ_2_SEQ_LM" if family == "t5" else "CAUSAL_LM")
    ).eval()
    theirs.save_pretrained(folder / "adapter")
    return folder / "adapter", theirs


@torch.no_grad()
def their_logits(model: Any, ids: list[int], family: str) -> torch.Tensor:
    more = {"decoder_input_ids": torch.tensor([[0, 5, 6]])} if family == "t5" else {}
    return model(input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long), **more).logits


@torch.no_grad()
def our_logits(opened: LoadedModel, inputs: ModelInputs, family: str) -> torch.Tensor:
    more = {"decoder_input_ids": torch.tensor([[0, 5, 6]])} if family == "t5" else {}
    ids = torch.tensor([inputs.encode_prompt(TEXT)])
    return wrap_model(opened.model, opened.task)(input_ids=ids, **more).logits()


def own_ids(folder: Path, family: str) -> list[int]:
    """What transformers makes of the text; a decoder goes on from it, so without what stands behind."""
    encoded = AutoTokenizer.from_pretrained(folder)(TEXT)
    last = max(i for i, sequence in enumerate(encoded.sequence_ids(0)) if sequence == 0)
    return encoded["input_ids"] if family == "t5" else encoded["input_ids"][: last + 1]


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize(("family", "form", "kind"), CASES)
def test_what_comes_in_is_what_peft_computes(family: str, form: str, kind: str, tmp_path: Path) -> None:
    folder, theirs = saved_by_peft(tmp_path, family, form, kind)
    start = locate_model(str(folder), tmp_path)
    inputs, opened = load_model_inputs(start, 64), open_model(start)
    ours, answer = our_logits(opened, inputs, family), their_logits(theirs, own_ids(tmp_path / "base", family), family)
    size = 3 if family == "t5" else len(own_ids(tmp_path / "base", family))
    if kind == "prefix" and family == "gpt2":  # PEFT moves learned positions, and a note says so
        assert any("shift `position_ids`" in note for note in opened.notes)
        return
    assert torch.allclose(ours[:, -size:], answer[:, -size:], atol=1e-4)
    soft = inputs.soft_prompt_frame
    if kind in ("prompt", "p-tuning") and inputs.encoder.prefix_ids:
        # The mutant: a prompt behind the special tokens.
        wrong = (
            *inputs.encoder.prefix_ids,
            *soft.outer_ids,
            *inputs.encode_prompt(TEXT)[len(soft.all_ids) + inputs.lead :],
        )
        with torch.no_grad():
            other = wrap_model(opened.model, opened.task)(input_ids=torch.tensor([wrong])).logits()
        assert not torch.allclose(other[:, -1], answer[:, -1], atol=1e-3)


# -- what a run publishes ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    workspace = make_workspace(tmp_path_factory.mktemp("shelf"), tmp_path_factory.getbasetemp() / "cache")
    save_model(make_llama(), bos_tokenizer(), workspace.folder / "bos")
    return workspace


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("model", ["llama", "bos"])
@pytest.mark.parametrize("tuning", [{"kind": "prompt", "length": 2}, {"kind": "lora", "rank": 2}])
def test_what_goes_out_is_what_peft_computes(shelf: Workspace, model: str, tuning: dict[str, Any]) -> None:
    raw = shelf.stage(f"{model}-{tuning['kind']}", tuning, model=model, tokens=200)
    done = shelf.run(raw)
    folder = done.run_folder / "model"
    refused = model == "bos" and tuning["kind"] == "prompt"
    assert (folder / "adapter_config.json").exists() is not refused
    notes = [note for note in done.record.notes if "PEFT" in note]
    if refused:
        assert notes == ["no folder for PEFT is written: PEFT puts a soft prompt before <s>, and here it follows it"]
        return
    assert not notes
    base = Path(json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"])
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).eval()
    start = locate_model(str(folder), shelf.folder)
    ours = our_logits(open_model(start), load_model_inputs(start, 64), "llama")
    answer = their_logits(theirs, own_ids(base, "llama"), "llama")
    size = len(own_ids(base, "llama"))
    assert torch.allclose(ours[:, -size:], answer[:, -size:], atol=1e-4)


@pytest.mark.parametrize("claim", ["add_bos_token", "add_eos_token"])
@pytest.mark.parametrize("model", ["llama", "bos"])
def test_a_setting_that_nothing_follows_is_told_and_not_published(
    shelf: Workspace, model: str, claim: str, tmp_path: Path
) -> None:
    """Transformers 5 ignores `add_bos_token` in a tokenizer's configuration, and transformers 4 obeyed it."""
    follows = model == "bos" and claim == "add_bos_token"
    tokenizer = AutoTokenizer.from_pretrained(shelf.folder / model)
    save_model(load_pretrained(locate_model(model, shelf.folder)).model, tokenizer, tmp_path / "start")
    file = tmp_path / "start" / "tokenizer_config.json"
    for value in (True, False, None):
        file.write_text(json.dumps(json.loads(file.read_text()) | {claim: value}))
        plan = shelf.plan(shelf.stage("told", {"kind": "head"}, model=str(tmp_path / "start")))
        notes = plan.model.inputs.notes()
        if value in (follows, None):
            assert notes == []
            continue
        assert len(notes) == 1 and f"{claim}: {str(value).lower()}" in notes[0]
        exported = export_model(str(tmp_path / "start"), tmp_path / f"exported-{value}")
        published = json.loads((exported.folder / "tokenizer_config.json").read_text())
        assert (
            published["tokenizer_class"] == "PreTrainedTokenizerFast" and claim not in published
        )  # which has no such setting


def test_a_published_tokenizer_has_a_class_that_both_versions_know(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<call>"]})
    save_model(make_llama(vocab_size=len(tokenizer)), tokenizer, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert config["additional_special_tokens"] == ["<call>"] and "extra_special_tokens" not in config
    read = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert read.convert_tokens_to_ids("<call>") == tokenizer.convert_tokens_to_ids("<call>")
    assert "<call>" in read.all_special_tokens


# -- two tables ----------------------------------------------------------------------------------------------------------


def with_two_tables(family: str, folder: Path) -> PreTrainedModel:
    """A folder whose configuration says that the tables are tied, while its file has two."""
    tokenizer = FORMS["T5" if family == "t5" else "nothing"].make()
    model = make_family(family, len(tokenizer))
    untie_output(model)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(3)  # type: ignore[operator]
    save_model(model, tokenizer, folder)  # type: ignore[arg-type]
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    return model


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_a_head_of_its_own_outlives_growth_whatever_the_configuration_says(family: str, tmp_path: Path) -> None:
    model = with_two_tables(family, tmp_path / "two")
    file = write_jsonl(tmp_path / "new.jsonl", [f"quoxel zymurgy {number} breltify" for number in range(12)])
    for out in (
        grow_vocabulary(str(tmp_path / "two"), [str(file)], tmp_path / "grown", tokens=5).folder,
        export_model(str(tmp_path / "two"), tmp_path / "exported").folder,
    ):
        auto = AutoModelForSeq2SeqLM if family == "t5" else AutoModelForCausalLM
        read = auto.from_pretrained(out).eval()
        size = len(model.get_input_embeddings().weight)  # type: ignore[arg-type]
        ids = [5, 6, 7, 8]
        expected = their_logits(model, ids, family)
        assert torch.allclose(their_logits(read, ids, family)[..., :size], expected, atol=1e-4)
        said = json.loads((out / "config.json").read_text())["tie_word_embeddings"]
        assert said is (family == "t5"), "T5's configuration ties its two input embeddings by the same key"

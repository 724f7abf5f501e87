"""Every verb from its words to its exit code, its JSON and the next command; no error of ours shows a traceback."""

# ruff: noqa: F811 (a fixture that is imported is named again where it is used)

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from postgrad.cli import main, progress
from postgrad.commands.synthesize import SynthesisProgress
from postgrad.lineage.record import read_record
from postgrad.run.events import RunEvent, StepCompleted
from tests.conftest import StageOf, make_llama, make_tokenizer, new_text, old_text, write_jsonl
from tests.test_docs import parse
from tests.tiny_lineage import LineageRuns, runs  # noqa: F401  (a fixture)


@dataclass(frozen=True)
class Done:
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        def no(word: str) -> None:
            raise ValueError(f"{word} is not JSON")

        return json.loads(self.out, parse_constant=no)

    @property
    def next(self) -> str:
        """The last line's command; it must parse."""
        last = self.out.strip().splitlines()[-1]
        assert last.startswith("next: postgrad "), last
        command = last.removeprefix("next: postgrad")
        parse(command)
        return command.strip()


Command = Callable[..., Done]


@pytest.fixture
def postgrad(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], cache: Path, tmp_path: Path
) -> Command:
    """The command line as a shell would call it, in this process."""
    monkeypatch.setenv("POSTGRAD_CACHE", str(cache))
    monkeypatch.chdir(tmp_path)

    def call(*words: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["postgrad", *map(str, words)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main.main()
            raise SystemExit(0)
        out, err = capfd.readouterr()
        assert "Traceback" not in out + err
        code = ended.value.code
        assert code is None or isinstance(code, int)
        return Done(code or 0, out, err)

    return call


@pytest.fixture
def stage_file(stage_of: StageOf, tmp_path: Path) -> Callable[..., Path]:
    def write(**changes: Any) -> Path:
        file = tmp_path / "stage.yaml"
        file.write_text(yaml.safe_dump(stage_of(**{"tokens": 1500, **changes})))
        return file

    return write


StageFile = Callable[..., Path]


# -- words ------------------------------------------------------------------------------------------------------------


def test_help_is_light() -> None:
    """Nobody should wait for torch to read what a command does."""
    program = """
import sys
sys.argv = ["postgrad", "--help"]
try:
    from postgrad.cli.main import main
    main()
except SystemExit as end:
    assert not end.code, end.code
heavy = {"torch", "transformers", "tokenizers", "numpy", "pydantic", "yaml", "datasets", "pyarrow", "safetensors"}
print("heavy:", sorted(heavy & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip().splitlines()[-1] == "heavy: []"
    for verb in ("demo", "init", "check", "train", "eval", "compare", "lineage", "report", "generate", "export"):
        assert re.search(rf"\b{verb}\b", done.stdout)
    # The mutant: a verb's own module would show.
    heavier = program.replace(
        "from postgrad.cli.main import main", "from postgrad.cli.main import main; import postgrad.config.stage"
    )
    done = subprocess.run([sys.executable, "-c", heavier], capture_output=True, text=True, check=True)
    assert "pydantic" in done.stdout.strip().splitlines()[-1]


def test_the_installed_command_and_the_module_are_one() -> None:
    wanted = subprocess.run([sys.executable, "-m", "postgrad", "--version"], capture_output=True, text=True, check=True)
    assert re.fullmatch(r"postgrad \d+\.\d+\S*\n", wanted.stdout)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train", "a.yaml", "--fast"], "No such option"),
        (["polish"], "No such command"),
        (["train"], "Missing argument"),
        (["eval", "model"], "nothing to score"),
        (["eval", "model", "x.txt", "--harness-limit", "3"], "no task of lm-eval is named"),
        (["init", "x"], "a stage needs a text and a model"),
        (["generate", "m", "--max-new-tokens", "many"], "integer"),
        (["export", "m"], "Missing argument"),
    ],
)
def test_wrong_words_are_bad_use(postgrad: Command, words: list[str], said: str) -> None:
    done = postgrad(*words)
    assert done.code == 2
    assert said in re.sub(r"[\s│]+", " ", done.err)
    assert done.out == ""


def test_no_words_at_all_show_the_verbs(postgrad: Command) -> None:
    done = postgrad()
    assert "train" in done.out + done.err
    assert postgrad("-h").code == 0
    assert postgrad("train", "-h").code == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train", "nowhere.yaml"], r"nowhere\.yaml: the stage file cannot be read"),
        (["check", "nowhere.yaml"], r"nowhere\.yaml: the stage file cannot be read"),
        (["eval", "./nowhere", "x.txt"], r"there is no folder \./nowhere"),
        (["compare", "one", "two"], r"one is not a run folder"),
        (["compare", "./a", "--text", "x.txt"], r"two or more models"),
        (["lineage", "one"], r"one is not a run folder"),
        (["report", "one"], r"one"),
        (["generate", "./nowhere", "--prompt", "x"], r"there is no folder \./nowhere"),
        (["export", "./nowhere", "there"], r"there is no folder \./nowhere"),
        (["init", "x", "--data", "x.txt", "--model", "./nowhere"], r"there is no folder \./nowhere"),
    ],
)
def test_what_is_not_there_is_bad_input(postgrad: Command, tmp_path: Path, words: list[str], said: str) -> None:
    done = postgrad(*words)
    assert done.code == 2
    assert re.match(rf"error: [\s\S]*{said}", done.err), done.err
    assert done.out == ""
    assert list(tmp_path.iterdir()) == []


# -- init, check, train -----------------------------------------------------------------------------------------------


def test_init_writes_what_check_accepts_and_train_carries_out(postgrad: Command, base: Path, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "new text.jsonl", new_text(300, 3))
    write_jsonl(tmp_path / "old.jsonl", old_text(200, 3))
    made = postgrad("init", "first", "--data", "new text.jsonl", "--model", base / "base", "--replay", "old.jsonl")
    assert made.code == 0, made.err
    assert made.next == "check first.yaml"
    checked = postgrad("check", "first.yaml")
    assert checked.code == 0, checked.err
    assert checked.next == "train first.yaml"
    for word in (
        "first:",
        "new",
        "replay",
        "memory: about",
        "time: about",
        "packed documents do not attend to each other",
        "step 1:",
    ):
        assert word in checked.out
    assert not (tmp_path / "runs").exists()  # a check leaves nothing
    trained = postgrad(*shlex.split(checked.next), "tokens=2000", "compute.threads=1", "compute.compile=false")
    assert trained.code == 0, trained.err
    assert trained.next == f"generate {tmp_path / 'runs' / 'first'}"
    assert postgrad(*shlex.split(trained.next), "--prompt", "one and", "--max-new-tokens", 3).code == 0


@pytest.mark.parametrize("data", ["*.jsonl", "a, b.jsonl", "x #1.jsonl", "it's: {odd}.jsonl", "2024"])
@pytest.mark.parametrize("name", ["first", "2024"])
def test_init_writes_yaml_whatever_the_names(
    postgrad: Command, base: Path, tmp_path: Path, data: str, name: str
) -> None:
    place = tmp_path / ("some.jsonl" if data == "*.jsonl" else data)
    if place.suffix:
        write_jsonl(place, new_text(120, 3))
    else:
        write_jsonl(place / "x.jsonl", new_text(120, 3))
    os.symlink(base / "base", tmp_path / "007")
    assert postgrad("init", name, "--data", data, "--model", "007").code == 0
    done = postgrad("check", f"{name}.yaml", "--json")
    assert done.code == 0, done.err
    raw = yaml.safe_load((tmp_path / f"{name}.yaml").read_text())
    assert (raw["name"], raw["model"], raw["data"]["sources"][0]["path"]) == (name, "007", data)


def test_init_overwrites_only_when_told(postgrad: Command, base: Path, tmp_path: Path) -> None:
    words = ["init", "first", "--data", base / "new.jsonl", "--model", base / "base"]
    (tmp_path / "first.yaml").write_text("mine")
    done = postgrad(*words)
    assert done.code == 2
    assert "--force" in done.err
    assert (tmp_path / "first.yaml").read_text() == "mine"
    found = postgrad(*words, "--force", "--json").json
    assert found["documents"] == 150
    assert "mine" not in (tmp_path / "first.yaml").read_text()
    assert "retained" in (tmp_path / "first.yaml").read_text()  # without old text it says what is missing


def test_init_goes_on_at_the_rate_of_a_run(postgrad: Command, base: Path, runs: LineageRuns, tmp_path: Path) -> None:
    for name, model in (("run", runs.naive), ("foreign", base / "base")):
        assert postgrad("init", name, "--data", base / "new.jsonl", "--model", model).code == 0
    went_on, foreign = (yaml.safe_load((tmp_path / f"{name}.yaml").read_text()) for name in ("run", "foreign"))
    curve = [rate for _, rate in read_record(runs.naive).schedule_curve]
    assert went_on["schedule"]["peak"] == pytest.approx(max(curve), rel=0.05) != foreign["schedule"]["peak"]
    assert (foreign["schedule"]["peak"], foreign["schedule"]["floor"]) == (1e-3, 1e-4)  # of so small a model


def test_a_stage_is_trained_and_the_next_command_parses(
    postgrad: Command, stage_file: StageFile, tmp_path: Path
) -> None:
    file = stage_file()
    done = postgrad("train", file)
    assert done.code == 0, done.err
    assert done.next == f"generate {tmp_path / 'run'}"
    assert "old-heldout" in done.out
    assert "report.html" in done.out
    again = postgrad("train", file)
    assert again.code == 0
    assert "already complete" in again.out


def test_results_as_json(postgrad: Command, stage_file: StageFile, tmp_path: Path) -> None:
    file = stage_file()
    plan = postgrad("check", file, "--json", "seed=4").json
    assert plan["steps"] > 0
    assert {"memory", "seconds", "schedule_curve", "sources"} <= plan.keys()
    done = postgrad("train", file, "--json")
    record = done.json
    assert record["status"] == "finished"
    events = [json.loads(line) for line in done.err.splitlines()]
    assert {e["event"] for e in events} == {"step", "evaluation", "checkpoint"}
    assert [e["step"] for e in events if e["event"] == "step"] == list(range(1, record["plan"]["steps"] + 1))
    assert postgrad("report", tmp_path / "run", "--json").json == {"report": str(tmp_path / "run" / "report.html")}


def test_overrides_reach_the_run_and_its_command(postgrad: Command, stage_file: StageFile, tmp_path: Path) -> None:
    done = postgrad("check", stage_file(), "data.sources.old.share=50%", "data.sources.new.share=50%", "seed=3")
    assert done.code == 0
    assert shlex.split(done.next)[2:] == ["data.sources.old.share=50%", "data.sources.new.share=50%", "seed=3"]
    assert "50." in done.out


def test_rows_are_shown_as_the_model_sees_them(postgrad: Command, stage_file: StageFile, base: Path) -> None:
    done = postgrad("check", stage_file(), "--show", 2)
    assert done.code == 0, done.err
    assert shlex.split(done.next)[0] == "train"
    assert f"new: {base / 'new.jsonl'}: 150 rows of kind text (column text), all tokens are trained" in done.out
    shown = done.out[done.out.index("«trained» tokens are predicted") :]
    assert shown.count("  step 1, row ") == 4
    assert "new (next-token): the first 2 of" in shown and "old (next-token): the first 2 of" in shown
    found = postgrad("check", stage_file(), "--show", 1, "--json").json
    (new, old) = found["shown"]
    assert (new["source"], old["source"], len(new["rows"])) == ("new", "old", 1)
    (row,) = new["rows"]
    tokens = [token for segment in row["segments"] for token in segment["tokens"]]
    assert sum(token["state"] == "trained" for token in tokens) == row["trained"] > 0
    assert "shown" not in postgrad("check", stage_file(), "--json").json
    assert postgrad("check", stage_file(), "--show", -1).code == 2


def test_a_mistake_in_a_stage_is_bad_input(postgrad: Command, stage_file: StageFile) -> None:
    done = postgrad("train", stage_file(), "data.sequence_lenght=5")
    assert done.code == 2
    assert "data.sequence_lenght: there is no key" in done.err
    assert "did you mean 'sequence_length'?" in done.err


def test_a_broken_checkpoint_store_or_disk_is_a_failure(
    postgrad: Command, stage_file: StageFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    from postgrad.commands import train
    from postgrad.errors import DiskError

    def full(*_: object, **__: object) -> None:
        raise DiskError("the disk is full", where="here", hint="make room")

    monkeypatch.setattr(train, "run_stage", full)
    done = postgrad("train", stage_file())
    assert done.code == 1
    assert done.err.splitlines()[-2:] == ["error: here: the disk is full", "  hint:     make room"]


def test_a_stopped_run_says_how_to_go_on(
    postgrad: Command, stage_file: StageFile, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = stage_file()
    show = progress._PlainScreen.show

    def interrupted(self: progress._PlainScreen, event: RunEvent) -> None:
        show(self, event)
        if isinstance(event, StepCompleted) and event.report.step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(progress._PlainScreen, "show", interrupted)
    done = postgrad("train", file)
    assert done.code == 3
    assert "stopped and saved at step 3" in done.out or "stopped and saved at step 2" in done.out
    assert done.next == f"train {file}"
    monkeypatch.undo()


def test_ctrl_c_while_text_is_read_is_a_stop_too(
    postgrad: Command, stage_file: StageFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    from postgrad.commands import train

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "make_plan", interrupted)
    for verb in ("train", "check"):
        done = postgrad(verb, stage_file())
        assert done.code == 3
        assert "stopped" in done.err


def test_a_gate_that_fails_has_a_code_of_its_own(postgrad: Command, stage_file: StageFile, runs: LineageRuns) -> None:
    new = yaml.safe_load(stage_file().read_text())["data"]["sources"][0]
    file = stage_file(
        model=str(runs.first),
        max_forgetting="1%",
        tokens=3000,
        data={"sequence_length": 32, "sources": [{**new, "share": 1}]},
    )
    done = postgrad("train", file)
    assert done.code == 4
    assert "retention gate FAILED" in done.out
    remedies = re.findall(r"postgrad (?:keep|blend|restore) .*", done.out.partition("what helps:")[2])
    assert [command.split()[1] for command in remedies] == ["keep", "blend", "restore"]
    assert "--prompts" in remedies[2]  # nothing was replayed
    for command in [*remedies, done.next]:
        parse(command.removeprefix("postgrad"))
    assert postgrad("train", file).code == 4  # a finished run says it again
    assert postgrad("train", file, "--json").json["retention_gate"]["passed"] is False


# -- after a run ------------------------------------------------------------------------------------------------------


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """A model that this tool never made, in a folder whose name must be quoted."""
    make_llama(seed=3).save_pretrained(tmp_path / "my model")
    make_tokenizer().save_pretrained(tmp_path / "my model")
    return tmp_path / "my model"


def test_any_model_is_evaluated(postgrad: Command, foreign: Path, base: Path) -> None:
    done = postgrad("eval", foreign, base / "old-heldout.jsonl", base / "new-heldout.jsonl")
    assert done.code == 0, done.err
    assert shlex.split(done.next)[1] == str(foreign)
    found = postgrad("eval", foreign, base / "old-heldout.jsonl", "--json").json
    row = found["sets"]["old-heldout"]
    assert {"nats", "low", "high", "perplexity", "bits_per_byte", "tokens", "bytes", "documents"} == row.keys()
    assert row["documents"] == 30
    assert f"{row['nats']:.4f}" in done.out


def test_tasks_of_lm_eval_are_asked_beside_text(postgrad: Command, foreign: Path, base: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    tasks = tmp_path / "my tasks"
    tasks.mkdir()
    (tasks / "rows.jsonl").write_text("".join(json.dumps({"q": f"x{i} = ", "a": i % 2}) + "\n" for i in range(8)))
    task = {
        "task": "mine",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tasks / "rows.jsonl")}, "cache_dir": str(tmp_path / "hub")},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{q}}",
        "doc_to_choice": ["y1;", "one"],
        "doc_to_target": "a",
        "metric_list": [{"metric": "acc"}],
    }
    (tasks / "mine.yaml").write_text(json.dumps(task))
    words = ["eval", foreign, base / "old-heldout.jsonl", "--harness", "mine", "--harness-include", tasks]
    done = postgrad(*words)
    assert done.code == 0, done.err
    assert re.search(r"^  mine +0 +8 +acc +0\.\d{4}", done.out, re.MULTILINE)
    found = postgrad(*words, "--harness-limit", "4", "--json").json
    assert found["sets"].keys() == {"old-heldout"}
    assert [(r["task"], r["items"], r["metric"]) for r in found["harness"]["results"]] == [("mine", 4, "acc")]


def test_models_are_compared_on_text(postgrad: Command, foreign: Path, base: Path) -> None:
    done = postgrad("compare", base / "base", foreign, "--text", base / "old-heldout.jsonl")
    assert done.code == 0, done.err
    words = shlex.split(done.next)
    assert words[:2] == ["generate", str(base / "base")]
    assert str(foreign) in words
    found = postgrad("compare", base / "base", foreign, "--text", base / "old-heldout.jsonl", "--json").json
    assert [row["model"] for row in found["rows"]] == [str(base / "base"), str(foreign)]


def test_runs_are_compared_and_told_as_a_lineage(postgrad: Command, runs: LineageRuns, tmp_path: Path) -> None:
    done = postgrad("compare", runs.naive, runs.replay)
    assert done.code == 0, done.err
    words = shlex.split(done.next)
    assert words[:3] == ["compare", str(runs.naive), str(runs.replay)]
    assert postgrad(*words).code == 0
    assert (tmp_path / "compare.html").exists()
    assert {"arms", "paired"} <= postgrad("compare", runs.naive, runs.replay, "--json").json.keys()
    done = postgrad("lineage", runs.naive)
    assert done.code == 0, done.err
    words = shlex.split(done.next)
    assert postgrad(*words).code == 0
    assert (tmp_path / "lineage.html").exists()
    found = postgrad("lineage", runs.naive, "--json").json
    assert [len(row) for row in found["R"]] == [2, 2, 2]
    done = postgrad("report", runs.naive)
    assert done.code == 0
    assert str(runs.naive / "report.html") in done.out


def test_a_model_writes(postgrad: Command, foreign: Path, base: Path) -> None:
    words = ["generate", foreign, "--prompt", "one and", "--max-new-tokens", 6]
    first = postgrad(*words)
    assert first.code == 0, first.err
    assert first.out.startswith("one and")
    assert postgrad(*words).out == first.out  # the same seed
    outs = {postgrad(*words, "--seed", seed, "--json").json["continuations"][0]["text"] for seed in range(4)}
    assert len(outs) > 1
    # The likeliest tokens are those of plain transformers.
    model, tokenizer = AutoModelForCausalLM.from_pretrained(foreign), AutoTokenizer.from_pretrained(foreign)
    ids = tokenizer("one and", return_tensors="pt")["input_ids"]
    begun = ids.shape[1]
    for _ in range(6):
        following = model(input_ids=ids).logits[0, -1].argmax()
        if following == tokenizer.eos_token_id:
            break
        ids = torch.cat([ids, following[None, None]], 1)
    greedy = postgrad(*words, "--temperature", 0, "--json").json
    assert greedy["continuations"][0]["text"] == tokenizer.decode(ids[0, begun:])
    beside = postgrad(*words, "--compare-with", base / "base")
    assert beside.code == 0
    assert f"[{foreign}]" in beside.out
    assert f"[{base / 'base'}]" in beside.out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--max-new-tokens", 0], "tokens"),
        (["--temperature", -1], "temperature"),
        (["--temperature", "nan"], "temperature"),
        (["--top-p", 0], "top-p"),
        (["--top-p", 1.5], "top-p"),
    ],
)
def test_numbers_that_mean_nothing_are_bad_use(
    postgrad: Command, foreign: Path, words: list[object], said: str
) -> None:
    done = postgrad("generate", foreign, "--prompt", "one", *words)
    assert done.code == 2
    assert said in done.err


def test_a_text_that_is_too_long_for_the_model(postgrad: Command, foreign: Path) -> None:
    done = postgrad("generate", foreign, "--prompt", "one and " * 200)
    assert done.code == 2
    assert re.search(r"--prompt: the prompt has [\d,]+ tokens and the model 128 positions", done.err)


def test_nobody_to_ask_for_a_text(postgrad: Command, foreign: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open(os.devnull) as nothing:
        monkeypatch.setattr(sys, "stdin", nothing)
        done = postgrad("generate", foreign)
    assert done.code == 2
    assert "--prompt" in done.err


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_what_is_exported_is_a_plain_folder(postgrad: Command, runs: LineageRuns, tmp_path: Path, dtype: str) -> None:
    done = postgrad("export", runs.naive, tmp_path / "deep" / "out it goes", "--dtype", dtype)
    assert done.code == 0, done.err
    assert shlex.split(done.next) == ["generate", str(tmp_path / "deep" / "out it goes")]
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "deep" / "out it goes")
    wanted = torch.float32 if dtype == "auto" else torch.bfloat16
    ours = AutoModelForCausalLM.from_pretrained(runs.naive / "model", dtype=wanted)
    assert theirs.dtype == wanted
    ids = torch.arange(20)[None]
    assert torch.equal(theirs(input_ids=ids).logits, ours(input_ids=ids).logits)
    assert AutoTokenizer.from_pretrained(tmp_path / "deep" / "out it goes")("one")["input_ids"]
    names = {p.name for p in (tmp_path / "deep" / "out it goes").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names
    again = postgrad("export", runs.naive, tmp_path / "deep" / "out it goes")
    assert again.code == 2
    assert "already exists" in again.err
    assert not [p for p in (tmp_path / "deep").iterdir() if p.name.startswith(".")]


def test_an_export_to_a_dtype_that_does_not_exist(postgrad: Command, runs: LineageRuns, tmp_path: Path) -> None:
    done = postgrad("export", runs.naive, tmp_path / "out", "--dtype", "fp16")
    assert done.code == 2
    assert "float32, bfloat16 or float16" in done.err
    assert not (tmp_path / "out").exists()


def test_an_interrupted_export_leaves_nothing(
    postgrad: Command,
    runs: LineageRuns,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from postgrad.models import published_vocabulary

    def half(model: Any, tokenizer: Any, folder: Path, **_: Any) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(published_vocabulary, "save_pretrained", half)
    done = postgrad("export", runs.naive, tmp_path / "out")
    assert done.code == 3
    assert list(tmp_path.iterdir()) == []


def test_a_reader_that_goes_away_is_no_traceback(runs: LineageRuns, base: Path, cache: Path) -> None:
    """`postgrad eval ... | head -1` closes the pipe early."""
    environment = {**os.environ, "POSTGRAD_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    reader, writer = os.pipe()
    os.close(reader)
    words = [sys.executable, "-m", "postgrad", "report", str(runs.naive)]
    done = subprocess.run(words, stdout=writer, stderr=subprocess.PIPE, text=True, env=environment, check=False)
    os.close(writer)
    assert done.returncode == 0
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--shots", "5"], "--shots: --shots requires --chat"),
        (["--answer", "base"], "--answer: --answer requires --chat"),
        (["--diverse-share", "50%"], "--diverse-share: --diverse-share requires --chat"),
        (["--chat", "--shots", "5"], "--shots: --shots requires --prompts"),
    ],
)
def test_an_option_that_would_say_nothing_is_refused(
    postgrad: Command, base: Path, words: list[str], says: str
) -> None:
    done = postgrad("synthesize", base / "base", "--out", "replay.jsonl", *words)
    assert done.code == 2 and says in done.err


def test_no_time_is_foretold_before_anything_is_written(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "_COUNT_EVERY_SECONDS", 0)
    progress.show_token_progress([SynthesisProgress(0, 0, 100), SynthesisProgress(1, 50, 100)], as_json=False)
    first, second = capsys.readouterr().err.splitlines()
    assert first == "0 of 100 tokens, 0 a second" and second.endswith(" left")


def test_runs_are_listed_and_cleaned_after_a_yes(postgrad: Command, runs: LineageRuns, tmp_path: Path) -> None:
    shutil.copytree(runs.replay, tmp_path / "home" / "replay")
    assert postgrad("runs", tmp_path / "home").next.endswith("--clean")
    refused = postgrad("runs", tmp_path / "home", "--clean")
    assert refused.code == 2 and "--yes" in refused.err and (tmp_path / "home" / "replay" / "checkpoints").exists()
    done = postgrad("runs", tmp_path / "home", "--clean", "--yes", "--json")
    assert done.code == 0 and done.json["bytes"] > 0 and not (tmp_path / "home" / "replay" / "checkpoints").exists()
    assert postgrad("runs", tmp_path / "home").next.startswith("lineage")
    assert postgrad("runs", "nowhere").code == 2


def test_track_and_push_refuse_with_a_way_on(postgrad: Command, runs: LineageRuns) -> None:
    unnamed = postgrad("track", runs.replay)
    assert unnamed.code == 2 and "tensorboard, wandb, mlflow, trackio" in unnamed.err
    mistyped = postgrad("track", runs.replay, "--to", "tensorbord")
    assert mistyped.code == 2 and "did you mean 'tensorboard'" in mistyped.err
    assert postgrad("track", runs.replay, "--to", "tensorboard", "--project", "x").code == 2
    assert postgrad("push", runs.replay, "no-owner").code == 2
    offline = postgrad("push", runs.replay, "me/model")
    assert offline.code == 1 and "offline" in offline.err


def test_the_doctor_speaks_json_and_words(postgrad: Command) -> None:
    assert {"versions", "requirements", "cache"} <= postgrad("doctor", "--json").json.keys()
    assert postgrad("doctor").next == "demo"


def test_written_stages_name_a_schema_that_accepts_them(postgrad: Command, base: Path, tmp_path: Path) -> None:
    assert postgrad("init", "mine", "--data", base / "new.jsonl", "--model", base / "base").code == 0
    moved = tmp_path / "another"  # as on another machine
    moved.mkdir()
    for name in ("mine.yaml", ".postgrad"):
        (tmp_path / name).rename(moved / name)
    first, _, text = (moved / "mine.yaml").read_text().partition("\n")
    named = first.removeprefix("# yaml-language-server: $schema=")
    assert not Path(named).is_absolute() and ":" not in named
    schema = json.loads((moved / named).read_text())
    jsonschema.validate(yaml.safe_load(text), schema)
    assert "track" in schema["properties"]

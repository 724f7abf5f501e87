"""Continue a language model's training without forgetting, and measure both.

    import postgrad

    stage = postgrad.load_stage("stage.yaml")
    for event in postgrad.train(stage):
        print(event)
    scores = postgrad.evaluate("runs/stage", ["held-out.jsonl"])

Functions return frozen, typed results and print nothing. Those that take long are iterators of events whose last item is the
result; `finish(events, ResultType)` runs one to its end. Importing the package imports no torch: names load on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from postgrad.version import __version__ as __version__

if TYPE_CHECKING:
    from postgrad.commands.advise import Advice as Advice
    from postgrad.commands.advise import advise as advise
    from postgrad.commands.blend import AverageOptions as AverageOptions
    from postgrad.commands.blend import Blend as Blend
    from postgrad.commands.blend import MergeOptions as MergeOptions
    from postgrad.commands.blend import blend as blend
    from postgrad.commands.check import StageCheck as StageCheck
    from postgrad.commands.check import check_stage as check_stage
    from postgrad.commands.check import dry_run as dry_run
    from postgrad.commands.compare import AbilityComparison as AbilityComparison
    from postgrad.commands.compare import ModelComparison as ModelComparison
    from postgrad.commands.compare import RunComparison as RunComparison
    from postgrad.commands.compare import TaskComparison as TaskComparison
    from postgrad.commands.compare import compare_abilities as compare_abilities
    from postgrad.commands.compare import compare_models as compare_models
    from postgrad.commands.compare import compare_runs as compare_runs
    from postgrad.commands.compare import compare_tasks as compare_tasks
    from postgrad.commands.doctor import MachineReport as MachineReport
    from postgrad.commands.doctor import check_machine as check_machine
    from postgrad.commands.evaluate import TextEvaluation as TextEvaluation
    from postgrad.commands.evaluate import evaluate as evaluate
    from postgrad.commands.evaluate_abilities import AbilityEvaluation as AbilityEvaluation
    from postgrad.commands.evaluate_abilities import evaluate_abilities as evaluate_abilities
    from postgrad.commands.evaluate_harness import HarnessEvaluation as HarnessEvaluation
    from postgrad.commands.evaluate_harness import evaluate_harness as evaluate_harness
    from postgrad.commands.evaluate_tasks import TaskEvaluation as TaskEvaluation
    from postgrad.commands.evaluate_tasks import evaluate_tasks as evaluate_tasks
    from postgrad.commands.export import ExportedModel as ExportedModel
    from postgrad.commands.export import export_model as export_model
    from postgrad.commands.generate import Generation as Generation
    from postgrad.commands.generate import generate as generate
    from postgrad.commands.grow import GrownModel as GrownModel
    from postgrad.commands.grow import grow_vocabulary as grow_vocabulary
    from postgrad.commands.importance import MeasuredImportance as MeasuredImportance
    from postgrad.commands.importance import measure_importance as measure_importance
    from postgrad.commands.keep import KeepChoice as KeepChoice
    from postgrad.commands.keep import keep as keep
    from postgrad.commands.lineage import trace_lineage as trace_lineage
    from postgrad.commands.list_runs import RunList as RunList
    from postgrad.commands.list_runs import clean_runs as clean_runs
    from postgrad.commands.list_runs import list_runs as list_runs
    from postgrad.commands.load_model import Classifier as Classifier
    from postgrad.commands.load_model import TrainedModel as TrainedModel
    from postgrad.commands.load_model import load_classifier as load_classifier
    from postgrad.commands.load_model import load_model as load_model
    from postgrad.commands.pages import write_page as write_page
    from postgrad.commands.probe import LayerProbe as LayerProbe
    from postgrad.commands.probe import probe_layers as probe_layers
    from postgrad.commands.push import PushedModel as PushedModel
    from postgrad.commands.push import push_model as push_model
    from postgrad.commands.restore import RestoredRun as RestoredRun
    from postgrad.commands.restore import restore as restore
    from postgrad.commands.results import finish as finish
    from postgrad.commands.shift import MeasuredShift as MeasuredShift
    from postgrad.commands.shift import measure_shift as measure_shift
    from postgrad.commands.synthesize import SynthesisRequest as SynthesisRequest
    from postgrad.commands.synthesize import SynthesizedText as SynthesizedText
    from postgrad.commands.synthesize import synthesize as synthesize
    from postgrad.commands.synthesize_chat import Rehearsal as Rehearsal
    from postgrad.commands.synthesize_chat import synthesize_chat as synthesize_chat
    from postgrad.commands.synthesize_from import Rewriting as Rewriting
    from postgrad.commands.synthesize_from import synthesize_from as synthesize_from
    from postgrad.commands.track import TrackingReport as TrackingReport
    from postgrad.commands.track import track_run as track_run
    from postgrad.commands.train import load_stage as load_stage
    from postgrad.commands.train import plan_stage as plan_stage
    from postgrad.commands.train import train as train
    from postgrad.config.stage import Stage as Stage
    from postgrad.errors import PostgradError as PostgradError
    from postgrad.lineage.record import Record as Record
    from postgrad.lineage.record import read_record as read_record
    from postgrad.lineage.tree import Lineage as Lineage
    from postgrad.plan.plan import Plan as Plan
    from postgrad.run.events import CheckpointSaved as CheckpointSaved
    from postgrad.run.events import EvaluationCompleted as EvaluationCompleted
    from postgrad.run.events import InfoMessage as InfoMessage
    from postgrad.run.events import PhaseStarted as PhaseStarted
    from postgrad.run.events import RunEvent as RunEvent
    from postgrad.run.events import RunFinished as RunFinished
    from postgrad.run.events import RunStarted as RunStarted
    from postgrad.run.events import RunStopped as RunStopped
    from postgrad.run.events import StepCompleted as StepCompleted
    from postgrad.run.events import StepSkipped as StepSkipped
    from postgrad.run.events import WarningMessage as WarningMessage
    from postgrad.studies.study_results import StudyOutcome as StudyOutcome
    from postgrad.studies.study_results import run_study as run_study

_NAMES = {
    "commands.advise": ("Advice", "advise"),
    "commands.blend": ("AverageOptions", "Blend", "MergeOptions", "blend"),
    "commands.check": ("StageCheck", "check_stage", "dry_run"),
    "commands.compare": (
        "AbilityComparison", "ModelComparison", "RunComparison", "TaskComparison", "compare_abilities", "compare_models",
        "compare_runs", "compare_tasks",
    ),
    "commands.doctor": ("MachineReport", "check_machine"),
    "commands.evaluate": ("TextEvaluation", "evaluate"),
    "commands.evaluate_abilities": ("AbilityEvaluation", "evaluate_abilities"),
    "commands.evaluate_harness": ("HarnessEvaluation", "evaluate_harness"),
    "commands.evaluate_tasks": ("TaskEvaluation", "evaluate_tasks"),
    "commands.export": ("ExportedModel", "export_model"),
    "commands.generate": ("Generation", "generate"),
    "commands.grow": ("GrownModel", "grow_vocabulary"),
    "commands.importance": ("MeasuredImportance", "measure_importance"),
    "commands.keep": ("KeepChoice", "keep"),
    "commands.lineage": ("trace_lineage",),
    "commands.list_runs": ("RunList", "clean_runs", "list_runs"),
    "commands.load_model": ("Classifier", "TrainedModel", "load_classifier", "load_model"),
    "commands.pages": ("write_page",),
    "commands.probe": ("LayerProbe", "probe_layers"),
    "commands.push": ("PushedModel", "push_model"),
    "commands.restore": ("RestoredRun", "restore"),
    "commands.results": ("finish",),
    "commands.shift": ("MeasuredShift", "measure_shift"),
    "commands.synthesize": ("SynthesisRequest", "SynthesizedText", "synthesize"),
    "commands.synthesize_chat": ("Rehearsal", "synthesize_chat"),
    "commands.synthesize_from": ("Rewriting", "synthesize_from"),
    "commands.track": ("TrackingReport", "track_run"),
    "commands.train": ("load_stage", "plan_stage", "train"),
    "config.stage": ("Stage",),
    "errors": ("PostgradError",),
    "lineage.record": ("Record", "read_record"),
    "lineage.tree": ("Lineage",),
    "plan.plan": ("Plan",),
    "run.events": (
        "CheckpointSaved", "EvaluationCompleted", "InfoMessage", "PhaseStarted", "RunEvent", "RunFinished", "RunStarted",
        "RunStopped", "StepCompleted", "StepSkipped", "WarningMessage",
    ),
    "studies.study_results": ("StudyOutcome", "run_study"),
}  # fmt: skip
"""The public names by module, for lazy loading; the same as above, where editors and type checkers read them."""
_MODULES = {name: module for module, names in _NAMES.items() for name in names}

__all__ = sorted([*_MODULES, "__version__"])  # pyrefly: ignore


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module 'postgrad' has no attribute {name!r}")
    value = getattr(import_module(f"postgrad.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return list(__all__)

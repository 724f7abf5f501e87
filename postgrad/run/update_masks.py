"""The update mask of a stage: which weight entries an optimizer step changes. Each kind of sparse update has its function."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from postgrad.config.quantities import load_function
from postgrad.config.sparse_updates import MagnitudeUpdate, MomentumUpdate, SourceShieldedUpdate
from postgrad.config.tunings import LoraTuning
from postgrad.errors import DataError, StageError
from postgrad.optim.migu import MiguMask
from postgrad.optim.mofo import MofoMask
from postgrad.optim.optimizer import Weights
from postgrad.optim.sparse_update import FullMask, UpdateMask
from postgrad.optim.ssu import SsuMask
from postgrad.penalties.importance_file import ImportanceFile, locate_importance_file
from postgrad.plan.plan import Plan
from postgrad.storage.atomic import sha256
from postgrad.tuning.open_model import start_fingerprint
from postgrad.tuning.targets import block_layers, is_transposed

if TYPE_CHECKING:
    from postgrad.run.tuned_model import TunedModel

_SSU_WHERE = "optimizer.sparse_update.importance"


def make_update_mask(plan: Plan, tuned_model: TunedModel, weights: Weights) -> UpdateMask:
    """The stage's update mask. Raises `StageError` where the update is impossible."""
    spec = plan.stage.optimizer.sparse_update
    return FullMask() if spec is None else spec.load()(spec, plan, tuned_model, weights)


def make_mofo(spec: MomentumUpdate, plan: Plan, tuned_model: TunedModel, weights: Weights) -> MofoMask:
    """The entries of each matrix with the largest momentum."""
    return MofoMask(spec.share, weights.masters)


def make_migu(spec: MagnitudeUpdate, plan: Plan, tuned_model: TunedModel, weights: Weights) -> MiguMask:
    """The rows of each linear layer with the largest outputs."""
    tuning = plan.stage.tuning
    if isinstance(tuning, LoraTuning) and tuning.variant == "dora":
        raise StageError(
            "the outputs of dora's parts include the base weights, so they do not measure the step's text",
            where="optimizer.sparse_update",
            expected="another variant of `lora`, or kind: mofo",
        )
    mask = MiguMask(spec.share, tuned_model.model, weights.entries)
    if not mask.layers:
        raise StageError(
            f"`{tuning.kind}` trains no linear layer of the model's blocks",
            where="optimizer.sparse_update",
            expected="a tuning that trains some, such as full, blocks or lora; or kind: mofo",
        )
    return mask


def update_fingerprints(plan: Plan) -> dict[str, str]:
    """Content hashes of the files of a sparse update, which must not change before a resume."""
    spec = plan.stage.optimizer.sparse_update
    if spec is None or spec.fingerprint_function is None:
        return {}
    return load_function(spec.fingerprint_function)(spec, plan)


def ssu_fingerprints(spec: SourceShieldedUpdate, plan: Plan) -> dict[str, str]:
    """The content hash of the importance file."""
    return {"importance": sha256(_locate_importance(spec, plan))}


def make_ssu(spec: SourceShieldedUpdate, plan: Plan, tuned_model: TunedModel, weights: Weights) -> SsuMask:
    """The columns of each linear layer that matter least for old text."""
    file = ImportanceFile(_locate_importance(spec, plan))
    start = plan.model.start
    file.check_model(start.name, start_fingerprint(start), _SSU_WHERE)
    layers = {
        id(layer.weight): int(not is_transposed(layer)) for layer in block_layers(tuned_model.model.pretrained).values()
    }
    columns = []
    for weight in weights.entries:
        name = tuned_model.base_names.get(weight.name)
        if name is None or id(weight.parameter) not in layers or name not in file.names:
            continue
        if file.shape(name) != tuple(weight.master.shape):
            raise DataError(
                f"the importance of {name} has shape {file.shape(name)}, and the weight {tuple(weight.master.shape)}",
                where=_SSU_WHERE,
                expected="importance of the start model",
            )
        dim = layers[id(weight.parameter)]
        columns.append((weight.master, file[name].float().sum(1 - dim), dim))
    if not columns:
        raise StageError(
            f"`{plan.stage.tuning.kind}` trains no linear layer of the model's blocks that {file.path.name} covers",
            where="optimizer.sparse_update",
            expected="a tuning that trains weights of the start model: full, blocks; or kind: mofo",
        )
    return SsuMask(spec.share, columns, weights.masters)


def _locate_importance(spec: SourceShieldedUpdate, plan: Plan) -> Path:
    return locate_importance_file(spec.importance, plan.root, _SSU_WHERE)

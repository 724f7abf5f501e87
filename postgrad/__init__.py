"""Continue a language model's training without it forgetting what it knows, and prove both with numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from postgrad.commands.classifier import Classifier

from postgrad.version import __version__ as __version__


def load(folder: str, base: str | None = None) -> Classifier:
    """A trained classifier: `postgrad.load(folder).predict(["A text."])`.

    `folder` is a run, one of its checkpoints, a model's or a tuning's folder, or one that `export` made; `base` is the model
    that a tuning's folder sits on, when it has moved. Raises `ModelError` for a model that is no classifier.
    """
    from postgrad.commands.classifier import load as load_classifier  # torch only when it is needed

    return load_classifier(str(folder), base)

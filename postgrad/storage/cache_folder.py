"""The cache folder: token stores, features and scores that are shared between runs."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """$POSTGRAD_CACHE, or postgrad/ in $XDG_CACHE_HOME or ~/.cache."""
    named = os.environ.get("POSTGRAD_CACHE")
    return Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "postgrad"

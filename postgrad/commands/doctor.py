"""Check this machine and installation: versions, device, memory, precision, compiler, disk, and what each verb lacks."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from postgrad.commands.results import Result
from postgrad.errors import first_line
from postgrad.foreign_text import mask_secrets, plain_text
from postgrad.hardware.memory import format_bytes
from postgrad.storage.cache_folder import cache_folder
from postgrad.version import __version__

_TRAIN = (
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "peft",
    "sklearn",
    "scipy",
    "regex",
    "jinja2",
    "pyarrow",
)
_NEEDS: Mapping[str, tuple[tuple[str, ...], str]] = {
    "train, eval, generate and all others": (_TRAIN, "train"),
    "report, lineage of scored runs, runs": ((), ""),
    "push, models of the Hub": (("huggingface_hub",), "train"),
    "data sources with hub:": (("datasets",), "hub"),
    "eval --harness": (("lm_eval",), "harness"),
    "export NAME.gguf": (("gguf",), "gguf"),
    "tuning with quantization:": (("bitsandbytes",), "quantization"),
    "track: tensorboard": (("tensorboard",), "tensorboard"),
    "track: wandb": (("wandb",), "wandb"),
    "track: mlflow": (("mlflow",), "mlflow"),
    "track: trackio": (("trackio",), "trackio"),
}
"""What is needed for what: importable packages, and the extra that installs them."""
_SHOWN = (
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "peft",
    "numpy",
    "pydantic",
    "huggingface_hub",
    "datasets",
)


@dataclass(frozen=True)
class Requirement:
    """Something that one can do, and what it lacks."""

    purpose: str
    missing: tuple[str, ...]
    hint: str
    """The command that installs it; empty when nothing is missing."""


@dataclass(frozen=True)
class MachineReport(Result):
    """This machine and installation."""

    versions: Mapping[str, str]
    system: str
    requirements: tuple[Requirement, ...]
    cores: int
    cache: Path
    cache_free_bytes: int
    folder_free_bytes: int
    """On the disk of the working directory."""
    device: str | None = None
    """None without torch."""
    memory_bytes: int | None = None
    """Free memory of the device; None: unknown."""
    bf16_speedup: float | None = None
    """Speed of a bf16 matrix product, fp32 = 1, measured."""
    uses_bf16: bool | None = None
    """Whether `compute.dtype: auto` takes bf16 for products of this size."""
    can_compile: bool | None = None
    hub: str | None = None
    """What the Hub says to this machine; None: it was not asked."""
    problems: tuple[str, ...] = ()

    def text(self) -> str:
        """In lines."""
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        lines = [f"versions:  {versions}", f"system:    {self.system}"]
        if self.device:
            memory = f"{format_bytes(self.memory_bytes)} free" if self.memory_bytes else "memory unknown"
            lines.append(f"device:    {self.device}, {self.cores} core{'s' * (self.cores > 1)}, {memory}")
        if self.bf16_speedup is not None:
            verdict = "used" if self.uses_bf16 else "not used"
            lines.append(f"bf16:      {self.bf16_speedup:.1f} times as fast as fp32 ({verdict})")
        if self.can_compile is not None:
            lines.append("compiler:  " + ("yes" if self.can_compile else "none: compute.compile has no effect"))
        lines.append(f"disk:      {format_bytes(self.folder_free_bytes)} free here")
        lines.append(f"cache:     {self.cache}, {format_bytes(self.cache_free_bytes)} free")
        lines.append(f"Hub:       {self.hub or 'not asked; --hub asks it'}")
        for requirement in self.requirements:
            lacks = f"lacks {', '.join(requirement.missing)}   {requirement.hint}" if requirement.missing else "ready"
            lines.append(f"  {requirement.purpose:<38} {lacks}")
        return "\n".join([*lines, *(f"problem: {problem}" for problem in self.problems)])


def check_machine(*, hub: bool = False) -> MachineReport:
    """Check this machine; nothing is written. `hub`: also ask the Hugging Face Hub who this is, the only use of the network."""
    has_torch = _is_installed("torch")
    facts = _measure_device() if has_torch else {}
    cache, problems = cache_folder(), []
    if not os.access(_existing(cache), os.W_OK):
        problems.append(f"the cache {cache} is not writable; set POSTGRAD_CACHE to another folder")
    return MachineReport(
        versions={"postgrad": __version__, "Python": platform.python_version(), **_versions()},
        system=platform.platform(),
        requirements=tuple(_check(purpose, *needs) for purpose, needs in _NEEDS.items()),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        cache=cache,
        cache_free_bytes=shutil.disk_usage(_existing(cache)).free,
        folder_free_bytes=shutil.disk_usage(Path.cwd()).free,
        hub=_ask_hub() if hub else None,
        problems=tuple(problems),
        **facts,  # type: ignore[bad-argument-type]
    )


def _measure_device() -> dict[str, str | int | float | bool | None]:
    import torch

    from postgrad.hardware import machine
    from postgrad.hardware.execution import MIN_BF16_SPEEDUP

    device, shape = machine.default_device(), (512, 512, 2048)
    speeds = [machine.matmul_speed(dtype, shape, device) for dtype in (torch.bfloat16, torch.float32)]
    speedup = speeds[0] / speeds[1]
    return {
        "device": machine.processor_name(),
        "memory_bytes": machine.available_memory(),
        "bf16_speedup": round(speedup, 2),
        "uses_bf16": speedup >= MIN_BF16_SPEEDUP,
        "can_compile": machine.can_compile(device),
    }


def _is_installed(package: str) -> bool:
    spec = find_spec(package)
    return spec is not None and spec.origin is not None


def _check(purpose: str, packages: tuple[str, ...], extra: str) -> Requirement:
    missing = tuple(package for package in packages if not _is_installed(package))
    return Requirement(purpose, missing, f"pip install 'postgrad[{extra}]'" if missing else "")


def _versions() -> dict[str, str]:
    return {name: metadata.version(name) for name in _SHOWN if _is_installed(name)}


def _existing(path: Path) -> Path:
    return next(each for each in (path.absolute(), *path.absolute().parents) if each.exists())


def _ask_hub() -> str:
    if not _is_installed("huggingface_hub"):
        return "huggingface_hub is not installed"
    from huggingface_hub import HfApi, constants, get_token

    if constants.is_offline_mode():
        return "off: HF_HUB_OFFLINE is set"
    try:
        if get_token() is None:
            next(iter(HfApi().list_models(limit=1)), None)
            return f"{constants.ENDPOINT} answers; not logged in (hf auth login), so nothing can be pushed"
        name = HfApi().whoami()["name"]
        return f"{constants.ENDPOINT} answers; logged in as {plain_text(name, 60)}"
    except Exception as error:
        return f"{constants.ENDPOINT} does not answer: {mask_secrets(plain_text(first_line(error), 200))}"

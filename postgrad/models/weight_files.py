"""Safetensors files that are never in memory as a whole: tensors mapped when they are asked for, and written one by one."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType

import torch
from safetensors import safe_open
from torch import Tensor

_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
}  # fmt: skip
_ALIGNMENT = 8


class StoredTensors(Mapping[str, Tensor]):
    """The tensors of safetensors files, each mapped when it is asked for: only the rows that are used are read."""

    def __init__(self, paths: Iterable[Path]) -> None:
        self._paths: dict[str, Path] = {}
        for path in paths:
            with safe_open(path, "pt") as file:
                self._paths |= dict.fromkeys(file.keys(), path)

    def __getitem__(self, name: str) -> Tensor:
        with safe_open(self._paths[name], "pt") as file:
            return file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._paths)

    def __len__(self) -> int:
        return len(self._paths)


class SafetensorsWriter:
    """Writes one safetensors file, a tensor after another."""

    def __init__(self, path: Path, like: Mapping[str, Tensor]) -> None:
        """`like`: tensors of the dtypes and shapes to write, on any device (`meta`)."""
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        self._begins: dict[str, int] = {}
        end = 0
        # Wider numbers first: every tensor begins at a multiple of the size of its numbers.
        for name in sorted(like, key=lambda name: (-like[name].element_size(), name)):
            begin, end = end, end + like[name].numel() * like[name].element_size()
            self._begins[name] = begin
            offsets, shape = [begin, end], list(like[name].shape)
            header[name] = {"dtype": _DTYPES[like[name].dtype], "shape": shape, "data_offsets": offsets}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % _ALIGNMENT)
        self._like, self._missing, self._data_begin = like, set(like), 8 + len(text)
        self._file = path.open("wb")
        self._file.write(struct.pack("<Q", len(text)) + text)

    def write(self, name: str, tensor: Tensor) -> None:
        """Write a tensor."""
        like = self._like[name]
        assert (tensor.dtype, tensor.shape) == (like.dtype, like.shape), f"{name} has another dtype or shape"
        self._missing.remove(name)
        self._file.seek(self._data_begin + self._begins[name])
        self._file.write(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: BaseException | TracebackType | None) -> None:
        self._file.close()
        assert kind or not self._missing, f"{sorted(self._missing)} were not written"

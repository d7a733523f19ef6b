"""Named tensors that are read one at a time, and a safetensors file that is written so.

The format: 8 bytes with the header's length, a JSON header, the tensors' bytes.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from graftwork.operators.errors import Diverged, IncompatibleError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_CODES = {dtype: code for code, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Spec:
    """Kind of a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Size of its content."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class Reader(Protocol):
    """Named tensors."""

    @property
    def specs(self) -> Mapping[str, Spec]:
        """Kinds of all of them, by name."""
        ...

    def read(self, name: str) -> Tensor:
        """A tensor on the CPU, not to be changed."""
        ...


class InMemory:
    """Tensors that are in memory already."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        self._state = state
        self.specs = {name: Spec(t.dtype, tuple(t.shape)) for name, t in state.items()}

    def read(self, name: str) -> Tensor:
        return self._state[name].detach().cpu()


class TensorFile:
    """A safetensors file, mapped into memory: what is not read takes none.

    Raises:
        IncompatibleError: a tensor of a type that is not merged, such as complex numbers.
        ValueError: the file is shorter than its header says.
    """

    def __init__(self, path: str | Path) -> None:
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
            total = file.seek(0, os.SEEK_END)
        header.pop("__metadata__", None)
        strange = {n: e["dtype"] for n, e in header.items() if e["dtype"] not in DTYPES}
        if strange:
            name, dtype = min(strange.items())
            raise IncompatibleError(
                f"{path}: {name} is of type {dtype}, which cannot be merged; "
                f"store it as one of {', '.join(DTYPES)}"
            )
        self.specs = {
            name: Spec(DTYPES[entry["dtype"]], tuple(entry["shape"]))
            for name, entry in header.items()
        }
        self._starts = {name: 8 + size + entry["data_offsets"][0] for name, entry in header.items()}
        if any(self._starts[name] + spec.bytes > total for name, spec in self.specs.items()):
            raise ValueError(f"{path} is shorter than its header says")
        self._whole = torch.from_file(str(path), shared=False, size=total, dtype=torch.uint8)

    def read(self, name: str) -> Tensor:
        spec, start = self.specs[name], self._starts[name]
        content = self._whole[start : start + spec.bytes]
        if start % spec.dtype.itemsize:
            content = content.clone()
        return content.view(spec.dtype).view(spec.shape)


class Finite:
    """Tensors of which none holds NaN or infinity: some merges would pass them over.

    Args:
        reader: the tensors.
        what: whose they are.

    Raises:
        Diverged: on reading one that does.
    """

    def __init__(self, reader: Reader, what: str) -> None:
        self._reader, self._what, self.specs = reader, what, reader.specs
        self._seen: set[str] = set()  # merges that look at the whole read a tensor several times

    def read(self, name: str) -> Tensor:
        tensor = self._reader.read(name)
        if name not in self._seen and not is_finite(tensor):
            raise Diverged(f"{self._what}: {name} is NaN or infinite; lower its learning rate")
        self._seen.add(name)
        return tensor


def is_finite(tensor: Tensor) -> bool:
    """Tells whether a tensor of any type holds neither NaN nor infinity."""
    if not tensor.is_floating_point():
        return True
    # Types of one byte cannot be asked.
    return bool(torch.isfinite(tensor.float() if tensor.itemsize == 1 else tensor).all())


class Mean:
    """Means of sums that several files hold, with the number of rows of each sum."""

    COUNT = "__count__"
    """Name of the number of rows, int64 []."""

    def __init__(self, parts: Sequence[Reader]) -> None:
        self._parts = parts
        self._count = sum(int(part.read(self.COUNT)) for part in parts)
        self.specs = {n: s for n, s in parts[0].specs.items() if n != self.COUNT}

    def read(self, name: str) -> Tensor:
        total = self._parts[0].read(name).to(torch.float64, copy=True)
        for part in self._parts[1:]:
            total += part.read(name)
        return (total / max(1, self._count)).to(self.specs[name].dtype)


def order(specs: Mapping[str, Spec]) -> list[str]:
    """Names in the order of a file: widest types first, so that all are aligned."""
    return sorted(specs, key=lambda name: (-specs[name].dtype.itemsize, name))


def to_bytes(specs: Mapping[str, Spec], tensors: Iterable[tuple[str, Tensor]]) -> bytearray:
    """A safetensors file, in memory, as the tensors come; none of its content is held twice.

    Args:
        specs: of all tensors.
        tensors: exactly these, in the order of `order(specs)`.
    """
    content = bytearray(len(_header(specs)) + sum(spec.bytes for spec in specs.values()))
    view, at = memoryview(content), 0
    for piece in _pieces(specs, tensors):
        view[at : at + len(piece)] = piece
        at += len(piece)
    return content


def _header(specs: Mapping[str, Spec]) -> bytes:
    header, start = {}, 0
    for name in order(specs):
        spec = specs[name]
        header[name] = {
            "dtype": _CODES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [start, start + spec.bytes],
        }
        start += spec.bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _pieces(
    specs: Mapping[str, Spec], tensors: Iterable[tuple[str, Tensor]]
) -> Iterator[memoryview]:
    yield memoryview(_header(specs))
    for expected, (name, tensor) in zip(order(specs), tensors, strict=True):
        found = Spec(tensor.dtype, tuple(tensor.shape))
        assert (name, found) == (expected, specs[expected]), (name, found, expected)
        if tensor.numel():
            yield tensor.contiguous().view(-1).view(torch.uint8).numpy().data

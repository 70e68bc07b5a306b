"""The weights of a model as far as the headers of its safetensors files tell. Never imports torch.

A file is the length of its header (8 bytes, little-endian), the header (JSON: dtype, shape and place of every
tensor) and the tensors' bytes.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from pdserve.contract.errors import ModelUnsupported, NotFound

INDEX = "model.safetensors.index.json"
"""Names the files of a model that has several."""

_LENGTH_BYTES = 8
_FLOAT_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1}  # names of safetensors
_DTYPE_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}  # names of torch


class _Tensor(NamedTuple):
    dtype: str
    num_bytes: int

    def bytes_as(self, dtype: str) -> int:
        """Once its numbers are `dtype`; what is no floating-point number stays, and so do all for ``""``."""
        if self.dtype not in _FLOAT_BYTES or dtype not in _DTYPE_BYTES:
            return self.num_bytes
        return self.num_bytes // _FLOAT_BYTES[self.dtype] * _DTYPE_BYTES[dtype]


@dataclass(frozen=True, slots=True)
class _Header:
    tensors: list[_Tensor]
    file_bytes: int
    """How large the whole file is."""


def weight_files(folder: Path) -> list[Path]:
    """Those that transformers loads, whether they are there or not: a folder may hold the same weights in
    another form as well. Raises ValueError when the index is damaged."""
    single, index = folder / "model.safetensors", folder / INDEX
    if single.is_file():
        return [single]
    if not index.is_file():
        return sorted(folder.glob("*.safetensors"))
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        return [folder / name for name in sorted(names)]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{INDEX} has no weight_map") from error


def require_whole_weights(model: str, folder: Path) -> None:
    """Raises ModelUnsupported when there are no safetensors, and NotFound when a file is missing, cut short
    or damaged."""
    try:
        files = weight_files(folder)
    except ValueError as error:
        raise NotFound(f"model {model!r}: {INDEX} is damaged ({error}): fetch the model again") from error
    if not files:
        raise _no_safetensors(model, folder)
    for file in files:
        _require_whole(model, file)


def loaded_bytes(folder: Path, dtype: str) -> int:
    """Of the weights in memory, their numbers being `dtype` (a name of torch's; empty: as they are)."""
    return sum(
        tensor.bytes_as(dtype) for file in weight_files(folder) for tensor in _read_header(file).tensors
    )


def _require_whole(model: str, file: Path) -> None:
    if not file.is_file():
        raise NotFound(f"model {model!r} lacks {file.name}, which {INDEX} names: fetch the model again")
    try:
        told_bytes = _read_header(file).file_bytes
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise NotFound(f"model {model!r}: {file.name} is damaged ({error}): fetch it again") from error
    if file.stat().st_size != told_bytes:
        raise NotFound(
            f"model {model!r}: {file.name} is cut short or damaged, it has {file.stat().st_size} bytes "
            f"instead of {told_bytes}: fetch it again"
        )


def _read_header(path: Path) -> _Header:
    """Raises ValueError, KeyError, TypeError or AttributeError when the file does not begin with one."""
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        if header_bytes > path.stat().st_size:
            raise ValueError(f"its header would have {header_bytes} bytes")
        content: dict[str, Any] = json.loads(file.read(header_bytes))
    entries = [entry for name, entry in content.items() if name != "__metadata__"]
    places = [entry["data_offsets"] for entry in entries]
    tensors = [_Tensor(e["dtype"], end - start) for e, (start, end) in zip(entries, places, strict=True)]
    return _Header(tensors, _LENGTH_BYTES + header_bytes + max((end for _, end in places), default=0))


def _no_safetensors(model: str, folder: Path) -> ModelUnsupported:
    pickles = [path.name for path in (*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth"))]
    found = f"only pickled weights ({', '.join(sorted(pickles))})" if pickles else "no weights"
    return ModelUnsupported(
        f"model {model!r} has {found}: pdserve loads safetensors only; convert it with "
        "save_pretrained(..., safe_serialization=True)"
    )

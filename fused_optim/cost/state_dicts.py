"""Reads the shapes and dtypes of the params in checkpoint files, as tensors on the meta device. No data is read."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..engine.table import DTYPE_CODES, real_dtype

WRAPPERS = "state_dict", "model_state_dict", "model", "module", "params"  # keys that training loops save models under
STATISTICS = "running_mean", "running_var"  # buffers of torch's batch norms

# The dtypes that optimizers take, by their names in safetensors.
SAFETENSORS = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F64": torch.float64,
    "C64": torch.complex64,
}

Found = tuple[dict[str, Tensor], list[str]]  # params by name; notes on where they were and what was left out


def read(paths: Sequence[Path]) -> Found:
    """The params in checkpoint files that together hold one model, such as its shards.

    Files that end in .safetensors are read with the package safetensors. All others are read with
    torch.load(weights_only=True) and mapped into memory if they are zip archives. Tensors that share all their elements
    count as one param. Tensors that no optimizer here can step and the running statistics of batch norms are left out.

    Raises:
        ValueError: a file is missing, is not a checkpoint or has several dicts of tensors, or safetensors or numpy is
            not installed. The message says what was found.
    """
    params: dict[str, Tensor] = {}
    notes: list[str] = []
    for path in paths:
        if not path.is_file():
            raise ValueError(
                f"{path} must be a checkpoint file, but {'is a folder' if path.is_dir() else 'is missing'}"
            )
        found, more = read_safetensors(path) if path.suffix == ".safetensors" else read_torch(path)
        if twice := params.keys() & found.keys():
            raise ValueError(
                f"the files must be parts of one model, but {min(twice)} is in more than one; name one file"
            )
        params |= found
        notes += more
    if not params:
        raise ValueError(f"{', '.join(map(str, paths))}: found no param for an optimizer. {' '.join(notes)}".rstrip())
    return params, notes


def read_safetensors(path: Path) -> Found:
    try:
        import numpy  # noqa: F401  (safe_open imports it)
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise ValueError(
            f"{path} is read with the packages safetensors and numpy, but {error.name} is not installed; "
            "pip install safetensors numpy"
        ) from None
    metas: dict[str, Tensor] = {}
    other: dict[str, str] = {}
    try:
        with safe_open(path, framework="numpy") as file:  # "pt" reserves memory for all data
            for name in file.keys():  # noqa: SIM118  (the file is no mapping)
                entry = file.get_slice(name)
                dtype = entry.get_dtype()
                if dtype in SAFETENSORS:
                    metas[name] = torch.empty(entry.get_shape(), dtype=SAFETENSORS[dtype], device="meta")
                else:
                    other[name] = dtype
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} must be a safetensors file, but cannot be read as one: {error}") from None
    return selected(path, metas, other)


def read_torch(path: Path) -> Found:
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # on a damaged or foreign file the unpickler can raise any exception
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ValueError(
            f"{path} must hold a state_dict, saved by torch.save, but torch.load(weights_only=True) says: {reason}"
        ) from None
    candidates = dict(named_tensors(saved, ()))
    if not candidates:
        raise ValueError(f"{path} must hold a dict of tensors by name, but holds {outline(saved)}")
    if len(candidates) > 1:
        found = ", ".join(f"{len(tensors)} {place(keys)}" for keys, tensors in candidates.items())
        raise ValueError(
            f"{path} must hold one dict of tensors, but has several: {found}. Save the dict of the model in a file of "
            "its own"
        )
    ((keys, tensors),) = candidates.items()

    first: dict[Any, str] = {}
    tied: list[str] = []
    metas: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        same = (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.shape, tensor.stride())
        if tensor.numel() and first.setdefault(same, name) != name:
            tied.append(f"Tied: {name} is {first[same]}.")
        elif takes(tensor):
            metas[name] = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
    other = {name: str(t.dtype) for name, t in tensors.items() if not takes(t)}
    params, notes = selected(path, metas, other)
    return params, [*([f"Tensors {place(keys)} of {path.name}."] if keys else []), *tied, *notes]


def named_tensors(saved: Any, keys: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], dict[str, Tensor]]]:
    """The dicts of tensors in a checkpoint, each with the keys that lead to it. If a key is in WRAPPERS, only the dicts
    under this key. The states of optimizers are skipped."""
    if not isinstance(saved, Mapping) or "param_groups" in saved:
        return
    for key in WRAPPERS:
        if inner := list(named_tensors(saved.get(key), (*keys, key))):
            yield from inner
            return
    own = {name: value for name, value in saved.items() if isinstance(name, str) and isinstance(value, Tensor)}
    if any(takes(tensor) for tensor in own.values()):
        yield keys, own
    for key, value in saved.items():
        yield from named_tensors(value, (*keys, str(key)))


def takes(tensor: Tensor) -> bool:
    """Whether the optimizers here can step a param of that dtype."""
    return real_dtype(tensor.dtype) in DTYPE_CODES


def place(keys: tuple[str, ...]) -> str:
    return f"under {'.'.join(keys)}" if keys else "at the top"


def outline(saved: Any) -> str:
    if not isinstance(saved, Mapping):
        return f"a {type(saved).__name__}"
    kinds = [f"{key} ({type(value).__name__})" for key, value in saved.items()]
    return "a dict of " + ", ".join([*kinds[:8], *(["and more"] if kinds[8:] else [])]) if kinds else "an empty dict"


def selected(path: Path, metas: dict[str, Tensor], other: dict[str, str]) -> Found:
    """The params without running statistics, and notes on what is left out. other: dtypes of the tensors that no
    optimizer takes, by name."""
    statistics = [name for name in metas if name.rpartition(".")[2] in STATISTICS]
    notes = []
    if statistics:
        notes.append(f"Left out: {len(statistics)} running statistics of norms.")
    if other:
        dtypes = ", ".join(sorted(dtype.removeprefix("torch.") for dtype in set(other.values())))
        notes.append(f"Left out: {len(other)} tensors of dtype {dtypes}.")
    return {name: meta for name, meta in metas.items() if name not in statistics}, notes

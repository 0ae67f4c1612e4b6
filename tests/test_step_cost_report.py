"""The input and output of `python -m fused_optim --model ...`: checkpoints of any kind, and the report."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fused_optim import __main__ as cli
from fused_optim.cost import state_dicts, step_cost
from fused_optim.cost.shapes import MODELS

# ---- checkpoints


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4, dtype=torch.bfloat16)
        self.conv = nn.Conv1d(3, 4, 2)
        self.norm = nn.BatchNorm1d(4)
        self.scale = nn.Parameter(torch.ones(()))
        self.output = nn.Linear(4, 7, bias=False)
        self.output.weight = self.embedding.weight


def shapes_of(tensors: Any) -> dict[str, Any]:
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors}


STATE_DICT = Model().state_dict()
PARAMS = shapes_of(Model().named_parameters())
STEP = {"step": torch.tensor(3), "epoch": 4}


def optimizer_state() -> dict[str, Any]:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(2)).sum().backward()
    optimizer.step()
    return optimizer.state_dict()


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    ("saved", "where"),
    [
        (STATE_DICT, None),
        (dict(Model().named_parameters(remove_duplicate=False)), None),
        ({**STEP, "optimizer": optimizer_state(), "model": STATE_DICT}, "under model"),
        ({"state_dict": {"model": STATE_DICT}, "ema": STATE_DICT}, "under state_dict.model"),
        ({**STEP, "mine": {"weights": STATE_DICT, "rng": {"cpu": torch.get_rng_state()}}}, "under mine.weights"),
    ],
    ids=["state_dict", "parameters", "model", "nested", "own name"],
)
def test_reads_checkpoints(saved: Any, where: str | None, zipped: bool, tmp_path: Path) -> None:
    path = tmp_path / "saved.pt"
    torch.save(saved, path, _use_new_zipfile_serialization=zipped)
    params, notes = state_dicts.read([path])
    assert shapes_of(params.items()) == PARAMS
    assert all(param.is_meta for param in params.values())
    text = " ".join(notes)
    assert "output.weight is embedding.weight" in text
    assert (where in text) if where else ("under" not in text)
    if "norm.running_mean" in str(saved):
        assert "2 running statistics" in text and "1 tensors of dtype int64" in text


BYTES = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8, "C64": 8, "F8_E4M3": 1}


def save_safetensors(path: Path, tensors: dict[str, tuple[str, list[int]]], **more: Any) -> Path:
    """Writes a sparse file: the data take no space on the disk."""
    header, end = dict[str, Any](), 0
    for name, (dtype, shape) in tensors.items():
        begin, end = end, end + BYTES[dtype] * prod(shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps({**header, **more}).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(file.tell() + end)
    return path


def test_reads_safetensors(tmp_path: Path) -> None:
    tensors = {
        "a": ("BF16", [3, 2]),
        "b.bias": ("F32", [4]),
        "scalar": ("F64", []),
        "z": ("C64", [2]),
        "bn.running_var": ("F32", [4]),
    }
    first = save_safetensors(
        tmp_path / "1.safetensors", {**tensors, "q": ("F8_E4M3", [9])}, __metadata__={"format": "pt"}
    )
    second = save_safetensors(tmp_path / "2.safetensors", {"c": ("F16", [5])})
    params, notes = state_dicts.read([first, second])
    assert shapes_of(params.items()) == {
        "a": ((3, 2), torch.bfloat16),
        "b.bias": ((4,), torch.float32),
        "scalar": ((), torch.float64),
        "z": ((2,), torch.complex64),
        "c": ((5,), torch.float16),
    }
    assert all(param.is_meta for param in params.values())
    assert notes == ["Left out: 1 running statistics of norms.", "Left out: 1 tensors of dtype F8_E4M3."]
    with pytest.raises(ValueError, match="c is in more than one"):
        state_dicts.read([second, second])


def test_reads_no_data_of_safetensors(tmp_path: Path) -> None:
    """The file has 2 TiB and does not fit in memory."""
    path = save_safetensors(tmp_path / "large.safetensors", {"a": ("F32", [2**19, 2**20])})
    params, _ = state_dicts.read([path])
    assert shapes_of(params.items()) == {"a": ((2**19, 2**20), torch.float32)}


@pytest.mark.parametrize("missing", ["safetensors", "numpy"])
def test_says_where_safetensors_is_missing(
    missing: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save_safetensors(tmp_path / "a.safetensors", {"a": ("F32", [4])})
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["--state-dict", str(path), "--gbps", "1"])
    last = capsys.readouterr().err.splitlines()[-1]
    assert stopped.value.code == 2 and f"{path} is read with" in last
    assert last.endswith(f"but {missing} is not installed; pip install safetensors numpy")


class Own:
    """A class that torch.load(weights_only=True) refuses."""


def write(content: Any) -> Callable[[Path], None]:
    return lambda path: torch.save(content, path)


def raw(content: bytes) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(content) and None


@pytest.mark.parametrize(
    ("make", "name", "words"),
    [
        (lambda path: None, "a.pt", "is missing"),
        (Path.mkdir, "a.pt", "is a folder"),
        (raw(b"not a checkpoint"), "a.pt", "torch.load(weights_only=True) says"),
        (raw(b""), "a.pt", "torch.load(weights_only=True) says"),
        (write(Own()), "a.pt", "torch.load(weights_only=True) says"),
        (write(torch.ones(3)), "a.pt", "but holds a Tensor"),
        (write({"loss": 3.0, "names": ["a"]}), "a.pt", "but holds a dict of loss (float), names (list)"),
        (write({}), "a.pt", "but holds an empty dict"),
        (write({"count": torch.tensor(3)}), "a.pt", "but holds a dict of count (Tensor)"),
        (write(optimizer_state()), "a.pt", "but holds a dict of state (dict), param_groups (list)"),
        (write({"g": STATE_DICT, "d": {"a": torch.ones(2)}}), "a.pt", "10 under g, 1 under d"),
        (write({"bn.running_mean": torch.ones(3)}), "a.pt", "no param for an optimizer"),
        (raw(b""), "a.safetensors", "must be a safetensors file"),
        (raw(b"\xff" * 16), "a.safetensors", "must be a safetensors file"),
        (raw(b"\x02" + b"\0" * 7 + b"[]"), "a.safetensors", "must be a safetensors file"),
        (raw(b"\x09" + b"\0" * 7 + b'{"a": {}}'), "a.safetensors", "must be a safetensors file"),
    ],
)
def test_refuses_what_is_no_checkpoint(
    make: Callable[[Path], None], name: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / name
    make(path)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["--state-dict", str(path), "--gbps", "1"])
    out, err = capsys.readouterr()
    assert stopped.value.code == 2 and not out
    assert str(path) in err.splitlines()[-1] and words in err.splitlines()[-1]


# ---- the command


def cells(capsys: pytest.CaptureFixture[str]) -> dict[str, list[str]]:
    """The lines of the report as {first cell: other cells}."""
    lines = [line.split("  ") for line in capsys.readouterr().out.splitlines()]
    return {first: [cell.strip() for cell in rest if cell.strip()] for first, *rest in lines}


def test_report_of_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--model", "gpt2-124m", "--gbps", "100", "--groups", "decay"]) == 0
    found = cells(capsys)
    assert "A step of FusedAdamW on gpt2-124m: float32" in found
    assert (found["tensors"], found["elements"], found["groups"]) == (["148"], ["124,439,808"], ["2"])
    assert found["states"] == ["995.5 MB", "8"]
    assert found["moved per step"] == ["3.484 GB", "28"]
    assert found["GPU, torch for CUDA 13"] == ["2", "2 + 2 to count steps"]
    assert found["CPU, parallel loops"] == ["1", "148"]
    assert found["given"] == ["34.8 ms", "100"]


def test_report_with_every_option(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save({"model": STATE_DICT}, path)
    options = "--dtype bfloat16 --state-dtype float32 --amsgrad --clip --ema --gbps 0.001 --groups each"
    assert cli.main(["--state-dict", str(path), "--optimizer", "adam", *options.split()]) == 0
    found = cells(capsys)
    (title,) = (line for line in found if line.startswith("A step"))
    assert title == (
        "A step of FusedAdam on model.pt: bfloat16, states in float32, amsgrad, gradients clipped, "
        "with an average of the weights"
    )
    assert "Tensors under model of model.pt." in found
    assert found["groups"] == [str(len(PARAMS))]
    assert found["moved per step"][1] == str(2 * 2 + 2 + 2 + 3 * 8 + 2 * 4)
    assert found["GPU, torch for CUDA 13"] == ["4", "has none"]


def test_report_of_packed_states(capsys: pytest.CaptureFixture[str]) -> None:
    options = "--dtype bfloat16 --master-weights exact --state-dtype compact --rounding dithered --gbps 100"
    assert cli.main(["--model", "gpt2-124m", *options.split()]) == 0
    found = cells(capsys)
    assert (
        "A step of FusedAdamW on gpt2-124m: bfloat16, exact master weights, compact states, dithered rounding" in found
    )
    assert (found["params"][1], found["grads"][1], found["states"][1]) == ("2", "2", "5")
    assert found["moved per step"] == ["1.991 GB", "16"]
    assert found["GPU, torch for CUDA 13"] == ["2", "has none"]


def test_report_measures_every_device(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    plain = step_cost.bandwidth
    monkeypatch.setattr(step_cost, "bandwidth", lambda device: plain(device, seconds=0.0, size=1 << 16))
    assert cli.main(["--model", "resnet50", "--optimizer", "lamb", "--no-clip"]) == 0
    found = cells(capsys)
    assert found["moved per step"] == ["1.022 GB", "40"]
    for device in ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]:
        assert float(found[device][1].replace(",", "")) > 0


def test_report_where_memory_is_short(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(device: torch.device) -> None:
        raise torch.OutOfMemoryError("out of memory\nand much more")

    monkeypatch.setattr(step_cost, "bandwidth", fail)
    assert cli.main(["--model", "resnet50"]) == 0
    assert cells(capsys)["cpu"] == ["not measured: out of memory"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--model gpt5", ", ".join(list(MODELS)[-2:])),
        ("--optimizer lamb", "--model and --state-dict"),
        ("--model resnet50 --optimizer lion --amsgrad", "--amsgrad is an option of adam, adamw, but"),
        ("--model resnet50 --momentum 0.9", "--momentum is an option of sgd, sgdw, schedulefreesgd, but the"),
        ("--model resnet50 --optimizer sgd --momentum -1", "Invalid momentum value: -1.0"),
        ("--model resnet50 --gbps 0", "--gbps"),
        ("--model resnet50 --dtype float16 --master-weights exact", "is for bfloat16 params, but got one of"),
        ("--model resnet50 --master-weights half", "exact, 24bit"),
        ("--model resnet50 --state-dict a.pt", "not allowed with"),
    ],
)
def test_refuses_options(arguments: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments.split())
    out, err = capsys.readouterr()
    assert stopped.value.code == 2 and not out
    assert words in err.splitlines()[-1].replace("'", "")

"""What `python -m fused_optim --model ...` says: against published sizes, hand-counted bytes and launches, and the
optimizers themselves."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fused_optim import __main__ as cli
from fused_optim import backends, doctor, state_dicts
from fused_optim.groups import no_decay
from fused_optim.shapes import MODELS

CUDA_13, CUDA_12 = doctor.TORCH_LAUNCHES
ON_MOMENTUM = {"momentum": 0.9}


def cost(shapes: Any, optimizer: str = "adamw", groups: str = "one", **options: Any) -> doctor.Cost:
    dtype = options.pop("dtype", torch.float32)
    named = shapes if isinstance(shapes, dict) else {str(i): shape for i, shape in enumerate(shapes)}
    model = doctor.on_meta(named, dtype)
    return doctor.cost_of(doctor.prepare(model, optimizer, groups, **options))


# Published: torchvision's num_params, and the numbers of elements in the checkpoints on Hugging Face.
SIZES = {
    "resnet50": (161, 25_557_032),
    "vit-b": (152, 86_567_656),
    "vit-l": (296, 304_326_632),
    "bert-base": (199, 109_482_240),
    "bert-large": (391, 335_141_888),
    "gpt2-124m": (148, 124_439_808),
    "gpt2-medium": (292, 354_823_168),
    "gpt2-large": (436, 774_030_080),
    "gpt2-xl": (580, 1_557_611_200),
    "llama-1b": (146, 1_235_814_400),
    "llama-3b": (254, 3_212_749_824),
    "llama-8b": (291, 8_030_261_248),
    "llama-70b": (723, 70_553_706_496),
}


@pytest.mark.parametrize("name", MODELS)
def test_sizes_of_models(name: str) -> None:
    shapes = MODELS[name]()
    assert (len(shapes), sum(map(prod, shapes.values()))) == SIZES[name]


@pytest.mark.parametrize(
    ("name", "decay"), [("resnet50", 54), ("gpt2-124m", 50), ("bert-large", 148), ("llama-8b", 226)]
)
def test_decay_groups_of_models(name: str, decay: int) -> None:
    """Convolutions, matrices and embeddings decay; biases and norms do not."""
    params = doctor.on_meta(MODELS[name](), torch.float32)
    first, second = (dict(group["params"]) for group in doctor.param_groups(params, "decay"))
    assert (len(first), len(second)) == (decay, len(params) - decay)
    assert all(key.endswith("weight") for key in first)
    assert all(key.endswith("bias") or "norm" in key.lower() or "bn" in key or ".ln_" in key or "downsample.1" in key
               for key in second)  # fmt: skip


def test_decay_groups_as_no_decay_makes_them() -> None:
    model = nn.ModuleList([nn.TransformerEncoderLayer(8, 2, 16), nn.LSTM(4, 4), nn.Bilinear(2, 3, 4), nn.PReLU()])
    ours = doctor.param_groups(dict(model.named_parameters()), "decay")
    theirs = no_decay(model, 0.1, norms=False, embeddings=False)
    names = [{name for name, _ in group["params"]} for group in theirs]
    assert sorted(map(sorted, names)) == sorted(sorted(dict(group["params"])) for group in ours)


# ---- bytes

HALF = {"dtype": torch.bfloat16}
MIXED = {**HALF, "state_dtype": torch.float32}


@pytest.mark.parametrize(
    ("optimizer", "options", "moved", "states"),
    [
        ("adamw", {}, 28, 8),
        ("adam", {"amsgrad": True}, 36, 12),
        ("adamw", HALF, 14, 4),
        ("adamw", MIXED, 22, 8),
        ("adamw", {**MIXED, "ema_decay": 0.99}, 26, 10),
        ("adamw", {**MIXED, "ema_decay": 0.99, "ema_dtype": torch.float32}, 30, 12),
        ("adamw", {"max_grad_norm": 1.0}, 32, 8),
        ("adamw", {"ema_decay": 0.99}, 36, 12),
        ("adamw", {**HALF, "max_grad_norm": 1.0}, 16, 4),
        ("adamw", {"dtype": torch.float64}, 56, 16),
        ("adamw", {"dtype": torch.complex64}, 56, 16),
        ("qhadamw", {}, 28, 8),
        ("sgd", {}, 12, 0),
        ("sgd", ON_MOMENTUM, 20, 4),
        ("sgdw", ON_MOMENTUM, 20, 4),
        ("lion", {}, 20, 4),
        ("lamb", {}, 44, 8),  # it clips unless told otherwise
        ("lamb", {"max_grad_norm": None}, 40, 8),
        ("lamb", {**MIXED, "max_grad_norm": None}, 32, 8),
    ],
)
def test_bytes_per_element(optimizer: str, options: dict[str, Any], moved: int, states: int) -> None:
    shapes = [(3, 5), (), (0,), (5000,)]
    count = 15 + 1 + 5000
    found = cost(shapes, optimizer, **options)
    size = options.get("dtype", torch.float32).itemsize
    assert (found.tensors, found.elements, found.groups) == (4, count, 1)
    assert (found.params, found.grads) == (count * size, count * size)
    assert found.moved == moved * count
    assert found.states == states * count + 4 * len(shapes)  # and a step per param


@pytest.mark.parametrize("groups", doctor.GROUPS)
@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 1.0}, MIXED], ids=["plain", "clipped", "mixed"])
@pytest.mark.parametrize("name", doctor.OPTIMIZERS)
def test_memory_is_what_a_real_step_leaves(name: str, options: dict[str, Any], groups: str) -> None:
    shapes = {"a.weight": (3, 5), "a.bias": (3,), "empty": (0, 2), "b.weight": (130, 101)}
    options = {**options, **(ON_MOMENTUM if name in doctor.takers("momentum") else {})}
    dtype = options.get("dtype", torch.float32)
    params = {key: nn.Parameter(torch.zeros(shape, dtype=dtype)) for key, shape in shapes.items()}
    kept = {key: value for key, value in options.items() if key != "dtype"}
    real = doctor.OPTIMIZERS[name](doctor.param_groups(params, groups), **kept)
    for p in params.values():
        p.grad = torch.ones_like(p)
    real.step()

    found = cost(shapes, name, groups, **options)
    steps = [] if real.rule.counted else list(real._steps.values())
    tensors = [tensor for state in real.state.values() for tensor in state.values() if isinstance(tensor, Tensor)]
    assert found.states == sum(tensor.nbytes for tensor in [*tensors, *steps])
    ((table, _),) = real._tables
    assert found.tables == sum(array.nbytes for array in table.arrays if array is not None)
    assert found.groups == len(real.param_groups) == {"one": 1, "decay": 2, "each": 4}[groups]


def test_tables_are_small() -> None:
    """Below a thousandth of the params, for one group and no clipping."""
    for name in MODELS.keys() - {"llama-70b"}:
        found = cost(MODELS[name]())
        assert 0 < found.tables < found.params / 1000


# ---- launches


def launches_one_by_one(sizes: list[int], most_tensors: int, most_blocks: int) -> int:
    """Block after block, as torch's kernel is fed."""
    launches = tensors = blocks = 0
    for size in filter(None, sizes):
        tensors += 1
        chunks = (size + 65535) // 65536
        for chunk in range(1, chunks + 1):
            blocks += 1
            last = chunk == chunks
            if blocks == most_blocks or (last and tensors == most_tensors):
                launches += 1
                tensors, blocks = 0 if last else 1, 0
    return launches + (blocks > 0)


SIZE = st.integers(0, 12).flatmap(lambda n: st.sampled_from([0, 1, n * 65536, n * 65536 + 1, max(0, n * 65536 - 1)]))


@settings(max_examples=300, deadline=None)
@given(sizes=st.lists(SIZE, max_size=30), most_tensors=st.integers(1, 5), most_blocks=st.integers(2, 9))
def test_torch_launches(sizes: list[int], most_tensors: int, most_blocks: int) -> None:
    kernel = doctor.TorchLaunch("small", (99, most_tensors), most_blocks)
    assert kernel.count(iter(sizes), addresses=2) == launches_one_by_one(sizes, most_tensors, most_blocks)


def test_torch_launches_by_hand() -> None:
    llama = cost(MODELS["llama-8b"]())
    assert llama.torch_launches == {CUDA_13.title: (55, 1), CUDA_12.title: (384, 3)}
    assert llama.torch_loops == 291

    small = [(10,)] * 1000
    assert cost(small).torch_launches == {CUDA_13.title: (4, 2), CUDA_12.title: (28, 10)}
    assert cost(small, amsgrad=True).torch_launches == {CUDA_13.title: (5, 2), CUDA_12.title: (34, 10)}
    assert cost(small, "sgd").torch_launches == {CUDA_13.title: (3, 0), CUDA_12.title: (16, 0)}
    assert cost(small, "sgd", **ON_MOMENTUM).torch_launches == {CUDA_13.title: (3, 0), CUDA_12.title: (21, 0)}
    each = cost(small, groups="each")
    assert each.torch_launches == {CUDA_13.title: (1000, 1000), CUDA_12.title: (1000, 1000)}
    assert (each.launches, each.loops) == (2, 1)


def test_torch_launches_by_dtype() -> None:
    model = {str(i): torch.empty(10, dtype=(torch.float32, torch.bfloat16)[i % 2], device="meta") for i in range(72)}
    found = doctor.cost_of(doctor.prepare(model))
    assert found.torch_launches == {CUDA_13.title: (2, 2), CUDA_12.title: (2, 2)}


@pytest.mark.parametrize(
    ("optimizer", "options"),
    [("sgdw", {}), ("qhadam", {}), ("lamb", {}), ("lion", {}), ("adamw", MIXED), ("adamw", {"dtype": torch.complex64})],
)
def test_where_torch_has_no_fused_step(optimizer: str, options: dict[str, Any]) -> None:
    found = cost([(10,)], optimizer, **options)
    assert found.torch_launches is None and found.torch_loops is None


VARIANTS = pytest.mark.parametrize("options", [{}, {"max_grad_norm": 1.0}, {"max_grad_norm": None}], ids=str)


@VARIANTS
@pytest.mark.parametrize("name", doctor.OPTIMIZERS)
def test_launches_are_those_of_the_launcher(
    name: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton", reason="the launcher is written in Triton, which is not installed")
    from fused_optim.triton_kernels import launch

    started: list[Any] = []
    monkeypatch.setattr(launch.Variant, "start", lambda self, *args: started.append(self.kernel))
    model = doctor.on_meta({"a": (5000,), "b": (3, 3)}, torch.float32)
    optimizer = doctor.prepare(model, name, **options)
    ((table, _),) = optimizer._tables
    arrays, squares = launch.Arrays(*table.arrays), None
    if optimizer._looks:
        squares = torch.empty(1, dtype=torch.float64, device="meta")
        launch.launch_squares(table.kinds, arrays, squares)
    launch.launch(table.rule.name, table.kinds, arrays, None, None, squares)
    launch.launch_move(table.rule.name, table.kinds, arrays)
    assert doctor.cost_of(optimizer).launches == len(started) >= 2


@VARIANTS
@pytest.mark.parametrize("name", doctor.OPTIMIZERS)
def test_loops_are_the_calls_of_a_backend(name: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of the three functions of the C++ backend is one parallel loop; the reference stands in for it."""
    calls: list[str] = []

    def counted(function: str) -> Callable[..., None]:
        plain = getattr(backends.BACKENDS["reference"], function)

        def call(*args: Any) -> None:
            calls.append(function)
            plain(*args)

        return call

    counting = {function: counted(function) for function in ("squares", "step", "move")}
    reference = dataclasses.replace(backends.BACKENDS["reference"], **counting)
    monkeypatch.setitem(backends.BACKENDS, "reference", reference)
    params = [nn.Parameter(torch.ones(10)), nn.Parameter(torch.ones(2, 3))]
    for p in params:
        p.grad = torch.ones_like(p)
    doctor.OPTIMIZERS[name](params, backend="reference", **options).step()
    assert cost([(10,), (2, 3)], name, **options).loops == len(calls) >= 1


# ---- bandwidth


@pytest.mark.parametrize("built", [True, False])
def test_bandwidth(built: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock that moves on by a second whenever it is looked at."""
    if built and isinstance(reason := backends.extension(), str):
        pytest.skip(reason)
    if not built:
        monkeypatch.setattr(backends, "extension", lambda: "not built")
    clock = iter(range(1000))
    monkeypatch.setattr(doctor.time, "perf_counter", lambda: next(clock))
    speed, how = doctor.bandwidth(torch.device("cpu"), seconds=10, size=4096)
    assert speed == (7 if built else 3) * 4096
    assert ("AdamW" in how) == built
    assert 10 <= next(clock) < 20


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


def save_safetensors(path: Path, tensors: dict[str, tuple[str, list[int]]], **more: Any) -> Path:
    """The header alone: whoever looks at the data fails."""
    header = {
        name: {"dtype": dtype, "shape": shape, "data_offsets": [0, 0]} for name, (dtype, shape) in tensors.items()
    }
    text = json.dumps({**header, **more}).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    return path


def test_reads_safetensors(tmp_path: Path) -> None:
    tensors = {"a": ("BF16", [3, 2]), "b.bias": ("F32", [4]), "scalar": ("F64", []), "bn.running_var": ("F32", [4])}
    first = save_safetensors(
        tmp_path / "1.safetensors", {**tensors, "q": ("F8_E4M3", [9])}, __metadata__={"format": "pt"}
    )
    second = save_safetensors(tmp_path / "2.safetensors", {"c": ("F16", [5])})
    params, notes = state_dicts.read([first, second])
    assert shapes_of(params.items()) == {
        "a": ((3, 2), torch.bfloat16),
        "b.bias": ((4,), torch.float32),
        "scalar": ((), torch.float64),
        "c": ((5,), torch.float16),
    }
    assert notes == ["Left out: 1 running statistics of norms.", "Left out: 1 tensors of dtype F8_E4M3."]
    with pytest.raises(ValueError, match="c is in more than one"):
        state_dicts.read([second, second])


class Own:
    """What torch.load(weights_only=True) refuses to make."""


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
    """Lines of the report as {first cell: the others}."""
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
    assert found["moved per step"][1] == str(2 * 2 + 2 + 2 + 3 * 8 + 2 * 2)
    assert found["GPU, torch for CUDA 13"] == ["4", "has none"]


def test_report_measures_every_device(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    plain = doctor.bandwidth
    monkeypatch.setattr(doctor, "bandwidth", lambda device: plain(device, seconds=0.0, size=1 << 16))
    assert cli.main(["--model", "resnet50", "--optimizer", "lamb", "--no-clip"]) == 0
    found = cells(capsys)
    assert found["moved per step"] == ["1.022 GB", "40"]
    for device in ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]:
        assert float(found[device][1].replace(",", "")) > 0


def test_report_where_memory_is_short(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(device: torch.device) -> None:
        raise torch.OutOfMemoryError("out of memory\nand much more")

    monkeypatch.setattr(doctor, "bandwidth", fail)
    assert cli.main(["--model", "resnet50"]) == 0
    assert cells(capsys)["cpu"] == ["not measured: out of memory"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--model gpt5", ", ".join(list(MODELS)[-2:])),
        ("--optimizer lamb", "--model and --state-dict"),
        ("--model resnet50 --optimizer lion --amsgrad", "--amsgrad is an option of adam, adamw, but"),
        ("--model resnet50 --momentum 0.9", "--momentum is an option of sgd, sgdw, but the optimizer is adamw"),
        ("--model resnet50 --optimizer sgd --momentum -1", "Invalid momentum value: -1.0"),
        ("--model resnet50 --gbps 0", "--gbps"),
        ("--model resnet50 --state-dict a.pt", "not allowed with"),
    ],
)
def test_refuses_options(arguments: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments.split())
    out, err = capsys.readouterr()
    assert stopped.value.code == 2 and not out
    assert words in err.splitlines()[-1].replace("'", "")

"""The cost of a step, as `python -m fused_optim --model ...` reports it, compared with published sizes, bytes and
launches counted by hand, and the optimizers themselves."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fused_optim import backends
from fused_optim.cost import step_cost
from fused_optim.cost.shapes import MODELS
from fused_optim.engine import modules
from fused_optim.groups import no_decay

CUDA_13, CUDA_12 = step_cost.TORCH_LAUNCHES
ON_MOMENTUM = {"momentum": 0.9}


def cost(shapes: Any, optimizer: str = "adamw", groups: str = "one", **options: Any) -> step_cost.Cost:
    dtype = options.pop("dtype", torch.float32)
    named = shapes if isinstance(shapes, dict) else {str(i): shape for i, shape in enumerate(shapes)}
    model = step_cost.on_meta(named, dtype)
    return step_cost.cost_of(step_cost.prepare(model, optimizer, groups, **options))


# Published sizes: torchvision's num_params, and the element counts of the checkpoints on Hugging Face.
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
    params = step_cost.on_meta(MODELS[name](), torch.float32)
    first, second = (dict(group["params"]) for group in step_cost.param_groups(params, "decay"))
    assert (len(first), len(second)) == (decay, len(params) - decay)
    assert all(key.endswith("weight") for key in first)
    assert all(key.endswith("bias") or "norm" in key.lower() or "bn" in key or ".ln_" in key or "downsample.1" in key
               for key in second)  # fmt: skip


def test_decay_groups_as_no_decay_makes_them() -> None:
    model = nn.ModuleList([nn.TransformerEncoderLayer(8, 2, 16), nn.LSTM(4, 4), nn.Bilinear(2, 3, 4), nn.PReLU()])
    ours = step_cost.param_groups(dict(model.named_parameters()), "decay")
    theirs = no_decay(model, 0.1, norms=False, embeddings=False)
    names = [{name for name, _ in group["params"]} for group in theirs]
    assert sorted(map(sorted, names)) == sorted(sorted(dict(group["params"])) for group in ours)


# ---- bytes

HALF = {"dtype": torch.bfloat16}
MIXED = {**HALF, "state_dtype": torch.float32}
EXACT = {**HALF, "master_weights": "exact"}
PACKED = {**EXACT, "state_dtype": "compact"}


@pytest.mark.parametrize(
    ("optimizer", "options", "moved", "states"),
    [
        ("adamw", {}, 28, 8),
        ("adam", {"amsgrad": True}, 36, 12),
        ("adamw", HALF, 14, 4),
        ("adamw", MIXED, 22, 8),
        ("adamw", {**MIXED, "ema_decay": 0.99}, 30, 12),
        ("adamw", {**MIXED, "ema_decay": 0.99, "ema_dtype": torch.bfloat16}, 26, 10),
        ("adamw", EXACT, 26, 10),
        ("adamw", PACKED, 16, 5),
        ("adamw", {**PACKED, "amsgrad": True}, 20, 7),
        ("adamw", {**PACKED, "master_weights": "24bit"}, 14, 4),
        ("adamw", {**PACKED, "master_weights": None, "rounding": "dithered"}, 12, 3),
        ("adamw", {**HALF, "state_dtype": {"exp_avg_sq": "e8m8"}}, 14, 4),
        ("adamw", {**PACKED, "dtype": torch.float32}, 18, 3),
        ("lion", PACKED, 14, 4),
        ("lamb", {**PACKED, "max_grad_norm": None}, 23, 5),
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
        ("lamb", {}, 44, 8),  # LAMB clips by default
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
    assert found.states == states * count + 4 * len(shapes)  # plus a step count per param


@pytest.mark.slow
@pytest.mark.parametrize("groups", step_cost.GROUPS)
@pytest.mark.parametrize(
    "options", [{}, {"max_grad_norm": 1.0}, MIXED, PACKED], ids=["plain", "clipped", "mixed", "packed"]
)
@pytest.mark.parametrize("name", step_cost.OPTIMIZERS)
def test_memory_is_what_a_real_step_leaves(name: str, options: dict[str, Any], groups: str) -> None:
    shapes = {"a.weight": (3, 5), "a.bias": (3,), "empty": (0, 2), "b.weight": (130, 101)}
    options = {**options, **(ON_MOMENTUM if name in step_cost.takers("momentum") else {})}
    dtype = options.get("dtype", torch.float32)
    params = {key: nn.Parameter(torch.zeros(shape, dtype=dtype)) for key, shape in shapes.items()}
    kept = {key: value for key, value in options.items() if key != "dtype"}
    real = step_cost.OPTIMIZERS[name](step_cost.param_groups(params, groups), **kept)
    for p in params.values():
        p.grad = torch.ones_like(p)
    real.step()

    found = cost(shapes, name, groups, **options)
    steps = [] if real.rule.counted else list(real._steps.values())
    tensors = [tensor for state in real.state.values() for tensor in state.values() if isinstance(tensor, Tensor)]
    assert found.states == sum(tensor.nbytes for tensor in [*tensors, *steps])
    (bound,) = real._tables
    table = bound.table
    assert found.tables == sum(array.nbytes for array in table.arrays if array is not None)
    assert found.groups == len(real.param_groups) == {"one": 1, "decay": 2, "each": 4}[groups]


@pytest.mark.slow
def test_tables_are_small() -> None:
    """Less than a thousandth of the params' size, with one group and without clipping."""
    for name in MODELS.keys() - {"llama-70b"}:
        found = cost(MODELS[name]())
        assert 0 < found.tables < found.params / 1000


# ---- launches


def launches_one_by_one(sizes: list[int], most_tensors: int, most_blocks: int) -> int:
    """Assigns one block after the other, as torch fills its kernel launches."""
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
    kernel = step_cost.TorchLaunch("small", (99, most_tensors), most_blocks)
    assert kernel.count(iter(sizes), addresses=2) == launches_one_by_one(sizes, most_tensors, most_blocks)


@pytest.mark.slow
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
    found = step_cost.cost_of(step_cost.prepare(model))
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
@pytest.mark.parametrize("name", step_cost.OPTIMIZERS)
def test_launches_are_those_of_the_launcher(
    name: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton", reason="needs Triton, in which the launcher is written")
    from fused_optim.triton_kernels import launch

    started: list[Any] = []
    monkeypatch.setattr(launch.Variant, "start", lambda self, *args: started.append(self.kernel))
    model = step_cost.on_meta({"a": (5000,), "b": (3, 3)}, torch.float32)
    optimizer = step_cost.prepare(model, name, **options)
    (bound,) = optimizer._tables
    table = bound.table
    arrays, squares = table.arrays, None
    if optimizer._looks:
        squares = torch.empty(1, dtype=torch.float64, device="meta")
        launch.launch_squares(table.dtype_signatures, arrays, squares)
    launch.launch(table.rule.name, table.dtype_signatures, arrays, None, None, squares)
    launch.launch_apply_update(table.rule.name, table.dtype_signatures, arrays)
    assert step_cost.cost_of(optimizer).launches == len(started) >= 2


@VARIANTS
@pytest.mark.parametrize("name", step_cost.OPTIMIZERS)
def test_loops_are_the_calls_of_a_backend(name: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of the three functions of the C++ backend is one parallel loop. The calls are counted on the reference
    backend."""
    calls: list[str] = []

    def counted(function: str) -> Callable[..., None]:
        plain = getattr(backends.BACKENDS["reference"], function)

        def call(*args: Any) -> None:
            calls.append(function)
            plain(*args)

        return call

    counting = {function: counted(function) for function in ("sum_squares", "step", "apply_update")}
    monkeypatch.setitem(backends.BACKENDS, "reference", type("Counting", (backends.BACKENDS["reference"],), counting))
    params = [nn.Parameter(torch.ones(10)), nn.Parameter(torch.ones(2, 3))]
    for p in params:
        p.grad = torch.ones_like(p)
    step_cost.OPTIMIZERS[name](params, backend="reference", **options).step()
    assert cost([(10,), (2, 3)], name, **options).loops == len(calls) >= 1


# ---- bandwidth


@pytest.mark.parametrize("built", [True, False])
def test_bandwidth(built: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock advances by a second at every call."""
    if built and isinstance(reason := modules.cpu(), str):
        pytest.skip(reason)
    if not built:
        monkeypatch.setattr(modules, "cpu", lambda: "not built")
    clock = iter(range(1000))
    monkeypatch.setattr(step_cost.time, "perf_counter", lambda: next(clock))
    speed, how = step_cost.bandwidth(torch.device("cpu"), seconds=10, size=4096)
    assert speed == (7 if built else 3) * 4096
    assert ("AdamW" in how) == built
    assert 10 <= next(clock) < 20

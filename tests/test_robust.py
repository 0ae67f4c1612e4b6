"""Threads, fork, memory, and installations without optional parts."""

from __future__ import annotations

import gc
import itertools
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator

import ptx.backends
import pytest
import torch
from cases import (
    ADAMW,
    AMSGRAD,
    LAMB,
    SLOW,
    Case,
    Target,
    build,
    build_torch,
    copies,
    for_every_case,
    for_every_class,
    make_params,
    on_every_target,
    parameters,
    quick,
    random_grads,
    set_grads,
    train,
)
from compare import assert_equal, assert_like_torch, states

from fused_optim.engine import modules

SHAPES = [(5, 3), (), (40,), (9,)]


@pytest.mark.shared
@pytest.mark.slow
@on_every_target
@for_every_case
def test_two_optimizers_from_two_threads(case: Case, target: Target) -> None:
    if target.backend in SLOW:
        pytest.skip("Triton's interpreter replaces triton.language while it runs: one thread at a time")
    steps, shapes = 40, [(3000,), (7, 5), (11,)]
    together = [build(case, target, make_params(shapes, device=target.device, seed=i)) for i in range(2)]
    alone = [build(case, target, copies(parameters(optimizer))) for optimizer in together]
    start, failures = threading.Barrier(2), []

    def work(index: int) -> None:
        try:
            start.wait()
            train([together[index]], steps, seed=100 * index)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    for index in range(2):
        train([alone[index]], steps, seed=100 * index)
        for p, q in zip(parameters(together[index]), parameters(alone[index]), strict=True):
            assert_equal(p, q)
        assert_equal(states(together[index]), states(alone[index]))


@pytest.mark.slow
@on_every_target
def test_gil_is_released(target: Target) -> None:
    """With a very long switch interval another thread runs only if the step releases the GIL."""
    if target != Target("cpp", "cpu"):
        pytest.skip("only the C++ step is one long call on the host")
    p = torch.nn.Parameter(torch.zeros(30_000_000))
    p.grad = torch.ones_like(p)
    optimizer = build(ADAMW, target, [p])
    optimizer.step()
    ticks, stop = [0], threading.Event()

    def tick() -> None:
        while not stop.is_set():
            ticks[0] += 1
            time.sleep(0.0005)

    interval = sys.getswitchinterval()
    thread = threading.Thread(target=tick)
    try:
        sys.setswitchinterval(1000.0)
        thread.start()
        time.sleep(0.01)
        most = 0
        for _ in range(20):
            before = ticks[0]
            optimizer.step()
            most = max(most, ticks[0] - before)
            if most >= 5:
                break
    finally:
        sys.setswitchinterval(interval)
        stop.set()
        thread.join()
    assert most >= 5


def run_python(code: str, timeout: float = 120, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, **environment},
        check=False,
    )


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.parametrize("steps_before", [0, 1], ids=["after-import", "after-a-step"])
def test_fork(steps_before: int) -> None:
    """Worker threads do not survive fork, so a child has none. Its steps must still end and be correct."""
    code = f"""
    import os, signal, torch
    from fused_optim import FusedAdamW
    p = torch.nn.Parameter(torch.ones(2_000_000))
    optimizer = FusedAdamW([p], lr=0.1, weight_decay=0.0)
    p.grad = torch.ones_like(p)
    for _ in range({steps_before}):
        optimizer.step()
    pid = os.fork()
    if pid == 0:
        signal.alarm(20)
        optimizer.step()
        wanted = 1 - 0.1 * ({steps_before} + 1)
        os._exit(0 if (p - wanted).abs().max().item() < 1e-5 else 1)
    print("child", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    optimizer.step()
    print("parent", p[0].item())
    """
    done = run_python(code)
    assert "child 0" in done.stdout, (done.stdout, done.stderr, f"SIGALRM is {-signal.SIGALRM}")
    assert "parent" in done.stdout


@pytest.fixture(scope="module")
def only_new_objects() -> Iterator[None]:
    """Excludes the existing objects from garbage collection: thousands of passes over a million objects take
    minutes."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def live_tensors() -> int:
    gc.collect()
    return sum(issubclass(type(x), torch.Tensor) for x in gc.get_objects())


@pytest.mark.host
@pytest.mark.usefixtures("only_new_objects")
@on_every_target
@for_every_class
def test_steps_leave_no_tensors_behind(case: Case, target: Target) -> None:
    params = make_params(SHAPES, device=target.device)
    optimizer = build(case, target, params)
    train([optimizer], 3)
    before = live_tensors()
    assert before >= len(params)
    train([optimizer], quick(target, 20, 3))
    optimizer.zero_grad()
    assert live_tensors() <= before


@pytest.mark.host
@pytest.mark.usefixtures("only_new_objects")
@on_every_target
@for_every_class
def test_a_dead_optimizer_lets_its_params_go(case: Case, target: Target) -> None:
    before = live_tensors()
    params = make_params(SHAPES, device=target.device)
    optimizer = build(case, target, params)
    train([optimizer], 2)
    del params, optimizer
    assert live_tensors() <= before


@pytest.mark.slow
@on_every_target
@for_every_class
def test_a_steady_step_allocates_nothing(case: Case, target: Target) -> None:
    if target != Target("cpp", "cpu"):
        pytest.skip("the reference and the emulations allocate temporaries; the next test is for GPUs")
    params = make_params([(100,)] * 50)
    optimizer = build(case, target, params)
    set_grads(params, random_grads(params, 0))
    for _ in range(3):
        optimizer.step()
    with torch.profiler.profile(profile_memory=True) as profile:
        optimizer.step()
    allocated = [event for event in profile.events() if event.name == "[memory]"]
    assert not allocated


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@on_every_target
@for_every_class
def test_a_steady_step_allocates_nothing_on_the_gpu(case: Case, target: Target) -> None:
    if target.device != "cuda" or target.backend == "reference":
        pytest.skip("only for the kernels on the GPU")
    params = make_params([(100,)] * 50, device="cuda")
    optimizer = build(case, target, params)
    set_grads(params, random_grads(params, 0))
    for _ in range(3):
        optimizer.step()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    optimizer.step()
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


@on_every_target
def test_tables_hold_nothing_that_nobody_has_written(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """For a skipped tensor prep writes one column, but the walks load all columns. Uninitialized columns would be
    reported by a memory checker."""
    if target.backend in ptx.backends.NAMES:
        pytest.skip("these backends overwrite the columns with NaN before each step")
    params = make_params(SHAPES, device=target.device)
    optimizer = build(LAMB, target, params)
    set_grads(params, random_grads(params, 0))
    optimizer.found_inf = torch.ones((), device=target.device)
    real = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: real(*args, **kwargs).fill_(0.5))
    optimizer.step()
    (bound,) = optimizer._tables
    assert len(bound.table.tensor_scalars) == len(params)
    assert (bound.table.tensor_scalars.count_nonzero(dim=1) <= 1).all()


@on_every_target
def test_params_that_share_a_block_of_memory(target: Target) -> None:
    """Params are views of one flat buffer, and so are gradients. Distributed wrappers use this layout."""
    flat = torch.randn(1000, device=target.device)
    bounds = [0, 1, 14, 15, 400, 403, 1000]
    params = [torch.nn.Parameter(flat[a:b]) for a, b in itertools.pairwise(bounds)]
    theirs = build_torch(AMSGRAD, copies(params))
    optimizer = build(AMSGRAD, target, params)
    for step in range(3):
        grad = torch.randn(1000, generator=torch.Generator().manual_seed(step)).to(target.device)
        for group in (params, parameters(theirs)):
            for p, (a, b) in zip(group, itertools.pairwise(bounds), strict=True):
                p.grad = grad[a:b]
        optimizer.step()
        theirs.step()
    assert_like_torch(optimizer, theirs)


@pytest.mark.slow
def test_report_of_backends() -> None:
    """`python -m fused_optim` lists every backend with ok or the reason why it is not available."""
    from fused_optim import backends

    done = run_python("import runpy; runpy.run_module('fused_optim', run_name='__main__')")
    assert done.returncode == 0, done.stderr
    for name, reason in backends.available().items():
        (line,) = (line for line in done.stdout.splitlines() if line.split()[:2] == ["backend", name])
        assert line.split(maxsplit=2)[2] == (reason or "ok")


BLOCKED = """
import sys
BLOCKED = {names!r}

class Blind:  # a finder that does not see what is blocked, as if it were not installed
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        hidden = name in BLOCKED or name.split(".")[0] in BLOCKED
        return None if hidden else self.finder.find_spec(name, path, target)

sys.meta_path[:] = [Blind(finder) for finder in sys.meta_path]
import warnings, torch, fused_optim
from fused_optim import FusedAdamW, backends
assert not set(BLOCKED) & set(sys.modules)
print(backends.available())
p, q = (torch.nn.Parameter(torch.ones(10)) for _ in range(2))
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    ours, theirs = FusedAdamW([p]), torch.optim.AdamW([q])
for _ in range(3):
    p.grad, q.grad = torch.ones(10), torch.ones(10)
    ours.step()
    theirs.step()
torch.testing.assert_close(p, q)
print("warned", [w.filename for w in caught if "plain PyTorch" in str(w.message)])
if "fused_optim._poll" in BLOCKED:
    try:
        FusedAdamW([p], backend="cpp")
    except RuntimeError as error:
        print("refused:", error)
"""


@pytest.mark.slow
@pytest.mark.parametrize("names", [["triton"], ["triton", *(f"fused_optim.{name}" for name in modules.NAMES)]], ids=str)
def test_import_needs_neither_triton_nor_the_extension(names: list[str]) -> None:
    done = run_python(BLOCKED.replace("{names!r}", repr(names)), TRITON_INTERPRET="0", FUSED_OPTIM_CUDA_EMULATE="0")
    assert done.returncode == 0, done.stderr
    if len(names) > 1:
        assert "warned ['<string>']" in done.stdout, "the warning must name the caller's file"
        assert "the C++ kernel for" in done.stdout.split("refused:")[1]

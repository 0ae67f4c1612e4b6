"""clip_grad_norm_ with threads, fork, autograd and torch.compile, and the objects that it keeps alive."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import textwrap
import threading
import weakref

import ptx.backends
import pytest
import torch
from cases import INTERPRETED, Target, on_every_target
from gradients import (
    alone,  # noqa: F401
    assert_bits,
    clipped,
    grads_of,
    holding,
    random_params,
    whole_numbers,
)

from fused_optim import clip_grad_norm_
from fused_optim.recipes import clip

torchs = torch.nn.utils.clip_grad_norm_


@on_every_target
def test_gradients_are_let_go(target: Target) -> None:
    params = random_params(target)
    clip_grad_norm_(params, 0.5, backend=target.backend)
    watched = [weakref.ref(p.grad) for p in params]
    storages = [weakref.ref(p.grad.untyped_storage()) for p in params]
    for p in params:
        p.grad = None
    gc.collect()
    assert not any(reference() is not None for reference in watched + storages)


def test_few_tables_are_kept() -> None:
    for size in range(1, 3 * clip.MOST_KEPT):
        clip_grad_norm_(holding([torch.ones(size)]), 0.5, backend="auto")
    assert len(clip._kept) <= clip.MOST_KEPT


@on_every_target
@pytest.mark.usefixtures("alone")
def test_what_autograd_knows(target: Target) -> None:
    """Clipping increments the gradient's version counter. Gradients with a history and gradients in inference mode are
    clipped too."""
    p = torch.ones(5, device=target.device, requires_grad=True)
    (p.grad,) = torch.autograd.grad((p**3).sum(), p, create_graph=True)
    version = p.grad._version
    norm = clip_grad_norm_(p, 0.5, backend=target.backend)
    assert p.grad._version > version and not norm.requires_grad
    assert p.grad.norm().item() == pytest.approx(0.5, rel=1e-5)
    with torch.inference_mode():
        q = torch.ones(5, device=target.device)
        q.grad = torch.ones(5, device=target.device)
        clip_grad_norm_(q, 0.5, backend=target.backend)
        assert q.grad.norm().item() == pytest.approx(0.5, rel=1e-5)


@on_every_target
@pytest.mark.usefixtures("alone")
def test_another_default_device(target: Target) -> None:
    params = random_params(target, torch.float64)
    wanted = clipped(grads_of(params), 0.125)
    with torch.device("meta"):
        for factor in (1.0, 0.25):  # the second call reuses the table
            clip_grad_norm_(params, 0.5 * factor, backend=target.backend)
    torch.testing.assert_close(grads_of(params), wanted, rtol=1e-5, atol=0)


def test_two_threads_with_models_of_one_shape() -> None:
    sizes = [3000, 7, 200_000]
    start, failures = threading.Barrier(2), []

    def work(seed: int) -> None:
        try:
            grads = [whole_numbers([size], torch.float32, "cpu", seed) for size in sizes]
            params, wanted = holding(grads), clipped(grads, 0.5)
            start.wait()
            for _ in range(30):
                for p, grad in zip(params, grads, strict=True):
                    p.grad = grad.clone()
                clip_grad_norm_(params, 0.5)
                assert_bits(grads_of(params), wanted)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", textwrap.dedent(code)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.slow
@on_every_target
@pytest.mark.skipif(sys.platform != "linux", reason="the signal for a write to read-only memory is that of Linux")
def test_what_is_not_clipped_is_not_written(target: Target) -> None:
    """The gradients are in read-only memory. The process must die when they are clipped, and not before."""
    if target.device != "cpu":
        pytest.skip("mprotect works on host memory only")
    if target.backend in ptx.backends.NAMES:
        pytest.skip("the PTX backends are not registered in the subprocess")
    done = run_python(f"""
    import ctypes, mmap, torch
    from fused_optim import clip_grad_norm_
    memory = mmap.mmap(-1, 3 * 4096 * 4)
    page = torch.frombuffer(memory, dtype=torch.float32)
    page.fill_(1.0)
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(page.data_ptr()), page.nbytes, mmap.PROT_READ) == 0
    p = torch.empty(page.numel(), requires_grad=True)
    p.grad = page
    print("norm", clip_grad_norm_(p, 1e9, backend="{target.backend}").item(), flush=True)
    clip_grad_norm_(p, 0.5, backend="{target.backend}")
    """)
    assert done.stdout.startswith("norm 110.8") and done.returncode == -signal.SIGSEGV, (done.stdout, done.stderr)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_fork() -> None:
    """Worker threads do not survive fork, so a child has none."""
    done = run_python("""
    import os, signal, torch
    from fused_optim import clip_grad_norm_
    p = torch.empty(2_000_000, requires_grad=True)
    p.grad = torch.ones(2_000_000)
    clip_grad_norm_(p, 1.0)
    pid = os.fork()
    if pid == 0:
        signal.alarm(20)
        clip_grad_norm_(p, 0.5)
        os._exit(0 if (p.grad * 2_000_000**0.5 - 0.5).abs().max().item() < 1e-4 else 1)
    print("child", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    """)
    assert "child 0" in done.stdout, (done.stdout, done.stderr)


def test_backends_by_name() -> None:
    params = random_params(Target("cpp", "cpu"))
    before = grads_of(params)
    with pytest.raises(ValueError, match="backend must be"):
        clip_grad_norm_(params, 0.5, backend="none")
    if not INTERPRETED:
        with pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
            clip_grad_norm_(params, 0.5, backend="triton")
    assert_bits(grads_of(params), before)


def test_under_torch_compile() -> None:
    """The graph contains torch's operators and has no break."""
    params = random_params(Target("cpp", "cpu"))
    others = holding(grads_of(params))
    norm = torch.compile(lambda: clip_grad_norm_(params, 0.5), backend="eager", fullgraph=True)()
    torch.testing.assert_close(norm, torchs(others, 0.5))
    torch.testing.assert_close(grads_of(params), grads_of(others))

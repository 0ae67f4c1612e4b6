"""Gradient release: params are stepped in buckets during backward(), and their gradients are freed at once."""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from ..engine.backend import Backend, Scaling
from ..engine.build import make_hparams, members_of, validate
from ..engine.changes import RAW_CHANGED, REBUILD, detect_changes
from ..engine.dtensor import local
from ..engine.forks import reset_threads_after_fork
from ..engine.graphs import refuse_capture
from ..engine.scaling import SQUARES, BucketScaler
from ..engine.table import HostHparams
from ..engine.walk import copy_in, walk
from .base import FusedOptimizer
from .buckets import BUCKET_BYTES, Bucket, divided, parts_of
from .options import check_grad_scale
from .plans import Plan, make_plan


class Hook:
    """What autograd calls when it has accumulated the gradient of a param. step: in which step it was called last."""

    def __init__(self, release: GradientRelease) -> None:
        self.release = weakref.ref(release)  # a hook lives as long as its param
        self.bucket: Bucket | None = None
        self.step = -1

    @_disable_dynamo  # compiled autograd would trace into the step
    def __call__(self, param: Tensor) -> None:
        release = self.release()
        if release is not None and self.bucket is not None:
            release._arrived(self, param)


class GradientRelease:
    """What release_gradients() returns; see release_gradients, which has the same arguments."""

    def __init__(self, model: nn.Module, optimizer: FusedOptimizer, bucket_bytes: int, grad_scale: Any) -> None:
        self.bucket_bytes = bucket_bytes
        self.grad_scale = grad_scale
        self._model, self._optimizer = weakref.ref(model), weakref.ref(optimizer)
        self._lock = threading.RLock()  # backward() uses one thread per device
        self._held = False
        self._hooks: dict[Tensor, tuple[Hook, Any]] = {}
        self._buckets: list[Bucket] = []
        self._scaler = BucketScaler(optimizer._scaler)
        self._step = 0
        self._begun = self._built = False
        self._changes = 0
        self._looks = False
        self._hparams: HostHparams | None = None
        self._watch: Any = None  # a change detector of groups and states; those of the buckets look at their tensors
        self._watched: tuple[object, object] = (None, None)
        self._arrange(optimizer)

    @contextmanager
    def no_release(self) -> Iterator[None]:
        """Context manager in which backward() only accumulates gradients, for all micro-batches but the last:

        with release.no_release():
            loss(first).backward()
        loss(last).backward()  # updates the params
        optimizer.step()
        """
        before, self._held = self._held, True
        try:
            yield
        finally:
            self._held = before

    def remove(self) -> None:
        """Ends gradient release. From now on step() updates all params, as without it."""
        optimizer = self._optimizer()
        for _, handle in self._hooks.values():
            handle.remove()
        self._hooks.clear()
        if optimizer is not None and optimizer._release is self:
            optimizer._forget()
            optimizer._release = None

    # ---- a step

    def _arrived(self, hook: Hook, param: Tensor) -> None:
        """The gradient of a param is complete."""
        if self._held or hook.bucket is None:
            return
        with self._lock:
            if hook.step == self._step:
                raise RuntimeError(
                    f"a param of shape {tuple(param.shape)} has got a second gradient in one step, but its bucket may "
                    "have been updated with the first one. Call optimizer.step() after each backward(). To accumulate "
                    "the gradients of several backward() calls, make all but the last inside of no_release(). Params "
                    "that are used in several segments of a reentrant torch.utils.checkpoint need use_reentrant=False"
                )
            hook.step = self._step
            bucket = hook.bucket
            bucket.arrived += 1
            if bucket.arrived == bucket.expected:
                self._update(bucket)

    def end_step(self, closure: Callable[[], Any] | None, grad_scale: Any) -> Any:
        """What step() does: updates the params that backward() has not updated, and ends the step.

        Raises:
            ValueError: a grad_scale is given.
            RuntimeError: GradScaler has called it.
        """
        optimizer = self._optimizer()
        assert optimizer is not None
        if grad_scale is not None:
            raise ValueError(
                "step() takes no grad_scale with gradient release, because backward() has updated the params; pass "
                "grad_scale to release_gradients()"
            )
        if any(optimizer.__dict__.get(name) is not None for name in ("grad_scale", "found_inf")):
            raise RuntimeError(
                "GradScaler does not work with gradient release, because it looks at all gradients before the step; "
                "use bfloat16, which needs no scale"
            )
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with self._lock:
            self._begin(optimizer)
            for bucket in self._buckets:
                if not bucket.updated:
                    self._update(bucket)
            if self._built:
                self._watch_groups(optimizer)
            self._scaler.end()
            self._step += 1
            self._begun = self._built = False
            for bucket in self._buckets:
                bucket.arrived, bucket.updated = 0, False
            for gone in [param for param, (hook, _) in self._hooks.items() if hook.bucket is None]:
                self._hooks.pop(gone)[1].remove()
        return loss

    def _begin(self, optimizer: FusedOptimizer) -> None:
        """Once per step, before the first update: looks for changes of groups and states, and counts the step."""
        if self._begun:
            return
        if optimizer._on_cuda:
            optimizer._check_capture()
        average = optimizer._ema
        optimizer._begin()
        reset_threads_after_fork()
        steps = 0 if average is None else average.steps
        try:
            state, groups = self._watched
            watched = self._watch is not None and state is optimizer.state and groups is optimizer.param_groups
            changes = self._watch.poll() if watched else REBUILD
            if changes & REBUILD:
                self._renew(optimizer)
                changes = 0
            if average is not None:
                changes |= average.advance(self._hparams)
        except BaseException:
            if average is not None:
                average.steps = steps
            optimizer._forget()
            raise
        self._begun, self._changes = True, changes

    @torch.no_grad()
    def _update(self, bucket: Bucket) -> None:
        """Updates the params of a bucket and frees their gradients."""
        optimizer = self._optimizer()
        assert optimizer is not None
        self._begin(optimizer)
        if bucket.stale:  # its params are in other buckets now, which step() updates
            return
        try:
            plan, scalings = self._prepare(optimizer, bucket)
        except BaseException:
            optimizer._forget()
            raise
        try:
            walk(plan.tables, scalings)
        finally:
            plan.detector.done()
        for param in bucket.params:
            param.grad = None
        bucket.updated = True
        if plan.is_meta:
            bucket.plan = None

    def _prepare(self, optimizer: FusedOptimizer, bucket: Bucket) -> tuple[Plan, Sequence[Scaling]]:
        """Everything before the first change of the bucket's params and states."""
        if self._watch is None:  # an option was set, or a checkpoint loaded, in the middle of a step
            self._renew(optimizer)
        plan, changes = bucket.plan, self._changes
        if plan is not None:
            changes |= plan.detector.poll()
        if plan is None or changes & REBUILD or (changes & RAW_CHANGED and plan.anchors.outgrown()):
            refuse_rebuilding()
            with torch.device("cpu"):  # the arrays are on the host, whatever torch.set_default_device says
                self._retire(optimizer, bucket)
                optimizer._settle_masters()
                plan = bucket.plan = make_plan(optimizer, parts_of(optimizer, bucket.params), self._hparams)
            changes, self._built = 0, True
        for bound in plan.tables:
            bound.upload(changes)
            if bound.table.copies:
                copy_in(bound.table)
        return plan, self._scaler(plan.tables, self._looks, self.grad_scale)

    def saved(self) -> dict[str, Tensor]:
        """What state_dict() holds besides: with max_grad_norm the norm of the last step clips the next one."""
        squares = self._scaler.scaler.last_squares
        return {} if squares is None else {SQUARES: squares}

    # ---- plans

    def tables(self) -> list[Backend]:
        """Those of all buckets."""
        return [bound for bucket in self._buckets if bucket.plan is not None for bound in bucket.plan.tables]

    def forget(self) -> None:
        """Drops the plans. The next updates make new ones."""
        optimizer = self._optimizer()
        if optimizer is not None:
            for bucket in self._buckets:
                self._retire(optimizer, bucket)
        self._watch = None

    def remember_versions(self) -> None:
        """Tells the optimizer's master weights the versions of their params after the last step."""
        optimizer = self._optimizer()
        if optimizer is not None:
            for bucket in self._buckets:
                if bucket.plan is not None and bucket.plan.guarded:
                    optimizer._masters.remember_versions(bucket.plan.guarded, bucket.plan.detector.versions())

    def _retire(self, optimizer: FusedOptimizer, bucket: Bucket) -> None:
        plan, bucket.plan = bucket.plan, None
        if plan is not None:
            optimizer._captured += [bound for bound in plan.tables if bound.captured]
            if plan.guarded:
                optimizer._masters.remember_versions(plan.guarded, plan.detector.versions())

    def _renew(self, optimizer: FusedOptimizer) -> None:
        """For new groups or states: drops all plans and reads the hyperparameters."""
        refuse_rebuilding()
        with torch.device("cpu"):
            optimizer._forget()
            optimizer._settle_masters()
            groups, rule = optimizer.param_groups, optimizer.rule
            validate(type(optimizer).__name__, rule, [{**group, "params": []} for group in groups], [], {})
            optimizer._keep_only(optimizer._all_params())
            self._arrange(optimizer)
            self._hparams = make_hparams(rule, groups, optimizer._scaler, optimizer._ema)
            self._looks = optimizer._scaler.looks_at(groups)
            self._watch_groups(optimizer)
        optimizer._on_cuda = any(local(param).device.type == "cuda" for param in optimizer._all_params())

    def _watch_groups(self, optimizer: FusedOptimizer) -> None:
        assert self._hparams is not None
        groups, state = optimizer.param_groups, optimizer.state
        self._watch = detect_changes(groups, state, optimizer.rule, self._hparams, [], [], [])
        self._watch.poll()
        self._watched = state, groups

    def _arrange(self, optimizer: FusedOptimizer) -> None:
        """Divides the params into buckets, unless they are already. Gradients come in the reverse order of the model's
        params. Params without a hook are updated by step() if they have a gradient then."""
        params = optimizer._all_params()
        hooked = [param for param in params if param.requires_grad and param.is_leaf]
        known = [param for bucket in self._buckets for param in bucket.params]
        if {*map(id, known)} == {*map(id, params)} and all(param in self._hooks for param in hooked):
            return
        for bucket in self._buckets:
            bucket.stale = True
        for hook, _ in self._hooks.values():  # are removed later: autograd may be going through a param's hooks now
            hook.bucket = None
        model = self._model()
        order = {id(param): -place for place, param in enumerate(model.parameters() if model is not None else ())}
        hooked.sort(key=lambda param: order.get(id(param), 1))
        self._buckets = [Bucket(part, len(part)) for part in divided(hooked, self.bucket_bytes)]
        for bucket in self._buckets:
            for param in bucket.params:
                if param not in self._hooks:
                    hook = Hook(self)
                    self._hooks[param] = hook, param.register_post_accumulate_grad_hook(hook)
                self._hooks[param][0].bucket = bucket
        rest = {*params} - {*hooked}
        self._buckets += [Bucket(part, 0) for part in divided([p for p in params if p in rest], self.bucket_bytes)]


def refuse_rebuilding() -> None:
    refuse_capture(
        "params cannot take their first step, or their first one with other params, states or groups,",
        "take one step before the capture",
    )


def release_gradients(
    model: nn.Module,
    optimizer: FusedOptimizer,
    *,
    bucket_bytes: int = BUCKET_BYTES,
    grad_scale: float | Tensor | None = None,
) -> GradientRelease:
    """Makes backward() update the params, bucket by bucket, as soon as all params of a bucket have their gradients, and
    free these gradients. The gradients of the whole model never exist at once. The training loop stays as it is:
    step() updates what is left, params in buckets of which some param had no gradient, and ends the step.

        release = release_gradients(model, optimizer)
        for batch in batches:
            loss(batch).backward()
            optimizer.step()

    Without clipping the results are those of plain steps, bit for bit. With max_grad_norm the norm of all gradients is
    not known when a bucket is updated. Its gradients are clipped by the larger of two norms: that of the whole last
    step, and that of the buckets of this step so far, its own gradients included. skip_nonfinite skips buckets with
    non-finite gradients; the others are updated.

    Args:
        model: the module whose params the optimizer has. Their order determines the buckets.
        optimizer: an optimizer of this package.
        bucket_bytes: the bytes of the params of a bucket, at most. A larger param has a bucket of its own.
        grad_scale: gradients are divided by it, as by step()'s. An attribute, which may be set before backward().

    Returns:
        A handle: `no_release()` is a context manager in which backward() accumulates gradients. `remove()` ends the
        release.

    Raises:
        TypeError: model is no module, or contains DistributedDataParallel or FullyShardedDataParallel, whose gradients
            are reduced later; or optimizer is none of this package.
        ValueError: bucket_bytes is no positive integer, or the optimizer has no param of the model.
        RuntimeError: the optimizer's gradients are released already, or it has a norm_group.
    """
    if not isinstance(optimizer, FusedOptimizer):
        raise TypeError(
            f"release_gradients() takes an optimizer of fused_optim, but got {type(optimizer).__name__}; make, for "
            "example, a FusedAdamW"
        )
    if not isinstance(model, nn.Module):
        raise TypeError(f"release_gradients() takes a torch.nn.Module, but got {type(model).__name__}")
    for module in model.modules():
        if reduces_late(module):
            raise TypeError(
                f"release_gradients() takes models whose gradients are complete when they arrive at their params, but "
                f"{type(module).__name__} reduces them later; shard the model with "
                "torch.distributed.fsdp.fully_shard"
            )
    if isinstance(bucket_bytes, bool) or not isinstance(bucket_bytes, int) or bucket_bytes < 1:
        raise ValueError(f"bucket_bytes must be a positive integer, but got {bucket_bytes!r}")
    if grad_scale is not None:
        check_grad_scale(grad_scale, optimizer.skip_nonfinite)
    if optimizer._release is not None:
        raise RuntimeError("the gradients of this optimizer are released already; call remove() of the first release")
    if optimizer.norm_group is not None:
        raise RuntimeError(
            "release_gradients() does not work with norm_group, whose processes hold other params and would wait for "
            "each other; shard the model with torch.distributed.fsdp.fully_shard, which needs no norm_group"
        )
    owned = {id(param) for param, *_ in members_of(optimizer.param_groups)}
    if not any(id(param) in owned for param in model.parameters()):
        raise ValueError("the optimizer has no param of the model; make it from model.parameters()")
    optimizer._forget()
    release = GradientRelease(model, optimizer, bucket_bytes, grad_scale)
    optimizer._release = release
    return release


def reduces_late(module: nn.Module) -> bool:
    """Whether the module reduces gradients over processes after autograd has accumulated them."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    kinds = [nn.parallel.DistributedDataParallel, *([fsdp.FullyShardedDataParallel] if fsdp is not None else [])]
    return isinstance(module, tuple(kinds))

"""FusedOptimizer: param groups, state, checkpoints and step() of every optimizer here. Subclasses name a rule."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from . import backends
from .device import DeviceTable
from .ema import Averaging, Decay, make_average
from .layout import check_grad, check_hyperparameter, check_param, conform, conform_step, make_row, make_states
from .scaling import Scaler, check_options
from .table import EMA_DECAY, Row, Rule, Scalars, Table
from .watch import REBUILD
from .watch import Watch as PythonWatch

# What copies and pickles hold besides torch's.
KEPT = ("backend", "state_dtype", "max_grad_norm", "_scaler", "_ema", "_steps")


class _Fork:
    """A forked child has none of its parent's OpenMP threads: torch, whose thread count the C++ step follows too,
    would wait for them for ever."""

    in_child = False

    @classmethod
    def remember(cls) -> None:
        cls.in_child = True

    @classmethod
    def heed(cls) -> None:
        torch.set_num_threads(1)
        cls.in_child = False


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_Fork.remember)


class _Uncast:
    """Carries a state through torch's load_state_dict, which would cast it to its param's dtype."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class FusedOptimizer(Averaging):
    """Base of the fused optimizers; stands before a torch.optim class, or alone, among the bases of one.

    Args:
        backend: "auto", "triton", "cuda", "cpp" or "reference" (see fused_optim.backends). A named one that cannot run
            the params is an error.
        state_dtype: dtype of the states of real params narrower than float64, e.g. float32 averages for bfloat16
            params; None: the param's own.
        max_grad_norm: every step multiplies the gradients it sees by min(1, max_grad_norm / (norm + 1e-6)), with the
            norm of all gradients together after unscaling; p.grad itself is left alone. None or 0: off. Groups may
            have their own, and those with None are neither clipped nor part of the norm.
        norm_type: 2 or inf.
        skip_nonfinite: a step whose gradients hold NaN or inf changes nothing.
        ema_decay: each update of a param also takes a moving average of the weights along, ema_decay * average +
            (1 - ema_decay) * param, which starts as a copy; see ema_weights. May be a function of the number of
            step() calls before, asked at each one. None: no averages.
        ema_dtype: dtype of the averages of real params narrower than float64; None: the param's own. In 16 bits an
            average stands still where decay is near 1.
        All else goes to the torch.optim class.

    Raises:
        ValueError: state_dtype, max_grad_norm, norm_type, ema_decay or ema_dtype is none of these.
        RuntimeError: the named backend cannot run here, or differentiable=True.
    """

    rule: ClassVar[Rule]
    _step_supports_amp_scaling = True  # GradScaler hands grad_scale and found_inf to step()

    def __init__(
        self,
        *args: Any,
        backend: str = "auto",
        state_dtype: torch.dtype | None = None,
        max_grad_norm: float | None = None,
        norm_type: float = 2.0,
        skip_nonfinite: bool = False,
        ema_decay: Decay | None = None,
        ema_dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        if state_dtype not in (None, torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(
                f"state_dtype must be None, torch.float32, torch.bfloat16 or torch.float16, but got {state_dtype}"
            )
        check_options(max_grad_norm, norm_type)
        self.backend = backend
        self.state_dtype = state_dtype
        self.max_grad_norm = max_grad_norm
        self._scaler = Scaler(norm_type, skip_nonfinite)
        self._ema = make_average(ema_decay, ema_dtype)
        self._steps: dict[Tensor, Tensor] = {}  # of params whose rule keeps no `step` in its states
        self._forget()
        super().__init__(*args, **kwargs)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        if self.max_grad_norm is not None:
            group.setdefault("max_grad_norm", self.max_grad_norm)
        if group.get("max_grad_norm") == 0:
            group["max_grad_norm"] = None  # the same, but a group with None is still looked at by skip_nonfinite
        try:
            if group.get("differentiable"):
                raise RuntimeError("`fused` does not support `differentiable`")
            for param in group["params"]:
                check_param(param)
                backends.pick(self.backend, param.device)
        except Exception:
            self.param_groups.pop()
            raise
        self._forget()

    @property
    def last_grad_norm(self) -> Tensor | None:
        """Of all gradients that are clipped (of all there are, where skip_nonfinite alone asks for it) in the last
        step, after unscaling and before clipping: float32 [], on the first param's device. None before the first such
        step."""
        return self._scaler.norm

    @property
    def skipped_steps(self) -> Tensor:
        """How many steps skip_nonfinite has skipped: int64 [], on the first param's device."""
        return self._scaler.skipped

    # ---- step

    def step(self, closure: Callable[[], Any] | None = None, grad_scale: float | Tensor | None = None) -> Any:
        """Updates every param that has a gradient: one launch per device.

        Args:
            closure: reevaluates the model, with grad enabled, and returns the loss.
            grad_scale: gradients are divided by it, and by GradScaler's scale besides: the number of micro-batches
                whose gradients were added up, say.

        Raises:
            RuntimeError: a gradient is sparse, or of another shape, dtype or device than its param allows. Nothing has
            been changed then.
        """
        if self._on_cuda:
            self._check_capture()
        if self._ema is not None:
            self._ema.begin()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()

        if _Fork.in_child:
            _Fork.heed()
        watched = self._watched_state is self.state and self._watched_groups is self.param_groups
        moved = self._watch.look() if watched else REBUILD
        if moved & REBUILD:
            self._rebuild()
            moved = 0  # new tables go to their device whole, when they are first used
        if self._ema is not None:
            moved |= self._ema.advance(self._tables)
        for table, backend in self._tables:
            backend.upload(table, moved)
            if table.copies:
                self._copy_in(table)
        given = self.__dict__  # GradScaler puts its two tensors here, and takes them away after the step
        scales = (given.get("grad_scale"), grad_scale)
        scalings = self._scaler(self._tables, self._looks, scales, given.get("found_inf"))
        for (table, backend), scaling in zip(self._tables, scalings, strict=True):
            backend.step(table, scaling)
        for table, backend in self._tables:
            if self.rule.trust:
                backend.move(table)
            if table.copies:
                self._copy_out(table)
        self._watch.done()
        return loss

    @staticmethod
    @torch.no_grad()
    def _copy_in(table: Table) -> None:
        for row in table.copies:
            row.target.copy_(row.param)

    @staticmethod
    @torch.no_grad()
    def _copy_out(table: Table) -> None:
        for row in table.copies:
            if row.param.grad is not None:
                row.param.copy_(row.target)

    def _check_capture(self) -> None:
        if "capturable" not in self.defaults:  # torch lets such optimizers be captured as they are
            return
        # The name before torch 2.10 is the second one.
        check = getattr(self, "_accelerator_graph_capture_health_check", None) or self._cuda_graph_capture_health_check
        check()

    # ---- tables

    def _forget(self) -> None:
        """Drops the tables: the next step looks at everything anew."""
        self._watch: Any = None
        self._watched_state: object = None
        self._watched_groups: object = None
        self._tables: list[tuple[Table, backends.Backend]] = []
        self._looks = False  # at all gradients, before the step
        self._on_cuda = True

    @torch.no_grad()
    def _rebuild(self) -> None:
        """New tables for what is there now. Checks first, then makes states, and installs both only when all has gone
        well."""
        self._keep_captured()
        self._forget()
        members = [(param, index, group) for index, group in enumerate(self.param_groups) for param in group["params"]]
        names = [
            name for group in self.param_groups for name in group.get("param_names", [None] * len(group["params"]))
        ]
        for (param, _, _), name in zip(members, names, strict=True):
            check_param(param)
            if param.grad is not None:
                check_grad(type(self).__name__, param, param.grad, name)

        for group in self.param_groups:
            for key, _, count, optional, _ in self.rule.columns:
                if not optional or group.get(key) is not None:
                    check_hyperparameter(key, group[key], count)

        rows: list[Row] = []
        pending: list[Tensor] = []
        fresh: dict[Tensor, dict[str, Any]] = {}
        steps: dict[Tensor, Tensor] = {}
        averages: dict[Tensor, Tensor] = {}
        for param, index, group in members:
            state = self.state.get(param, {})
            if param.grad is None and not state and param not in self._steps:
                pending.append(param)
                continue
            wanted = self.rule.states_of(group)
            fresh[param] = conform(param, state, wanted)
            made = make_states(param, fresh[param], wanted, self.state_dtype)
            steps[param] = conform_step(param, self._step_of(param, state, begun=not made))
            fresh[param].update(made)
            rows.append(make_row(param, fresh[param], wanted, steps[param], index))
            if self._ema is not None:
                averages[param] = self._ema.join(rows[-1])
            if self.rule.counted:
                fresh[param] = {"step": steps[param], **fresh[param]}

        max_norm = self._scaler.bound_without_key(self.param_groups)
        scalars = Scalars(len(self.param_groups), self.rule.clip_eps, max_norm)
        if self._ema is not None:
            scalars.raw[:, EMA_DECAY] = self._ema.current
        by_device: dict[torch.device, list[Row]] = {}
        for row in rows:
            by_device.setdefault(row.param.device, []).append(row)
        looks = self._scaler.looks_at(self.param_groups)
        tables = [
            (Table(self.rule, device, members_, scalars, looks), backends.pick(self.backend, device))
            for device, members_ in by_device.items()
        ]

        if self._ema is not None:
            self._ema.tensors.update(averages)
        for row in rows:  # the state dicts stay the same objects, which others may hold
            if fresh[row.param]:
                row.state = self.state[row.param]
                row.state.update(fresh[row.param])
            else:
                row.state = self.state.get(row.param, {})
        if not self.rule.counted:
            self._steps.update(steps)
        extension = backends.extension()
        watch: Any = (PythonWatch if isinstance(extension, str) else extension.Watch)(
            self.param_groups, self.state, self.rule.columns, scalars.raw, scalars.lr
        )
        for param in pending:
            watch.add_pending(param)
        for table, _ in tables:
            for number, row in enumerate(table.rows_list):
                watch.add_row(row.param, row.target, row.state, row.grad_dtype, table.grads, number)
        if watch.look() & REBUILD:
            raise RuntimeError(
                "params, gradients or states changed while the step was being prepared; was another thread at them?"
            )
        self._watch, self._tables, self._looks = watch, tables, looks
        self._watched_state, self._watched_groups = self.state, self.param_groups
        self._on_cuda = any(table.device.type == "cuda" for table, _ in tables)

    def _step_of(self, param: Tensor, state: dict[str, Any], begun: bool) -> Any:
        """How many updates the param has had. Where that is no state, it is enough to know whether there was one: a
        loaded optimizer has begun with a param whose states it has."""
        if self.rule.counted:
            return state.get("step", 0.0)
        return self._steps.get(param, 1.0 if state else 0.0) if begun else 0.0

    def _keep_captured(self) -> None:
        """A captured graph goes on reading the tables it was captured with."""
        kept = [
            table for table, _ in self._tables if isinstance(table.on_device, DeviceTable) and table.on_device.captured
        ]
        self.__dict__.setdefault("_captured", []).extend(kept)

    # ---- checkpoints

    def __getstate__(self) -> dict[str, Any]:
        ours = {key: self.__dict__[key] for key in KEPT}
        return {**super().__getstate__(), **ours}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Before torch's class looks: it makes a tensor of a `step` that is none.
        for values in state["state"].values():
            if isinstance(values, dict):
                values.update({key: value.tensor for key, value in values.items() if isinstance(value, _Uncast)})
        defaults = dict(state.get("defaults") or self.defaults)  # before torch's class puts options of its own in
        super().__setstate__(state)
        self.__dict__.setdefault("backend", "auto")
        self.__dict__.setdefault("state_dtype", None)
        self.__dict__.setdefault("max_grad_norm", None)
        self.__dict__.setdefault("_scaler", Scaler())
        self.__dict__.setdefault("_ema", None)
        self.__dict__.setdefault("_steps", {})
        for group in self.param_groups:
            for key, value in defaults.items():
                group.setdefault(key, value)
        self._forget()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a checkpoint of this class, or of torch's class of the same rule.

        States keep the dtype that they were saved in, `step` may be a number or a tensor of any device, and options
        that the saved groups lack keep this optimizer's values. Errors are torch's.
        """

        def protect(_: Optimizer, incoming: dict[str, Any]) -> dict[str, Any]:
            states = {
                key: {k: _Uncast(v) if isinstance(v, Tensor) else v for k, v in value.items()}
                if isinstance(value, dict)
                else value
                for key, value in incoming["state"].items()
            }
            groups = incoming["param_groups"]
            if len(groups) == len(self.param_groups):
                ours = (
                    {k: v for k, v in group.items() if k not in ("params", "param_names")}
                    for group in self.param_groups
                )
                groups = [{**options, **group} for options, group in zip(ours, groups, strict=True)]
            return {**incoming, "state": states, "param_groups": groups}

        handle = self.register_load_state_dict_pre_hook(protect)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
        self._steps.clear()

    def load_ema_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        super().load_ema_state_dict(state_dict)
        self._forget()  # the tables have the addresses of others

    def state_dict(self) -> dict[str, Any]:
        """As torch's. A state that no update has reached yet (each was skipped) is left out where torch would not have
        made it."""
        begun = [param for param, step in self._steps.items() if self.state.get(param)]
        waiting = [param for param, step in zip(begun, self._counts(begun), strict=True) if step == 0]

        def leave_out(_: Optimizer, packed: dict[str, Any]) -> dict[str, Any]:
            params = [param for group in self.param_groups for param in group["params"]]
            unreached = {index for index, param in enumerate(params) if any(param is other for other in waiting)}
            return {**packed, "state": {k: v for k, v in packed["state"].items() if k not in unreached}}

        if not waiting:
            return super().state_dict()
        handle = self.register_state_dict_post_hook(leave_out, prepend=True)
        try:
            return super().state_dict()
        finally:
            handle.remove()

    def _counts(self, params: list[Tensor]) -> list[float]:
        return [float(count) for count in torch.stack([self._steps[p].cpu() for p in params])] if params else []

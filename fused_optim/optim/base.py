"""FusedOptimizer: param groups, state, checkpoints and step() of every optimizer here. Subclasses name a rule."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.compiler import is_dynamo_compiling

from .. import backends
from ..backends import device_tables as devices
from ..backends.trial import choose
from ..engine.changes import REBUILD, watch_over
from ..engine.checkpoints import Checkpoints
from ..engine.dtensor import Groups, groups_of, is_sharded, local, reduce_over
from ..engine.ema import Averaging, Decay, check_dtype, make_average
from ..engine.forks import heed_fork
from ..engine.scaling import Scaler
from ..engine.table import EMA_DECAY, Row, Rule, Scalars, Table
from ..engine.validation import (
    check_grad,
    check_hyperparameter,
    check_param,
    conform,
    conform_step,
    make_row,
    make_states,
    may_get_grad,
)
from .options import (
    BackendName,
    Options,
    check_grad_scale,
    check_group,
    check_keywords,
    check_max_grad_norm,
    check_norm_type,
)

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class FusedOptimizer(Options, Averaging, Checkpoints):
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
        skip_nonfinite: a step that would see NaN or inf in its gradients changes nothing, be they there from the start
            or made by the division by grad_scale.
        norm_group: processes that hold other gradients of the same model in plain tensors (ZeroRedundancyOptimizer,
            FSDP1's flat params): the norm goes over all of them. That of DTensors always goes over all their shards.
        ema_decay: each update of a param also takes a moving average of the weights along, ema_decay * average +
            (1 - ema_decay) * param, which starts as a copy; see ema_weights. May be a function of the number of
            step() calls before, asked at each one. None: no averages.
        ema_dtype: dtype of the averages of real params narrower than float64; None: float32. In 16 bits an average
            stands still where decay is near 1.

    All other arguments go to the torch.optim class. These options are attributes, too. A new value holds from the next
    step on; norm_group cannot be set.

    Raises:
        ValueError: state_dtype, max_grad_norm, norm_type, ema_decay or ema_dtype is none of these.
        TypeError: a keyword argument that the class does not have.
        RuntimeError: the named backend cannot run here, or differentiable=True.
    """

    rule: ClassVar[Rule]
    _uncompiled_step: ClassVar[Any] = None  # step() with torch.compile disabled: a graph breaks here
    _step_supports_amp_scaling = True  # GradScaler hands grad_scale and found_inf to step()

    @_disable_dynamo  # as torch's constructor: where a graph breaks in it, what was set before would be gone
    def __init__(
        self,
        *args: Any,
        backend: BackendName = "auto",
        state_dtype: torch.dtype | None = None,
        max_grad_norm: float | None = None,
        norm_type: float = 2.0,
        skip_nonfinite: bool = False,
        norm_group: ProcessGroup | None = None,
        ema_decay: Decay | None = None,
        ema_dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        check_keywords(type(self), kwargs)
        backends.check_name(backend)
        check_dtype(state_dtype, "state_dtype")
        check_max_grad_norm(max_grad_norm)
        check_norm_type(norm_type)
        self._backend = backend
        self._state_dtype = state_dtype
        self._max_grad_norm = max_grad_norm
        self._scaler = Scaler(norm_type, skip_nonfinite, norm_group)
        self._ema = make_average(ema_decay, ema_dtype)
        self._steps: dict[Tensor, Tensor] = {}  # of params whose rule keeps no `step` in its states
        self._forget()
        super().__init__(*args, **kwargs)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        check_group(param_group, self)
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        if self._max_grad_norm is not None:
            group.setdefault("max_grad_norm", self._max_grad_norm)
        if group.get("max_grad_norm") == 0:
            group["max_grad_norm"] = None  # the same, but a group with None is still looked at by skip_nonfinite
        try:
            if group.get("differentiable"):
                raise RuntimeError("`fused` does not support `differentiable`")
            check_max_grad_norm(group.get("max_grad_norm"))
            for param in group["params"]:
                if may_get_grad(param):
                    check_param(param)
                    backends.pick(self._backend, local(param).device)
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
        """How many steps skip_nonfinite has skipped: int64 [], on the first param's device. A new tensor each time."""
        return self._scaler.skipped.clone()

    # ---- step

    def step(self, closure: Callable[[], Any] | None = None, grad_scale: float | Tensor | None = None) -> Any:
        """Updates every param that has a gradient: one launch per device.

        Args:
            closure: reevaluates the model, with grad enabled, and returns the loss.
            grad_scale: gradients are divided by it, and by GradScaler's scale besides: the number of micro-batches
                whose gradients were added up, say. A number above 0, or a one-element tensor, which is read on its
                device. With skip_nonfinite a step whose grad_scale is 0, NaN or inf is skipped.

        Raises:
            ValueError: grad_scale is a number that cannot be divided by, or a tensor of several elements.
            TypeError: grad_scale is neither a number nor a tensor.
            RuntimeError: a gradient is sparse, or of another shape, dtype or device than its param allows. Nothing has
                been changed then.
        """
        if is_dynamo_compiling():  # tracing would recompile for each value of lr and gain nothing
            loss = None
            if closure is not None:
                with torch.enable_grad():
                    loss = closure()
            self._uncompiled_step(grad_scale=grad_scale)
            return loss
        if grad_scale is not None:
            check_grad_scale(grad_scale, self._scaler.skip_nonfinite)
        if self._on_cuda:
            self._check_capture()
        if self._ema is not None:
            self._ema.begin()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()

        heed_fork()
        averaged = 0 if self._ema is None else self._ema.steps
        try:
            scalings = self._prepare(grad_scale)
        except BaseException:
            if self._ema is not None:
                self._ema.steps = averaged
            self._forget()  # the devices may not know what has moved; new tables bring it over
            raise
        self._walk(scalings)
        return loss

    def _prepare(self, grad_scale: float | Tensor | None) -> list[backends.Scaling]:
        """All that comes before the first change of a param or state."""
        watched = self._watched_state is self.state and self._watched_groups is self.param_groups
        moved = self._watch.look() if watched else REBUILD
        if moved & REBUILD:
            with torch.device("cpu"):  # of the host's arrays, whatever torch.set_default_device says
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
        return self._scaler(self._tables, self._looks, scales, given.get("found_inf"))

    def _walk(self, scalings: Sequence[backends.Scaling]) -> None:
        """One walk over every table, or two.

        Raises:
            RuntimeError: a walk has failed; says what has been changed.
        """
        fates = ["unchanged"] * len(self._tables)
        try:
            for number, ((table, backend), scaling) in enumerate(zip(self._tables, scalings, strict=True)):
                fates[number] = "perhaps changed in part"
                backend.step(table, scaling)
                fates[number] = "states and step counts updated, params not"
                if not self.rule.trust:
                    self._finish(table, fates, number)
            if self.rule.trust:
                self._sum_over_processes()
                for number, (table, backend) in enumerate(self._tables):
                    backend.move(table)
                    self._finish(table, fates, number)
        except BaseException as error:
            found = "; ".join(f"{table.device}: {fate}" for (table, _), fate in zip(self._tables, fates, strict=True))
            text = (
                f"a step has ended before it was complete ({type(error).__name__}: {error}). Tensors on {found}. Load "
                "a checkpoint to go on"
            )
            if isinstance(error, Exception):
                raise RuntimeError(text) from error
            warnings.warn(text, stacklevel=3)
            raise
        finally:
            self._watch.done()

    def _finish(self, table: Table, fates: list[str], number: int) -> None:
        if table.copies:
            self._copy_out(table)
        fates[number] = "updated"

    @staticmethod
    @torch.no_grad()
    def _copy_in(table: Table) -> None:
        for row in table.copies:
            row.target.copy_(row.shard)

    @staticmethod
    @torch.no_grad()
    def _copy_out(table: Table) -> None:
        for row in table.copies:
            if row.param.grad is not None:
                row.shard.copy_(row.target)

    def _sum_over_processes(self) -> None:
        """The squares that trust ratios are made of, where tensors are spread over processes."""
        for table, _ in self._tables:
            if table.groups and table.sums is not None:
                (total,) = reduce_over([table.sums], [table.groups])
                table.sums.copy_(total)

    def _check_capture(self) -> None:
        if "capturable" not in self.defaults:  # torch lets such optimizers be captured as they are
            return
        # The name before torch 2.10 is the second one.
        check = getattr(self, "_accelerator_graph_capture_health_check", None) or self._cuda_graph_capture_health_check
        check()

    # ---- tables

    def _forget(self) -> None:
        """Drops the tables: the next step looks at everything anew."""
        if FusedOptimizer._uncompiled_step is None:  # not sooner: it imports Dynamo, as torch's constructor does
            FusedOptimizer._uncompiled_step = torch.compiler.disable(
                FusedOptimizer.step, reason="a fused optimizer's step is a kernel of its own, which nothing can enter"
            )
        self._captured: list[Table] = self.__dict__.get("_captured", [])  # a graph goes on reading its tables
        self._captured += [table for table, _ in self.__dict__.get("_tables", ()) if devices.was_captured(table)]
        self._watch: Any = None
        self._watched_state: object = None
        self._watched_groups: object = None
        self._tables: list[tuple[Table, backends.Backend]] = []
        self._looks = False  # at all gradients, before the step
        self._on_cuda = True

    @torch.no_grad()
    def _rebuild(self) -> None:
        """New tables for what is there now. Checks first, then makes states, and installs both only when all has gone
        well.

        Raises:
            RuntimeError: a CUDA graph is being captured: its replays would make the states anew every time.
        """
        devices.refuse_capture(
            "an optimizer cannot take its first step, or its first one with other params, states or groups,",
            "take one step before the capture",
        )
        self._forget()
        members = [(param, index, group) for index, group in enumerate(self.param_groups) for param in group["params"]]
        for (param, _, _), name in zip(members, self._all_names(), strict=True):
            if param.grad is not None or self.state.get(param):
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
            made = make_states(param, fresh[param], wanted, self._state_dtype)
            steps[param] = conform_step(param, self._step_of(param, state, begun=not made))
            fresh[param].update(made)
            rows.append(make_row(param, fresh[param], wanted, steps[param], index))
            if self._ema is not None:
                averages[param] = self._ema.join(rows[-1], self._steps.get(param) if made else None)
            if self.rule.counted:
                fresh[param] = {"step": steps[param], **fresh[param]}

        max_norm = self._scaler.bound_without_key(self.param_groups)
        scalars = Scalars(len(self.param_groups), self.rule.clip_eps, max_norm)
        if self._ema is not None:
            scalars.raw[:, EMA_DECAY] = self._ema.current
        looks = self._scaler.looks_at(self.param_groups)
        sums = looks or self.rule.trust  # then those that are summed over the same processes have a table of their own
        by_place: dict[tuple[torch.device, bool, Groups], list[Row]] = {}
        for row in rows:
            groups = groups_of(row.param) if sums else ()
            alone = self._scaler.norm_group is not None and is_sharded(row.param)
            by_place.setdefault((row.shard.device, alone, groups), []).append(row)
        made_tables = [
            Table(self.rule, device, members_, scalars, looks, groups)
            for (device, _, groups), members_ in by_place.items()
        ]
        tables = [(table, choose(self._backend, table)) for table in made_tables]

        if self._ema is not None:
            self._ema.tensors.update(averages)
            self._ema.keep_only(param for param, _, _ in members)
        for row in rows:  # the state dicts stay the same objects, which others may hold
            if fresh[row.param]:
                row.state = self.state[row.param]
                row.state.update(fresh[row.param])
            else:
                row.state = self.state.get(row.param, {})
        if not self.rule.counted:
            counted = {**self._steps, **steps}
            self._steps = {param: counted[param] for param, _, _ in members if param in counted}
        watched = [table for table, _ in tables if not table.is_meta]
        watch = watch_over(self.param_groups, self.state, self.rule, scalars, pending, watched)
        if watch.look() & REBUILD:
            raise RuntimeError(
                "params, gradients or states changed while the step was being prepared; was another thread at them?"
            )
        self._watch, self._tables, self._looks = watch, tables, looks
        # Nothing watches params on meta: with one of them every step looks at all params anew.
        self._watched_state = None if any(table.is_meta for table, _ in tables) else self.state
        self._watched_groups = self.param_groups
        self._on_cuda = any(table.device.type == "cuda" for table, _ in tables)

    def _step_of(self, param: Tensor, state: dict[str, Any], begun: bool) -> Any:
        """How many updates the param has had. Where that is no state, it is enough to know whether there was one: a
        loaded optimizer has begun with a param whose states it has."""
        if self.rule.counted:
            return state.get("step", 0.0)
        return self._steps.get(param, 1.0 if state else 0.0) if begun else 0.0

    def release_captured(self) -> None:
        """Frees what is kept for CUDA graphs in which steps of this optimizer were captured: tables, pinned buffers,
        and states that have been replaced since. Without this call they live as long as the optimizer. Call it when
        none of these graphs will be replayed again. It waits for the device.

        Raises:
            RuntimeError: a CUDA graph is being captured.
        """
        devices.release([*self._captured, *(table for table, _ in self._tables)])
        self._captured.clear()

    def load_ema_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        super().load_ema_state_dict(state_dict)
        self._forget()  # the tables have the addresses of others

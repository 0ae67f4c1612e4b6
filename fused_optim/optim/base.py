"""FusedOptimizer: param groups, states, checkpoints and step() of every optimizer. Subclasses name a rule."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.compiler import is_dynamo_compiling

from .. import backends
from ..backends.device_tables import release
from ..engine.backend import Backend, Scaling
from ..engine.build import make_eager_states
from ..engine.changes import RAW_CHANGED, REBUILD
from ..engine.dtensor import local
from ..engine.ema import Decay, make_average
from ..engine.forks import reset_threads_after_fork
from ..engine.graphs import refuse_capture
from ..engine.masters import Kind, MasterWeights
from ..engine.masters import check_param as check_master
from ..engine.scaling import Scaler
from ..engine.state_formats import StateDtype, check_betas, check_state_dtype
from ..engine.table import Rule
from ..engine.validation import check_param, may_get_grad
from ..engine.walk import copy_in, walk
from .options import (
    BackendName,
    Rounding,
    check_grad_scale,
    check_group,
    check_keywords,
    check_max_grad_norm,
    check_norm_type,
    check_rounding,
)
from .plans import make_plan
from .saved import Saved

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class FusedOptimizer(Saved):
    """Base of the fused optimizers; stands before a torch.optim class, or alone, among the bases of one.

    Args:
        backend: "auto", "triton", "cuda", "cpp" or "reference" (see fused_optim.backends). A named one that cannot run
            the params is an error.
        state_dtype: how states of real params narrower than float64 are stored: a dtype, e.g. torch.float32 averages
            for bfloat16 params; "compact": exp_avg in 1 byte, exp_avg_sq and max_exp_avg_sq in 2, and states of
            optimizers without exp_avg_sq in bfloat16, all with dithered rounding; or a dict from names of states to
            dtypes, "e8m8" (exp_avg_sq in 2 bytes) or "anchored8" (exp_avg in 1 byte). None: the param's own dtype, and
            float32 where it has master weights. Groups may have their own.
        master_weights: "exact": bfloat16 params are the upper halves of float32 weights, whose lower halves are in
            `state[param]["param_low"]` (int16). Steps are those of float32 params, bit for bit; see master_params and
            lower_params. float32 params need none and have none. "24bit": of the lower half only the upper eight bits
            (int8), with dithered rounding. None: no master weights.
        rounding: of 16-bit params without master weights, and of 16-bit states and averages of the weights: "nearest",
            or "dithered", bfloat16 alone: up or down by a threshold that is a function of the element's index and of
            the step, so that small updates are not lost. The same bits at every run.
        max_grad_norm: every step multiplies the gradients it sees by min(1, max_grad_norm / (norm + 1e-6)), with the
            norm of all gradients together after unscaling; p.grad itself is left alone. None and 0 switch clipping off;
            0 does not make the gradients 0, as it does in torch.nn.utils.clip_grad_norm_. Groups may have their own,
            and those with None or 0 are neither clipped nor part of the norm.
        norm_type: the norm that max_grad_norm bounds: 2 or math.inf.
        skip_nonfinite: a step that would see NaN or inf in its gradients changes nothing, be they there from the start
            or made by the division by grad_scale.
        norm_group: processes that hold other gradients of the same model in plain tensors (ZeroRedundancyOptimizer,
            FSDP1's flat params): the norm goes over all of them. That of DTensors always goes over all their shards.
        ema_decay: each update of a param also takes a moving average of the weights along, ema_decay * average +
            (1 - ema_decay) * param, which starts as a copy; see ema_weights. It is the state "ema". May be a function
            of the number of step() calls before, asked at each one. None: no averages.
        ema_dtype: dtype of the averages of real params narrower than float64; None: float32. In 16 bits an average
            stands still where decay is near 1.

    All other arguments go to the torch.optim class. These options are attributes, too. A new value holds from the next
    step on; norm_group and master_weights cannot be set.

    Raises:
        ValueError: state_dtype, master_weights, rounding, max_grad_norm, norm_type, ema_decay or ema_dtype is none of
            these.
        TypeError: a keyword argument that the class does not have, or a float16 param with master_weights.
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
        state_dtype: StateDtype = None,
        master_weights: Kind | None = None,
        rounding: Rounding = "nearest",
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
        check_state_dtype(state_dtype, self.rule)
        check_rounding(rounding)
        check_max_grad_norm(max_grad_norm)
        check_norm_type(norm_type)
        self._backend = backend
        self._state_dtype = state_dtype
        self._rounding = rounding
        self._masters = MasterWeights(master_weights)
        self._max_grad_norm = max_grad_norm
        self._scaler = Scaler(norm_type, skip_nonfinite, norm_group)
        self._ema = make_average(ema_decay, ema_dtype)
        self._steps: dict[Tensor, Tensor] = {}  # of params whose rule keeps no `step` in its states
        self._forget()
        super().__init__(*args, **kwargs)
        if self.rule.eager:  # once more: torch's constructor has made its own
            for group in self.param_groups:
                make_eager_states(self.rule, group, self.state, state_dtype, self._masters)

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
            stored = group.get("state_dtype", self._state_dtype)
            check_state_dtype(stored, self.rule)
            check_betas(stored, self.rule.of(group), group.get("betas"))
            for param in group["params"]:
                if may_get_grad(param):
                    check_param(param)
                    check_master(param, self._masters.kind)
                    backends.pick(self._backend, local(param).device)
        except Exception:
            self.param_groups.pop()
            raise
        if self.rule.eager:
            make_eager_states(self.rule, group, self.state, self._state_dtype, self._masters)
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
        """Updates every param that has a gradient. On each GPU this takes two launches, prepare and update; clipping
        adds two or three, LAMB three.

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
        if self._release is not None:
            return self._release.end_step(closure, grad_scale)
        if self._on_cuda:
            self._check_capture()
        self._begin()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()

        reset_threads_after_fork()
        averaged = 0 if self._ema is None else self._ema.steps
        try:
            scalings = self._prepare(grad_scale)
        except BaseException:
            if self._ema is not None:
                self._ema.steps = averaged
            self._forget()  # the devices may lack changes; new tables bring them
            raise
        try:
            walk(self._tables, scalings)
        finally:
            self._detector.done()
        return loss

    def _prepare(self, grad_scale: float | Tensor | None) -> list[Scaling]:
        """Everything before the first change of a param or state."""
        watched = self._watched_state is self.state and self._watched_groups is self.param_groups
        changes = self._detector.poll() if watched else REBUILD
        if changes & REBUILD or (changes & RAW_CHANGED and self._anchors.outgrown()):
            with torch.device("cpu"):  # the arrays are on the host, whatever torch.set_default_device says
                self._rebuild()
            changes = 0  # new tables go to their device whole, when they are first used
        if self._ema is not None:
            changes |= self._ema.advance(self._tables[0].table.hparams if self._tables else None)
        for bound in self._tables:
            bound.upload(changes)
            if bound.table.copies:
                copy_in(bound.table)
        given = self.__dict__  # GradScaler puts its two tensors here, and takes them away after the step
        scales = (given.get("grad_scale"), grad_scale)
        return self._scaler(self._tables, self._looks, scales, given.get("found_inf"))

    def _begin(self) -> None:
        """Before everything else in a step. Raises an error if no step can be taken now."""
        if self._ema is not None:
            self._ema.begin()

    def _check_capture(self) -> None:
        if "capturable" not in self.defaults:  # torch lets such optimizers be captured as they are
            return
        # The name before torch 2.10 is the second one.
        check = getattr(self, "_accelerator_graph_capture_health_check", None) or self._cuda_graph_capture_health_check
        check()

    # ---- tables

    def _forget(self) -> None:
        """Drops the tables. The next step builds new ones."""
        if FusedOptimizer._uncompiled_step is None:  # not sooner: it imports Dynamo, as torch's constructor does
            FusedOptimizer._uncompiled_step = torch.compiler.disable(
                FusedOptimizer.step, reason="a fused optimizer's step is a kernel of its own, which nothing can enter"
            )
        # CUDA graphs keep reading their tables.
        self._captured: list[Backend] = self.__dict__.get("_captured", [])
        self._captured += [bound for bound in self.__dict__.get("_tables", ()) if bound.captured]
        if self.__dict__.get("_guarded"):
            self._masters.remember_versions(self._guarded, self._detector.versions())
        self._guarded = []
        if self._release is not None:
            self._release.forget()
        self._detector: Any = None
        self._watched_state: object = None
        self._watched_groups: object = None
        self._tables: list[Backend] = []
        self._looks = False  # at all gradients, before the step
        self._on_cuda = True

    def _rebuild(self) -> None:
        """Builds tables for the present params, gradients, states and groups: validates, builds states, builds tables.
        They are installed only if all of this succeeds.

        Raises:
            RuntimeError: a CUDA graph is being captured. Every replay would make the states again.
        """
        refuse_capture(
            "an optimizer cannot take its first step, or its first one with other params, states or groups,",
            "take one step before the capture",
        )
        self._forget()
        self._settle_masters()
        plan = make_plan(self, self.param_groups)
        self._keep_only(self._all_params())
        self._detector, self._tables, self._guarded = plan.detector, plan.tables, plan.guarded
        self._looks, self._anchors = self._scaler.looks_at(self.param_groups), plan.anchors
        # Params on meta cannot be watched: with one of them every step builds new tables.
        self._watched_state = None if plan.is_meta else self.state
        self._watched_groups = self.param_groups
        self._on_cuda = plan.on_cuda

    def _keep_only(self, params: list[Tensor]) -> None:
        """Forgets what is known of all other params."""
        if self._ema is not None:
            self._ema.keep_only(params)
        self._masters.keep_only(params)
        self._steps = {param: self._steps[param] for param in params if param in self._steps}

    def _all_tables(self) -> list[Backend]:
        return [*self._tables, *(() if self._release is None else self._release.tables())]

    def release_captured(self) -> None:
        """Frees what is kept for CUDA graphs in which steps of this optimizer were captured: tables, pinned buffers,
        and states that have been replaced since. Without this call they live as long as the optimizer. Call it when
        none of these graphs will be replayed again. It waits for the device.

        Raises:
            RuntimeError: a CUDA graph is being captured.
        """
        release([*self._captured, *self._all_tables()])
        self._captured.clear()

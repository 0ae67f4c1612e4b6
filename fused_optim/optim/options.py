"""The options that every optimizer has in addition to torch's: their types, checks and attributes."""

from __future__ import annotations

import difflib
import functools
import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from numbers import Real
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypedDict, get_args

import torch
from torch import Tensor
from torch.optim import Optimizer

from .. import backends
from ..backends import BackendName
from ..engine.dtensor import local
from ..engine.ema import Decay, WeightAverage, check_dtype, drop_averages
from ..engine.masters import Kind, MasterWeights
from ..engine.scaling import Scaler, Shared
from ..engine.state_formats import StateDtype, check_betas, check_state_dtype
from ..engine.table import Rule
from ..engine.validation import may_get_grad

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Convention = Literal["torch", "paper", "normalized"]
Rounding = Literal["nearest", "dithered"]


class Whole(TypedDict, total=False):
    """Keyword arguments of every class, in addition to its own. FusedOptimizer describes them in full."""

    backend: BackendName
    """Default "auto": the first backend that works on the params. A backend that is named must work."""
    state_dtype: StateDtype
    """Default None: states have their param's dtype. A dtype, "compact", or a dict from states to dtypes, "e8m8" or
    "anchored8"."""
    master_weights: Kind | None
    """Default None. "exact" or "24bit": bfloat16 params have master weights."""
    rounding: Rounding
    """Default "nearest". "dithered": bfloat16 params without master weights, states and averages keep small updates."""
    norm_type: float  # a Literal cannot hold inf, and 2.0 and 2 are both 2
    """Default 2.0: the norm that max_grad_norm bounds. 2 or math.inf."""
    skip_nonfinite: bool
    """Default False. If True, a step whose gradients contain NaN or inf changes nothing."""
    norm_group: ProcessGroup | None
    """Default None. Processes with other gradients of the same model in plain tensors (ZeRO, FSDP1)."""
    ema_decay: float | Callable[[int], float] | None
    """Default None: no average of the weights. A number from 0 to 1, or a function of the number of step() calls."""
    ema_dtype: torch.dtype | None
    """Default None: averages of float32 and 16-bit params are float32."""


class Common(Whole, total=False):
    """The same with max_grad_norm, for all classes but LAMB, which declares max_grad_norm itself."""

    max_grad_norm: float | None
    """Default None: no clipping, as with 0. Otherwise the largest norm of all gradients together."""


class Decayed(Common, total=False):
    """The same for the classes with decoupled decay. fused_optim.decay.Decoupled describes the additions in full."""

    decay: Convention
    """Default "torch": lr * weight_decay per step. "paper" and "normalized" use lr / lr_reference in place of lr."""
    lr_reference: float | None
    """Default None: each group's initial lr. "paper" and "normalized" divide lr by it."""
    decay_period: float | None
    """Default None. The number of updates in the current restart period; required by decay="normalized"."""
    corrected_decay: bool
    """Default False. If True, the decay is multiplied by lr over the largest lr so far."""
    cautious_decay: bool
    """Default False. If True, only elements that the update moves towards 0 are decayed."""


# Options of the whole optimizer, which a param group cannot set.
OF_THE_WHOLE = (*(key for key in Whole.__annotations__ if key != "state_dtype"), "decay")


# ---- checks


def check_max_grad_norm(bound: Any) -> None:
    if bound is not None and not (isinstance(bound, Real | Tensor) and float(bound) >= 0.0):
        raise ValueError(f"max_grad_norm must be 0 or more, or None for no clipping, but got {bound!r}")


def check_rounding(rounding: Any) -> None:
    if rounding not in get_args(Rounding):
        raise ValueError(f'rounding must be "nearest" or "dithered", but got {rounding!r}')


def check_norm_type(norm_type: Any) -> None:
    if norm_type not in (2, math.inf):
        raise ValueError(f"norm_type must be 2 or inf, but got {norm_type!r}")


def check_group(group: Mapping[str, Any], optimizer: Options) -> None:
    """Raises ValueError if a group has another value for an option of the whole optimizer. The same value is accepted,
    because ZeroRedundancyOptimizer writes all options into its groups."""
    for key in OF_THE_WHOLE:
        if key in group and group[key] != getattr(optimizer, key, OF_THE_WHOLE):
            raise ValueError(
                f"a param group cannot have {key} of its own, because {key} is an option of the whole optimizer; "
                f"remove it from the group and pass it to {type(optimizer).__name__}(...)"
            )


def check_grad_scale(scale: Any, may_skip: bool) -> None:
    """Raises TypeError or ValueError if the grad_scale of a step is not a positive number. The values of tensors are
    not checked, because that would wait for the device. may_skip: 0, NaN and inf are accepted; the step is skipped."""
    if isinstance(scale, Tensor):
        if scale.numel() != 1 or scale.is_complex() or scale.dtype == torch.bool:
            raise ValueError(
                "grad_scale must be a number or a one-element tensor of a real dtype, but is a tensor of shape "
                f"{tuple(scale.shape)} and {scale.dtype}; pass the one number that all gradients are divided by"
            )
        return
    if not isinstance(scale, Real) or isinstance(scale, bool):
        raise TypeError(
            f"grad_scale must be a number or a one-element tensor, but got {scale!r}; pass the number that gradients "
            "are divided by, such as the number of micro-batches"
        )
    largest = torch.finfo(torch.float32).max
    usable = 1.0 / largest <= float(scale) <= largest
    if not usable and (float(scale) < 0 or not may_skip):
        raise ValueError(
            f"grad_scale must be a finite float32 number above 0, whose reciprocal is finite, but got {scale!r}; skip "
            "this step, or pass skip_nonfinite=True to the optimizer, which skips such steps"
        )


@functools.cache
def accepted(kind: type) -> tuple[str, ...]:
    """The names of the arguments in the constructors of a class and its bases."""
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    found = {
        name: None
        for base in kind.__mro__
        if "__init__" in vars(base) and base is not object
        for name, parameter in inspect.signature(vars(base)["__init__"]).parameters.items()
        if parameter.kind in named
    }
    return tuple(found)


def signature_of(kind: type) -> inspect.Signature:
    """The signature of a class's constructor, in which `**ours: Unpack[...]` is replaced by its options."""
    _, *named = inspect.signature(vars(kind)["__init__"]).parameters.values()
    if not (named and str(named[-1].annotation).startswith("Unpack[")):
        return inspect.Signature(named)
    found = {parameter.name: parameter for parameter in named[:-1]}
    for base in kind.__mro__[1:]:
        if issubclass(base, Options) and "__init__" in vars(base):
            for name, parameter in inspect.signature(vars(base)["__init__"]).parameters.items():
                if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
                    found.setdefault(name, parameter)
    return inspect.Signature([*found.values()])


def check_keywords(kind: type, given: Iterable[str]) -> None:
    """Raises TypeError for a keyword argument that no constructor of the class has."""
    for name in given:
        if name not in accepted(kind):
            close = difflib.get_close_matches(name, accepted(kind), n=1)
            hint = f'; did you mean "{close[0]}"?' if close else ""
            raise TypeError(f'{kind.__name__}() got an unexpected keyword argument "{name}"{hint}')


# ---- attributes


class Options(Optimizer):
    """The options as attributes. A new value is checked at once and holds from the next step on."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__init__" in vars(cls):
            cls.__signature__ = signature_of(cls)  # type: ignore[attr-defined]

    _backend: BackendName
    rule: ClassVar[Rule]
    _state_dtype: StateDtype
    _masters: MasterWeights
    _rounding: Rounding
    _detector: Any
    _max_grad_norm: float | None
    _scaler: Scaler
    _ema: WeightAverage | None
    _sharers = Shared(None, "distributed_group")  # the processes that share the work of an orthogonal rule

    def _forget(self) -> None:
        raise NotImplementedError

    @property
    def backend(self) -> BackendName:
        """The name of the backend that steps the params; see fused_optim.backends."""
        return self._backend

    @backend.setter
    def backend(self, name: BackendName) -> None:
        backends.check_name(name)
        for param in (param for group in self.param_groups for param in group["params"]):
            if may_get_grad(param):
                backends.pick(name, local(param).device)
        self._backend = name
        self._forget()

    @property
    def state_dtype(self) -> StateDtype:
        """How the states of groups without a state_dtype of their own are stored. Setting it holds for states that are
        made from now on, and converts those that are in packed formats or shall be."""
        return self._state_dtype

    @state_dtype.setter
    def state_dtype(self, value: StateDtype) -> None:
        check_state_dtype(value, self.rule)
        for group in self.param_groups:
            check_betas(group.get("state_dtype", value), self.rule.of(group), group.get("betas"))
        self._state_dtype = value
        self._forget()

    @property
    def rounding(self) -> Rounding:
        """How bfloat16 params without master weights, states and averages are rounded."""
        return self._rounding

    @rounding.setter
    def rounding(self, rounding: Rounding) -> None:
        check_rounding(rounding)
        self._rounding = rounding
        self._forget()

    @property
    def max_grad_norm(self) -> float | None:
        """The max_grad_norm of all param groups. None if they have none. A new value goes to every group, and to groups
        that are added later.

        Raises:
            AttributeError: the groups have different values; read group["max_grad_norm"] of each.
        """
        bounds = [group.get("max_grad_norm") for group in self.param_groups]
        if any(bound != bounds[0] for bound in bounds):
            raise AttributeError(
                f'the param groups have different values of max_grad_norm, {bounds}; read group["max_grad_norm"] of '
                "each"
            )
        return bounds[0]

    @max_grad_norm.setter
    def max_grad_norm(self, bound: float | None) -> None:
        check_max_grad_norm(bound)
        self._max_grad_norm = bound
        for options in (self.defaults, *self.param_groups):
            if "max_grad_norm" in options or (bound and options is not self.defaults):
                options["max_grad_norm"] = bound or None

    @property
    def norm_type(self) -> float:
        """The type of the norm that max_grad_norm bounds: 2 or inf."""
        return self._scaler.norm_type

    @norm_type.setter
    def norm_type(self, norm_type: float) -> None:
        check_norm_type(norm_type)
        self._scaler.norm_type = norm_type

    @property
    def skip_nonfinite(self) -> bool:
        """Whether a step with NaN or inf in its gradients is skipped. A skipped step changes nothing."""
        return self._scaler.skip_nonfinite

    @skip_nonfinite.setter
    def skip_nonfinite(self, skips: bool) -> None:
        self._scaler.skip_nonfinite = bool(skips)
        self._forget()

    @property
    def norm_group(self) -> ProcessGroup | None:
        """The processes whose gradients the norm covers. It cannot be set."""
        return self._scaler.norm_group

    @property
    def ema_decay(self) -> Decay | None:
        """The decay of the averages of the weights. None if there are none; setting None drops them."""
        return None if self._ema is None else self._ema.decay

    @ema_decay.setter
    def ema_decay(self, decay: Decay | None) -> None:
        if self._ema is not None:
            self._ema.check_not_swapped("ema_decay cannot be set")
        if decay is None:
            self._ema = None
            drop_averages(self.state)
        elif self._ema is None:
            self._ema = WeightAverage(decay)
        else:
            self._ema.set_decay(decay)
        self._forget()

    @property
    def ema_dtype(self) -> torch.dtype | None:
        """The dtype of new averages. None: float32 for 16-bit params, else the param's own."""
        return None if self._ema is None else self._ema.dtype

    @ema_dtype.setter
    def ema_dtype(self, dtype: torch.dtype | None) -> None:
        if self._ema is None:
            raise ValueError("ema_dtype needs ema_decay; set ema_decay first, for example to 0.999")
        check_dtype(dtype)
        self._ema.dtype = dtype

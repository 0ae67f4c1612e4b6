"""Muon, with AdamW for the params that are not matrices."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, get_args

from torch import Tensor
from typing_extensions import Unpack

from ..engine.orthogonal import Settings
from ..engine.scaling import Shared
from ..engine.table import Rule
from ..engine.validation import may_get_grad
from .adam import ADAM
from .checks import check_adam_like
from .decay import Decoupled
from .options import Decayed

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

AdjustLr = Literal["original", "match_rms_adamw"]
NS_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # Keller Jordan's: the steepest polynomial at 0 that stays bounded

ADAMW = replace(ADAM, states=("exp_avg", "exp_avg_sq"), switched={}, squares=("exp_avg_sq",))  # without amsgrad
MUON = Rule(
    name="muon",
    states=("momentum_buffer",),
    counted=False,
    trust=True,
    orthogonal=True,
    chosen_by="use_muon",
    otherwise=ADAMW,
    decides=("use_muon", "ns_coefficients", "ns_steps", "adjust_lr_fn", "normuon", "normuon_beta2", "flatten"),
    options=(
        ("momentum", "option_a", 1),
        ("nesterov", "option_b", 1),
        ("betas", "beta1", 2),
        ("eps", "eps", 1),
    ),
)


class FusedMuon(Decoupled):
    r"""Muon for matrices and AdamW for all other params, in one optimizer and one step. Muon's part has the arguments,
    semantics, errors and checkpoints of torch.optim.Muon.

    With $g$ the gradient of a matrix of $A$ rows and $B$ columns, and $NS$ the Newton-Schulz iteration, which moves all
    singular values towards 1:

    $$
    b = \mu b + (1-\mu) g, \quad o = NS((1-\mu) g + \mu b) \text{ or } NS(b), \quad
    p = (1 - lr \cdot \lambda) p - lr \cdot s \cdot o
    $$

    The scale $s$ is $\sqrt{\max(1, A/B)}$, or $0.2 \sqrt{\max(A, B)}$ with adjust_lr_fn="match_rms_adamw". One pass
    over memory makes the momentum, the update and its norm. Matrix products in bfloat16 orthogonalize the update. A
    second pass applies decay and update. Between the passes each matrix has a workspace of 2 bytes per element (8 for
    float64 params). Matrices of one shape are orthogonalized in batches, on a CPU only small ones.

    A group is stepped by Muon unless it has use_muon=False; fused_optim.groups.muon makes the groups of a model. Groups
    with use_muon=False hold lr, betas, eps and weight_decay of AdamW, and get those that they lack from adamw_lr and so
    on.

    Unlike torch.optim.Muon, momentum_buffer is never normalized in place (torch does so for bfloat16 params without
    Nesterov), and bfloat16 params are rounded once per step.

    Args:
        params: matrices, (name, matrix) pairs, or dicts of groups; float32, bfloat16, float16 or float64, any memory
            layout. Groups with use_muon=False take tensors of any shape.
        lr: learning rate; a one-element tensor is read at every step, where it lies.
        weight_decay: share of the param that a step takes off, measured as decay says.
        momentum: $\mu$, in [0, 1].
        nesterov: orthogonalize $(1-\mu) g + \mu b$ in place of $b$.
        ns_coefficients: $a, b, c$ of the polynomial $a x + b x^3 + c x^5$ that an iteration applies to the singular
            values.
        eps: the smallest norm that an update is divided by before the first iteration.
        ns_steps: the number of iterations, below 100.
        adjust_lr_fn: "original" or "match_rms_adamw"; None: "original".
        use_muon: whether groups without a use_muon of their own are stepped by Muon.
        flatten: take tensors of three and more dimensions as matrices of their first dimension and all others, such as
            the weights of convolutions.
        normuon: divide each row of the orthogonalized update by the root of the running average of its mean square, and
            restore the norm of the matrix (NorMuon). The averages are the state "second_momentum_buffer", float32
            [A, 1].
        normuon_beta2: decay rate of these averages.
        adamw_lr, adamw_betas, adamw_eps, adamw_weight_decay: the defaults of groups with use_muon=False.
        maximize: ascend.
        distributed_group: processes with the same plain params and gradients, as in DistributedDataParallel. Each
            orthogonalizes its share of the matrices, and one all-gather for each shape hands out the results. None:
            every process orthogonalizes all. DTensors need no group: the matrices of one shape are dealt out to the
            processes that hold their shards, with two exchanges for each shape.
        ours: options of decoupled decay, see fused_optim.decay.Decoupled: decay="torch", lr_reference=None,
            decay_period=None, corrected_decay=False, cautious_decay=False; and of every class, see FusedOptimizer:
            backend="auto", state_dtype=None, master_weights=None, rounding="nearest", max_grad_norm=None,
            norm_type=2.0, skip_nonfinite=False, norm_group=None, ema_decay=None, ema_dtype=None.

    Raises:
        ValueError: a hyperparameter is out of range, or a param of a group that Muon steps is not a matrix (torch's
            messages).
        RuntimeError: a param of such a group is complex, or the named backend cannot run here.

    Sources: Jordan et al., https://kellerjordan.github.io/posts/muon; torch.optim.Muon; match_rms_adamw: Liu et al.,
    arXiv:2502.16982; NorMuon: Li et al., arXiv:2510.05491; AdamW: Loshchilov and Hutter, arXiv:1711.05101.
    """

    rule = MUON

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: tuple[float, float, float] = NS_COEFFICIENTS,
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: AdjustLr | None = None,
        *,
        use_muon: bool = True,
        flatten: bool = False,
        normuon: bool = False,
        normuon_beta2: float = 0.95,
        adamw_lr: float | Tensor = 1e-3,
        adamw_betas: tuple[float, float] = (0.9, 0.999),
        adamw_eps: float = 1e-8,
        adamw_weight_decay: float = 1e-2,
        maximize: bool = False,
        distributed_group: ProcessGroup | None = None,
        **ours: Unpack[Decayed],
    ) -> None:
        check_adam_like(adamw_lr, adamw_betas, adamw_weight_decay, adamw_eps)
        options = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_coefficients": ns_coefficients,
            "eps": eps,
            "ns_steps": ns_steps,
            "adjust_lr_fn": adjust_lr_fn,
            "use_muon": use_muon,
            "flatten": flatten,
            "normuon": normuon,
            "normuon_beta2": normuon_beta2,
            "betas": adamw_betas,
            "maximize": maximize,
            "decoupled_weight_decay": True,
        }
        check_options(options)
        self._adamw = {"lr": adamw_lr, "eps": adamw_eps, "weight_decay": adamw_weight_decay}
        self._sharers = Shared(distributed_group, "distributed_group")
        super().__init__(params, options, **ours)

    @property
    def distributed_group(self) -> ProcessGroup | None:
        """The processes that share the work. It cannot be set."""
        return self._sharers.value

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's. A group with use_muon=False gets the options that it lacks from adamw_lr and so on."""
        if not param_group.get("use_muon", self.defaults["use_muon"]):
            param_group = {**self._adamw, **param_group}
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            if group["use_muon"]:
                check_options(group)
                for param in group["params"]:
                    check_matrix(param, group["flatten"])
            else:
                check_adam_like(group["lr"], group["betas"], group["weight_decay"], group["eps"])
        except Exception:
            self.param_groups.pop()
            raise

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_adamw": self._adamw, "_sharers": self._sharers}


def check_options(group: dict[str, Any]) -> None:
    """Raises ValueError for an option of Muon that is out of range, in torch's words where it has the error."""
    lr, function, beta2 = group["lr"], group["adjust_lr_fn"], group["normuon_beta2"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError("Tensor lr must be 1-element")
    if not lr >= 0.0:
        raise ValueError(f"Learning rate should be >= 0 but is: {lr}")
    if not group["momentum"] >= 0.0:
        raise ValueError(f"momentum should be >= 0 but is: {group['momentum']}")
    if not group["weight_decay"] >= 0.0:
        raise ValueError(f"weight decay should be >= 0 but is: {group['weight_decay']}")
    if function is not None and function not in get_args(AdjustLr):
        raise ValueError(f"Adjust learning rate function {function} is not supported")
    if not 0.0 <= beta2 < 1.0:
        raise ValueError(f"normuon_beta2 must be in [0, 1), but is {beta2}")
    Settings.of(group)


def check_matrix(param: Tensor, flatten: bool) -> None:
    """Raises ValueError or RuntimeError for a param that Muon cannot step."""
    if param.ndim != 2 and not (flatten and param.ndim > 2):
        raise ValueError(
            f"Muon only supports 2D parameters whereas we found a parameter with size: {param.size()}; put it into a "
            "group with use_muon=False, which AdamW steps, or pass flatten=True if it is the weight of a convolution. "
            "fused_optim.groups.muon makes the groups of a model"
        )
    if may_get_grad(param) and param.is_complex():
        raise RuntimeError("Muon does not support complex parameters")

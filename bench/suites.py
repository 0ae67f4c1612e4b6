"""The grids of the committed results, and the goals for their figures."""

from __future__ import annotations

from dataclasses import dataclass, field

from family import BASELINES, OPTIMIZERS
from measure import FLOOR, Measured, Timed
from peers import PEERS
from workload import Config

HOST_US, HOST_US_PER_TENSOR = 20.0, 0.1


@dataclass(frozen=True)
class Goal:
    """What our optimizer must reach in one case. None: no goal of that kind."""

    share_of_floor: float | None = None
    speed: float | None = None  # times as fast as the case's baseline
    no_more_than: Config | None = None  # at most 1.1 times our own time in this other case


@dataclass(frozen=True)
class Suite:
    device: str
    peers: list[str]
    goals: dict[Config, Goal]
    rounds: int = 21
    graph: bool = False
    configs: list[Config] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "configs", list(self.goals))

    @property
    def title(self) -> str:
        names = [OPTIMIZERS[name].title for name in dict.fromkeys(config.optimizer for config in self.configs)]
        return f"{' and '.join([', '.join(names[:-1]), names[-1]] if names[1:] else names)} on"

    def peers_of(self, config: Config, asked: list[str] | None, baseline: str | None) -> list[str]:
        """The peers asked for, or all that have the optimizer. A baseline is always among them."""
        names = asked or [name for name in self.peers if config.optimizer in PEERS[name].builds]
        usual = [name for name in BASELINES if config.optimizer in PEERS[name].builds]
        if baseline is None and not set(usual) & set(names):
            baseline = usual[0]
        return names if baseline is None or baseline in names else [baseline, *names]


CPU = Suite(
    "cpu",
    ["torch-for", "torch-foreach", "torch-fused", "foreach", "qhoptim", "ours"],
    {
        Config("one-tensor-100m"): Goal(0.95, 1.05),
        Config("gpt2-124m"): Goal(0.95, 1.3),
        Config("gpt2-124m", groups="two"): Goal(0.95, 1.3),
        Config("gpt2-124m", "bf16"): Goal(None, 1.8),
        Config("gpt2-124m", "bf16-float32-states"): Goal(),
        Config("gpt2-124m", amsgrad=True): Goal(),
        Config("resnet50"): Goal(0.95, 1.3),
        Config("2000x1000"): Goal(None, 15),
        Config("2000x1000", hot=True): Goal(None, 25),
        Config("600x1000", hot=True): Goal(),
        Config("600x1000", hot=True, crowded=True): Goal(),
        Config("resnet50", crowded=True): Goal(),
        Config("1000x1024"): Goal(),
        Config("10000x64"): Goal(),
        Config("465x1000"): Goal(),
        Config("465-groups", groups="each"): Goal(no_more_than=Config("465x1000")),
    },
)

_LARGE = ("gpt2-124m", "vit-l", "llama-1b", "llama-8b-shard")
GPU = Suite(
    "cuda",
    [
        "torch-foreach",
        "torch-fused",
        "torch-compile",
        "foreach",
        "qhoptim",
        "ours-triton",
        "ours-cuda",
        "optimi",
        "apex",
        "apex-sgd-lamb",
        "bitsandbytes",
        "flashoptim",
        "torchao-8bit",
    ],
    {
        Config("one-tensor-100m"): Goal(None, 1.0),
        **{Config(case): Goal(0.92, 1.0) for case in _LARGE},
        **{Config(case, "bf16-float32-states"): Goal() for case in _LARGE},
        **{Config(case, "bf16"): Goal(None, 1.0) for case in _LARGE},
        Config("gpt2-124m", "float16"): Goal(None, 1.0),
        Config("gpt2-124m", groups="two"): Goal(0.92, 1.0),
        Config("gpt2-124m", amsgrad=True): Goal(None, 1.0),
        Config("resnet50"): Goal(None, 1.0),
        Config("1000x1024"): Goal(None, 5),
        Config("10000x64"): Goal(None, 5),
        Config("465x1000"): Goal(),
        Config("465-groups", groups="each"): Goal(None, 5),
    },
    graph=True,
)

_FAMILY = ("sgd", "sgdw", "qhadamw", "lamb", "lion")
FAMILY = Suite(
    "cpu",
    CPU.peers,
    {
        Config(case, dtype, optimizer=optimizer): goal
        for optimizer in _FAMILY
        for case, dtype, goal in (
            ("gpt2-124m", "float32", Goal(0.95)),
            ("gpt2-124m", "bf16", Goal()),
            ("resnet50", "float32", Goal(0.95)),
            ("2000x1000", "float32", Goal()),
        )
    },
    rounds=15,
)
GPU_FAMILY = Suite(
    "cuda",
    GPU.peers,
    {
        Config("gpt2-124m", dtype, optimizer=optimizer): goal
        for optimizer in _FAMILY
        for dtype, goal in (("float32", Goal(0.92, 1.0)), ("bf16", Goal(None, 1.0)))
    },
    graph=True,
)

SUITES = {"cpu": CPU, "gpu": GPU, "family": FAMILY, "gpu-family": GPU_FAMILY}


def verdicts(goal: Goal, measured: Measured, others: dict[Config, Measured]) -> list[tuple[str, str, str, bool]]:
    """(peer, goal, figure, met) for each of our peers in one case."""
    rows = []
    for timed in (timed for name, timed in measured.timed.items() if name.startswith("ours")):
        for wanted, figure, text in (
            (goal.share_of_floor, timed.share_of(measured.timed[FLOOR]), "of the floor's speed"),
            (goal.speed, timed.speed(measured.timed.get(measured.baseline)), f"x {measured.baseline}"),
        ):
            if wanted is not None and figure is not None:
                rows.append((timed.name, f"at least {wanted:g} {text}", f"{figure:.2f}", figure >= wanted))
        rows += _against_other_case(goal, timed, others)
        if timed.host_us is not None:
            limit = HOST_US + HOST_US_PER_TENSOR * measured.tensors
            rows.append(
                (timed.name, f"host time at most {limit:.0f} µs", f"{timed.host_us:.0f} µs", timed.host_us <= limit)
            )
    return rows


def _against_other_case(goal: Goal, timed: Timed, others: dict[Config, Measured]) -> list[tuple[str, str, str, bool]]:
    other = others[goal.no_more_than].timed.get(timed.name) if goal.no_more_than in others else None
    ours, theirs = timed.median(), other.median() if other else None
    if ours is None or theirs is None:
        return []
    return [
        (timed.name, f"at most 1.1 x the time of {goal.no_more_than}", f"{ours / theirs:.2f}", ours <= 1.1 * theirs)
    ]

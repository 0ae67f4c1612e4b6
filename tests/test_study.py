"""bench/study.py: its search, its timing, its result file, and the statistics that it reports."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parent.parent / "bench"))

import study
import study_plan
import study_tasks
from study_claims import Claim, Results, claims, epochs_to_target
from study_images import WideResNet
from study_optimizers import CONTENDERS, Clock, scheduler_for
from study_records import Outcome, Records, Run
from study_statistics import difference, plus_minus, spread

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def same_threads_after() -> Iterator[None]:
    """The study sets torch's thread count for the process. This restores it."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


# ---- plan


def test_the_ladder_climbs_past_its_ends_and_refines_between() -> None:
    assert study_plan.ladder({}) == 0
    assert study_plan.ladder({0: 2.0}) == 1
    assert study_plan.ladder({0: math.inf}) == -1
    assert study_plan.ladder({0: 2.0, 1: 1.0}) == 2
    assert study_plan.ladder({0: 2.0, 1: 3.0}) == -1
    assert study_plan.ladder({0: 2.0, 1: 3.0, -1: 2.5}) == -0.5
    assert study_plan.ladder({0: 2.0, 1: math.inf, 2: math.inf}) == -1


def made_up(run: Run) -> Outcome:
    """An outcome that is a function of the run. The best score is at lr 0.03 and decay 0.01."""
    bowl = math.log10(run.lr / 0.03) ** 2 + 0.1 * math.log10(run.decay / 0.01) ** 2
    noise = 0.1 * run.seed
    made: Outcome = {"score": 1 + bowl, "error": 10 * bowl + noise, "params": 1, "seconds": 0.1}
    made |= {"cost": {"whole": 2.0, "ours": 0.1}, "perplexity": 50 + bowl + noise, "perplexity with pointer": 40.0}
    if run.split == "test":
        made |= {"error with tta": 5 * bowl, "pointer": {"theta": 1.0, "share": 0.1}}
        made["curve"] = [100 / (epoch + 1) for epoch in range(run.epochs)]
    return made


def runs_of(chain: study_plan.Chain) -> Iterator[Run]:
    run = next(chain)
    while True:
        yield run
        try:
            run = chain.send(made_up(run))
        except StopIteration:
            return


@pytest.mark.parametrize("quick", [True, False])
def test_searches_are_alike_and_never_see_a_test_split_or_a_final_seed(quick: bool) -> None:
    names, seeds = list(study_plan.TASKS), range(3)
    chains = study_plan.chains(names, list(CONTENDERS), seeds, None, quick)
    plan = [list(runs_of(chain)) for chain in chains]
    runs = [run for chain in plan for run in chain]
    assert len(runs) == study_plan.count(names, list(CONTENDERS), seeds, quick) == len({run.key for run in runs})
    for run in runs:
        assert (run.split == "valid") == (run.seed == study_plan.SEARCH_SEED) == (run.seed not in seeds)
    searches = {sum(run.split == "valid" for run in chain) for chain in plan if chain[0].settings["name"] == "images"}
    assert len(searches) == 1
    if not quick:
        for chain in plan:
            if chain[0].settings["name"] == "images":
                best = min((run for run in chain if run.split == "valid"), key=lambda run: made_up(run)["score"])
                assert {(run.lr, run.decay) for run in chain if run.split == "test"} == {(best.lr, best.decay)}
                assert 0.01 < best.lr < 0.1


def test_restarts_end_with_the_run_and_the_decay_follows_its_period() -> None:
    param = torch.nn.Parameter(torch.ones(2))
    contender = CONTENDERS["AdamWR"]
    optimizer = contender.make([{"params": [param], "lr": 0.1}], 0.01)
    settings = study_plan.tasks(None, quick=False)["images"]
    epochs, restart, batches = int(settings["epochs"]), int(settings["restart"]), 5
    scheduler = scheduler_for(contender.schedule, optimizer, contender, epochs, batches, restart)
    lrs, periods = [], []
    for _ in range(epochs * batches):
        param.grad = torch.ones(2)
        optimizer.step()
        lrs.append(optimizer.param_groups[0]["lr"])
        periods.append(optimizer.param_groups[0]["decay_period"])
        scheduler.step()
    assert lrs[-1] < 0.01 * lrs[0] and optimizer.param_groups[0]["lr"] == pytest.approx(lrs[0])
    assert sorted(set(periods)) == [2 * batches, 4 * batches, 8 * batches]


# ---- training


def test_the_clock_changes_nothing_and_times_torch_beside_ours() -> None:
    def trained(contender_for_clock: bool) -> tuple[Tensor, Clock]:
        torch.manual_seed(0)
        param = torch.nn.Parameter(torch.randn(20))
        contender = CONTENDERS["AdamW"]
        optimizer = contender.make([{"params": [param], "lr": 0.1}], 0.01)
        clock = Clock(optimizer, contender if contender_for_clock else None, 0.1, 0.01)
        for _ in range(12):
            (param**2).sum().backward()
            clock.step()
            optimizer.zero_grad()
        return param.detach(), clock

    (with_peers, clock), (alone, _) = trained(True), trained(False)
    assert torch.equal(with_peers, alone)
    assert set(clock.step_ms) == {"ours", "torch", "torch fused"}
    assert {len(times) for times in clock.step_ms.values()} == {3}
    twins = {name: params for name, params, _ in clock.steps}
    assert torch.allclose(twins["torch"][0], twins["torch fused"][0], atol=1e-6)
    assert not torch.equal(twins["torch"][0], with_peers)


def quick_run(task: str, optimizer: str, **changes: Any) -> Run:
    settings = study_plan.tasks(None, quick=True)[task] | changes.pop("settings", {})
    lr = changes.pop("lr", CONTENDERS[optimizer].lr.get(task, 1e-2))
    schedule = CONTENDERS[optimizer].schedule
    variant = changes.pop("variant", "")
    return Run(tuple(settings.items()), optimizer, lr, 1e-2, int(settings["epochs"]), schedule, 0, "valid", variant)


def test_a_run_repeats_itself_and_a_diverged_one_says_so() -> None:
    run, place = quick_run("qrnn", "AdamWR"), study_tasks.Place()
    assert study_tasks.train(run, place)["score"] == study_tasks.train(run, place)["score"]
    diverged = study_tasks.train(quick_run("images", "SGDW", lr=1e30), place)
    assert diverged["score"] is None and diverged["diverged"]


def test_fine_tuning_starts_from_one_net_and_moves_low_layers_less(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {}

    def fit(run: Run, model: WideResNet, groups: Any, data: Any, place: Any) -> Outcome:
        if "pretraining" in run.settings and run.lr == 0.5:
            lrs = {param: group["lr"] for group in groups for _, param in group["params"]}
            lr_of = {name: lrs[param] for name, param in model.named_parameters()}
            seen[run.variant] = lr_of, {name: value.clone() for name, value in model.state_dict().items()}, data
        return {"score": 0.0}

    monkeypatch.setattr(study_tasks, "fit_images", fit)
    study_tasks.pretrained.cache_clear()
    for variant in (study_tasks.ONE_LR, study_tasks.LAYERWISE):
        study_tasks.train(quick_run("finetune", "AdamW", lr=0.5, variant=variant), study_tasks.Place())
    study_tasks.pretrained.cache_clear()
    (one, weights, data), (layered, others, _) = seen.values()
    assert set(one.values()) == {0.5}
    assert layered["head.weight"] == 0.5 and layered["stem.weight"] == pytest.approx(0.5 / 2.6**4)
    assert all(torch.equal(weights[name], others[name]) for name in weights)
    assert data.train[1].unique().tolist() == [0, 1, 2, 3, 4] and weights["head.weight"].shape[0] == 5


# ---- result file


def test_a_killed_study_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[str] = []

    def train(run: Run, place: study_tasks.Place) -> Outcome:
        if len(trained) == 20:
            raise KeyboardInterrupt
        trained.append(run.key)
        return made_up(run)

    monkeypatch.setattr(study, "train", train)
    monkeypatch.setattr(study.study_report, "write", lambda *_: None)
    tasks = ["images", "finetune", "schedules"]
    arguments = ["--quick", "--jobs", "1", "--seeds", "3", "--out", str(tmp_path), "--tasks", ",".join(tasks)]
    with pytest.raises(KeyboardInterrupt):
        study.main(arguments)
    file = tmp_path / "runs.jsonl"
    with file.open("a") as broken:
        broken.write('{"run": {"deca')
    assert len(Records(file).outcomes) == 20 and file.read_text().endswith("}\n")

    before = set(trained)
    trained.append("")  # makes the length 21, because train() interrupts at 20
    study.main(arguments)
    total = study_plan.count(tasks, list(CONTENDERS), range(3), quick=True)
    assert len(trained) == total + 1 == len(set(trained)) and before < set(trained)
    keys = [json.dumps(json.loads(line)["run"], sort_keys=True) for line in file.read_text().splitlines()]
    assert len(keys) == len(set(keys)) == total


def test_a_line_that_is_no_record_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "runs.jsonl"
    file.write_text('{"run": {}, "outcome": {}, "made": {}}\n{"run": \n')
    with pytest.raises(ValueError, match=r"Line 2 of .* must be a record"):
        Records(file)


# ---- statistics


def test_means_and_spreads() -> None:
    assert spread([2.0, 4.0, 4.0, 4.0, 5.0, 5.0, 7.0, 9.0]) == pytest.approx(math.sqrt(32 / 7))
    assert math.isnan(spread([3.0]))
    assert [plus_minus(values) for values in ([1.0, 2.0, 3.0], [2.5], [])] == ["2.00 ± 1.00", "2.50", ""]


def final_run(schedule: str, seed: int, curve: list[float]) -> tuple[Run, Outcome]:
    settings = (("name", "schedules"),)
    run = Run(settings, "AdamW", 0.1, 0.01, len(curve), schedule, seed, "test", "")
    return run, {"curve": curve}


def test_epochs_to_the_target_by_hand() -> None:
    """The target is the mean of the constant schedule's last errors, here 20."""
    done = [
        final_run("constant", 0, [50.0, 30.0, 22.0, 18.0]),
        final_run("constant", 1, [50.0, 20.0, 25.0, 22.0]),
        final_run("1cycle", 0, [30.0, 19.0]),
        final_run("1cycle", 0, [40.0, 30.0, 10.0]),  # the shorter run reaches the target in fewer epochs
        final_run("1cycle", 1, [30.0, 21.0]),
        final_run("step", 1, [30.0, 20.0, 10.0]),
    ]
    ((optimizer, (target, reached)),) = epochs_to_target(Results(done)).items()
    assert (optimizer, target) == ("AdamW", 20.0)
    assert reached == {"constant": {0: 4.0, 1: 2.0}, "1cycle": {0: 2.0, 1: 5.0}, "step": {1: 2.0}}


def test_comparisons_need_three_seeds_and_go_by_the_right_side() -> None:
    def runs(optimizer: str, errors: list[float]) -> list[tuple[Run, Outcome]]:
        settings = (("name", "images"),)
        make = lambda seed: Run(settings, optimizer, 0.1, 0.01, 1, "1cycle", seed, "test", "")  # noqa: E731
        return [(make(seed), {"error": e, "error with tta": e - 1}) for seed, e in enumerate(errors)]

    done = [*runs("AdamW", [1.0, 1.1, 1.2]), *runs("Adam", [3.0, 3.1, 3.3]), *runs("LAMB", [2.0, 2.0])]
    made = {claim.text: claim for claim in claims(Results(done))}
    assert made.keys() == {"AdamW against Adam", "AdamW, error with tta", "Adam, error with tta"}
    assert made["AdamW against Adam"].words == "better: as in the article"
    assert made["AdamW against Adam"].found.mean == pytest.approx((2.0 + 2.0 + 2.1) / 3)


@pytest.mark.parametrize(
    ("first", "second", "verdict"),
    [
        ((1.0, 1.1, 1.2), (3.0, 3.2, 3.1), "better"),
        ((3.0, 3.2, 3.1), (1.0, 1.1, 1.2), "worse"),
        ((1.0, 2.0, 3.0), (1.5, 2.5, 3.51), "slightly better"),
        ((1.0, 2.0, 3.0), (3.0, 1.0, 2.1), "no difference shows"),
        ((1.0, 2.0, 3.0), (1.0, 2.0, 3.0), "no difference shows"),
    ],
)
def test_what_a_difference_over_seeds_is_called(first: Any, second: Any, verdict: str) -> None:
    found = difference(dict(enumerate(first)), dict(enumerate(second)))
    assert found.verdict == verdict
    told = {expected: Claim("", "", "", "", found, expected).words for expected in (True, False)}
    if verdict == "no difference shows":
        assert told == {True: verdict, False: f"{verdict}: as in the article"}
    else:
        better = verdict.endswith("better")
        assert (told[True].endswith("as in the article"), told[False].endswith("as in the article")) == (
            better,
            not better,
        )


def test_the_interval_of_a_difference_against_a_table_of_students_t() -> None:
    found = difference(
        {0: 0.0, 1: 0.0, 2: 0.0, 3: 0.0, 4: 0.0, 9: 5.0}, {0: 1.0, 1: 2.0, 2: 3.0, 3: 4.0, 4: 5.0, 7: 5.0}
    )
    assert found.mean == 3.0 and found.half == pytest.approx(2.776 * math.sqrt(2.5) / math.sqrt(5), rel=1e-3)
    with pytest.raises(ValueError, match="needs 3 seeds"):
        difference({0: 1.0, 1: 1.0}, {0: 1.0, 1: 1.0})

"""bench/study_family.py: its data, its plan, its schedule and its page."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parent.parent / "bench"))

import study_family
import study_family_data
import study_family_report
from study_claims import Results
from study_family_models import GPT
from study_family_optimizers import ENTRANTS, factor
from study_family_tasks import fit, nats_per_word
from study_plan import SEARCH_SEED, Size
from study_records import Run

pytestmark = pytest.mark.slow


# ---- data


def test_the_digits_are_split_without_overlap() -> None:
    data = study_family_data.mnist(5000)
    parts = [data.train, data.valid, data.test]
    assert [len(labels) for _, labels in parts] == [3000, 500, 1500]
    assert torch.cat([labels for _, labels in parts]).bincount().tolist() == [500] * 10
    images = torch.cat([images for images, _ in parts])
    assert images.shape == (5000, 1, 28, 28) and (images.min(), images.max()) == (-1, 1)
    assert len(images.flatten(1).unique(dim=0)) == 5000


def test_the_sources_leave_out_tests_and_installed_packages(tmp_path: Path) -> None:
    for name in ("b.py", "a/c.py", "test/d.py", "a/tests/e.py", "site-packages/f.py", "g.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("pass")
    assert list(study_family_data.library_sources(tmp_path)) == ["a/c.py", "b.py"]


# ---- plan


def test_every_optimizer_gets_eight_trials_that_never_see_the_test_split() -> None:
    for entrant in ENTRANTS.values():
        chain = study_family.contest({"name": "digits"}, entrant, range(5), Size())
        runs = [next(chain)]
        with pytest.raises(StopIteration):
            while True:
                runs.append(chain.send({"score": abs(torch.tensor(runs[-1].lr / 0.02).log().item())}))
        assert [run.split for run in runs] == ["valid"] * 8 + ["test"] * 5
        assert {run.seed for run in runs[:8]} == {SEARCH_SEED} and [run.seed for run in runs[8:]] == [0, 1, 2, 3, 4]
        best = min(runs[:8], key=lambda run: abs(torch.tensor(run.lr / 0.02).log().item()))
        assert {run.lr for run in runs[8:]} == {best.lr}


def test_the_schedule_warms_up_and_falls_to_nearly_zero() -> None:
    factors = [factor(step, 100) for step in range(100)]
    assert factors[0] == pytest.approx(0.1) and max(factors) == factors[9] == 1.0
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert factors[-1] == pytest.approx(1 / 91) and factor(100, 100) == 0.0


def test_schedule_free_keeps_its_lr_and_ends_with_the_average() -> None:
    run = Run((("name", "gpt"), ("steps", 4)), "ScheduleFreeSGD", 0.5, 0.0, 1, "none", 0, "valid")
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(model.weight, 1.0)
    batches = iter([(torch.ones(1), torch.ones(1))] * 4)
    fit(run, model, batches, lambda _: 0.1 * model.weight.sum())
    # z falls by 0.05 a step. The first step is the only one of the warm-up of 0 steps. x is the mean of z1 to z4.
    assert model.weight.item() == pytest.approx(1 - 0.05 * (1 + 2 + 3 + 4) / 4)


def test_the_gpt_never_sees_the_word_that_it_predicts() -> None:
    torch.manual_seed(0)
    model = GPT(20, 8, 2, 2, 6)
    words = torch.randint(20, (1, 6))
    changed = words.clone()
    changed[0, 4:] = (words[0, 4:] + 1) % 20
    assert torch.allclose(model(words)[0, :4], model(changed)[0, :4], atol=1e-6)
    assert not torch.allclose(model(words)[0, 4], model(changed)[0, 4], atol=1e-6)
    torch.nn.init.zeros_(model.head.weight)
    assert nats_per_word(model, torch.randint(20, (50,)), 6) == pytest.approx(torch.tensor(20.0).log().item())


# ---- page


def test_the_table_compares_with_adamw_by_seed_and_puts_the_best_first() -> None:
    def runs(optimizer: str, scores: list[float | None]) -> list[tuple[Run, dict[str, float | bool | None]]]:
        made = []
        for seed, score in enumerate(scores):
            run = Run((("name", "digits"),), optimizer, 0.01, 0.1, 1, "linear", seed, "test")
            made.append((run, {"score": None, "diverged": True} if score is None else {"score": score, "error": 2.0}))
        return made

    done = [*runs("AdamW", [0.2, 0.21, 0.22]), *runs("Muon", [0.1, 0.12, 0.11]), *runs("ADOPT", [0.3, None, 0.32])]
    lines = study_family_report.table(Results(done), "digits").splitlines()[2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert [row[0] for row in cells] == ["Muon", "AdamW", "ADOPT"]
    # Differences 0.10, 0.09 and 0.11: mean 0.1, half-width 4.303 * 0.01 / sqrt(3).
    assert cells[0][-3:] == ["+0.1000 (+0.0752 to +0.1248)", "better", "0"]
    assert cells[2][-3:] == ["", "", "1"]


def test_a_quick_study_runs_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = {path.name: path.read_text() for path in sorted(Path(json.__file__).parent.glob("*.py"))}
    monkeypatch.setattr(study_family_data, "library_sources", lambda _: few)
    study_family_data.python_library.cache_clear()
    threads = torch.get_num_threads()
    arguments = ["--quick", "--out", str(tmp_path), "--seeds", "1", "--optimizers", "ScheduleFreeAdamW,Muon"]
    try:
        study_family.main(arguments)
        records = (tmp_path / "runs.jsonl").read_text()
        study_family.main(arguments)
    finally:
        torch.set_num_threads(threads)
        study_family_data.python_library.cache_clear()
    assert (tmp_path / "runs.jsonl").read_text() == records and len(records.splitlines()) == 2 * 2 * 4
    page = (tmp_path / "study_family.md").read_text()
    assert "A quick run" in page and "## digits" in page and "## gpt" in page

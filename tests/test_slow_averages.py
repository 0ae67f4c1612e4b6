"""The warning for an exp_avg_sq in bfloat16 that is rounded to nearest."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from cases import ADAMW, BY_NAME, Case, Target, build, for_every_class, random_grads, set_grads
from torch import Tensor, nn

from fused_optim.optim import plans

REFERENCE = Target("reference", "cpu")
BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def nothing_said_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "told", set())


def stepped(case: Case, params: list[Tensor] | None = None, dtype: torch.dtype = BF16, **options: Any) -> Any:
    params = [nn.Parameter(torch.zeros(9, dtype=dtype))] if params is None else params
    optimizer = build(case, REFERENCE, params, **options)
    for step in range(2):
        set_grads(params, random_grads(params, step))
        optimizer.step()
    return optimizer


def test_it_is_given_once_and_points_at_the_step() -> None:
    with pytest.warns(UserWarning) as found:
        stepped(ADAMW)
        stepped(ADAMW)
    (warning,) = found
    assert warning.filename == __file__
    text = str(warning.message)
    assert "beta2 is 0.999" in text and "25 % too large" in text
    assert all(way in text for way in ('rounding="dithered"', 'state_dtype="compact"', "state_dtype=torch.float32"))


@for_every_class
def test_where_it_is_given(case: Case) -> None:
    squares = "exp_avg_sq" in case.states
    options = case.known(betas=(0.9, 0.99))
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        optimizer = stepped(case, **options)
    assert len(found) == squares
    if squares:
        assert optimizer.state[optimizer.param_groups[0]["params"][0]]["exp_avg_sq"].dtype == BF16  # torch's contract


QUIET: list[dict[str, Any]] = [
    {"rounding": "dithered"},
    {"state_dtype": torch.float32},
    {"state_dtype": "compact"},
    {"state_dtype": {"exp_avg_sq": "e8m8"}},
    {"master_weights": "exact"},
    {"betas": (0.9, 0.98)},
    {"dtype": torch.float32},
    {"dtype": torch.float16},
]


@pytest.mark.parametrize("options", QUIET, ids=str)
def test_where_it_is_not_given(options: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stepped(ADAMW, **options)
    if "betas" not in options:
        with pytest.warns(UserWarning, match="exp_avg_sq is stored in bfloat16"):
            stepped(ADAMW)


def test_a_group_among_others() -> None:
    params = [nn.Parameter(torch.zeros(3, dtype=dtype)) for dtype in (torch.float32, BF16)]
    with pytest.warns(UserWarning, match="beta2 is 0.995"):
        optimizer = build(
            BY_NAME["adamw"], REFERENCE, [{"params": [p], "betas": (0.9, 0.99 + i / 200)} for i, p in enumerate(params)]
        )
        set_grads(params, random_grads(params, 0))
        optimizer.step()

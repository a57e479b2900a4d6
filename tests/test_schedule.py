"""The clip limits over time: exact ramps that stop."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import brn_kernels as brn
from brn_kernels import ClipSchedule

SCHEDULE = ClipSchedule(r_max=3.0, d_max=5.0, hold=10, r_ramp=8, d_ramp=5)
CORNERS = {
    0: (1, 0), 9: (1, 0), 10: (1, 0), 11: (1.25, 1), 14: (2, 4), 15: (2.25, 5), 16: (2.5, 5), 17: (2.75, 5), 18: (3, 5),
    19: (3, 5), 10**12: (3, 5), 2**62: (3, 5),
}  # fmt: skip


@pytest.mark.parametrize("step, expected", CORNERS.items())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_corners(device, step, expected, dtype):
    assert SCHEDULE.limits(step) == expected
    r_max, d_max = SCHEDULE.limits(torch.tensor(step, device=device), dtype=dtype)
    assert (r_max.item(), d_max.item()) == expected
    assert r_max.dtype == d_max.dtype == dtype
    assert r_max.device.type == device.type


def test_many_steps_at_once():
    r_max, d_max = SCHEDULE.limits(torch.tensor(list(CORNERS)))
    assert list(zip(r_max.tolist(), d_max.tolist(), strict=True)) == list(CORNERS.values())


def test_paper():
    paper = ClipSchedule.paper()
    assert paper == ClipSchedule()
    assert paper.limits(4_999) == (1, 0)
    assert paper.limits(5_000) == (1, 0)
    assert paper.limits(15_000) == (pytest.approx(1 + 2 * 10 / 35), 2.5)
    assert paper.limits(25_000)[1] == 5
    assert paper.limits(39_999)[0] < 3
    assert paper.limits(40_000) == (3, 5)


def test_constructors():
    assert ClipSchedule.constant(2, 1).limits(0) == (2, 1)
    assert ClipSchedule.batchnorm().limits(10**9) == (1, 0)
    assert ClipSchedule.unclipped().limits(0) == (math.inf, math.inf)
    assert ClipSchedule(math.inf, math.inf, hold=3, r_ramp=0, d_ramp=0).limits(2) == (1, 0)
    assert ClipSchedule(math.inf, math.inf, hold=3, r_ramp=0, d_ramp=0).limits(3) == (math.inf, math.inf)
    assert ClipSchedule.for_training(160_000) == ClipSchedule.paper()
    assert ClipSchedule.for_training(320).limits(80) == (3, 5)
    assert ClipSchedule.for_training(1).limits(1) == (3, 5)


@given(
    st.floats(1, 100), st.floats(0, 100), st.integers(0, 10**6), st.integers(0, 10**6), st.integers(0, 10**6),
    st.integers(0, 4 * 10**6),
)  # fmt: skip
def test_ramps_are_exact_and_stop(r_final, d_final, hold, r_ramp, d_ramp, step):
    found = ClipSchedule(r_final, d_final, hold, r_ramp, d_ramp).limits(step)
    for limit, closed, final, ramp in zip(found, (1, 0), (r_final, d_final), (r_ramp, d_ramp), strict=True):
        if step < hold:
            assert limit == closed
        elif step >= hold + ramp:
            assert limit == final
        else:
            exact = closed + (Fraction(final) - closed) * Fraction(step - hold, ramp)
            assert limit == pytest.approx(float(exact), rel=1e-15)


@pytest.mark.parametrize(
    "arguments, name",
    [
        ({"r_max": 0.99}, "r_max"),
        ({"r_max": math.nan}, "r_max"),
        ({"r_max": "3"}, "r_max"),
        ({"d_max": -0.1}, "d_max"),
        ({"d_max": math.nan}, "d_max"),
        ({"hold": -1}, "hold"),
        ({"hold": math.inf}, "hold"),
        ({"hold": 0.5}, "hold"),
        ({"r_ramp": math.nan}, "r_ramp"),
        ({"r_ramp": -3}, "r_ramp"),
        ({"d_ramp": math.inf}, "d_ramp"),
        ({"d_ramp": None}, "d_ramp"),
        ({"r_max": math.inf}, "r_ramp"),
        ({"d_max": math.inf}, "d_ramp"),
    ],
)
def test_bad_arguments_are_named(arguments, name):
    with pytest.raises(ValueError, match=name):
        ClipSchedule(**arguments)


@pytest.mark.parametrize("steps", [0, -1, math.inf, math.nan, None])
def test_bad_training_length(steps):
    with pytest.raises(ValueError, match="total_steps"):
        ClipSchedule.for_training(steps)


def test_it_is_frozen_and_hashable():
    with pytest.raises(AttributeError):
        SCHEDULE.r_max = 2
    assert len({SCHEDULE, ClipSchedule(3.0, 5.0, 10, 8, 5)}) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_layer_clips_at_the_limits_of_its_step(backend, device, dtype):
    """Outputs of a channel that is far out tell r and d, hence the limits in force."""
    layer = brn.BatchRenorm1d(2, schedule=SCHEDULE, eps=1e-12, momentum=0.0, dtype=dtype, device=device)
    x = torch.tensor([[-1.0, 99.0], [1.0, 101.0]], dtype=dtype, device=device) * 1000
    for step in range(25):
        layer.num_batches_tracked.fill_(step)
        r_max, d_max = SCHEDULE.limits(step)
        y = layer(x)
        assert y[1, 0].item() == pytest.approx(r_max, rel=1e-5)
        assert y[:, 1].mean().item() == pytest.approx(d_max, rel=1e-5)


def test_limits_given_as_tensors(backend, device):
    x = torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(device) * 3 + 1
    outputs = []
    for r_max, d_max in ((1.5, 0.25), tuple(torch.tensor(v, device=device) for v in (1.5, 0.25))):
        mean, var = torch.zeros(3, dtype=x.dtype, device=device), torch.ones(3, dtype=x.dtype, device=device)
        outputs.append(brn.batch_renorm(x, mean, var, training=True, r_max=r_max, d_max=d_max))
    assert torch.equal(*outputs)

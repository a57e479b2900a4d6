"""The quick check before and after a change: a layer against its peers, on the cases and peers of ``brn bench``.

What pytest-benchmark records (and compares with ``--benchmark-compare``) is our time; the ratios are of the turns that
all took before, so that they hold on a noisy machine: all saw the same noise.
"""

import pytest

from bench.cases import DIRECTIONS
from bench.layers import in_direction, prepare, rows_of
from bench.peers import OURS
from bench.timing import time_together

ROUNDS = 15


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_layer(benchmark, rows, device, case, direction):
    tensors, models, _ = prepare(case, device)
    calls = {name: in_direction(model, tensors, direction) for name, model in models.items()}
    timed = rows_of(case, direction, "eager", time_together(calls, device, seconds=0.1 * len(calls)), {})
    rows += timed
    benchmark.group = f"{direction}, {case.layer.follows}, {case.dtype}, {case.layout}"
    benchmark.extra_info["ratios"] = {row["candidate"]: row["ratio"] for row in timed}
    benchmark.pedantic(calls[OURS], rounds=ROUNDS)

"""``ClipMonitor`` says what one computes by hand from the inputs and the running statistics; it waits for nothing."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import brn_kernels as brn
from brn_kernels import monitor as monitor_module
from brn_kernels import observe
from brn_kernels.monitor import COLUMNS, QUANTILES

pytestmark = pytest.mark.many_steps

RAMP = brn.ClipSchedule(r_max=1.3, d_max=0.4, hold=2, r_ramp=5, d_ramp=3)
SCHEDULES = {
    "constant": brn.ClipSchedule.constant(1.15, 0.3),
    "ramp": RAMP,
    "closed": brn.ClipSchedule.batchnorm(),
    "unclipped": brn.ClipSchedule.unclipped(),
    "auto": brn.ClipSchedule.auto(),
}


@pytest.fixture(autouse=True)
def nobody_listens_afterwards():
    yield
    assert not observe.observers


def by_hand(x, layer, clipped_before, mask=None):
    """The numbers of one call, in NumPy and float64, from the layer as it is before the call."""
    values = np.moveaxis(x.detach().double().cpu().numpy(), 1, 0).reshape(x.shape[1], -1)
    if mask is not None:
        values = values[:, mask.cpu().numpy().ravel()]
    with np.errstate(invalid="ignore"):
        std, mean = np.sqrt(values.var(1) + layer.eps), values.mean(1)
    sigma = np.sqrt(layer.running_var.double().cpu().numpy() + layer.eps)
    r, d = std / sigma, (mean - layer.running_mean.double().cpu().numpy()) / sigma
    if layer.auto_state is not None:
        r_max, d_max = (limit.double().cpu().numpy() for limit in layer.auto_limits())
    else:
        r_max, d_max = (np.full(len(r), limit) for limit in layer.schedule.limits(int(layer.num_batches_tracked)))
    finite = np.isfinite(r) & np.isfinite(d)
    clipped_r, clipped_d = finite & ((r > r_max) | (r < 1 / r_max)), finite & (abs(d) > d_max)
    predicted = (r_max > 1) & (d_max > 0) & ~clipped_before
    hits = predicted == (finite & ~clipped_r & ~clipped_d)
    quantiles = [np.quantile(values[finite], QUANTILES) for values in (r, d)]
    return [clipped_r.mean(), clipped_d.mean(), (~finite).mean(), hits.mean(), *quantiles[0], *quantiles[1]]


def assert_row(row, expected):
    found = [row[column] for column in COLUMNS]
    assert found == pytest.approx(expected, rel=2e-4, abs=2e-5)


def batch(step, shape=(6, 16, 5, 3), dtype=torch.float32):
    generator = torch.Generator().manual_seed(step)
    spread = torch.linspace(0.7, 1.4, shape[1], dtype=torch.float64).view(1, -1, *[1] * (len(shape) - 2))
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * spread + spread - 1).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_numbers_equal_those_by_hand(backend, device, schedule, momentum, dtype):
    layer = brn.BatchRenorm2d(16, momentum=momentum, schedule=SCHEDULES[schedule]).to(device, dtype)
    expected = []
    with brn.ClipMonitor(layer, every=1) as monitor:
        for step in range(14):
            x = batch(step, dtype=dtype).to(device)
            expected.append(by_hand(x, layer, layer.clipped.cpu().numpy().copy()))
            layer(x.requires_grad_(step % 2 == 0))
    assert [row["call"] for row in monitor.rows()] == list(range(14))
    for row, numbers in zip(monitor.rows(), expected, strict=True):
        assert_row(row, numbers)
    if schedule != "unclipped":
        assert any(0 < numbers[0] for numbers in expected)


@pytest.mark.parametrize("eps", [1e-5, 3e-3, 3e-6, 0.3, 1e-12])
@pytest.mark.parametrize("schedule", ["closed", "auto", "ramp"])
def test_dead_channels_are_not_clipped_by_a_rounding(backend, device, schedule, eps):
    """r is exactly 1 there, which is no more than closed limits allow."""
    layer = brn.BatchRenorm1d(4, eps=eps, schedule=SCHEDULES[schedule]).to(device)
    layer.running_var.zero_()
    with brn.ClipMonitor(layer, every=1) as monitor:
        layer(torch.zeros(8, 4, device=device))
    (row,) = monitor.rows()
    assert (row["clipped_r"], row["clipped_d"], row["hits"]) == (0, 0, 0), "right but not predicted: limits are closed"


def test_masks_and_channels_that_are_not_finite(device):
    layer = brn.BatchRenorm2d(16, momentum=0.1, schedule=SCHEDULES["constant"]).to(device)
    mask = (torch.rand(6, 5, 3, generator=torch.Generator().manual_seed(0)) < 0.6).to(device)
    with brn.ClipMonitor(layer, every=1) as monitor:
        for step in range(4):
            x = batch(step).to(device)
            x[:, 3] = math.nan if step == 2 else 0.5
            expected = by_hand(x, layer, layer.clipped.cpu().numpy().copy(), mask)
            layer(x, mask=mask)
            assert_row(monitor.rows()[-1], expected)
    assert [row["not_finite"] for row in monitor.rows()] == [0, 0, 1 / 16, 0]


class Network(nn.Module):
    """A layer called twice, one in evaluation, one behind an activation that ``fuse`` takes in."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.shared = brn.BatchRenorm2d(8, schedule=RAMP)
        self.frozen = brn.BatchRenorm2d(8, schedule=RAMP).eval()
        self.last = brn.BatchRenorm2d(8, schedule=RAMP)

    def forward(self, x):
        x = self.shared(self.shared(self.conv(x)) * 2)
        self.frozen.eval()
        return torch.relu(self.last(self.frozen(x)))


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_calls_of_a_network(backend, device, fused):
    model = Network().to(device)
    model = brn.fuse(model) if fused else model
    with brn.ClipMonitor(model, every=1) as monitor:
        for step in range(3):
            model.train()
            for _ in range(2):  # gradients accumulate
                model(batch(step, (4, 3, 6, 6)).to(device)).square().mean().backward()
            model.eval()
            model(batch(step, (4, 3, 6, 6)).to(device))
    calls = {name: sum(row["layer"] == name for row in monitor.rows()) for name in monitor.layers}
    assert calls == {"shared": 12, "frozen": 0, "last": 6}
    model.train()
    model(batch(9, (4, 3, 6, 6)).to(device))
    assert len(monitor.rows()) == 18, "it is closed"


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_checkpointed_call_counts_once(device, use_reentrant):
    layer = brn.BatchRenorm2d(16, schedule=RAMP).to(device)
    with brn.ClipMonitor(layer, every=1) as monitor:
        for step in range(3):
            checkpoint(
                layer, batch(step).to(device).requires_grad_(), use_reentrant=use_reentrant
            ).sin().sum().backward()
    assert len(monitor.rows()) == 3 == layer.num_batches_tracked


def test_every_history_reset_and_two_monitors(device):
    layer = brn.BatchRenorm2d(16, schedule=RAMP).to(device)
    with brn.ClipMonitor(layer, every=3, history=2) as few, brn.ClipMonitor(layer, every=1) as all_of_them:
        for step in range(10):
            layer(batch(step).to(device))
        assert [row["call"] for row in few.rows()] == [6, 9]
        assert few.rows()[-1] == all_of_them.rows()[-1]
        few.reset()
        layer(batch(11).to(device))
        few.reset()  # what still waits to be computed is forgotten, too
        layer(batch(12).to(device))
        layer(batch(13).to(device))
        assert [row["call"] for row in few.rows()] == [0]


def test_what_waits_is_bounded(device, monkeypatch):
    monkeypatch.setattr(monitor_module, "_WAITING_VALUES", 1000)
    layer = brn.BatchRenorm2d(16, schedule=RAMP).to(device)
    with brn.ClipMonitor(layer, every=1, history=4) as monitor:
        for step in range(50):
            layer(batch(step).to(device))
            assert monitor._waiting_values <= 1000
            assert sum(map(len, monitor._waiting.values())) <= 1000 // (6 * 16)
    assert [row["call"] for row in monitor.rows()] == [46, 47, 48, 49]


def test_layers_are_found_at_once(device):
    """The search over all layers is for the first call: at each it would cost milliseconds in a deep network."""
    layers = nn.ModuleList(brn.BatchRenorm1d(4) for _ in range(300)).to(device)
    with brn.ClipMonitor(layers, every=1) as monitor:
        for layer in layers:
            layer(torch.randn(3, 4, device=device))
        assert len(monitor._names) == 300


@pytest.mark.parametrize("room", [1, 3_000, 10**9])
def test_calls_that_wait_for_each_other_keep_their_own_numbers(device, monkeypatch, room):
    """Layers of one size and of others, schedules that change between calls, double among float."""
    monkeypatch.setattr(monitor_module, "_WAITING_VALUES", room)
    model = nn.ModuleDict(
        {
            "a": brn.BatchRenorm2d(16, schedule=RAMP), "b": brn.BatchRenorm2d(16, momentum=None, eps=0.3),
            "few": brn.BatchRenorm1d(5, schedule=SCHEDULES["constant"]), "wide": brn.BatchRenorm2d(16).double(),
            "auto": brn.BatchRenorm2d(16, momentum=0.1, schedule=SCHEDULES["auto"]),
            "untracked": brn.BatchRenorm2d(16, track_running_stats=False),
        }
    ).to(device)  # fmt: skip
    expected = {name: [] for name in model if name != "untracked"}
    with brn.ClipMonitor(model, every=1) as monitor:
        for step in range(16):
            model["b"].schedule = SCHEDULES["constant" if step % 3 else "ramp"]
            for index, (name, layer) in enumerate(model.items()):
                shape = (6, 5) if name == "few" else (6, 16, 5, 3)
                x = batch(20 * step + index, shape, torch.float64 if name == "wide" else torch.float32).to(device)
                if name != "untracked":
                    expected[name].append(by_hand(x, layer, layer.clipped.cpu().numpy().copy()))
                layer(x)
            if step == 8:
                assert len(monitor.rows()) == 5 * 9
    for name, numbers in expected.items():
        rows = [row for row in monitor.rows() if row["layer"] == name]
        assert [row["call"] for row in rows] == list(range(16))
        for row, of_call in zip(rows, numbers, strict=True):
            assert_row(row, of_call)


def test_layers_are_known_after_they_got_other_tensors(device):
    layer = brn.BatchRenorm2d(16, schedule=RAMP).to(device)
    with brn.ClipMonitor(layer, every=1) as monitor:
        layer(batch(0).to(device))
        layer.double().float()
        layer(batch(1).to(device))
        layer.load_state_dict({name: value.clone() for name, value in layer.state_dict().items()}, assign=True)
        layer(batch(2).to(device))
    assert [row["call"] for row in monitor.rows()] == [0, 1, 2]


class Count(TorchDispatchMode):
    """Operators other than views and allocations: on a GPU, launches."""

    NO_LAUNCH = {"detach", "alias", "view", "select", "unbind", "expand", "empty", "empty_like", "slice", "unsqueeze"}

    def __init__(self):
        super().__init__()
        self.launches = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.launches += function._schema.name.partition("::")[2] not in self.NO_LAUNCH
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("schedule", ["ramp", "auto"])
def test_a_call_costs_three_launches_and_one_that_is_not_looked_at_none(device, schedule):
    layer = brn.BatchRenorm2d(16, schedule=SCHEDULES[schedule]).to(device)

    def launches():
        with Count() as count:
            for step in range(20):
                layer(batch(step).to(device))
        return count.launches

    alone = launches()
    with brn.ClipMonitor(layer, every=1):
        assert launches() == alone + 3 * 20
    with brn.ClipMonitor(layer, every=20):
        assert launches() == alone + 3


def test_an_overflowed_batch_leaves_the_means_readable(device):
    layer = brn.BatchRenorm2d(16, schedule=RAMP).to(device)
    with brn.ClipMonitor(layer, every=1) as monitor:
        layer(batch(0).to(device))
        layer(torch.full((6, 16, 5, 3), math.nan, device=device))
    first, overflowed = monitor.rows()
    assert overflowed["not_finite"] == 1 and math.isnan(overflowed["r_50"])
    assert monitor.means()["BatchRenorm2d"]["r_50"] == first["r_50"]
    assert monitor.means()["BatchRenorm2d"]["not_finite"] == 0.5


def test_a_step_reads_nothing_from_the_device(device, monkeypatch):
    layer = brn.BatchRenorm2d(16, schedule=RAMP).to(device)
    with brn.ClipMonitor(layer, every=1) as monitor:
        layer(batch(0).to(device))
        x = batch(1).to(device)
        with monkeypatch.context() as patch:
            for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__"):
                patch.setattr(torch.Tensor, name, lambda *_: pytest.fail("the host waited"))
            layer(x)
        assert len(monitor.rows()) == 2


def test_results_are_those_without_a_monitor(backend, device):
    layer = brn.BatchRenorm2d(16, schedule=RAMP, activation="relu").to(device)
    alone = copy.deepcopy(layer)
    with brn.ClipMonitor(layer, every=2):
        for step in range(4):
            x = batch(step).to(device)
            assert torch.equal(layer(x.requires_grad_()), alone(x))
    for ours, theirs in zip(layer.buffers(), alone.buffers(), strict=True):
        assert torch.equal(ours, theirs)


def test_compiled_code_is_not_seen_and_says_so(device):
    torch._dynamo.reset()
    layer = brn.BatchRenorm2d(16, schedule=RAMP).to(device)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with brn.ClipMonitor(layer, every=1) as monitor:
        compiled(batch(0).to(device))
        with pytest.warns(UserWarning, match="compiled code"):
            assert monitor.rows() == []


def test_ways_out(device, tmp_path):
    pytest.importorskip("tabulate")
    model = Network().to(device)
    with brn.ClipMonitor(model, every=1) as monitor:
        for step in range(4):
            model.train()
            model(batch(step, (4, 3, 6, 6)).to(device))
    lines = str(monitor).splitlines()
    assert len(lines) == 4 and lines[2].split()[0] == "shared" and "clipped_r" in lines[0]
    shares = [row["clipped_d"] for row in monitor.rows() if row["layer"] == "shared"]
    assert monitor.means()["shared"]["clipped_d"] == pytest.approx(sum(shares) / 8)
    pytest.importorskip("matplotlib")
    monitor.plot(tmp_path / "clips.png")
    assert (tmp_path / "clips.png").stat().st_size > 5_000

    class Writer:
        def __init__(self):
            self.scalars = {}

        def add_scalar(self, tag, value, step):
            self.scalars[tag] = (value, step)

    writer = Writer()
    monitor.write(writer, 7)
    assert writer.scalars["batch_renorm/last/clipped_r"] == (monitor.rows()[-1]["clipped_r"], 7)
    assert len(writer.scalars) == 2 * len(COLUMNS)


def test_a_tensorboard_writer_takes_it(device, tmp_path):
    tensorboard = pytest.importorskip("torch.utils.tensorboard", reason="needs tensorboard")
    layer = brn.BatchRenorm2d(16, schedule=RAMP).to(device)
    with brn.ClipMonitor(layer, every=1) as monitor, tensorboard.SummaryWriter(str(tmp_path)) as writer:
        layer(batch(0).to(device))
        monitor.write(writer, 0)
    assert list(tmp_path.iterdir())


def test_bad_arguments():
    with pytest.raises(ValueError, match="must be a torch.nn.Module, got str"):
        brn.ClipMonitor("model")
    with pytest.raises(ValueError, match="no Batch Renormalization layer"):
        brn.ClipMonitor(nn.Sequential(nn.BatchNorm2d(3)))
    for name in ("every", "history"):
        for number in (0, 1.5, -1, True):
            with pytest.raises(ValueError, match=name):
                brn.ClipMonitor(brn.BatchRenorm2d(3), **{name: number})

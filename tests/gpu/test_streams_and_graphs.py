"""CUDA graphs, several streams, the same bits every time."""

import copy

import pytest
import torch

import brn_kernels as brn

pytestmark = pytest.mark.usefixtures("kernels")
RAMP = brn.ClipSchedule(r_max=1.5, d_max=0.5, hold=10, r_ramp=60, d_ramp=40)


class Block(torch.nn.Module):
    """Every kind of call: plain, with an activation, with residual and ReLU."""

    def __init__(self, channels=64):
        super().__init__()
        self.norm1 = brn.BatchRenorm2d(channels, momentum=0.1, schedule=RAMP, activation="relu")
        self.norm2 = brn.BatchRenorm2d(channels, momentum=None, schedule=RAMP)
        self.norm3 = brn.BatchRenorm2d(channels, momentum=0.1, schedule=RAMP, activation="relu")

    def forward(self, x):
        return self.norm3(self.norm2(self.norm1(x)) * 1.5, residual=x)


def batch(seed, dtype=torch.bfloat16, shape=(16, 64, 28, 28), channels_last=True):
    generator = torch.Generator("cuda").manual_seed(seed)
    x = torch.randn(shape, generator=generator, device="cuda") * (1 + seed % 3) + 0.2
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return x.to(dtype).to(memory_format=memory_format)


def step(model, x, dy, set_to_none=False):
    model.zero_grad(set_to_none)
    x = x.detach().requires_grad_()
    y = model(x)
    y.backward(dy)
    return y.detach(), x.grad


def state_of(model):
    return [*model.buffers(), *(p.grad for p in model.parameters())]


@pytest.mark.parametrize("channels_last", [True, False], ids=["channels_last", "contiguous"])
def test_captured_training_step_equals_eager_over_100_replays(channels_last):
    eager = Block().cuda()
    captured = copy.deepcopy(eager)
    x, dy = batch(0, channels_last=channels_last), batch(1, channels_last=channels_last)
    start = copy.deepcopy(captured.state_dict())
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(captured, x, dy)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    captured.zero_grad(set_to_none=False)
    with torch.cuda.graph(graph):
        y, dx = step(captured, x, dy)
    captured.load_state_dict(start)
    for replay in range(100):
        new_x, new_dy = batch(replay, channels_last=channels_last), batch(replay + 1000, channels_last=channels_last)
        x.copy_(new_x)
        dy.copy_(new_dy)
        graph.replay()
        expected_y, expected_dx = step(eager, new_x, new_dy)
        assert torch.equal(y, expected_y) and torch.equal(dx, expected_dx), replay
        for ours, truth in zip(state_of(captured), state_of(eager), strict=True):
            assert torch.equal(ours, truth), replay
    assert captured.norm1.num_batches_tracked.item() == 100, "the schedule moved in the replays"


def test_a_graph_replayed_beside_eager_calls():
    """Both count with tickets: they must not share them."""
    model, other = Block().cuda(), Block().cuda()
    x, dy = batch(0), batch(1)
    step(model, x, dy)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, dx = step(model, x, dy)
    expected = None
    side = torch.cuda.Stream()
    for _ in range(50):
        model.load_state_dict(Block().state_dict())
        other.load_state_dict(Block().state_dict())
        torch.cuda.synchronize()
        with torch.cuda.stream(side):
            graph.replay()
        other_y, other_dx = step(other, x, dy)
        torch.cuda.synchronize()
        results = [y.clone(), dx.clone(), other_y, other_dx]
        expected = expected or results
        assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


def test_two_streams_at_once_equal_one_after_the_other():
    inputs = [(batch(k), batch(k + 10)) for k in range(2)]
    start = Block().cuda()
    expected = [step(copy.deepcopy(start), x, dy) for x, dy in inputs]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(2)]
    for _ in range(50):
        found = []
        models = [copy.deepcopy(start) for _ in range(2)]
        torch.cuda.synchronize()
        for stream, model, (x, dy) in zip(streams, models, inputs, strict=True):
            with torch.cuda.stream(stream):
                found.append(step(model, x, dy))
        torch.cuda.synchronize()
        for ours, truth in zip(found, expected, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(ours, truth, strict=True))


@pytest.mark.parametrize("shape", [(256, 256, 14, 14), (64, 24, 33, 31), (256, 1024, 14, 14)], ids=str)
@pytest.mark.parametrize("channels_last", [True, False], ids=["channels_last", "contiguous"])
def test_the_same_bits_in_100_runs_beside_other_work(shape, channels_last):
    """Other work changes which program arrives last."""
    x, dy = batch(0, shape=shape, channels_last=channels_last), batch(1, shape=shape, channels_last=channels_last)
    start = Block(shape[1]).cuda()
    load, side = torch.randn(2048, 2048, device="cuda"), torch.cuda.Stream()
    expected = None
    for run in range(100):
        with torch.cuda.stream(side):
            for _ in range(run % 7):
                load @ load
        model = copy.deepcopy(start)
        y, dx = step(model, x, dy)
        results = [y, dx, *(t.clone() for t in state_of(model))]
        expected = expected or results
        assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True)), run


def test_nothing_synchronizes():
    model, x, dy = Block().cuda(), batch(0), batch(1)
    step(model, x, dy)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(model, x, dy)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_reduce_overhead_compiles_and_keeps_the_counters():
    """Its warm-up allocates from the graphs' pool: counters made there would be overwritten by replays."""
    model = Block().cuda()
    eager = copy.deepcopy(model)
    compiled = torch.compile(model, mode="reduce-overhead", fullgraph=True)
    for k in range(8):
        x, dy = batch(k), batch(k + 100)
        y, dx = step(compiled, x, dy, set_to_none=True)  # they lie in the graphs' memory
        expected_y, expected_dx = step(eager, x, dy)
        assert torch.equal(y.clone(), expected_y) and torch.equal(dx.clone(), expected_dx), k

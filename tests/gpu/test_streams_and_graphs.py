"""CUDA graphs, several streams, the same bits every time."""

import copy

import pytest
import torch
from gpu_tools import DEVICE, IS_GPU, Captured, Gate, is_busy, on, scaled, seconds_of, streams, synchronize, warm_up

import brn_kernels as brn

pytestmark = pytest.mark.usefixtures("kernels")
RAMP = brn.ClipSchedule(r_max=1.5, d_max=0.5, hold=10, r_ramp=60, d_ramp=40)
CHANNELS = scaled(64, 2)
SHAPE = scaled((16, CHANNELS, 28, 28), (2, CHANNELS, 3, 2))  # on a GPU: many splits, which count each other
LAYOUTS = pytest.mark.parametrize("channels_last", [True, False], ids=["channels_last", "contiguous"])


class Block(torch.nn.Module):
    """Every kind of call: plain, with an activation, with residual and ReLU."""

    def __init__(self, channels=CHANNELS):
        super().__init__()
        self.norm1 = brn.BatchRenorm2d(channels, momentum=0.1, schedule=RAMP, activation="relu")
        self.norm2 = brn.BatchRenorm2d(channels, momentum=None, schedule=RAMP)
        self.norm3 = brn.BatchRenorm2d(channels, momentum=0.1, schedule=RAMP, activation="relu")

    def forward(self, x):
        return self.norm3(self.norm2(self.norm1(x)) * 1.5, residual=x)


def block(channels=CHANNELS):
    return Block(channels).to(DEVICE)


def batch(seed, shape=SHAPE, channels_last=True):
    generator = torch.Generator(DEVICE).manual_seed(seed)
    x = torch.randn(shape, generator=generator, device=DEVICE) * (1 + seed % 3) + 0.2
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return x.bfloat16().to(memory_format=memory_format)


def step(model, x, dy, set_to_none=False):
    model.zero_grad(set_to_none)
    x = x.detach().requires_grad_()
    y = model(x)
    y.backward(dy)
    return y.detach(), x.grad


def state_of(model):
    return [*model.buffers(), *(p.grad for p in model.parameters())]


def same(ours, truth):
    return all(torch.equal(a, b) for a, b in zip(ours, truth, strict=True))


@LAYOUTS
def test_captured_training_step_equals_eager_over_100_replays(channels_last):
    eager = block()
    captured = copy.deepcopy(eager)
    x, dy = batch(0, channels_last=channels_last), batch(1, channels_last=channels_last)
    start = copy.deepcopy(captured.state_dict())
    warm_up(lambda: step(captured, x, dy), 3)
    captured.zero_grad(set_to_none=False)
    graph = Captured(lambda: step(captured, x, dy))
    captured.load_state_dict(start)
    replays = scaled(100, 2)
    for replay in range(replays):
        new_x, new_dy = batch(replay, channels_last=channels_last), batch(replay + 1000, channels_last=channels_last)
        x.copy_(new_x)
        dy.copy_(new_dy)
        graph.replay()
        assert same(graph.results, step(eager, new_x, new_dy)), replay
        assert same(state_of(captured), state_of(eager)), replay
    assert captured.norm1.num_batches_tracked.item() == replays, "the schedule moved in the replays"


class AtOnce:
    """Calls, each on a stream of its own, that all begin at the same moment: when everything has been queued.

    Side by side for certain, then, and not one after the other because the host is slower than the GPU.
    """

    def __init__(self, calls):
        self.calls, self.streams = calls, streams(len(calls))
        self.queue()  # memory, compilation, counters
        self.seconds = 0.02 + 4 * seconds_of(self.queue)

    def queue(self):
        results = []
        for stream, call in zip(self.streams, self.calls, strict=True):
            with on(stream):
                results.append(call())
        return results

    def runs(self, number, prepare=lambda: None):
        """The results of so many runs; those that the gate did not outlast do not count."""
        for _ in range(2 * number):
            synchronize()  # nothing that was queued before may change what is prepared
            prepare()
            synchronize()
            gate = Gate(self.streams, self.seconds)
            results = self.queue()
            held = gate.is_closed()
            synchronize()
            if held:
                yield results
                number -= 1
            else:
                self.seconds *= 1.5
            if not number:
                return
        pytest.fail(f"no gate holds long enough: the last, {self.seconds:.2f} s")


def of_different_models(number):
    """Training steps of ``number`` models on a batch each, and what each gives when it runs alone."""
    start = block().state_dict()
    models = [block() for _ in range(number)]
    inputs = [(batch(k), batch(k + 10)) for k in range(number)]

    def call(model, x, dy):
        return [*step(model, x, dy), *(t.clone() for t in state_of(model))]

    def prepare():
        for model in models:
            model.load_state_dict(start)

    calls = [lambda model=model, x=x, dy=dy: call(model, x, dy) for model, (x, dy) in zip(models, inputs, strict=True)]
    prepare()
    expected = [call() for call in calls]
    return calls, prepare, expected


def test_streams_at_once_equal_one_after_the_other():
    calls, prepare, expected = of_different_models(scaled(4, 2))
    for found in AtOnce(calls).runs(scaled(50, 2), prepare):
        assert all(same(ours, truth) for ours, truth in zip(found, expected, strict=True))


@pytest.mark.needs_gpu
def test_streams_that_share_counters_do_not(kernels, monkeypatch):
    """That the test before this one can fail: its programs do meet."""
    if kernels != "triton":
        pytest.skip("only the Triton kernels have counters")
    from brn_kernels.backends.triton import launch

    calls, prepare, expected = of_different_models(4)
    shared = torch.zeros(2**16, dtype=torch.int32, device=DEVICE)
    monkeypatch.setattr(launch, "tickets", lambda device, count: shared)
    wrong = 0
    for found in AtOnce(calls).runs(50, lambda: (prepare(), shared.zero_())):
        wrong += not all(same(ours, truth) for ours, truth in zip(found, expected, strict=True))
    assert wrong, "launches on four streams never met: the test of streams at once shows nothing"


def test_a_graph_replayed_beside_eager_calls():
    """Both count with tickets: they must not share them."""
    calls, prepare, expected = of_different_models(2)
    prepare()
    graph = Captured(calls[0])

    def replayed():
        graph.replay()
        return [t.clone() for t in graph.results]

    def wrong(ours, truth):
        """How many values differ, of those results (y, dx, buffers, gradients) where any do."""
        pairs = enumerate(zip(ours, truth, strict=True))
        return {number: int((a != b).sum()) for number, (a, b) in pairs if not torch.equal(a, b)}

    both = {"the graph": replayed, "the eager call": calls[1]}
    for run, found in enumerate(AtOnce(both.values()).runs(scaled(50, 2), prepare)):
        at_once = {who: wrong(ours, truth) for who, ours, truth in zip(both, found, expected, strict=True)}
        if any(at_once.values()):
            prepare()
            alone = {who: wrong(call(), truth) for (who, call), truth in zip(both.items(), expected, strict=True)}
            pytest.fail(f"run {run}: wrong at once: {at_once}; one after the other: {alone}")


@pytest.mark.parametrize("shape", scaled([(256, 256, 14, 14), (64, 24, 33, 31), (256, 1024, 14, 14)], [SHAPE]), ids=str)
@LAYOUTS
def test_the_same_bits_in_100_runs_beside_other_work(shape, channels_last):
    """Other work changes which program arrives last."""
    x, dy = batch(0, shape=shape, channels_last=channels_last), batch(1, shape=shape, channels_last=channels_last)
    start = block(shape[1])
    size = scaled(4096, 8)
    load, product, (side,) = torch.randn(size, size, device=DEVICE), torch.zeros(size, size, device=DEVICE), streams(1)
    step(copy.deepcopy(start), x, dy)
    synchronize()
    expected, runs, beside = None, scaled(100, 2), 0
    for run in range(runs):
        with on(side):
            for _ in range(scaled(10, 3) + run % 7):  # of 3 ms each
                torch.mm(load, load, out=product)
        model = copy.deepcopy(start)
        y, dx = step(model, x, dy)
        dx.flatten()[0].item()  # until the step is done
        beside += is_busy(side)
        results = [y, dx, *(t.clone() for t in state_of(model))]
        expected = expected or results
        assert same(results, expected), run
    assert beside >= 0.8 * runs, "the other work was over before the steps"


@pytest.mark.needs_gpu
def test_nothing_synchronizes():
    model, x, dy = block(), batch(0), batch(1)
    step(model, x, dy)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(model, x, dy)
        with pytest.raises(RuntimeError, match="synchroniz"):
            x.sum().item()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_reduce_overhead_compiles_and_keeps_the_counters():
    """Its warm-up allocates from the graphs' pool: counters made there would be overwritten by replays."""
    model = block()
    eager = copy.deepcopy(model)
    compiled = torch.compile(model, mode="reduce-overhead", fullgraph=True) if IS_GPU else model
    for k in range(scaled(8, 1)):
        x, dy = batch(k), batch(k + 100)
        y, dx = step(compiled, x, dy, set_to_none=True)  # they lie in the graphs' memory
        assert same([y.clone(), dx.clone()], step(eager, x, dy)), k

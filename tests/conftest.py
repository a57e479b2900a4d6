"""What every test gets: a device, a backend, and empties that are not zero by luck."""

import gc
import importlib.util
import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported: kernels then run here, interpreted

import brn_kernels
from brn_kernels.backends import PREFERENCE

BACKENDS = [name for name in PREFERENCE if importlib.util.find_spec(f"brn_kernels.backends.{name}")]

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
torch.backends.cudnn.deterministic = True  # convolutions too must give the same bits twice ...
torch.backends.cudnn.allow_tf32 = False  # ... and float32 its digits


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", help="the device the tests run on, for example cuda")
    parser.addoption("--failures", metavar="FILE", help="append each failure to FILE at once: a run may be cut off")


def pytest_configure(config):
    path = config.getoption("--failures")
    if path and not hasattr(config, "workerinput"):  # xdist's workers report to their controller
        config.pluginmanager.register(_Failures(path))


class _Failures:
    """What pytest itself prints only when all tests are done."""

    def __init__(self, path):
        self.path = path

    def pytest_runtest_logreport(self, report):
        if report.failed:
            with open(self.path, "a") as file:
                file.write(f"==== {report.nodeid} ({report.when}, {report.duration:.1f} s)\n{report.longreprtext}\n\n")


def pytest_collection_modifyitems(items):
    """``-m device`` selects what runs on the device chosen: a GPU is rented by the minute."""
    for item in items:
        if "device" in item.fixturenames or item.path.parent.name == "gpu":
            item.add_marker("device")


@pytest.fixture
def device(request):
    return torch.device(request.config.getoption("--device"))


@pytest.fixture(params=BACKENDS)
def backend(request, device):
    """Each backend in turn; one that cannot run here skips, with its reason."""
    try:
        brn_kernels.backends.resolve(request.param, device.type)
    except RuntimeError as error:
        pytest.skip(str(error))
    if request.param == "triton" and device.type == "cpu" and request.node.get_closest_marker("many_steps"):
        pytest.skip("minutes under the Triton interpreter; what it tests lies above the backends, and runs on a GPU")
    with brn_kernels.use_backend(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def poisoned_empties(monkeypatch):
    """Fill what ``torch.empty`` and its relatives return: an element nobody writes then fails the comparison."""

    def poisoning(make):
        def made(*arguments, **keywords):
            tensor = make(*arguments, **keywords)
            if tensor.is_meta or torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None:
                return tensor
            with torch.no_grad():
                # a NaN of any dtype too, where bytes are a workspace
                filling = float("nan") if tensor.is_floating_point() else 0xFF if tensor.dtype == torch.uint8 else 1
                return tensor.fill_(filling)

        return made

    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, poisoning(getattr(torch, name)))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoning(torch.Tensor.new_empty))


@pytest.fixture
def triton_kernels(device):
    """Skips, with the reason, where the Triton kernels cannot run."""
    from brn_kernels.backends import triton

    if reason := triton.unusable(device.type):
        pytest.skip(reason)


@pytest.fixture
def tiny_tiles(nothing_resident, monkeypatch):
    """Tiles of 64 elements and 7 programs at once: every loop of the Triton kernels turns more than once."""
    from brn_kernels.backends.triton import config

    monkeypatch.setattr(config, "SETTINGS", dict.fromkeys(config.SETTINGS, config.Settings(1, 1, 3)))
    monkeypatch.setattr(config, "MAX_INNER_CHANNELS_LAST", 8)
    monkeypatch.setattr(config, "MIN_INNER_CONTIGUOUS", 8)
    monkeypatch.setattr(config, "MERGED_BYTES", 128)
    monkeypatch.setattr(config, "multiprocessors_of", lambda _: 7)
    monkeypatch.setattr(config, "ITEMS_WITHOUT_SPLIT", 0)
    _forget_launches()
    yield
    _forget_launches()


def _forget_launches():
    from brn_kernels import node
    from brn_kernels.backends.triton import launch

    launch.forget()
    node.forget()


@pytest.fixture
def nothing_resident(monkeypatch):
    """The Triton kernels hold nothing in registers from one pass to the next, however small it is."""
    from brn_kernels.backends.triton import config

    chosen = config._resident
    monkeypatch.setattr(config, "_resident", lambda *_: None)
    _forget_launches()
    yield chosen
    _forget_launches()


@pytest.fixture(params=["two launches", "one launch", "resident"])
def launches(request, tiny_tiles, nothing_resident, monkeypatch):
    """With tiny tiles, whole channels in several programs, in one, or in one that holds them in registers."""
    from brn_kernels.backends.triton import config

    if request.param == "resident":
        whole = config.Residence(2**20, 64, 16, most_warps=8, programs=1)
        monkeypatch.setattr(config, "_resident", nothing_resident)
        monkeypatch.setattr(config, "RESIDENCE", dict.fromkeys(config.RESIDENCE, whole))
    if request.param == "one launch":
        monkeypatch.setattr(config, "ITEMS_WITHOUT_SPLIT", 10**9)
    return request.param


@pytest.fixture
def nothing_left_behind():
    """The test of ``recompute_activations`` leaves no hooks, nor registered outputs once its graphs are gone."""
    from brn_kernels import recompute

    yield
    assert torch._C._autograd._top_saved_tensors_default_hooks(False) is None
    gc.collect()
    assert not recompute._outputs

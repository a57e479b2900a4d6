"""Who chooses the backend, and what is said when one cannot run."""

import logging
import os
import subprocess
import sys

import pytest
import torch

import brn_kernels as brn
from brn_kernels import backends


@pytest.fixture(autouse=True)
def choice_restored():
    before = backends.selected()
    yield
    with brn.use_backend("auto"):
        pass
    backends._selected = before


def in_a_new_process(code, **environment):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("BRN_")} | environment
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)


def test_a_call_holds_and_a_context_restores():
    brn.use_backend("reference")
    assert backends.selected() == "reference"
    with brn.use_backend("auto"):
        assert backends.selected() == "auto"
        with brn.use_backend("reference"):
            assert backends.selected() == "reference"
        assert backends.selected() == "auto"
    assert backends.selected() == "reference"
    with pytest.raises(KeyError), brn.use_backend("auto"):
        raise KeyError
    assert backends.selected() == "reference"


def test_unknown_name():
    before = backends.selected()
    with pytest.raises(ValueError, match="backend must be one of auto, triton, native, reference; got 'cuda'"):
        brn.use_backend("cuda")
    assert backends.selected() == before


def test_a_name_that_cannot_run_gives_the_reason(monkeypatch):
    monkeypatch.setattr(backends, "_unusable", lambda name, device_type: f"no {name} for {device_type}")
    before = backends.selected()
    with pytest.raises(RuntimeError, match="backend 'triton' cannot run here: no triton for cpu"):
        brn.use_backend("triton")
    assert backends.selected() == before
    backends._resolve.cache_clear()
    with pytest.raises(RuntimeError, match="backend 'native' cannot run on cpu: no native for cpu"):
        backends.resolve("native", "cpu")
    backends._resolve.cache_clear()


def test_a_backend_that_fails_to_import_is_passed_over(monkeypatch):
    def load(name):
        if name != "reference":
            raise ImportError(f"{name} is broken")
        return backends.reference

    import brn_kernels.backends.reference  # noqa: F401

    monkeypatch.setattr(backends, "_load", load)
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda *_: True)
    assert backends._unusable("triton", "cpu") == "triton is broken"
    backends._resolve.cache_clear()
    assert backends.resolve("auto", "cpu") is backends.reference
    backends._resolve.cache_clear()


def test_every_backend_is_listed_with_its_reason():
    listed = brn.available_backends()
    assert list(listed) == ["triton", "native", "reference"]
    assert listed["reference"] is None
    assert all(reason is None or isinstance(reason, str) and reason for reason in listed.values())


def test_the_backend_in_force_at_the_forward_runs_the_backward(monkeypatch):
    seen = []
    real = backends.resolve
    monkeypatch.setattr(backends, "resolve", lambda name, device: seen.append(name) or real(name, device))
    with brn.use_backend("reference"):
        y = brn.BatchRenorm1d(3)(torch.randn(4, 3))
    assert set(seen) == {"reference"}
    seen.clear()
    y.backward(torch.randn(4, 3))
    assert seen == ["reference"]


def test_falling_back_to_the_reference_is_logged_once(monkeypatch, caplog):
    monkeypatch.setattr(backends, "_unusable", lambda name, _: None if name == "reference" else f"{name} is missing")
    backends._resolve.cache_clear()
    with brn.use_backend("auto"), caplog.at_level(logging.DEBUG, logger="brn_kernels"):
        for _ in range(3):
            brn.BatchRenorm1d(3)(torch.randn(4, 3))
    backends._resolve.cache_clear()
    assert [record.getMessage() for record in caplog.records] == [
        "using the reference backend (plain PyTorch) on cpu. triton: triton is missing; native: native is missing"
    ]


def test_the_environment_chooses():
    code = "import brn_kernels as brn; print(brn.backends.selected())"
    assert in_a_new_process(code, BRN_KERNELS_BACKEND="reference").stdout.strip() == "reference"
    assert in_a_new_process(code).stdout.strip() == "auto"


def test_a_wrong_name_in_the_environment_is_told_when_it_is_used():
    code = "import torch, brn_kernels as brn; print('imported'); brn.BatchRenorm1d(3)(torch.randn(4, 3))"
    run = in_a_new_process(code, BRN_KERNELS_BACKEND="tritn")
    assert run.returncode == 1 and run.stdout.strip() == "imported"
    assert "got 'tritn' (from BRN_KERNELS_BACKEND)" in run.stderr


def test_import_loads_no_triton_and_asks_for_no_device():
    code = "import sys, brn_kernels, torch; print('triton' in sys.modules, torch.cuda.is_initialized())"
    assert in_a_new_process(code).stdout.split() == ["False", "False"]


def test_import_works_where_triton_is_missing():
    code = (
        "import sys; sys.modules['triton'] = None; import torch, brn_kernels as brn;"
        "print(brn.BatchRenorm1d(3)(torch.randn(4, 3)).shape, brn.available_backends()['triton'])"
    )
    run = in_a_new_process(code)
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("torch.Size([4, 3]) ") and not run.stdout.strip().endswith("None")


def test_auto_takes_the_compiled_loops_on_cpus():
    if reason := brn.available_backends()["native"]:
        pytest.skip(reason)
    backends._resolve.cache_clear()
    assert backends.resolve("auto", "cpu").__name__ == "brn_kernels.backends.native"


def test_without_a_compiled_library_native_says_what_to_do(tmp_path):
    code = (
        "import brn_kernels as brn\n"
        "from brn_kernels import build\n"
        "build.find = lambda sanitize=False: 'not built: run `brn build`'\n"
        "print(brn.available_backends()['native'], brn.backends.resolve('auto', 'cpu').__name__)\n"
    )
    printed = in_a_new_process(code).stdout
    assert printed.split() == ["not", "built:", "run", "`brn", "build`", "brn_kernels.backends.reference"]

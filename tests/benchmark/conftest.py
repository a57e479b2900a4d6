"""The benchmark's packages are an extra of their own."""

import pytest

pytest.importorskip("pandas")
pytest.importorskip("matplotlib")
pytest.importorskip("tabulate")


@pytest.fixture(autouse=True)
def a_backend_to_measure():
    from brn_kernels import backends

    if backends.resolve("auto", "cpu").__name__.endswith("reference"):
        pytest.skip("no fast backend for CPUs here: nothing to measure")

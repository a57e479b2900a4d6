"""Options and the summary of ``make bench``."""

import pytest

QUICK_LAYERS = 4


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", help="where the benchmarks run, for example cuda")
    parser.addoption("--batch", type=int, default=16, help="samples a batch, a divisor of 256")
    parser.addoption("--every-layer", action="store_true", help=f"all of ResNet-50's layers, not only {QUICK_LAYERS}")


def pytest_report_header(config):
    import brn_kernels

    device = config.getoption("--device").split(":")[0]
    backend = brn_kernels.backends.resolve("auto", device).__name__.rpartition(".")[2]
    if backend == "reference":
        raise pytest.UsageError(f"nothing to measure: {brn_kernels.available_backends()}")
    return f"brn_kernels backend on {device}: {backend}"


def pytest_generate_tests(metafunc):
    if "case" in metafunc.fixturenames:
        from bench.cases import ALL_PEERS, Plan
        from bench.networks import NETWORKS

        option = metafunc.config.getoption
        layers = None if option("--every-layer") else QUICK_LAYERS
        plan = Plan(("ResNet-50",), layers=layers, divisor=NETWORKS["ResNet-50"].batch // option("--batch"))
        cases = [case for case in plan.cases() if case.peers == ALL_PEERS and case.layer.net == "ResNet-50"]
        metafunc.parametrize("case", cases, ids=[str(case).partition(": ")[2].replace(" ", "-") for case in cases])


@pytest.fixture(scope="session")
def device(request):
    import torch

    return torch.device(request.config.getoption("--device"))


@pytest.fixture(scope="session")
def rows(request):
    """Where a test leaves its rows for the summary."""
    request.config.bench_rows = []
    return request.config.bench_rows


def pytest_terminal_summary(terminalreporter, config):
    if not getattr(config, "bench_rows", None):
        return
    import pandas as pd

    from bench import report

    measured = pd.DataFrame(config.bench_rows).rename_axis(None)
    measured["job"] = measured["size"] + measured.channels.astype(str) + measured.follows
    terminalreporter.section("time of a peer / our time: geometric means over the layers (above 1: ours is faster)")
    terminalreporter.write_line(report.text(report.means(measured, ["direction", *report.FORMAT])))
    slower = report.losses(measured)
    if len(slower):
        terminalreporter.write_line("\nslower than a peer:\n" + report.text(slower))

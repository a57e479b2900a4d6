"""Options and the summary of ``make bench``."""

import math
import statistics

import pytest
from tabulate import tabulate

QUICK_LAYERS = 4


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", help="where the benchmarks run, for example cuda")
    parser.addoption("--batch", type=int, default=16, help="samples a batch")
    parser.addoption("--every-layer", action="store_true", help=f"all of ResNet-50's layers, not only {QUICK_LAYERS}")
    parser.addoption("--csv", help="write the ratios to this file")


def pytest_report_header(config):
    import brn_kernels

    device = config.getoption("--device").split(":")[0]
    backend = brn_kernels.backends.resolve("auto", device).__name__.rpartition(".")[2]
    if backend == "reference":
        raise pytest.UsageError(f"nothing to measure: {brn_kernels.available_backends()}")
    return f"brn_kernels backend on {device}: {backend}"


def pytest_generate_tests(metafunc):
    if "layer" in metafunc.fixturenames:
        from bench.cases import RESNET50_LAYERS

        every = metafunc.config.getoption("--every-layer")
        layers = RESNET50_LAYERS if every else RESNET50_LAYERS[1 :: len(RESNET50_LAYERS) // QUICK_LAYERS]
        metafunc.parametrize("layer", layers, ids=[f"{channels}x{size}x{size}" for channels, size in layers])


def pytest_terminal_summary(terminalreporter, config):
    session = getattr(config, "_benchmarksession", None)
    cases = [bench.extra_info for bench in session.benchmarks if "ratios" in bench.extra_info] if session else []
    if not cases:
        return
    peers = list(dict.fromkeys(peer for case in cases for peer in case["ratios"]))
    keys = ("direction", "activation", "dtype", "layout")
    groups = {}
    for case in cases:
        groups.setdefault(tuple(case[key] for key in keys), []).append(case["ratios"])
    rows = [
        [*group, len(all_of), *(geometric_mean(all_of, peer) for peer in peers)] for group, all_of in groups.items()
    ]
    terminalreporter.section("time of a peer / our time: geometric means over the layers")
    terminalreporter.write_line(tabulate(rows, [*keys, "layers", *peers], floatfmt=".2f"))
    for direction, activation in dict.fromkeys((case["direction"], case["activation"]) for case in cases):
        some = [it["ratios"] for it in cases if (it["direction"], it["activation"]) == (direction, activation)]
        means = ", ".join(f"{peer} {geometric_mean(some, peer):.2f}" for peer in peers if peer != "clone")
        terminalreporter.write_line(f"{direction}, {activation}: {means}")
    slower = [case for case in cases if any(case["ratios"][peer] < 1 for peer in peers if peer != "clone")]
    for case in slower:
        lost = ", ".join(
            f"{peer} {ratio:.2f}" for peer, ratio in case["ratios"].items() if ratio < 1 and peer != "clone"
        )
        terminalreporter.write_line(f"slower than a peer: {case['name']}: {lost}")
    if path := config.getoption("--csv"):
        from bench.record import write_csv

        about = {"batch": config.getoption("--batch")}
        rows = [
            {key: case[key] for key in ("layer", *keys)} | about | {peer: case["ratios"].get(peer) for peer in peers}
            for case in cases
        ]
        write_csv(path, rows, config.getoption("--device"))
        terminalreporter.write_line(f"{path} written")


def geometric_mean(ratios, peer):
    """Over the cases that were compared with that peer; None if none was."""
    logs = [math.log(each[peer]) for each in ratios if peer in each]
    return math.exp(statistics.fmean(logs)) if logs else None


@pytest.fixture(scope="session")
def device(request):
    import torch

    return torch.device(request.config.getoption("--device"))

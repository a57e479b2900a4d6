"""What is made of Nsight Compute's output."""

import subprocess

import pytest

from bench import profile

HEADER = (
    "ID", "Process ID", "Process Name", "Host Name", "Kernel Name", "Context", "Stream", "Block Size", "Grid Size",
    "Device", "CC", "Section Name", "Metric Name", "Metric Unit", "Metric Value",
)  # fmt: skip
TIME, READ, WRITTEN = list(profile.METRICS)[:3]


def line(*fields):
    return ",".join(f'"{field}"' for field in fields)


def metric(number, kernel, name, unit, value):
    about = (4711, "python3", "127.0.0.1", kernel, 1, 7, "(128, 1, 1)", "(4, 396, 1)", 0, "9.0")
    return line(number, *about, "Command line profiler metrics", name, unit, value)


def said(*metrics):
    return "\n".join([
        "==PROF== Connected to process 4711 (/usr/bin/python3.12)", f"layer: {profile.LAYERS[0]}",
        '==PROF== Profiling "stream_kernel" - 0: 0%....50%....100% - 2 passes', f"layer: {profile.LAYERS[1]}",
        "==PROF== Disconnected from process 4711", line(*HEADER), *metrics,
    ])  # fmt: skip


def test_each_kernel_has_a_row_with_its_layer_and_its_speed():
    rows = profile.parse(said(
        metric(0, "stream_kernel", TIME, "us", "309.22"), metric(0, "stream_kernel", READ, "Mbyte", "411.07"),
        metric(0, "stream_kernel", WRITTEN, "Mbyte", "393.4"),
        metric(0, "stream_kernel", "launch__registers_per_thread", "register/thread", "168"),
        metric(1, "repair_kernel", TIME, "ns", "2,848"), metric(1, "repair_kernel", READ, "Kbyte", "8.19"),
        metric(1, "repair_kernel", WRITTEN, "byte", "0"),
        metric(10, "apply_kernel", TIME, "ms", "1.5"), metric(10, "apply_kernel", READ, "Gbyte", "1.2"),
        metric(10, "apply_kernel", WRITTEN, "n/a", "n/a"), metric(9, "stream_kernel", TIME, "us", "7"),
    ))  # fmt: skip
    first, second = map(str, profile.LAYERS[:2])
    kernels = ["stream_kernel", "repair_kernel", "stream_kernel", "apply_kernel"]
    assert [(row["layer"], row["kernel"]) for row in rows] == list(
        zip([first, first, second, second], kernels, strict=True)
    )
    assert rows[0] == {"layer": first, "kernel": kernels[0], "us": "309.2", "MB_read": "411.1", "MB_written": "393.4",
                       "registers": "168", "GB_per_s": "2602"}  # fmt: skip
    assert (rows[1]["us"], rows[1]["MB_read"], rows[1]["GB_per_s"]) == ("2.848", "0.00819", "2.876")
    assert (rows[3]["us"], rows[3]["MB_written"], rows[3]["GB_per_s"]) == ("1500", "n/a", "n/a")
    assert {name for row in rows for name in row} <= set(profile.COLUMNS)


def test_what_ncu_measures_besides_is_left_out():
    rows = profile.parse(said(metric(0, "stream_kernel", "another__metric", "", "1")))
    assert rows == [{"layer": str(profile.LAYERS[0]), "kernel": "stream_kernel", "GB_per_s": "n/a"}]


@pytest.mark.parametrize("known", [True, False])
def test_a_metric_that_ncu_does_not_know_does_not_lose_the_others(known, tmp_path, monkeypatch, capsys):
    asked = []

    def ncu(command, **_):
        asked.append(command[command.index("--metrics") + 1].split(","))
        if "launch__registers_per_thread" in asked[-1] and not known:
            return subprocess.CompletedProcess(
                command, 1, "", "==ERROR== Failed to find metric launch__registers_per_thread\n"
            )
        return subprocess.CompletedProcess(command, 0, said(metric(0, "stream_kernel", TIME, "us", "5")), "")

    monkeypatch.setattr(profile.shutil, "which", lambda name: name)
    monkeypatch.setattr(profile.subprocess, "run", ncu)
    monkeypatch.setattr(profile, "machine", lambda device: {"device": "a GPU"})
    lines = profile.run(tmp_path / "profile.csv").read_text().splitlines()
    assert len(asked) == (1 if known else 2) and len(asked[-1]) == len(profile.METRICS) - (not known)
    assert lines[0].split(",") == [*profile.COLUMNS, "device"] and lines[1].endswith(",a GPU") and len(lines) == 2
    assert ("does not know launch__registers" in capsys.readouterr().err) == (not known)


def test_a_failure_of_ncu_is_told(monkeypatch, tmp_path):
    failed = subprocess.CompletedProcess([], 1, "", "==ERROR== ERR_NVGPUCTRPERM - no permission\n")
    monkeypatch.setattr(profile.shutil, "which", lambda name: name)
    monkeypatch.setattr(profile.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(ValueError, match="ERR_NVGPUCTRPERM"):
        profile.run(tmp_path / "profile.csv")
    assert not list(tmp_path.iterdir())


def test_a_layer_with_residual_and_closed_limits_is_profiled():
    assert any(layer.residual for layer in profile.LAYERS) and any(layer.closed for layer in profile.LAYERS)
    assert len(set(map(str, profile.LAYERS))) == len(profile.LAYERS)

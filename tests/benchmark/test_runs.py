"""A run from end to end, its CSV, and what is made of it."""

import csv
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch

from bench import bars, cli, compare, docs, layers, peers, report, run, timing
from bench.cases import DIRECTIONS

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A tiny run by the command, and what it printed."""
    folder = tmp_path_factory.mktemp("bench")
    command = [
        sys.executable,
        "-m",
        "brn_kernels",
        "bench",
        "--tiny",
        "--threads",
        "1",
        "--out",
        str(folder / "run.csv"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "run.csv", done.stdout


def test_a_tiny_run_gives_a_table_a_csv_and_figures(tiny):
    path, printed = tiny
    rows = report.load(path)
    assert {"layer", "network"} <= set(rows.part)
    assert {"brn_kernels", "clone", "BatchNorm (ATen)", "BRN over F.batch_norm"} <= set(rows.candidate)
    assert set(DIRECTIONS) <= set(rows.direction)
    layer = rows[(rows.part == "layer") & rows.p50_us.notna()]
    assert (layer.p20_us <= layer.p50_us).all() and (layer.p50_us <= layer.p80_us).all() and (layer.p20_us > 0).all()
    for name in ("device", "commit", "torch", "date", "backend", "level"):
        assert (rows[name] != "").all(), name
    assert (rows[rows.candidate == "clone"].percent_of_copy - 100).abs().max() < 0.1
    both = rows[
        (rows.part == "layer") & (rows.direction == "both") & (rows["mode"] == "eager") & (rows.candidate != "clone")
    ]
    # y and dx at least; the profiler misses nothing of them
    assert (both.peak_mb >= 1.99 * both.mb).all()
    for section in ("time of a peer / our time", "percent of a copy", "host time", "whole networks", "not measured"):
        assert section in printed or section == "percent of a copy", section
    assert {file.name for file in path.with_suffix("").glob("*.png")} == {
        "roofline.png", "peers.png", "networks.png", "limits.png",
    }  # fmt: skip
    assert not list(path.parent.glob("*.part"))


def test_ratios_gbs_and_percent_follow_from_the_times(tiny):
    rows = report.load(tiny[0])
    layer = rows[(rows.part == "layer") & (rows["mode"] == "eager")]
    for _, case in layer.groupby(["job", "direction"]):
        times = case.set_index("candidate")
        ours, copy = times.loc["brn_kernels"], times.loc["clone"]
        for name, row in times.iterrows():
            assert row.ratio == pytest.approx(row.p50_us / ours.p50_us, rel=2e-3)
            factor = {"forward": 2, "backward": 3, "both": 5}[row.direction] + (name != "clone") * (
                row.follows.startswith("add") * {"forward": 1, "backward": 1, "both": 2}[row.direction]
            )
            moved = 2 if name == "clone" else factor
            assert row.gb_per_s == pytest.approx(1e3 * row.mb * moved / row.p50_us, rel=5e-3)
            assert row.percent_of_copy == pytest.approx(100 * row.gb_per_s / copy.gb_per_s, rel=5e-3)


def test_a_finished_run_is_not_overwritten(tiny, capsys):
    before = tiny[0].read_text()
    assert cli.main(["--tiny", "--out", str(tiny[0])]) == 2
    assert "finished already" in capsys.readouterr().err
    assert tiny[0].read_text() == before


def test_a_killed_run_goes_on_where_it_was(tmp_path):
    """SIGKILL in the middle, and half a line at the end of the file."""
    out, part = tmp_path / "run.csv", tmp_path / "run.csv.part"
    command = [sys.executable, "-m", "bench", "--tiny", "--threads", "1", "--out", str(out)]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    deadline = time.monotonic() + 300
    while len(jobs_in(part)) < 2:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    kept = jobs_in(part)
    lines = part.read_text().splitlines(keepends=True)
    with part.open("a") as file:
        file.write(lines[1].replace(kept[0], "half a job")[:40])
    resumed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    found = int(re.search(r"going on: (\d+) of", resumed.stderr).group(1))
    assert found >= 2
    after = out.read_text().splitlines(keepends=True)
    assert after[: len(lines)][: found * 3] == lines[: found * 3]  # measured once
    assert "half a job" not in out.read_text()
    assert len(jobs_in(out)) == len(run.jobs(run.levels("cpu")["tiny"], CPU))
    assert len(set(after)) == len(after)


def jobs_in(path):
    """Names of finished jobs, in order."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["rows"] and row["rows"].isdigit()]
    names = [row["job"] for row in rows]
    return [
        name
        for name in dict.fromkeys(names)
        if names.count(name) == int(next(r["rows"] for r in rows if r["job"] == name))
    ]


def test_a_run_cut_by_its_time_limit_goes_on_and_is_finished_as_it_is_on_demand(tmp_path, monkeypatch, capsys):
    out, now, measured = tmp_path / "run.csv", [0.0], []

    def measure(case, device, **_):
        now[0] += 60
        measured.append(str(case))
        return [{"part": "layer", "net": "x", "candidate": "y"}]

    monkeypatch.setattr(run.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(layers, "measure", measure)
    monkeypatch.setattr(run.training, "measure", measure)
    names = [job.name for job in run.jobs(run.levels("cpu")["tiny"], CPU)]
    command = ["--tiny", "--device", "cpu", "--out", str(out)]
    assert cli.main([*command, "--minutes", "1"]) == cli.UNFINISHED
    assert "same command goes on" in capsys.readouterr().err
    assert measured == names[:2] == jobs_in(out.with_name("run.csv.part")) and not out.exists()
    with pytest.raises(run.TimeLimit, match=f"{len(names) - 3} of {len(names)} cases left"):
        run.run("tiny", CPU, out=out, minutes=0.5, fresh=False)
    assert measured == names[:3]
    rows = report.load(run.run("tiny", CPU, out=out, minutes=0, fresh=False))
    assert measured == names[:3] and not out.with_name("run.csv.part").exists()
    assert rows.error.tolist() == [""] * 3 + ["not reached in the time limit"] * (len(names) - 3)
    assert "not measured" in report.summary(rows)


def test_what_is_asked_first_is_measured_first():
    names = [job.name for job in run.jobs(run.levels("cuda")["full"], CPU)]

    def positions(*words):
        found = [i for i, name in enumerate(names) if all(word in name for word in words)]
        assert found, words
        return found

    others = [i for net in ("MobileNet", "EfficientNet", "U-Net") for i in positions(net)]
    opens = [i for i in positions("ResNet-50: 256", ", open")]
    assert opens == list(range(opens[0], opens[0] + len(opens))) and opens[0] <= 1
    order = [opens, positions("ResNet-50: 256", ", closed"), positions("training of ResNet-50", ", eager"),
             positions("sweep"), positions("ResNet-50: 256", ", clip 10"), others]  # fmt: skip
    for earlier, later in zip(order, order[1:], strict=False):
        assert max(earlier) < min(later), (names[max(earlier)], names[min(later)])
    assert max(others) < max(positions("training", ", compiled")) == len(names) - 1


def test_a_case_without_memory_is_left_out_and_the_run_goes_on(tmp_path, monkeypatch):
    def measure(case, device, **_):
        raise torch.OutOfMemoryError("no memory\nfor this")

    monkeypatch.setattr(layers, "measure", measure)
    monkeypatch.setattr(run.training, "measure", lambda case, device, **_: [])
    rows = report.load(run.run("tiny", CPU, out=tmp_path / "run.csv", minutes=None, fresh=False))
    assert set(rows.error) == {"no memory", "gave nothing"}


def test_wrong_results_end_the_run_with_an_error(tmp_path, monkeypatch, capsys):
    forward = peers.Ours.forward
    monkeypatch.setattr(peers.Ours, "forward", lambda self, *tensors: forward(self, *tensors) + 0.5)
    out = tmp_path / "run.csv"
    assert cli.main(["--tiny", "--out", str(out)]) == 1
    assert "WRONG RESULTS" in capsys.readouterr().err
    assert not out.exists()


def test_compare_finds_what_got_slower(tiny, tmp_path, capsys):
    rows = pd.read_csv(tiny[0], dtype=str, keep_default_na=False)
    chosen = rows[(rows.candidate == "brn_kernels") & (rows.direction == "forward") & (rows["mode"] == "eager")].index[
        0
    ]
    for column in ("p20_us", "p50_us", "p80_us"):
        rows.loc[chosen, column] = str(100 * float(rows.loc[chosen, column]))
    slower = tmp_path / "slower.csv"
    rows.to_csv(slower, index=False)
    text, number = compare.compare(tiny[0], slower, 0.05)
    assert number == 1 and "slower: 1 of" in text and "100" in text
    assert compare.compare(slower, tiny[0], 0.05)[1] == 0
    assert cli.main(["compare", str(tiny[0]), str(tiny[0])]) == 0
    assert cli.main(["compare", str(tiny[0]), str(slower)]) == 1
    capsys.readouterr()
    other = tmp_path / "other.csv"
    other.write_text("a,b\n1,2\n")
    assert cli.main(["compare", str(tiny[0]), str(other)]) == 2
    assert cli.main(["compare", str(tiny[0]), str(tmp_path / "none.csv")]) == 2
    assert "not a CSV of brn bench" in capsys.readouterr().err


def test_plot_and_show_read_a_csv(tiny, tmp_path, capsys):
    assert cli.main(["plot", str(tiny[0]), "--out", str(tmp_path / "figures")]) == 0
    assert len(list((tmp_path / "figures").glob("*.png"))) == 4
    capsys.readouterr()
    assert cli.main(["show", str(tiny[0])]) == 0
    assert capsys.readouterr().out.strip() in tiny[1]


def test_means_are_geometric_and_weighted():
    rows = pd.DataFrame({
        "job": ["a", "b", "a", "b"], "net": ["n"] * 4, "candidate": ["p", "p", "clone", "brn_kernels"],
        "ratio": [2.0, 4.0, 9.0, 1.0], "count": [3, 1, 3, 1],
    })  # fmt: skip
    table = report.means(rows, ["net"])
    assert table.loc["n", "p"] == pytest.approx((2**3 * 4) ** (1 / 4)) and table.loc["n", "layers"] == 2
    assert list(table.columns) == ["layers", "p"]


def test_bars_are_judged_on_the_numbers():
    def rows(ours):
        base = {"part": "layer", "net": "ResNet-50", "job": "j", "size": "112x112", "follows": "relu", "mb": 400.0,
                "count": 1, "dtype": "bfloat16", "layout": "channels_last", "state": "open", "direction": "forward",
                "mode": "eager", "images_per_s": float("nan")}  # fmt: skip
        return pd.DataFrame([
            base | {"candidate": "brn_kernels", "p50_us": ours, "ratio": 1.0},
            base | {"candidate": "clone", "p50_us": 100.0, "ratio": 100 / ours},
            base | {"candidate": "BatchNorm (ATen)", "p50_us": 300.0, "ratio": 300 / ours},
        ])  # fmt: skip

    for ours, expected in ((104.0, "met"), (106.0, "MISSED")):
        table, count = bars.judge(rows(ours))
        row = table[table.bar.str.startswith("forward / clone") & table.bar.str.endswith("channels_last")].iloc[0]
        assert (row.result, float(row.measured)) == (expected, ours / 100)
        assert count["MISSED"] == (expected == "MISSED") and count["met"] == 2 - count["MISSED"]
        assert count["not measured"] == len(table) - 2
        assert (table.result == "not measured").sum() == len(table) - 2  # the worst case of all is the other one


@pytest.mark.parametrize("results, status", [(("met", "met"), 0), (("met", "MISSED", "not measured"), 1),
                                             (("met", "not measured"), 3)])  # fmt: skip
def test_bars_not_measured_are_no_success(tiny, results, status, monkeypatch, capsys):
    values = {"met": 0.5, "MISSED": 2.0, "not measured": None}
    monkeypatch.setattr(
        bars, "BARS", [bars.Bar(str(i), lambda _, r=result: values[r], 1.0) for i, result in enumerate(results)]
    )
    assert cli.main(["bars", str(tiny[0])]) == status
    said = capsys.readouterr().out.splitlines()[-1]
    assert said == ", ".join(f"{results.count(name)} {name}" for name in ("met", "MISSED", "not measured"))


def test_turns_are_shuffled_and_everybody_has_as_many():
    calls = {name: [] for name in "abc"}
    order = []
    functions = {name: lambda name=name: order.append(name) for name in calls}
    times = timing.time_together(functions, CPU, seconds=0)
    assert set(times) == set(calls)
    turns = ["".join(order[i : i + 3]) for i in range(3, len(order), 3)]  # after a first call of each
    assert len(turns) == timing.MIN_ROUNDS + 1 and all(sorted(turn) == list("abc") for turn in turns)
    assert len(set(turns)) > 1


class GpuOfPaper:
    """A GPU that works through a queue, and a host with a clock of its own; microseconds, and a cycle is one."""

    def __init__(self):
        self.host = self.gpu = 0

    def queue(self, gpu_us, host_us):
        self.host += host_us
        self.gpu = max(self.gpu, self.host) + gpu_us

    def event(self, enable_timing):
        event, gpu = SimpleNamespace(), self

        def record():
            event.at = max(gpu.gpu, gpu.host)

        def synchronize():
            gpu.host = max(gpu.host, event.at)

        event.record, event.synchronize = record, synchronize
        event.query = lambda: event.at <= gpu.host
        event.elapsed_time = lambda end: (end.at - event.at) / 1e3
        return event


@pytest.mark.parametrize("host_us, counts, expected", [(100, False, 50), (7_000, False, 50), (7_000, True, 7_000)])
def test_time_of_a_slow_host_is_not_taken_for_the_gpus(monkeypatch, host_us, counts, expected):
    """On the H100 two rows said 950 and 2,199 us where the kernels took 80 and 120: the host had been 2 ms late."""
    gpu = GpuOfPaper()
    monkeypatch.setattr(torch.cuda, "Event", gpu.event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: gpu.queue(cycles, 1))
    monkeypatch.setattr(timing, "HEAD_START", 2_000)
    monkeypatch.setattr(timing, "MAX_HEAD_START", 32_000)
    stopwatch = timing._GpuStopwatch(counts)
    for _ in range(2):
        seconds = stopwatch(lambda: [gpu.queue(gpu_us, host_us) for gpu_us in (20, 30)], lambda: gpu.queue(40, 1))
        assert seconds * 1e6 == pytest.approx(expected, abs=2 * host_us if counts else 1e-6)
    assert stopwatch.head_start == (16_000 if host_us > 1_000 and not counts else 2_000)


def test_a_call_that_waits_for_the_gpu_is_timed_as_it_is(monkeypatch):
    gpu = GpuOfPaper()
    monkeypatch.setattr(torch.cuda, "Event", gpu.event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: gpu.queue(cycles, 1))
    monkeypatch.setattr(timing, "HEAD_START", 2_000)
    monkeypatch.setattr(timing, "MAX_HEAD_START", 32_000)

    def call():
        gpu.queue(20, 5)
        gpu.host = gpu.gpu
        gpu.queue(30, 5)

    assert timing._GpuStopwatch(False)(call, lambda: gpu.queue(40, 1)) * 1e6 == pytest.approx(55)


def test_quantiles():
    times = timing.Times.of([float(i) for i in range(11)])
    assert (times.p20, times.p50, times.p80) == (2e6, 5e6, 8e6)


def test_peak_memory_counts_what_is_held_at_once():
    x = torch.ones(2**18)  # 1 MiB

    def call():
        y = x + 1
        del y
        return x + 2, x + 3

    assert timing.peak_bytes(call, CPU) == pytest.approx(2 * 2**20, rel=1e-3)  # beside the two numbers added


def test_the_documentation_is_what_the_recorded_runs_say():
    """``make docs-bench`` was run after the last change of a CSV."""
    paths = docs.recorded()
    assert docs.PAGE.read_text() == docs.page(paths, draw=False)
    text = docs.README.read_text()
    assert docs.readme(text, docs.readme_block(paths)) == text
    for line in docs.PAGE.read_text().splitlines():
        for figure in re.findall(r"\(figures/([^)]+)\)", line):
            assert (docs.FIGURES / figure).is_file()


def test_readme_without_its_marks_is_an_error():
    with pytest.raises(ValueError, match="no place"):
        docs.readme("nothing", "block")


def test_an_installed_package_says_where_the_benchmark_is(monkeypatch, tmp_path, capsys):
    from brn_kernels import cli as brn_cli

    monkeypatch.setattr(brn_cli, "__file__", str(tmp_path / "site-packages" / "brn_kernels" / "cli.py"))
    assert brn_cli.main(["bench", "--quick"]) == 1
    assert "checkout" in capsys.readouterr().err


def test_nothing_to_measure_without_a_fast_backend(monkeypatch, capsys):
    import brn_kernels

    with brn_kernels.use_backend("reference"):
        assert cli.main(["--tiny"]) == 2
    assert "no fast backend" in capsys.readouterr().err


@pytest.mark.parametrize("device", ("cpu", "cuda"))
@pytest.mark.parametrize("level", ("quick", "full", "everything", "tiny"))
def test_every_level_has_cases_and_distinct_names(level, device):
    names = [job.name for job in run.jobs(run.levels(device)[level], CPU)]
    assert len(names) == len(set(names)) > 5


@pytest.mark.parametrize("option", [("--threads", "0"), ("--minutes", "-1"), ("--minutes", "nan")])
def test_numbers_out_of_range_are_named(option, tmp_path, capsys):
    assert cli.main(["--tiny", "--out", str(tmp_path / "run.csv"), *option]) == 2
    assert option[0] in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ("settings", "profile"))
def test_what_needs_a_gpu_says_so(command, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main([command, str(tmp_path / "out.csv")]) == 2
    assert "sees none" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_no_profile_without_nsight_compute(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert cli.main(["profile", str(tmp_path / "out.csv")]) == 2
    assert "Nsight Compute" in capsys.readouterr().err and not list(tmp_path.iterdir())

"""``bench/gpu_check.sh``, with a stand-in for the interpreter of a machine with a GPU, and dry."""

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch

from bench import gpu_record

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "bench" / "gpu_check.sh"
STEPS = ["build", "tests", "large", "sanitizers", "profile", "settings", "bench", "bars"]
INTERPRETER = f"""#!/usr/bin/env bash
case "$*" in
*gpu_record\\ machine*) exit 0 ;;
*gpu_record*) exec {sys.executable} "$@" ;;
*is_available*) name=gpu ;;
*resolve*triton*) name=triton ;;
*resolve*native*) name=native ;;
*brn_kernels\\ info*) exit 0 ;;
*brn_kernels\\ build*) name=build ;;
*pytest*test_large.py*--ignore*) name=tests ;;
*pytest*test_large.py*) name=large ;;
*pytest*test_sanitizer.py*) name=sanitizers ;;
*bench\\ profile*) name=profile ;;
*bench\\ settings*) name=settings ;;
*bench\\ bars*) name=bars ;;
*--minutes\\ 0\\ *) name=finish ;;
*bench*) name=bench ;;
esac
echo "$name $*" >>"$STUB/calls"
[ ! -e "$STUB/$name" ] || . "$STUB/$name"
case $name in
tests | large | sanitizers) echo "==== 5 passed, 2 warnings in 1.00s ====" ;;
bars) echo "3 met, 0 MISSED, 0 not measured" ;;
bench) echo numbers >"${{@: -1}}" ;;
finish) mv "${{@: -1}}.part" "${{@: -1}}" ;;
esac
exit 0
"""


class Check:
    """The script's surroundings, and what it left behind."""

    def __init__(self, folder):
        self.stub, self.out = folder / "stub", folder / "out"
        self.stub.mkdir()
        self.python = self.stub / "python"
        self.python.write_text(INTERPRETER)
        self.python.chmod(0o755)

    def does(self, **what):
        """What the interpreter does instead, by step, in bash."""
        for name, commands in what.items():
            (self.stub / name).write_text(commands)

    def start(self, *, commit="abc1234", script=SCRIPT, **environment):
        kept = {name: value for name, value in os.environ.items() if name not in ("STEPS", "TRITON_INTERPRET")}
        environment = {"PYTHON": str(self.python), "STUB": str(self.stub), "COMMIT": commit} | environment
        return subprocess.Popen(
            [script, self.out], env=kept | environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # in the background shells ignore it
        )  # fmt: skip

    def run(self, **environment):
        started = self.start(**environment)
        self.said, _ = started.communicate(timeout=120)
        return started.returncode

    def calls(self):
        return [line.split()[0] for line in (self.stub / "calls").read_text().splitlines()]

    def results(self):
        record = json.loads((self.out / "run.json").read_text())
        return {name: entry["result"] for name, entry in record["steps"].items()}


@pytest.fixture
def check(tmp_path):
    return Check(tmp_path)


def test_all_steps_in_their_order_and_everything_in_one_file(check):
    assert check.run() == 0, check.said
    assert check.calls() == ["gpu", "build", "triton", "native", *STEPS[1:]]
    assert check.results() == dict.fromkeys(STEPS, "passed") | {"bars": "3 met, 0 MISSED, 0 not measured"}
    entry = json.loads((check.out / "run.json").read_text())["steps"]["tests"]
    assert (entry["passed"], entry["warning"]) == (5, 2) and entry["seconds"] >= 0
    assert [line.split()[0] for line in (check.out / "summary.txt").read_text().splitlines()] == STEPS
    assert "ran 8 of 8 steps" in check.said
    with tarfile.open(f"{check.out}.tgz") as packed:
        assert {f"out/{name}" for name in ("run.json", "summary.txt", "tests.log", "bench.csv")} <= set(
            packed.getnames()
        )


def test_options_reach_what_they_are_for(check):
    assert check.run(STEPS="tests bench", TEST_ARGS="-k name", WORKERS="3", BENCH_ARGS="--minutes 2") == 0
    tests, bench = [line for line in (check.stub / "calls").read_text().splitlines() if line[:5] in ("tests", "bench")]
    assert tests.endswith("-k name") and "-n 3" in tests and "--failures" in tests and "--device cuda" in tests
    assert "--minutes 2" in bench and "--fresh" not in bench
    assert "ran 2 of 2 steps" in check.said
    assert check.run() == 0 and "--fresh" in (check.stub / "calls").read_text()


def test_a_misspelt_step_is_an_error_before_anything_is_touched(check):
    assert check.run(STEPS="build benhc") == 2 and "no such step: benhc" in check.said
    assert not check.out.exists() and not (check.stub / "calls").exists()


def test_without_a_gpu_nothing_is_touched(check):
    check.out.mkdir()
    (check.out / "summary.txt").write_text("an earlier run's")
    check.does(gpu="exit 1")
    assert check.run() == 2 and "sees no GPU" in check.said
    assert (check.out / "summary.txt").read_text() == "an earlier run's"


def test_a_folder_of_others_is_left_alone(check):
    check.out.mkdir()
    (check.out / "numbers.csv").write_text("mine")
    assert check.run() == 2 and "in use" in check.said
    assert (check.out / "numbers.csv").exists()


def test_a_copy_must_say_of_which_commit(check, tmp_path):
    copy = tmp_path / "copy" / "bench" / "gpu_check.sh"
    copy.parent.mkdir(parents=True)
    copy.write_bytes(SCRIPT.read_bytes())
    copy.chmod(0o755)
    assert check.run(commit="", script=copy) == 2 and "COMMIT" in check.said


def test_a_backend_that_does_not_load_ends_it_before_the_tests(check):
    check.does(native="exit 1")
    assert check.run() == 2 and "SKIP_NATIVE" in check.said
    assert check.calls() == ["gpu", "build", "triton", "native"]
    assert check.run(SKIP_NATIVE="1") == 0 and check.calls()[-1] == "bars"


@pytest.mark.parametrize("step, does, result", [
    ("build", "exit 4", "FAILED with status 4"),
    ("tests", "echo '==== 9 failed in 1.0s ===='; exit 1", "FAILED with status 1"),
    ("tests", "echo '9 skipped in 1.0s'; exit 0", "NOTHING RAN"),
    ("tests", "echo '9 skipped, 1 error in 1.0s'; exit 1", "FAILED with status 1"),
    ("large", "echo '7 passed, 1 skipped in 1.0s'; exit 0", "SKIPPED"),
    ("bars", "exit 2", "FAILED with status 2"),
])  # fmt: skip
def test_a_step_that_fails_is_told_and_the_others_go_on(check, step, does, result):
    check.does(**{step: does})
    assert check.run() == 1, check.said
    assert check.results()[step] == result and list(check.results()) == STEPS


def test_missed_bars_are_told_and_are_no_failure(check):
    check.does(bars="echo '2 met, 1 MISSED, 4 not measured'; exit 1")
    assert check.run() == 0
    assert check.results()["bars"] == "2 met, 1 MISSED, 4 not measured"


def test_a_benchmark_cut_off_is_judged_by_what_there_is_and_goes_on(check):
    check.does(bench='echo some >"${@: -1}.part"; exit 3')
    assert check.run() == 0
    assert check.results()["bench"].startswith("cut off") and check.calls()[-2:] == ["finish", "bars"]
    last = (check.stub / "calls").read_text().splitlines()[-1]
    assert last.endswith("bench-so-far.csv") and (check.out / "bench.csv.part").read_text() == "some\n"
    check.does(bench='rm "${@: -1}.part"')
    assert check.run(STEPS="bench bars") == 0
    assert check.calls()[-2:] == ["bench", "bars"] and check.results()["bench"] == "passed"


def test_a_benchmark_that_fails_is_not_judged_by_older_numbers(check):
    check.out.mkdir()
    for name in ("summary.txt", "bench.csv"):
        (check.out / name).write_text("older")
    check.does(bench='echo some >"${@: -1}.part"; exit 137')
    assert check.run() == 1
    last = (check.stub / "calls").read_text().splitlines()[-1]
    assert last.endswith("bench-so-far.csv") and not (check.out / "bench.csv").exists()


def test_wrong_results_are_not_judged(check):
    check.does(bench='echo "WRONG RESULTS, nothing is published"; exit 1')
    assert check.run() == 1
    assert "bars" not in check.calls() and "not judged" in (check.out / "summary.txt").read_text()


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupt_ends_what_runs_and_packs_what_there_is(check, sent):
    check.does(tests='echo $$ >"$STUB/pid"; sleep 300 & echo $! >>"$STUB/pid"; wait')
    started = check.start()
    deadline = time.monotonic() + 60
    while not (check.stub / "pid").exists() or len((check.stub / "pid").read_text().split()) < 2:
        assert started.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    started.send_signal(sent)
    started.communicate(timeout=60)
    assert started.returncode == 130
    assert check.results() == {"build": "passed", "tests": "INTERRUPTED"}
    assert Path(f"{check.out}.tgz").exists()
    for pid in (check.stub / "pid").read_text().split():
        state = Path(f"/proc/{pid}/stat")
        assert not state.exists() or state.read_text().split()[2] == "Z", pid


def test_counts_are_read_off_pytests_last_line():
    log = "12 passed earlier\n==== 1 failed, 20 passed, 3 skipped, 2 errors in 5.0s (0:00:05) ====\nmore\n"
    assert gpu_record.counts(log) == {"failed": 1, "passed": 20, "skipped": 3, "error": 2}
    assert gpu_record.counts("no tests here") == {}


def test_the_record_says_on_what_of_what_and_when(tmp_path, monkeypatch):
    monkeypatch.setenv("COMMIT", "abc1234")
    gpu_record.step(tmp_path, "build", "passed", "7")
    gpu_record.machine(tmp_path)
    record = json.loads((tmp_path / "run.json").read_text())
    (call,) = record["calls"]
    assert call["commit"] == "abc1234" and call["torch"] == torch.__version__
    assert {"device", "driver", "triton", "nvcc", "ncu", "compute-sanitizer", "dirty", "date"} <= set(call)
    assert record["steps"] == {"build": {"result": "passed", "seconds": 7}}


@pytest.mark.parametrize("workers", [0, 1])
def test_failures_are_written_down_before_the_end(workers, tmp_path):
    pytest.importorskip("xdist")
    (tmp_path / "conftest.py").write_bytes((ROOT / "tests" / "conftest.py").read_bytes())
    (tmp_path / "test_it.py").write_text(
        "import os\ndef test_a():\n    assert 1 == 2, 'the reason'\ndef test_b():\n    os._exit(3)\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--failures", "out.txt", "test_it.py"]
    command += ["-n", str(workers)]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True)
    text = (tmp_path / "out.txt").read_text()
    assert done.returncode == (1 if workers else 3) and text.count("test_it.py::test_a (call") == 1
    assert "the reason" in text


def test_without_a_gpu_it_refuses(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    environment = os.environ | {"PYTHON": sys.executable, "COMMIT": "abc1234"}
    done = subprocess.run([SCRIPT, tmp_path / "out"], env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and "sees no GPU" in done.stderr and not list(tmp_path.iterdir())


def test_it_runs_dry(tmp_path):
    environment = os.environ | {"PYTHON": sys.executable, "COMMIT": "abc1234", "STEPS": "profile bench bars"}
    done = subprocess.run([SCRIPT, "--dry-run", tmp_path / "out"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    steps = json.loads((tmp_path / "out" / "run.json").read_text())["steps"]
    assert [steps[name]["result"] for name in ("profile", "bench")] == ["passed"] * 2
    assert "not measured" in steps["bars"]["result"] and (tmp_path / "out.tgz").exists()
    assert "backends" in (tmp_path / "out" / "machine.txt").read_text()

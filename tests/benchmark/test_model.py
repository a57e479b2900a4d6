"""The model of how long the Triton kernels take: exact where it counts, sane where it estimates."""

import json
import math
import os
import subprocess
import sys

import pandas as pd
import pytest
import torch

triton = pytest.importorskip("triton")
from bench import cli, model, predict, settings  # noqa: E402
from bench.cases import Case, Layer  # noqa: E402
from bench.compiled import Compiled, barriers, launches, loops_that_read  # noqa: E402
from bench.record import RESULTS  # noqa: E402
from brn_kernels.backends.triton import config  # noqa: E402

H100 = model.GPUS["h100"]
FEW = Compiled(registers=64, stack=0, spills=0, waits=0, instructions=100, shared=16, narrowest=16, unlike_driver="")
LARGE = Case(Layer("x", 256, 256, (56, 56), "relu"), "bfloat16", "channels_last")
ADDING = Case(Layer("x", 256, 256, (56, 56), "add_relu"), "bfloat16", "channels_last")
SMALL = Case(Layer("x", 4, 64, (8, 8), "plain"), "float32", "contiguous")


@pytest.fixture(autouse=True)
def not_compiled(monkeypatch):
    """Whatever is compiled needs 64 registers: the interpreter, which the tests run in, cannot compile."""
    monkeypatch.setattr(model, "_compiled", lambda *_: FEW)


def passes(case, direction, state="open"):
    kernels = model.predict(Case(case.layer, case.dtype, case.layout, state), direction, H100)
    return [(k.name.removesuffix("_kernel"), k.read / case.bytes, k.written / case.bytes) for k in kernels]


def test_bytes_are_those_of_the_documentation():
    assert passes(LARGE, "forward") == [("stream", 1, 1), ("repair", 0, 0)]
    kept = H100.constants.kept * H100.l2 / LARGE.bytes  # found in L2 again
    closed = passes(LARGE, "forward", "closed")
    assert closed == [("stream", 1, 0), ("repair", pytest.approx(1 - kept), 1)]
    assert passes(LARGE, "backward") == [("reduce", 2, 0), ("apply", pytest.approx(2 - kept), 1)]
    bits = 1 / 16
    assert passes(ADDING, "forward") == [("stream", 2, 1 + bits), ("repair", 0, 0)]
    assert passes(ADDING, "backward") == [("reduce", 2 + bits, 0), ("apply", pytest.approx(2 + bits - kept), 2)]
    assert [name for name, *_ in passes(SMALL, "forward") + passes(SMALL, "backward")] == [
        "resident_forward",
        "resident_backward",
    ]


@pytest.mark.parametrize("direction, least", [("forward", 2), ("backward", 5)])
@pytest.mark.parametrize("state", ["open", "closed"])
def test_large_layers_take_about_as_long_as_their_passes(direction, least, state):
    seconds = sum(
        k.seconds for k in model.predict(Case(LARGE.layer, "bfloat16", "channels_last", state), direction, H100)
    )
    passes = least + (direction == "forward" and state == "closed")
    assert 0.95 < seconds / (passes * LARGE.bytes / H100.copy) < 1.25


def test_more_registers_leave_room_for_fewer_programs():
    stream = launches(LARGE.layer.shape, True, torch.bfloat16, "relu", False)[0]
    rooms = [model.resident(stream, Compiled(n, 0, 0, 0, 100, 1024, 16, "")) for n in (32, 64, 128, 168, 255)]
    assert rooms == [16, 8, 4, 3, 2]  # of four warps each
    assert model.resident(stream, Compiled(32, 0, 0, 0, 100, 100_000, 16, "")) == 2  # shared memory


def test_partial_results_of_many_splits_are_merged_in_few_trips():
    many = launches((256, 64, 112, 112), True, torch.bfloat16, "relu", False)[0]
    assert math.prod(many.grid) > 300 and model.trips(many) <= 5
    alone = launches(SMALL.layer.shape, False, torch.float32, None, False)[0]
    assert model.trips(alone) == 0


@pytest.mark.parametrize("state, direction", [("clip 10", "forward"), ("open", "both")])
def test_what_it_does_not_know_is_an_error(state, direction):
    with pytest.raises(ValueError, match="there is no model"):
        model.predict(Case(LARGE.layer, "bfloat16", "channels_last", state), direction, H100)


def test_measured_times_stand_beside_predicted_ones(tmp_path):
    run = RESULTS / "nvidia-h100-80gb-hbm3-quick-6ac4c85.csv"
    layer = Case(Layer("ResNet-50", 256, 128, (28, 28), "relu", 4), "bfloat16", "channels_last")
    rows = pd.read_csv(predict.run(tmp_path / "a.csv", "h100", run, [layer]))
    whole = rows[rows.kernel == "all"]
    assert list(whole.direction) == ["forward", "backward"] and whole.measured_us.notna().all()
    assert (whole.measured_by.str.contains("H100")).all()
    for direction, group in rows.groupby("direction"):
        parts, all_ = group[group.kernel != "all"], group[group.kernel == "all"].iloc[0]
        assert parts.predicted_us.sum() == pytest.approx(all_.predicted_us, rel=1e-3), direction
    assert "2 calls" in predict.errors(tmp_path / "a.csv")
    predict.run(tmp_path / "b.csv", "h200", None, [layer])
    assert predict.errors(tmp_path / "b.csv") == "nothing is measured yet"


def test_a_run_of_other_layers_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="none of these calls"):
        predict.run(tmp_path / "a.csv", "h100", sorted(RESULTS.glob("amd-*.csv"))[0], [LARGE])


def test_a_kernel_is_compiled_for_a_gpu_that_is_not_there():
    code = (
        "import json, torch; from bench.compiled import launches, compile_variant;"
        "one = launches((64, 64, 56, 56), False, torch.float32, None, False)[3];"
        "found = compile_variant(one.variant, 90);"
        "print(json.dumps([one.variant.kernel, *(getattr(found, name) for name in"
        " ('registers', 'spills', 'waits', 'instructions', 'narrowest'))]))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    kernel, registers, spills, waits, instructions, narrowest = json.loads(done.stdout.splitlines()[-1])
    assert kernel == "apply_kernel" and 16 <= registers <= 255 and spills == waits == 0 and narrowest == 16
    assert 20 <= instructions <= 500  # of an item: at least its four accesses, and the arithmetic of 8 values a thread


def test_loops_that_read_are_found_in_machine_code():
    loop = ["LDG.E.128 R4, desc[UR4][R2.64]", "BAR.SYNC.DEFER_BLOCKING 0x0", "@P0 BRA 0x0010"]

    def of(*instructions):
        return loops_that_read("\n".join(f"/*{16 * i:04x}*/  {it} ;" for i, it in enumerate(instructions)))

    assert of("MOV R1, c[0x0][0x28]", *loop, "EXIT") == [loop] and barriers(loop) == 1
    assert of("MOV R1, R2", "LDS R1, [R2]", *loop[1:], "EXIT") == []  # reads nothing of memory
    assert of("MOV R1, R2", *loop[:2], "EXIT", loop[2]) == []  # no loop: what is seldom run lies behind the end
    last = [*loop[:2], "@!P1 EXIT", loop[2]]  # of the kernel: it ends in it
    assert of("MOV R1, R2", *last) == [last]


def test_settings_are_predicted_each_with_its_own_programs(tmp_path, monkeypatch):
    monkeypatch.setattr(settings, "SHAPES", (LARGE.layer.shape,))
    before, programs = dict(config.SETTINGS), []

    def predicted(case, direction, gpu, original=model.predict):
        kernels = original(case, direction, gpu)
        programs.append(kernels[0].programs)
        return kernels

    monkeypatch.setattr(settings, "predict", predicted)
    monkeypatch.setattr(cli, "_need_compiler", lambda: None)  # nothing is compiled here
    assert cli.main(["settings", "--main", "--gpu", "h200", str(tmp_path / "settings.csv")]) == 0
    rows = pd.read_csv(tmp_path / "settings.csv")
    assert len(rows) == len(settings.CANDIDATES) * len(settings.KINDS) * 2 == len(programs)
    assert rows.p50_us.isna().all() and (rows.gpu == "h200").all() and (rows.spills == 0).all()
    assert rows.predicted_percent_of_copy.between(50, 110).all()
    channels_last = rows[rows.layout == "channels_last"]
    expected = 132 * channels_last.programs  # one wave of them
    assert (channels_last.index.map(lambda row: programs[row]) <= expected).all()
    assert (channels_last.index.map(lambda row: programs[row]) > 0.8 * expected).all()
    assert before == config.SETTINGS
    assert tuple(model.GPUS) == cli.MODELLED


@pytest.mark.parametrize("command", [["predict"], ["settings", "--gpu", "h100"]], ids=lambda command: command[0])
def test_what_compiles_says_what_it_lacks(command, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(triton.knobs.runtime, "interpret", True)
    assert cli.main([*command, str(tmp_path / "out.csv")]) == 2
    assert "unset TRITON_INTERPRET" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "triton", None)
    assert cli.main([*command, str(tmp_path / "out.csv")]) == 2
    assert "needs Triton" in capsys.readouterr().err and not list(tmp_path.iterdir())

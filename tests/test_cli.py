"""The command ``brn``, as a process and inside one."""

import csv
import json
import os
import subprocess
import sys

import pytest

import brn_kernels as brn
from brn_kernels import cli


def test_info_as_text(capsys):
    assert cli.main(["info"]) == 0
    text = capsys.readouterr().out
    for line in ("brn_kernels", "torch", "triton", "reference      available", "used on cpu"):
        assert line in text, line


def test_info_as_json(capsys):
    assert cli.main(["info", "--json"]) == 0
    info = json.loads(capsys.readouterr().out)
    assert info["versions"]["brn_kernels"] == brn.__version__
    assert set(info["backends"]) == {"triton", "native", "reference"}
    assert info["backends"]["reference"] == "available"
    assert "cpu" in info["devices"] and info["choice"]["used on cpu"] in info["backends"]


def test_info_tells_of_a_wrong_name_in_the_environment(monkeypatch, capsys):
    monkeypatch.setattr(brn.backends, "_selected", "tritn")
    assert cli.main(["info"]) == 1
    assert "backend must be one of" in capsys.readouterr().err


def test_without_a_command_it_says_what_there_is(capsys):
    assert cli.main([]) == 2
    assert "demo" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["nonsense"], ["demo", "--seeds", "many"]])
def test_bad_arguments_exit_with_2(arguments):
    with pytest.raises(SystemExit) as exit_:
        cli.main(arguments)
    assert exit_.value.code == 2


@pytest.mark.parametrize("option", ["--seeds", "--steps"])
def test_demo_refuses_fewer_than_one(option, capsys):
    assert cli.main(["demo", option, "0"]) == 2
    assert f"{option} must be at least 1, got 0" in capsys.readouterr().err


def test_demo_without_its_extra_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    monkeypatch.delitem(sys.modules, "brn_kernels.demo", raising=False)
    assert cli.main(["demo"]) == 1
    assert "pip install 'brn_kernels[demo]'" in capsys.readouterr().err


def test_demo_prints_a_table_and_writes_figure_and_numbers(tmp_path):
    command = [sys.executable, "-m", "brn_kernels", "demo", "--seeds", "2", "--steps", "6", "--out", str(tmp_path)]
    environment = os.environ | {"BRN_KERNELS_BACKEND": "reference"}  # interpreted kernels would take minutes
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    for words in ("iid, batches of 32", "iid, batches of 4", "non-iid", "±", "standard error"):
        assert words in run.stdout, words
    assert "%|" in run.stderr, "no progress shown"
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
    rows = list(csv.DictReader((tmp_path / "demo.csv").open()))
    assert {(row["layer"], row["seed"]) for row in rows} == {
        (layer, seed) for layer in ("BatchNorm", "Batch Renorm") for seed in "01"
    }
    assert all(0 <= float(row["accuracy"]) <= 100 for row in rows)

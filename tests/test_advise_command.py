"""``brn advise``: what it prints, and what it refuses in one line."""

import json

import pytest

from brn_kernels import cli

USER = """
import torch
from torch import nn

def batches(size):
    torch.manual_seed(0)
    return [torch.randn(size, 8) for _ in range(20)]

def good(): return nn.BatchNorm1d(8), batches(64)
def tiny(): return nn.BatchNorm1d(8), batches(2)
def single(): return nn.BatchNorm1d(8), batches(1)
def one(): return nn.BatchNorm1d(8), batches(64)[:1]
def nothing(): return nn.BatchNorm1d(8), []
def bare(): return nn.Linear(8, 8), batches(64)
def wrong(): return nn.BatchNorm1d(8)
def faulty(): raise ValueError("the user's own")
number = 3
"""


@pytest.fixture
def user_module(tmp_path, monkeypatch):
    (tmp_path / "advised_user.py").write_text(USER)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def test_command(user_module, capsys):
    assert cli.main(["advise", "advised_user:good", "--figure", "figures/a.png"]) == 0
    assert "Use BatchNorm" in capsys.readouterr().out and (user_module / "figures" / "a.png").exists()
    assert cli.main(["advise", "advised_user:good", "--figure", "figures/b.JPG"]) == 0, "what else matplotlib writes"
    capsys.readouterr()
    assert cli.main(["advise", "advised_user:tiny", "--json", "--steps", "500"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["choice"] == "Batch Renormalization" and "hold=16" in found["code"]


@pytest.mark.parametrize(
    "function, message",
    [
        ("advised_user", "expected module:function"),
        ("no_such_module:f", "no module named 'no_such_module'"),
        ("advised_user:none", "has no 'none'"),
        ("advised_user:number", "is a int, not a function"),
        ("advised_user:wrong", "must return (model, batches), got BatchNorm1d"),
        ("advised_user:bare", "no BatchNorm or Batch Renormalization layer"),
        ("advised_user:nothing", "yielded nothing"),
        ("advised_user:one", "at least 8 batches"),
        ("advised_user:single", "batches of one sample"),
    ],
)
def test_command_refuses_in_one_line(user_module, capsys, function, message):
    assert cli.main(["advise", function]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("brn advise: ") and message in err and err.count("\n") == 1


def test_command_says_what_it_found_even_if_the_figure_cannot_be_written(user_module, capsys):
    (user_module / "file").touch()
    assert cli.main(["advise", "advised_user:good", "--figure", "file/a.png"]) == 2
    out, err = capsys.readouterr()
    assert "Use BatchNorm" in out and err.startswith("brn advise: ") and err.count("\n") == 1


def test_command_refuses_a_kind_of_figure_before_it_measures(user_module, capsys):
    assert cli.main(["advise", "advised_user:good", "--figure", "a.nonsense"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and "must end in one of ." in err and ".png" in err and err.count("\n") == 1


def test_command_shows_the_users_own_error(user_module):
    with pytest.raises(ValueError, match="the user's own"):
        cli.main(["advise", "advised_user:faulty"])

"""The file of a run: what it goes on from, what it says of the machine and the commit."""

import csv
import subprocess

import pytest
import torch

from bench import record
from brn_kernels import node

CPU = torch.device("cpu")


def recorder(path, **about):
    return record.Recorder(path, dict.fromkeys(record.ABOUT, "x") | about)


def test_a_started_run_of_something_else_is_not_continued(tmp_path):
    path = tmp_path / "run.csv"
    recorder(path).add("a", [{"candidate": "one"}, {"candidate": "two"}])
    with pytest.raises(FileExistsError, match="another torch"):
        recorder(path, torch="y")
    assert recorder(path, date="tomorrow").done == {"a"}  # a run over midnight is one run
    fresh = record.Recorder(path, dict.fromkeys(record.ABOUT, "y"), fresh=True)
    assert fresh.done == set()


def test_a_job_cut_off_between_its_rows_is_measured_again(tmp_path):
    path = tmp_path / "run.csv"
    first = recorder(path)
    first.add("a", [{"candidate": "one"}, {"candidate": "two"}])
    first.add("b", [{"candidate": "one"}, {"candidate": "two"}])
    lines = first.part.read_text().splitlines(keepends=True)
    first.part.write_text("".join(lines[:-1]))
    again = recorder(path)
    assert again.done == {"a"}
    again.add("b", [{"candidate": "one"}])
    rows = list(csv.DictReader(again.finish().open(newline="")))
    assert [(row["job"], row["candidate"]) for row in rows] == [("a", "one"), ("a", "two"), ("b", "one")]


def test_a_fresh_run_leaves_no_older_numbers_to_be_taken_for_its_own(tmp_path):
    path = tmp_path / "run.csv"
    path.write_text("an older run's")
    record.Recorder(path, dict.fromkeys(record.ABOUT, "x"), fresh=True)
    assert not path.exists()


@pytest.mark.parametrize("where", ["no git", "inside another checkout"])
def test_a_copy_without_its_history_has_no_commit_but_the_one_it_is_given(where, tmp_path, monkeypatch):
    def git(*arguments):
        subprocess.run(["git", "-c", "user.name=x", "-c", "user.email=x@y", *arguments], cwd=tmp_path, check=True)

    if where == "inside another checkout":
        git("init", "-q")
        git("commit", "-q", "--allow-empty", "-m", "another project's")
    folder = tmp_path / "copy" / "bench"
    folder.mkdir(parents=True)
    monkeypatch.setattr(record, "__file__", str(folder / "record.py"))
    monkeypatch.delenv("COMMIT", raising=False)
    assert (record.machine(CPU)["commit"], record.machine(CPU)["dirty"]) == ("", "")
    monkeypatch.setenv("COMMIT", "abc1234")
    assert record.machine(CPU)["commit"] == "abc1234"


def test_changes_are_named_whoever_names_the_commit(tmp_path, monkeypatch):
    def git(*arguments):
        subprocess.run(["git", "-c", "user.name=x", "-c", "user.email=x@y", *arguments], cwd=tmp_path, check=True)

    folder = tmp_path / "bench"
    folder.mkdir()
    (folder / "record.py").write_text("as committed")
    git("init", "-q")
    git("add", "-A")
    git("commit", "-q", "-m", "first")
    monkeypatch.setattr(record, "__file__", str(folder / "record.py"))
    monkeypatch.setenv("COMMIT", "abc1234")
    assert record.machine(CPU)["dirty"] == ""
    (folder / "record.py").write_text("changed")
    assert record.machine(CPU)["dirty"] and record.machine(CPU)["commit"] == "abc1234"


def test_it_says_how_layers_are_called(monkeypatch):
    """The host's time hangs on it, and nothing else in a run's CSV tells."""
    built = record.machine(CPU)["calls"]
    assert built in ("in C++", "in Python")
    monkeypatch.setattr(node, "module", lambda: None)
    assert record.machine(CPU)["calls"] == "in Python"


def test_a_started_run_with_other_columns_is_not_continued(tmp_path):
    (tmp_path / "run.csv.part").write_text("a,b\n1,2\n")
    with pytest.raises(FileExistsError, match="other columns"):
        recorder(tmp_path / "run.csv")

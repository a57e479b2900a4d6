"""brn tune: the search space, resuming, pruning, plots, the line printed, and what it refuses."""

import sqlite3
import sys

import pytest

import brn_kernels as brn
from brn_kernels import cli

optuna = pytest.importorskip("optuna")
from brn_kernels.tune import Options, best_line, open_study, search, suggest  # noqa: E402

optuna.logging.set_verbosity(optuna.logging.WARNING)

USER = """
import optuna

def objective(schedule, momentum, trial):
    assert trial.number >= 0
    return (schedule.r_max - 2) ** 2 + (schedule.d_max - 3) ** 2

def reporting(schedule, momentum, trial):
    for step in range(3):
        trial.report(schedule.d_max, step)
        if trial.should_prune():
            raise optuna.TrialPruned
    return schedule.d_max

def pruned(schedule, momentum, trial): raise optuna.TrialPruned
def faulty(schedule, momentum, trial): raise ValueError("the user's own")
"""


@pytest.fixture(autouse=True)
def user_module(tmp_path, monkeypatch):
    (tmp_path / "tuned_user.py").write_text(USER)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)


def run(name, *options):
    return cli.main(["tune", f"tuned_user:{name}", "--steps", "1000", *options])


def params(study):
    return [trial.params for trial in study.trials]


def test_durations_are_shares_of_the_steps():
    chosen = {"r_max": 2.5, "d_max": 4.0, "hold": 0.1, "r_ramp": 0.2, "d_ramp": 0.3, "momentum": 0.05}
    schedule, momentum = suggest(optuna.trial.FixedTrial(chosen), 2000)
    assert schedule == brn.ClipSchedule(r_max=2.5, d_max=4.0, hold=200, r_ramp=400, d_ramp=600)
    assert momentum == 0.05


def test_the_space_holds_batchnorm_and_the_paper():
    study = optuna.create_study()
    seen = {}

    def look(trial):
        suggest(trial, 100)
        seen.update(trial.distributions)
        return 0.0

    study.optimize(look, n_trials=1)
    for point in (
        {"r_max": 1.0, "d_max": 0.0, "momentum": 0.1},
        {"r_max": 3.0, "d_max": 5.0, "momentum": 0.01, "hold": 1 / 32, "r_ramp": 7 / 32, "d_ramp": 1 / 8},
    ):
        for name, value in point.items():
            assert seen[name].low <= value <= seen[name].high, name
    assert seen["momentum"].log


def test_seeded_and_better_than_chance():
    def objective(schedule, momentum, trial):
        return (schedule.r_max - 2) ** 2

    runs = []
    for seed in (0, 0, 1):
        options = Options(steps=100, trials=25, direction="minimize", seed=seed)
        study = open_study(options)
        search(study, objective, options)
        runs.append(params(study))
        assert study.best_value < 0.02
    assert runs[0] == runs[1] != runs[2]


def test_a_study_goes_on_and_does_not_repeat_itself(capsys):
    assert run("objective", "--trials", "3", "--storage", "study.db", "--direction", "minimize") == 0
    assert "best of 3 trials" in capsys.readouterr().out
    assert run("objective", "--trials", "3", "--storage", "study.db", "--direction", "minimize") == 0
    assert "best of 6 trials" in capsys.readouterr().out
    assert run("objective", "--trials", "2", "--storage", "study.db", "--direction", "minimize", "--study", "b") == 0
    assert "best of 2 trials" in capsys.readouterr().out
    study = optuna.load_study(study_name="brn", storage="sqlite:///study.db")
    assert len({str(p) for p in params(study)}) == 6
    with sqlite3.connect("study.db") as database:
        assert database.execute("select count(*) from studies").fetchone() == (2,)


def test_the_line_printed_is_the_best_trial(capsys):
    assert run("objective", "--trials", "5", "--direction", "minimize", "--storage", "sqlite:///line.db") == 0
    line = capsys.readouterr().out.splitlines()[1]
    best = optuna.load_study(study_name="brn", storage="sqlite:///line.db").best_params
    model = brn.convert_batchnorm  # so that a rename fails here
    found = {}

    def convert_batchnorm(model, *, schedule, momentum):
        found.update(schedule=schedule, momentum=momentum)

    exec(line, {"brn": type("Package", (), {"ClipSchedule": brn.ClipSchedule, "convert_batchnorm": convert_batchnorm}),
                "model": model})  # fmt: skip
    assert found["schedule"].hold == round(1000 * best["hold"])
    assert found["schedule"].r_max == pytest.approx(best["r_max"], rel=1e-3)
    assert found["momentum"] == pytest.approx(best["momentum"], rel=1e-3)


def test_pruning_and_plots(capsys):
    assert run("reporting", "--trials", "15", "--storage", "pruned.db", "--plots", "plots") == 0
    written = capsys.readouterr().out.splitlines()[2:]
    assert "plots/optimization_history.png" in written and "plots/intermediate_values.png" in written
    study = optuna.load_study(study_name="brn", storage="sqlite:///pruned.db")
    states = [trial.state for trial in study.trials]
    assert optuna.trial.TrialState.PRUNED in states and optuna.trial.TrialState.COMPLETE in states


def test_timeout_ends_the_search(capsys):
    assert run("objective", "--timeout", "0.001", "--storage", "timed.db") == 0
    assert "best of 1 trials" in capsys.readouterr().out


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("objective", ["--steps", "0"], "steps must be at least 1"),
        ("objective", ["--trials", "0"], "trials must be at least 1"),
        ("objective", ["--timeout", "-1"], "timeout must be a positive"),
        ("objective", ["--storage", "nodialect://x"], "cannot be opened"),
        ("objective", ["--storage", "no/such/folder/x.db"], "cannot be opened"),
        ("none", [], "has no 'none'"),
        ("pruned", ["--trials", "1"], "no trial came to its end"),
    ],
)
def test_refuses_in_one_line(name, options, message, capsys):
    assert run(name, *options) == 2
    err = [line for line in capsys.readouterr().err.splitlines() if line.startswith("brn tune: ")]
    assert len(err) == 1 and message in err[0]


@pytest.mark.parametrize(
    "changed, message",
    [(["--steps", "50"], "1000 steps, not 50"), (["--direction", "minimize"], "another direction")],
)
def test_another_study_under_the_same_name_is_refused(changed, message, capsys):
    assert run("objective", "--trials", "1") == 0
    assert run("objective", "--trials", "1", *changed) == 2
    assert message in capsys.readouterr().err


def test_the_users_own_error_is_shown():
    with pytest.raises(ValueError, match="the user's own"):
        run("faulty", "--trials", "1")


def test_without_optuna_it_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "optuna", None)
    monkeypatch.delitem(sys.modules, "brn_kernels.tune")
    assert run("objective") == 1
    assert capsys.readouterr().err == "brn tune needs optuna: pip install 'brn_kernels[tune]'\n"


def test_nothing_finished_has_no_best():
    with pytest.raises(ValueError, match="no trial"):
        best_line(open_study(Options(steps=10)), 10)

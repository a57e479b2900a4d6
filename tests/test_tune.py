"""``brn tune``: a thin layer over Optuna."""

import math
import sys

import pytest

import brn_kernels as brn
from brn_kernels import cli

optuna = pytest.importorskip("optuna")
from brn_kernels import tune as tuning  # noqa: E402

STEPS = 1000


@pytest.fixture(autouse=True)
def quiet():
    optuna.logging.set_verbosity(optuna.logging.WARNING)


def distance(schedule, momentum, trial):
    """Least at r_max 2, d_max 1 and momentum 0.1."""
    return (schedule.r_max - 2) ** 2 + (schedule.d_max - 1) ** 2 + math.log10(momentum / 0.1) ** 2


@pytest.fixture
def storage(tmp_path):
    return f"sqlite:///{tmp_path / 'study.db'}"


def test_it_finds_the_best_and_tries_the_default_first(storage):
    study = tuning.tune(distance, steps=STEPS, trials=40, storage=storage)
    default = brn.ClipSchedule.for_training(STEPS)
    assert tuning.suggest(optuna.trial.FixedTrial(study.trials[0].params), STEPS) == (default, 0.01)
    assert study.best_value < distance(default, 0.01, None) / 10


def test_an_interrupted_study_goes_on(storage):
    seen = []

    def interrupted(schedule, momentum, trial):
        seen.append(trial.number)
        if len(seen) == 4:
            raise KeyboardInterrupt
        return distance(schedule, momentum, trial)

    with pytest.raises(KeyboardInterrupt):
        tuning.tune(interrupted, steps=STEPS, trials=8, storage=storage)
    study = tuning.tune(interrupted, steps=STEPS, trials=8, storage=storage)
    states = [trial.state.name for trial in study.trials]
    assert states.count("COMPLETE") == 8 and len(seen) == 9
    assert len(tuning.tune(interrupted, steps=STEPS, trials=8, storage=storage).trials) == len(states), "nothing left"


def test_a_study_that_goes_on_draws_new_points(storage):
    tuning.tune(distance, steps=STEPS, trials=4, storage=storage)
    study = tuning.tune(distance, steps=STEPS, trials=8, storage=storage)
    assert len({tuple(trial.params.items()) for trial in study.trials}) == 8


def test_the_default_is_tried_again_if_it_was_interrupted(storage):
    def interrupted(schedule, momentum, trial):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tuning.tune(interrupted, steps=STEPS, trials=3, storage=storage)
    for trials in (3, 5):
        study = tuning.tune(distance, steps=STEPS, trials=trials, storage=storage)
    default = brn.ClipSchedule.for_training(STEPS)
    done = [trial for trial in study.trials if trial.state.name == "COMPLETE"]
    drawn = [tuning.suggest(optuna.trial.FixedTrial(trial.params), STEPS) for trial in done]
    assert len(done) == 5 and drawn.count((default, 0.01)) == 1


@pytest.mark.parametrize("other", [{"maximize": True}, {"steps": STEPS + 1}])
def test_a_study_of_another_kind_does_not_go_on(storage, other):
    tuning.tune(distance, steps=STEPS, trials=2, storage=storage)
    with pytest.raises(ValueError, match="has a study 'brn' with .*: give another name"):
        tuning.tune(distance, **{"steps": STEPS, "trials": 4, "storage": storage} | other)
    assert len(tuning.tune(distance, steps=STEPS, trials=2, storage=storage).trials) == 2


@pytest.mark.parametrize("storage", ["nonsense://x", "sqlite:////no/such/folder/study.db"])
def test_a_storage_that_cannot_be_opened(storage):
    with pytest.raises(ValueError, match="cannot be opened"):
        tuning.tune(distance, steps=STEPS, trials=2, storage=storage)


def test_bad_trials_are_pruned():
    def objective(schedule, momentum, trial):
        value = distance(schedule, momentum, trial) + trial.number
        for step in range(5):
            trial.report(value, step)
            if trial.should_prune():
                raise optuna.TrialPruned
        return value

    study = tuning.tune(objective, steps=STEPS, trials=20, storage=None)
    assert any(trial.state.name == "PRUNED" for trial in study.trials)


def test_more_can_be_better():
    study = tuning.tune(
        lambda schedule, momentum, trial: schedule.r_max, steps=10, trials=15, storage=None, maximize=True
    )
    assert study.best_value > 4


def test_the_best_line_is_python():
    study = tuning.tune(distance, steps=STEPS, trials=3, storage=None)
    found = {}

    class Names:
        ClipSchedule = brn.ClipSchedule
        convert_batchnorm = staticmethod(lambda model, **keywords: found.update(keywords))

    eval(tuning.best_line(study, STEPS), {"brn": Names, "model": None})
    schedule, momentum = tuning.suggest(optuna.trial.FixedTrial(study.best_params), STEPS)
    assert found["schedule"] == schedule and found["momentum"] == pytest.approx(momentum, rel=1e-3)


MODULE = """
def objective(schedule, momentum, trial):
    return (schedule.r_max - 2) ** 2 + momentum

def pruned(schedule, momentum, trial):
    import optuna
    raise optuna.TrialPruned

def nan(schedule, momentum, trial): return float("nan")
def faulty(schedule, momentum, trial): raise ValueError("the user's own")
number = 3
"""


def test_the_command(tmp_path, monkeypatch, capsys):
    (tmp_path / "my_training.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    command = ["tune", "my_training:objective", "--steps", "500", "--trials", "6", "--plots", "figures"]
    assert cli.main(command) == 0
    output = capsys.readouterr().out
    assert "brn.convert_batchnorm(model, schedule=brn.ClipSchedule(r_max=" in output
    assert (tmp_path / "brn-tune.db").exists() and len(list((tmp_path / "figures").glob("*.png"))) >= 2
    for wrong, message in (
        ("no_such_module:objective", "no module named 'no_such_module'"),
        ("my_training:missing", "has no 'missing'"),
        ("my_training", "expected module:function"),
        ("my_training:number", "is a int, not a function"),
        (":objective", "expected module:function"),
        ("./my_training.py:objective", "expected module:function"),
        (".my_training:objective", "expected module:function"),
    ):
        assert cli.main(["tune", wrong, "--steps", "5"]) == 2
        assert message in capsys.readouterr().err
    for wrong, message in (
        (["my_training:objective", "--steps", "0"], "must be positive"),
        (["my_training:objective", "--steps", "500", "--maximize"], "with direction minimize, not maximize"),
        (
            ["my_training:objective", "--steps", "500", "--trials", "1", "--plots", "my_training.py"],
            "no folder for plots",
        ),
        (
            ["my_training:pruned", "--steps", "5", "--trials", "2", "--study", "p"],
            "no trial of 2 gave a value: 2 pruned",
        ),
        (["my_training:nan", "--steps", "5", "--trials", "2", "--study", "n"], "0 pruned, 2 failed"),
    ):
        assert cli.main(["tune", *wrong]) == 2
        err = capsys.readouterr().err
        assert [line for line in err.splitlines() if line.startswith("brn tune: ")][0].count(message) == 1, err
    with pytest.raises(ValueError, match="the user's own"):
        cli.main(["tune", "my_training:faulty", "--steps", "5", "--study", "f"])


def test_without_optuna_it_says_what_to_install(tmp_path, monkeypatch, capsys):
    (tmp_path / "my_training.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert cli.main(["tune", "my_training:objective", "--steps", "5"]) == 1
    assert "brn_kernels[tune]" in capsys.readouterr().err


def test_bad_numbers():
    for bad in ({"steps": 0}, {"steps": 5, "trials": 0}, {"steps": 5, "timeout": -1.0}, {"steps": 5, "trials": None}):
        with pytest.raises(ValueError, match="trials"):
            tuning.tune(distance, storage=None, **bad)

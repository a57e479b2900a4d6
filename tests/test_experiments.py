"""The experiments: verdicts by hand, seeds that do not see each other, runs that go on, a page that matches."""

import math
from functools import partial

import pytest
import torch

pytest.importorskip("scipy", reason='the experiments need the extra "experiments": scipy')
pd = pytest.importorskip("pandas")
from experiments import docs, h_time, images, pool, record  # noqa: E402
from experiments.__main__ import main  # noqa: E402
from experiments.candidates import AUTO, BN, CANDIDATES, PAPER  # noqa: E402
from experiments.claims import NAMES, experiment  # noqa: E402
from experiments.common import ACCURACY, Job, judge_each, values  # noqa: E402
from experiments.gates import Recurrent  # noqa: E402
from experiments.verdicts import (  # noqa: E402
    CONFIRMED,
    NOT_DECIDED,
    REFUTED,
    Interval,
    equal,
    every,
    interval,
    less,
    more,
)  # fmt: skip


def test_interval_by_hand():
    # mean 2, deviation 1, 3 values: the quantile for 2 degrees of freedom is 0.95 sqrt(2 / (1 - 0.95^2))
    found = interval([1.0, 2.0, 3.0])
    half = 0.95 * math.sqrt(2 / (1 - 0.95**2)) / math.sqrt(3)
    assert (found.mean, found.low, found.high) == pytest.approx((2.0, 2.0 - half, 2.0 + half), rel=1e-12)


def test_one_value_decides_nothing():
    alone = interval([9.0])
    assert more(alone) == equal(alone) == less(alone, 1.0) == NOT_DECIDED


@pytest.mark.parametrize("broken", [[], [1.0, math.nan], [math.inf, 1.0]])
def test_interval_refuses(broken):
    with pytest.raises(ValueError, match="finite values"):
        interval(broken)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.1, 2.0, CONFIRMED),
        (0.1, 0.4, CONFIRMED),  # a small gain is one
        (-2.0, 0.4, REFUTED),  # if there is a gain, it is negligible
        (-2.0, -1.0, REFUTED),
        (-0.1, 0.6, NOT_DECIDED),
    ],
)
def test_more(low, high, expected):
    assert more(Interval((low + high) / 2, low, high), 0.0, 0.5) == expected
    assert more(Interval((low + high) / 2 + 7, low + 7, high + 7), 7.0, 0.5) == expected


@pytest.mark.parametrize(
    ("low", "high", "expected"), [(1.0, 1.9, CONFIRMED), (2.1, 3.0, REFUTED), (1.9, 2.1, NOT_DECIDED)]
)
def test_less(low, high, expected):
    assert less(Interval((low + high) / 2, low, high), 2.0) == expected


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (-0.4, 0.4, CONFIRMED),
        (0.1, 0.4, CONFIRMED),  # different, but not by what matters
        (0.6, 0.9, REFUTED),
        (-2.0, -0.6, REFUTED),
        (-0.6, 0.4, NOT_DECIDED),
        (-9.0, 9.0, NOT_DECIDED),
    ],
)
def test_equal(low, high, expected):
    assert equal(Interval((low + high) / 2, low, high), 0.5) == expected


def test_every():
    assert every([CONFIRMED, CONFIRMED]) == CONFIRMED
    assert every([CONFIRMED, NOT_DECIDED]) == NOT_DECIDED
    assert every([NOT_DECIDED, REFUTED, CONFIRMED]) == REFUTED


def made_up(gain, candidates=(PAPER, AUTO)):
    """BN at 90 to 93 by seed; the others ``gain`` above, seed by seed, up to 0.1."""
    numbers = {BN: [90.0, 91.0, 92.0, 93.0]}
    numbers |= {
        name: [v + gain + e for v, e in zip(numbers[BN], (-0.1, 0.1, -0.1, 0.1), strict=True)] for name in candidates
    }
    return pd.DataFrame(
        {
            "condition": "x",
            "candidate": name,
            "measure": ACCURACY,
            "x": x,
            "seed": seed,
            "value": value - (x < 2) * 50 * (name != BN),
        }
        for name, column in numbers.items()
        for seed, value in enumerate(column)
        for x in (1.0, 2.0)
    )


@pytest.mark.parametrize(("gain", "expected"), [(1.0, CONFIRMED), (-1.0, REFUTED), (0.4, CONFIRMED), (0.1, REFUTED)])
def test_differences_are_paired_by_seed_and_of_the_last_step(gain, expected):
    for found in judge_each(made_up(gain), ["x"], "better", more):
        assert found.verdict == expected and found.numbers.startswith(f"x: {gain:+.2f} [")


def test_a_sign_turns_the_question_round():
    assert {each.verdict for each in judge_each(made_up(-1.0), ["x"], "BN better", more, sign=-1)} == {CONFIRMED}


def test_values_that_are_not_there():
    with pytest.raises(KeyError, match="no test accuracy"):
        values(made_up(1.0), "y", BN)


@pytest.mark.parametrize("candidate", [BN, PAPER, AUTO])
def test_seeds_side_by_side_are_the_seeds_alone(candidate):
    condition = images.Condition("iid", 4, 10, 5, 0.01)
    data = tuple(t.double() if t.is_floating_point() else t for t in images.digits())

    def weights(seeds):
        model = CANDIDATES[candidate].put_into(images.initial(seeds).double(), 5)
        images.train(model, condition, Job("iid", candidate, seeds, 5), lambda: None, data)
        return {name: p.detach().unflatten(0, (len(seeds), -1)) for name, p in model.named_parameters()}

    together = weights((3, 5))
    for place, seed in enumerate((3, 5)):
        alone = weights((seed,))
        for name, weight in together.items():
            torch.testing.assert_close(weight[place], alone[name][0], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
@pytest.mark.parametrize("per_step", [False, True])
def test_padding_does_not_reach_a_recurrent_network(kind, per_step):
    torch.manual_seed(0)
    model = CANDIDATES[BN].put_into(Recurrent(kind, per_step, 2), 10, masked=True)
    mask = torch.arange(8) < torch.tensor([8, 5, 8, 6, 7])[:, None]
    x = torch.randn(5, 16, 8)
    other = torch.where(mask[:, None], x, 1e3)
    torch.testing.assert_close(model(x, mask), model(other, mask))
    if not per_step:  # the state stops where the sequence does
        model.eval()
        torch.testing.assert_close(model(x, mask)[1], model(x[1:2, :, :5], mask[1:2, :5])[0])
    with pytest.raises(ValueError, match="a mask needs"):
        Recurrent(kind, per_step, 2)(x, mask)


def test_gaps_are_none_where_evaluation_is_training():
    seeds, condition = (0, 1), images.Condition("iid", 8, 10, 8, 0.01)
    model = images.initial(seeds)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    opened = CANDIDATES["BRN, (3, 5), 0.01"].put_into(images.initial(seeds), 8)
    assert all(gap > 1 for layer in images.gaps(model, condition, seeds, 3) for gap in layer)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    opened(images.digits()[0][:8].expand(-1, 2, -1, -1))  # so that running statistics are not 0 and 1
    for layer in opened.modules():
        if hasattr(layer, "schedule"):
            layer.schedule, layer.momentum = layer.schedule.unclipped(), 0.0
    assert max(gap for layer in images.gaps(opened, condition, seeds, 3) for gap in layer) < 1e-3


@pytest.fixture
def in_this_process(monkeypatch):
    """Jobs without workers, whose imports take longer than the quick jobs."""
    monkeypatch.setattr(pool, "ProcessPoolExecutor", _Here)
    monkeypatch.setattr(pool, "as_completed", iter)


class _Later:
    def __init__(self, result):
        self.result = result


class _Here:
    """A job is done when its result is asked for."""

    def __init__(self, workers, context, initializer, arguments):
        initializer(*arguments)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def shutdown(self, **_):
        return None

    def submit(self, function, *arguments):
        return _Later(partial(function, *arguments))


@pytest.mark.parametrize("letter", NAMES)
def test_quick(letter, tmp_path, in_this_process, capsys, monkeypatch):
    assert main([letter, "--quick", "--out", str(tmp_path)]) == 0
    rows = record.load(tmp_path / f"{NAMES[letter]}.csv")
    assert set(rows.job) == {str(job) for job in experiment(letter).jobs(True)}
    assert rows.value.notna().all() and rows.seed.nunique() == 2
    assert experiment(letter).claim in capsys.readouterr().out
    monkeypatch.setattr(docs, "FIGURES", tmp_path)
    text = docs.section(letter, experiment(letter), rows, draw=True)
    assert (tmp_path / f"{letter}.png").stat().st_size > 10_000 and "| verdict" in text
    assert all("BN, 0.1" in against for against in docs.differences({letter: rows}).values())


def test_an_interrupted_run_goes_on(tmp_path, in_this_process, monkeypatch):
    done = []
    do = pool._do

    def counted(letter, job):
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(str(job))
        return do(letter, job)

    monkeypatch.setattr(pool, "_do", counted)
    command = ["k", "--quick", "--out", str(tmp_path)]
    with pytest.raises(KeyboardInterrupt):
        main(command)
    path = tmp_path / f"{NAMES['k']}.csv"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-1]) + lines[-1][:20])  # cut off in the middle of the third job
    assert len(record.Results(path).done) == 2
    monkeypatch.setattr(pool, "_do", lambda letter, job: (done.append(str(job)), do(letter, job))[1])
    assert main(command) == 0
    jobs = [str(job) for job in experiment("k").jobs(True)]
    assert done[3:] == [done[2], *(job for job in jobs if job not in done[:3])]
    rows = record.load(path)
    assert set(rows.job) == set(jobs) and not rows.duplicated(["job", "measure", "x", "seed"]).any()


def test_other_columns_are_refused(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("job,rows\nx,1\n")
    with pytest.raises(ValueError, match="other columns"):
        record.Results(path)
    assert path.read_text() == "job,rows\nx,1\n"
    assert record.Results(path, fresh=True).done == set()


@pytest.mark.parametrize("wrong", [["z"], ["a", "--workers", "0"], ["a", "--quick"]])
def test_wrong_arguments(wrong, capsys):
    with pytest.raises(SystemExit):
        main(wrong)
    assert "error:" in capsys.readouterr().err


def test_the_page_matches_the_numbers():
    page = docs.page({letter: experiment(letter) for letter in NAMES}, record.RESULTS, draw=False)
    assert docs.PAGE.read_text() == page, "run `make docs-experiments`"
    recorded = [letter for letter in NAMES if f"## Claim {letter}\n" in page]
    assert recorded and all((docs.FIGURES / f"{letter}.png").exists() for letter in recorded)


def test_a_network_trained_at_two_sizes_counts_once(tmp_path, monkeypatch):
    """Two sizes of one network had decided a claim, as if they were two networks."""
    name = "amd-epyc-2-threads-avx2-full-f736e5d.csv"
    rows = pd.read_csv(h_time.RECORDED / name)
    trained = rows[(rows.part == "network") & (rows["mode"] == "compiled")]
    assert trained.batch.nunique() == 2 and trained.net.nunique() == 1
    trained.to_csv(tmp_path / name, index=False)
    monkeypatch.setattr(h_time, "RECORDED", tmp_path)
    found = h_time.recorded()
    assert len(found) == 2 and all(", 1 networks" in what and more(of) == NOT_DECIDED for what, of in found.items())


def test_a_claim_without_all_its_numbers_is_not_judged(tmp_path, monkeypatch):
    rows = (record.RESULTS / f"{NAMES['a']}.csv").read_text().splitlines(keepends=True)
    (tmp_path / f"{NAMES['a']}.csv").write_text("".join(rows[: len(rows) // 2]))
    page = docs.page({"a": experiment("a")}, tmp_path, draw=False)
    assert "not measured" in page and "## Claim a" not in page and CONFIRMED not in page.split("## The claims")[1]

"""``docs/when-to-use.md`` and its figures from the CSVs: ``make docs-experiments``."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from tabulate import tabulate

from .candidates import BN, CANDIDATES
from .claims import NAMES
from .common import ACCURACY, PREQUENTIAL, Experiment, values
from .record import load
from .verdicts import METHOD, Interval, interval

DOCS = Path(__file__).parents[1] / "docs"
PAGE, FIGURES = DOCS / "when-to-use.md", DOCS / "figures" / "experiments"
ACCURACIES = (ACCURACY, PREQUENTIAL)
INTRODUCTION = """# When does Batch Renormalization help?

Written by `make docs-experiments` from the CSVs in [`experiments/results`](../experiments/results); no number or
verdict here was typed by hand. `make experiments` goes on where the recorded runs end; `python -m experiments b
--fresh` runs one claim anew. Small networks on small data, so that anyone can repeat it: what they show need not hold
for ImageNet.

**Candidates.** `BN, 0.1` and `BN, 0.01` are PyTorch's BatchNorm with this momentum. `BRN` is this package's layer:
"scaled" is `ClipSchedule.for_training(steps)`, the paper's schedule scaled to the training (with the paper's
momentum, 0.01, and with 0.1); "(3, 5)" is `ClipSchedule.constant(3, 5)`, the paper's final limits from the first step
on; "auto" is `ClipSchedule.auto()`. Claims are judged for the paper's settings and for the automatic limits, against
`BN, 0.1`. All candidates of a seed have the same initial weights, batches, optimizer and learning rate. The rate is
the best for `BN, 0.1` of 0.01, 0.02, 0.05 and 0.1 on other seeds ([`rates.csv`](../experiments/results/rates.csv),
`python -m experiments.rates`) where batches of images are trained on from scratch, by the accuracy on the same test
images; elsewhere it was set beforehand. Test accuracies are those of evaluation, normalized by running statistics, at
the end of the training.
"""


def page(experiments: dict[str, Experiment], results: Path, draw: bool = True) -> str:
    """The whole page; claims that are not wholly measured are named as missing."""
    rows = {letter: load(path) for letter in experiments if (path := csv_of(results, letter)) is not None}
    rows = {letter: table for letter, table in rows.items() if is_complete(experiments[letter], table)}
    against_bn = differences(rows)
    parts = [INTRODUCTION, f"**Verdicts.** {METHOD.strip()}", "## The claims", overview(experiments, rows)]
    parts += ["## Every accuracy, less that of BN, 0.1", tally(against_bn)]
    parts += ["Points, mean [95 % interval]; bold where the interval excludes 0.", table_of(against_bn)]
    for letter, table in rows.items():
        parts.append(section(letter, experiments[letter], table, draw))
    return "\n\n".join(part.strip() for part in parts) + "\n"


def csv_of(results: Path, letter: str) -> Path | None:
    path = results / f"{NAMES[letter]}.csv"
    return path if path.exists() else None


def is_complete(one: Experiment, rows: pd.DataFrame) -> bool:
    """Whether all its jobs are recorded."""
    return {str(job) for job in one.jobs(False)} <= set(rows.job)


def overview(experiments: dict[str, Experiment], rows: dict[str, pd.DataFrame]) -> str:
    """A row a claim."""
    lines = []
    for letter, one in experiments.items():
        headlines = [each for each in one.judge(rows[letter]) if each.headline] if letter in rows else []
        verdicts = "<br>".join(f"{each.statement}: **{each.verdict}** ({each.numbers})" for each in headlines)
        ran = _ran(rows[letter]) if letter in rows else ""
        lines.append([f"[{letter}](#claim-{letter})", one.claim, ran, verdicts or "not measured", one.limits])
    return _table(lines, ["", "claim", "run", "verdict (mean [95 % interval])", "limits of the evidence"])


def _ran(rows: pd.DataFrame) -> str:
    """Conditions, steps and seeds."""
    conditions = rows.drop_duplicates("condition")
    parts = [f"{each.condition} ({each.steps:,} steps)" for each in conditions.itertuples()]
    return f"{'; '.join(parts)}; {rows.seed.nunique()} seeds"


def differences(rows: dict[str, pd.DataFrame]) -> dict[str, dict[str, Interval]]:
    """Of every condition that ends in an accuracy and has BN, 0.1: each candidate less that; of BN its accuracy."""
    found: dict[str, dict[str, Interval]] = {}
    for letter, table in rows.items():
        for measure in ACCURACIES:
            chosen = table[table.measure == measure]
            for condition in dict.fromkeys(chosen.condition):
                measured = set(chosen[chosen.condition == condition].candidate) & set(CANDIDATES)
                if BN not in measured:
                    continue
                by_seed = {name: values(table, condition, name, measure) for name in CANDIDATES if name in measured}
                found[f"{letter}. {condition}"] = {
                    name: interval(list(own if name == BN else own - by_seed[BN])) for name, own in by_seed.items()
                }
    return found


def tally(against_bn: dict[str, dict[str, Interval]]) -> str:
    """In how many conditions a candidate differs from BN, 0.1."""
    lines = []
    for name in CANDIDATES:
        own = [of[name] for of in against_bn.values() if name in of]
        better, worse = sum(of.low > 0 for of in own), sum(of.high < 0 for of in own)
        if name != BN:
            lines.append([name, str(better), str(worse), str(len(own) - better - worse)])
    return _table(lines, ["of all conditions", "better than BN, 0.1", "worse", "the interval holds 0"])


def table_of(against_bn: dict[str, dict[str, Interval]]) -> str:
    """A row a condition, a column a candidate."""

    def cell(name: str, of: Interval) -> str:
        if name == BN:
            return f"{of.mean:.2f} %"
        return f"**{of}**" if of.low > 0 or of.high < 0 else str(of)

    lines = [
        [condition, *(cell(name, of[name]) if name in of else "" for name in CANDIDATES)]
        for condition, of in against_bn.items()
    ]
    return _table(lines, ["", *CANDIDATES])


def section(letter: str, one: Experiment, rows: pd.DataFrame, draw: bool) -> str:
    """All about one claim; its figure is drawn on the way."""
    if draw:
        FIGURES.mkdir(parents=True, exist_ok=True)
        figure = one.draw(rows)
        figure.savefig(FIGURES / f"{letter}.png", dpi=110)
        plt.close(figure)
    judged = [[each.statement, each.numbers, f"**{each.verdict}**"] for each in one.judge(rows)]
    seeds, first = rows.seed.nunique(), rows.sort_values("date").iloc[-1]
    dirty = " with changes" if first.dirty else ""
    return "\n\n".join(
        [
            f"## Claim {letter}",
            f"**{one.claim}.** Source: {one.source}.",
            f"**Run.** {one.setup}; {seeds} seeds. **Rule.** {one.rule[0].upper()}{one.rule[1:]}.",
            _table(judged, ["statement", "numbers", "verdict"]),
            f"**{one.table[0].upper()}{one.table[1:]}**, mean ± half of the 95 % interval:",
            means(rows, one.table),
            f"![Claim {letter}](figures/experiments/{letter}.png)",
            f"**Limits of the evidence.** {one.limits[0].upper()}{one.limits[1:]}.",
            f"{first.device}, {first.backend} backend, torch {first.torch}, {first.date}, commit "
            f"{first.commit}{dirty}. "
            f"Limits of an axis may cut early values off. [All rows](../experiments/results/{NAMES[letter]}.csv).",
        ]
    )


def means(rows: pd.DataFrame, measure: str) -> str:
    """Conditions by candidates."""
    conditions, candidates = (
        list(dict.fromkeys(rows[rows.measure == measure][name])) for name in ("condition", "candidate")
    )
    order = [name for name in CANDIDATES if name in candidates] + [n for n in candidates if n not in CANDIDATES]
    lines = []
    for condition in conditions:
        line = [condition]
        for name in order:
            try:
                of = interval(list(values(rows, condition, name, measure)))
                line.append(f"{of.mean:.2f} ± {of.high - of.mean:.2f}")
            except KeyError:
                line.append("")
        lines.append(line)
    return _table(lines, ["", *order])


def summary(letter: str, one: Experiment, results: Path) -> str:
    """For the terminal."""
    path = csv_of(results, letter)
    if path is None:
        raise ValueError(f"no results of experiment {letter} in {results}")
    judged = [[each.statement, each.numbers.replace("; ", "\n"), each.verdict] for each in one.judge(load(path))]
    return (
        f"\n{letter}. {one.claim}\n{tabulate(judged, ['statement', 'numbers', 'verdict'], maxcolwidths=[40, 60, None])}"
    )


def write(experiments: dict[str, Experiment], results: Path) -> str:
    """Page and figures."""
    PAGE.write_text(page(experiments, results))
    return f"{PAGE.name}: {len(experiments)} claims"


def _table(lines: list[list[str]], headers: list[str]) -> str:
    return tabulate(lines, headers, tablefmt="github", disable_numparse=True)

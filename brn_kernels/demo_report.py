"""What ``brn demo`` shows: a table, a file of numbers, a figure."""

from __future__ import annotations

import csv
import math
import statistics
from collections.abc import Sequence
from pathlib import Path

import matplotlib
from tabulate import tabulate

from .demo import LAYERS, LEARNING_RATE, MOMENTUM, SETTINGS, TEST_IMAGES, Run
from .schedule import ClipSchedule

COLORS = {"BatchNorm": "#D55E00", "Batch Renorm": "#0072B2"}  # told apart by colour-blind eyes too


def explain(seeds: int, steps: int) -> str:
    """All settings of the demo, in words."""
    schedule = ClipSchedule.for_training(steps)
    return (
        f"Handwritten digits, 8 x 8 pixels; {1797 - TEST_IMAGES} to train on, {TEST_IMAGES} to test.\n"
        f"Residual network with 5 normalizations; {steps} steps of SGD (momentum 0.9, learning rate {LEARNING_RATE} "
        f"with cosine decay); {seeds} seeds.\n"
        f"Both layers: the same weights and batches, statistics' momentum {MOMENTUM}. Batch Renormalization's limits: "
        f"closed for {schedule.hold} steps;\nd_max reaches {schedule.d_max:g} at step "
        f"{schedule.hold + schedule.d_ramp}, r_max {schedule.r_max:g} at step {schedule.hold + schedule.r_ramp}."
    )


def table(runs: Sequence[Run]) -> str:
    """Mean and standard deviation over seeds, and what the paired differences say."""
    rows = []
    for setting in SETTINGS:
        for layer in LAYERS:
            chosen = [run for run in runs if (run.setting, run.layer) == (setting.name, layer)]
            clipped = [share for run in chosen for share in run.clipped[-1]]
            rows.append(
                [
                    setting.name if layer == LAYERS[0] else "",
                    layer,
                    _mean_and_spread([run.accuracy[-1] for run in chosen]),
                    _mean_and_spread([run.batch_accuracy for run in chosen]),
                    f"{statistics.median(run.ms_per_step for run in chosen):.1f}",
                    f"{100 * statistics.fmean(clipped):.0f} %" if clipped else "",
                ]
            )
    headers = ["training batches", "layer", "test accuracy, %\n(evaluation)", "test accuracy, %\n(batch statistics)"]
    headers += ["ms per step", "channels clipped\nin the last 5 %"]
    return "\n".join([tabulate(rows, headers, disable_numparse=True), "", *(verdict(runs, s.name) for s in SETTINGS)])


def verdict(runs: Sequence[Run], setting: str) -> str:
    """One line: the difference of the final accuracies, seed by seed, against its standard error."""
    final = {(run.layer, run.seed): run.accuracy[-1] for run in runs if run.setting == setting}
    seeds = sorted({seed for _, seed in final})
    differences = [final[LAYERS[1], seed] - final[LAYERS[0], seed] for seed in seeds]
    mean = statistics.fmean(differences)
    if len(seeds) < 2:
        return f"{setting}: Batch Renorm {mean:+.2f} points (one seed: no spread)"
    error = statistics.stdev(differences) / math.sqrt(len(seeds))
    if abs(mean) <= 2 * error:
        words = "no difference beyond the spread"
    else:
        words = "Batch Renorm is better" if mean > 0 else "BatchNorm is better"
    return f"{setting}: {words} (Batch Renorm {mean:+.2f} points, standard error {error:.2f})"


def write_csv(runs: Sequence[Run], path: Path) -> None:
    """One row per run and measurement."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["setting", "layer", "seed", "step", "accuracy", "batch_accuracy", "ms_per_step", "clipped"])
        for run in runs:
            for step, right, clipped in zip(run.steps, run.accuracy, run.clipped, strict=True):
                shares = " ".join(f"{share:.4f}" for share in clipped)
                last = step == run.steps[-1]
                writer.writerow(
                    [run.setting, run.layer, run.seed, step, f"{right:.3f}"]
                    + ([f"{run.batch_accuracy:.3f}", f"{run.ms_per_step:.3f}"] if last else ["", ""])
                    + [shares]
                )


def write_figure(runs: Sequence[Run], steps: int, path: Path) -> None:
    """Above, accuracy over time; below, the share of clipped channels of every layer."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, len(SETTINGS), figsize=(14, 7.5), sharex=True, sharey="row", layout="constrained")
    shades = plt.get_cmap("viridis")
    schedule = ClipSchedule.for_training(steps)
    for column, setting in enumerate(SETTINGS):
        above, below = axes[0][column], axes[1][column]
        for layer in LAYERS:
            chosen = [run for run in runs if (run.setting, run.layer) == (setting.name, layer)]
            curves = list(zip(*(run.accuracy for run in chosen), strict=True))
            middle = [statistics.fmean(values) for values in curves]
            above.plot(chosen[0].steps, middle, color=COLORS[layer], linewidth=2, label=layer)
            above.fill_between(chosen[0].steps, *_extremes(curves), color=COLORS[layer], alpha=0.2, linewidth=0)
        renorm = [run for run in runs if (run.setting, run.layer) == (setting.name, LAYERS[1])]
        layers = len(renorm[0].clipped[0])
        for index in range(layers):
            shares = [
                100 * statistics.fmean(run.clipped[k][index] for run in renorm) for k in range(len(renorm[0].steps))
            ]
            color = shades(0.1 + 0.75 * index / max(layers - 1, 1))
            below.plot(renorm[0].steps, shares, color=color, linewidth=1.6, label=f"layer {index + 1}")
        below.axvspan(0, schedule.hold, color="0.85", linewidth=0)
        for ramp, name, side in ((schedule.d_ramp, "d_max ", "right"), (schedule.r_ramp, " r_max", "left")):
            below.axvline(schedule.hold + ramp, color="0.5", linewidth=0.8, linestyle=":")
            below.text(schedule.hold + ramp, 103, name, ha=side, va="bottom", fontsize=8, color="0.35")
        above.set_title(setting.name, fontsize=11)
        below.set_xlabel("training step")
        for axis in (above, below):
            axis.grid(color="0.92")
            axis.spines[["top", "right"]].set_visible(False)
            axis.set_axisbelow(True)
    axes[0][0].set_ylabel("test accuracy (evaluation), %")
    axes[1][0].set_ylabel("channels clipped, %")
    axes[1][0].set_ylim(-3, 103)
    axes[0][0].set_ylim(top=101)
    axes[0][-1].legend(frameon=False, loc="lower right", title="mean, and range over seeds")
    axes[1][-1].legend(frameon=False, loc="upper right", title="Batch Renorm, from input to output", ncols=2)
    axes[1][0].set_xlabel("training step (grey: limits closed, as in BatchNorm; dotted: fully open)")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _mean_and_spread(values: Sequence[float]) -> str:
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.2f}{spread}"


def _extremes(curves: Sequence[Sequence[float]]) -> tuple[list[float], list[float]]:
    return [min(values) for values in curves], [max(values) for values in curves]

"""Which layer, momentum and limits follow from the measurements: all thresholds are here."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .advise_measure import LayerAdvice
from .schedule import ClipSchedule

BATCHNORM, BATCH_RENORM = "BatchNorm", "Batch Renormalization"

# The rule's thresholds; lengths are in population standard deviations of a channel. docs/advise.md has the trainings.
NOISE = 0.25  # sampling noise of a batch mean: that of 16 independent values. Less does not hurt BatchNorm.
FEW_SAMPLES = 2  # of a batch; a trained network's late features differ between samples rather than within
EXCESS = 0.02  # what composition adds; little, since an untrained network tells classes apart badly ...
EXCESS_RATIO = 1.5  # ... but then the batch means' variance must be this multiple of what sampling gives
DRIFT = 0.1  # what the trend adds, if it is also twice what composition adds
SIGNIFICANT = 3  # standard errors that ratio and trend must be away from those of iid batches

STRAY = 0.05  # what the running mean may stray by sampling: sets the momentum
MOMENTA = (0.01, 0.1)  # the paper's and PyTorch's
SMALL = 0.15  # a gap below this did BatchNorm no measurable harm in our trainings: the advice then says so
CLOSED = 32  # the limits are closed for 1/32 of the training; the running statistics' memory is to be no longer


@dataclass(frozen=True)
class Statement:
    """One thing the advice says, the number it rests on, and why that number says so."""

    says: str
    number: float
    reason: str


def decide(layers: tuple[LayerAdvice, ...], overall: LayerAdvice, batches: int) -> tuple[str, Statement]:
    """The rule, all of it: the first of these that holds.

    1. In some layer the trend is more than DRIFT, twice the composition and significant: BatchNorm. It normalizes by
       the batch at hand, and running statistics are late.
    2. In some layer composition adds more than EXCESS, and the variance of batch means is EXCESS_RATIO of the iid one
       and significantly more: Batch Renormalization. Batch statistics then tell of the batch, not of the population
       that evaluation normalizes by.
    3. Batches of up to FEW_SAMPLES samples, or noise above NOISE in all: Batch Renormalization, for the same gap.
    4. Else BatchNorm: it is as good, and it has no limits to choose.

    One layer is enough for 1 and 2, since BatchNorm hides from later layers what it takes away in the first.
    """
    trendless = 2 - SIGNIFICANT * 2 * math.sqrt((batches - 2) / (batches**2 - 1))
    ratio = max(EXCESS_RATIO, 1 + SIGNIFICANT * math.sqrt(2 / (batches - 1)))
    drifting = [x for x in layers if x.drift > DRIFT and x.drift > 2 * x.excess and x.neumann < trendless]
    uneven = [x for x in layers if x.excess > EXCESS and x.d**2 > ratio * x.noise**2]
    if drifting:
        worst = max(drifting, key=lambda x: x.drift)
        return BATCHNORM, Statement(
            f"The stream drifts: in {worst.layer} the trend moves batch means by {worst.drift:.2f} standard deviations",
            worst.drift,
            f"more than {DRIFT} and than twice what composition adds ({worst.excess:.2f}); the successive differences' "
            f"von Neumann ratio is {worst.neumann:.2f}, 2 without a trend. BatchNorm follows at once, running "
            "statistics lag behind",
        )
    if uneven:
        worst = max(uneven, key=lambda x: x.excess)
        return BATCH_RENORM, Statement(
            f"Batches are not drawn evenly: in {worst.layer} the variance of batch means is {_ratio(worst):.1f} "
            "times that of iid batches",
            _ratio(worst),
            f"more than {ratio:.1f}; composition moves them by {worst.excess:.3f} standard deviations, sampling by "
            f"{worst.noise:.3f}. BatchNorm trains on statistics that evaluation does not have",
        )
    if overall.samples <= FEW_SAMPLES:
        return BATCH_RENORM, Statement(
            f"A batch has {overall.samples} samples",
            overall.samples,
            f"up to {FEW_SAMPLES} are too few: what a trained network's late layers see differs between samples rather "
            f"than within (as it is now, the noise is {overall.noise:.2f} standard deviations)",
        )
    if overall.noise > NOISE:
        return BATCH_RENORM, Statement(
            f"A batch mean is worth {overall.effective_count:.1f} independent values",
            overall.effective_count,
            f"fewer than {1 / NOISE**2:.0f}: sampling alone moves it by {overall.noise:.2f} standard deviations",
        )
    return BATCHNORM, Statement(
        f"Batches are large and even enough: their means stray by {overall.d:.3f} standard deviations",
        overall.d,
        f"sampling gives {overall.noise:.3f} (limit {NOISE}), composition adds {overall.excess:.3f} and a trend "
        f"{overall.drift:.3f}, in no layer beyond its limits ({EXCESS} with {ratio:.1f} times the iid variance; "
        f"{DRIFT})",
    )


def _ratio(layer: LayerAdvice) -> float:
    return layer.d**2 / layer.noise**2 if layer.noise > 0 else math.inf


def caution(choice: str, layers: tuple[LayerAdvice, ...]) -> str | None:
    """What to know before Batch Renormalization is used where the gap measured is small."""
    largest = max(layer.d for layer in layers)
    if choice == BATCHNORM or largest > SMALL:
        return None
    return (
        f"the gap is small (batch means stray by {largest:.3f} standard deviations at most, less than {SMALL}): in "
        "short trainings of a small convolutional network BatchNorm was as good there or better, so try both"
    )


@dataclass(frozen=True)
class Recommendation:
    """What to use; limits of 1 and 0 are BatchNorm's."""

    momentum: float
    r_max: float
    d_max: float
    code: str
    statements: tuple[Statement, ...]


def recommend(choice: str, overall: LayerAdvice, has_renorm: bool, total_steps: int | None) -> Recommendation:
    """Momentum, limits and ramp for ``choice``, each with its number and reason, and a line of Python.

    Args:
        choice: what :func:`decide` said.
        overall: of all layers.
        has_renorm: whether the model has Batch Renormalization layers.
        total_steps: of the training, if known.
    """
    if choice == BATCHNORM:
        momentum = _recommended_momentum(overall, None)
        model = "brn.revert_to_batchnorm(model)" if has_renorm else "model"
        code = (
            f"model = brn.convert_batchnorm({model}, schedule=brn.ClipSchedule.batchnorm(), momentum={momentum:g})"
            "  # or nn.BatchNorm with this momentum"
        )
        return Recommendation(momentum, 1.0, 0.0, code, (_momentum_statement(momentum, overall),))
    momentum = _recommended_momentum(overall, total_steps)
    r_max, d_max = _recommended_limits(overall)
    schedule = _recommended_schedule(r_max, d_max, total_steps)
    shown = f"{momentum:g}" if total_steps is not None else f"max({momentum:g}, min(0.1, {CLOSED} / total_steps))"
    model = "brn.revert_to_batchnorm(model)" if has_renorm else "model"
    code = f"model = brn.convert_batchnorm({model}, schedule={schedule}, momentum={shown})"
    memory = Statement(
        f"Momentum at least {CLOSED} / steps of the training, up to 0.1",
        CLOSED,
        f"limits are closed for 1/{CLOSED} of the training: what running statistics remember must not be longer",
    )
    limits = (
        Statement(
            f"r_max {r_max:g}", r_max, f"99 % of r and 1 / r are below {overall.r_high:.2f}; from 1.5 to the paper's 3"
        ),
        Statement(f"d_max {d_max:g}", d_max, f"99 % of |d| are below {overall.d_high:.2f}; from 1 to the paper's 5"),
        Statement(
            f"Ramp: limits closed for 1/{CLOSED} of the training, d_max at 5/32, r_max at 1/4",
            1 / CLOSED,
            "the paper's shares: running statistics are not to be trusted at the start",
        ),
    )
    return Recommendation(momentum, r_max, d_max, code, (_momentum_statement(momentum, overall), memory, *limits))


def _momentum_statement(momentum: float, overall: LayerAdvice) -> Statement:
    stray = math.hypot(overall.noise, overall.excess)
    return Statement(
        f"Momentum {momentum:g}",
        momentum,
        f"from {MOMENTA[0]:g} to {MOMENTA[1]:g}; a running mean strays by sqrt(m / (2 - m)) of what batch means do, "
        f"{stray:.3f} standard deviations without the trend: {stray * math.sqrt(momentum / (2 - momentum)):.3f} "
        f"(aimed at: {STRAY} or less)",
    )


def _recommended_momentum(overall: LayerAdvice, total_steps: int | None) -> float:
    """A running mean of momentum m has m / (2 - m) of the variance of a batch mean; so much is STRAY squared."""
    variance = overall.noise**2 + overall.excess**2
    momentum = 2 * STRAY**2 / (variance + STRAY**2)
    if total_steps is not None:
        momentum = max(momentum, CLOSED / total_steps)
    return float(f"{min(max(momentum, MOMENTA[0]), MOMENTA[1]):.2g}")


def _recommended_limits(overall: LayerAdvice) -> tuple[float, float]:
    """r_max and d_max that let 99 % of the corrections through, in halves, from (1.5, 1) to the paper's (3, 5)."""
    r_max = math.ceil(2 * overall.r_high) / 2
    d_max = math.ceil(2 * overall.d_high) / 2
    return min(max(r_max, 1.5), 3.0), min(max(d_max, 1.0), 5.0)


def _recommended_schedule(r_max: float, d_max: float, total_steps: int | None) -> str:
    """Python for the paper's ramps, scaled to the training, with these limits."""
    if total_steps is None:
        return f"dataclasses.replace(brn.ClipSchedule.for_training(total_steps), r_max={r_max:g}, d_max={d_max:g})"
    ramps = ClipSchedule.for_training(total_steps)
    return (
        f"brn.ClipSchedule(r_max={r_max:g}, d_max={d_max:g}, hold={ramps.hold}, r_ramp={ramps.r_ramp}, "
        f"d_ramp={ramps.d_ramp})"
    )

"""``brn bench`` (and ``python -m bench``): measure, draw, compare, judge."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

UNFINISHED = 3
MODELLED = ("h100", "h200")  # model.GPUS, which wants Triton


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0; 1 if results are wrong, something got slower or a bar is missed; 2 for wrong arguments.

    3 if the time limit was reached with cases left, or if no bar is missed but not all were measured.
    """
    arguments = _parser().parse_args(argv)
    try:
        return arguments.run(arguments)
    except (OSError, ValueError) as error:
        print(f"brn bench: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nbrn bench: interrupted; the same command goes on from here", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="brn bench",
        description="Time the layers against what a user would pick instead and against a copy, and whole networks. "
        "Without a command it measures; a run that was interrupted goes on when started again.",
    )
    size = parser.add_mutually_exclusive_group()
    for level, what in (
        ("quick", "90 seconds on a GPU, under 3 minutes on a CPU"),
        ("everything", "all cases, hours"),
        ("tiny", "a few seconds: does it work at all?"),
    ):
        size.add_argument(f"--{level}", dest="level", action="store_const", const=level, default="full", help=what)
    parser.add_argument("--device", help="default: the GPU if there is one, else the CPU")
    parser.add_argument(
        "--minutes",
        type=float,
        help="after which no further case begins; the same command goes on from there (exit status 3). 0: finish the "
        "CSV as it is",
    )
    parser.add_argument("--threads", type=int, help="of the CPU (default: PyTorch's)")
    parser.add_argument("--out", type=Path, help="the CSV (default: bench/results/<device>-<level>-<commit>.csv)")
    parser.add_argument("--figures", type=Path, help="folder for figures (default: the CSV's name without .csv)")
    parser.add_argument("--fresh", action="store_true", help="start again, whatever is there")
    parser.set_defaults(run=_run)
    commands = parser.add_subparsers(metavar="command", title="or, from the CSVs of runs")

    plot = commands.add_parser("plot", help="draw the figures again")
    plot.add_argument("csv", type=Path)
    plot.add_argument("--out", type=Path, help="folder (default: the CSV's name without .csv)")
    plot.set_defaults(run=_plot)

    show = commands.add_parser("show", help="print the tables again")
    show.add_argument("csv", type=Path)
    show.set_defaults(run=_show)

    compare = commands.add_parser("compare", help="what got slower from A to B; exit status 1 if something did")
    compare.add_argument("before", type=Path, metavar="A.csv")
    compare.add_argument("after", type=Path, metavar="B.csv")
    compare.add_argument("--threshold", type=float, default=0.05, help="smallest change (default: %(default)s)")
    compare.add_argument("--everyone", action="store_true", help="the peers too")
    compare.set_defaults(run=_compare)

    settings = commands.add_parser("settings", help="which launch settings of the Triton kernels are fastest here")
    settings.add_argument("out", type=Path, metavar="CSV")
    settings.add_argument("--seconds", type=float, default=0.05, help="for each candidate (default: %(default)s)")
    settings.add_argument("--minutes", type=float, default=20.0, help="after which no further layer begins")
    settings.add_argument("--main", action="store_true", help="bfloat16 channels_last and float32 contiguous only")
    settings.add_argument("--gpu", choices=MODELLED, help="predict for that one, by a model; needs no GPU, no seconds")
    settings.set_defaults(run=_settings)

    profile = commands.add_parser("profile", help="bytes, bandwidth and waits of the kernels, by Nsight Compute")
    profile.add_argument("out", type=Path, metavar="CSV")
    profile.set_defaults(run=_profile)

    host = commands.add_parser("host", help="the host's time of a small layer, kernels left out; needs no GPU")
    host.add_argument("out", type=Path, metavar="CSV")
    host.add_argument("--seconds", type=float, default=20.0, help="in all (default: %(default)s)")
    host.set_defaults(run=_host)

    predict = commands.add_parser("predict", help="how long the Triton kernels should take, by a model; needs no GPU")
    predict.add_argument("out", type=Path, metavar="CSV")
    predict.add_argument("--gpu", choices=MODELLED, default="h100", help="default: %(default)s")
    predict.add_argument("--measured", type=Path, metavar="RUN.csv", help="a run to put beside it")
    predict.set_defaults(run=_predict)

    bars = commands.add_parser(
        "bars",
        help="judge a run, finished or not, by the speeds aimed at; exit status 1 if one is missed, 3 if none is but "
        "not all were measured",
    )
    bars.add_argument("csv", type=Path)
    bars.set_defaults(run=_bars)
    return parser


def _run(arguments: argparse.Namespace) -> int:
    import torch

    from brn_kernels import available_backends, backends

    from . import plot, report
    from .layers import WrongResults
    from .run import TimeLimit, run

    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device must be cpu or cuda, got {arguments.device}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: this torch sees no GPU")
    if backends.resolve(backends.selected(), device.type).__name__.endswith("reference"):
        reasons = "; ".join(f"{name}: {why}" for name, why in available_backends().items() if why)
        print(f"brn bench: no fast backend here, so there is nothing to measure ({reasons})", file=sys.stderr)
        return 2
    if arguments.threads is not None:
        if arguments.threads < 1:
            raise ValueError(f"--threads must be at least 1, got {arguments.threads}")
        torch.set_num_threads(arguments.threads)
    if arguments.minutes is not None and not arguments.minutes >= 0:
        raise ValueError(f"--minutes must not be negative, got {arguments.minutes}")
    try:
        path = run(arguments.level, device, out=arguments.out, minutes=arguments.minutes, fresh=arguments.fresh)
    except WrongResults as error:
        print(f"brn bench: WRONG RESULTS, nothing is published: {error}", file=sys.stderr)
        return 1
    except TimeLimit as limit:
        print(
            f"brn bench: the time limit was reached with {limit}.\nThe same command goes on from here, with "
            "--minutes N for N more; --minutes 0 finishes the CSV as it is.",
            file=sys.stderr,
        )
        return UNFINISHED
    print(report.summary(report.load(path)))
    figures = plot.draw(path, arguments.figures or path.with_suffix(""))
    print(f"\n{path}")
    for figure in figures:
        print(figure)
    return 0


def _plot(arguments: argparse.Namespace) -> int:
    from .plot import draw

    for figure in draw(arguments.csv, arguments.out or arguments.csv.with_suffix("")):
        print(figure)
    return 0


def _show(arguments: argparse.Namespace) -> int:
    from . import report

    print(report.summary(report.load(arguments.csv)))
    return 0


def _compare(arguments: argparse.Namespace) -> int:
    from .compare import compare

    text, slower = compare(arguments.before, arguments.after, arguments.threshold, arguments.everyone)
    print(text)
    return 1 if slower else 0


def _settings(arguments: argparse.Namespace) -> int:
    if arguments.gpu:
        _need_compiler()
    else:
        _need_gpu()
    from .settings import run, run_model

    if arguments.gpu:
        print(run_model(arguments.out, arguments.gpu, arguments.main))
    else:
        print(run(arguments.out, arguments.seconds, arguments.minutes, arguments.main))
    return 0


def _profile(arguments: argparse.Namespace) -> int:
    _need_gpu()
    from .profile import run

    print(run(arguments.out))
    return 0


def _host(arguments: argparse.Namespace) -> int:
    try:
        from .host import run
    except ImportError as error:
        raise ValueError(f"this runs the code that launches Triton kernels, which needs Triton: {error}") from error

    path = run(arguments.out, arguments.seconds)
    print(path.read_text(), end="")
    return 0


def _predict(arguments: argparse.Namespace) -> int:
    _need_compiler()
    from .predict import errors, run

    print(run(arguments.out, arguments.gpu, arguments.measured))
    print(errors(arguments.out))
    return 0


def _need_gpu() -> None:
    import torch

    if not torch.cuda.is_available():
        raise ValueError("this is measured on a GPU, and this torch sees none")


def _need_compiler() -> None:
    """For what the model says: registers are known from the compiled kernels."""
    try:
        import triton
    except ImportError as error:
        raise ValueError(f"the model compiles the Triton kernels, which needs Triton: {error}") from error
    if triton.knobs.runtime.interpret:
        raise ValueError("the model compiles the Triton kernels: unset TRITON_INTERPRET")


def _bars(arguments: argparse.Namespace) -> int:
    from . import report
    from .bars import MISSED, NOT_MEASURED, RESULTS, judge

    table, count = judge(report.load(arguments.csv))
    print(report.text(table))
    print("\n" + ", ".join(f"{count[result]} {result}" for result in RESULTS))
    return 1 if count[MISSED] else UNFINISHED if count[NOT_MEASURED] else 0


if __name__ == "__main__":
    sys.exit(main())

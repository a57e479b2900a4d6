"""``docs/benchmarks.md`` and README's table, from the CSVs in ``bench/results``: ``make docs-bench``."""

from __future__ import annotations

import sys
from pathlib import Path

import pandas as pd

from . import plot, report
from .bars import judge
from .peers import EAGER
from .record import RESULTS

ROOT = Path(__file__).parents[1]
PAGE, README, FIGURES = ROOT / "docs" / "benchmarks.md", ROOT / "README.md", ROOT / "docs" / "figures"
BEGIN, END = "<!-- benchmarks: written by `make docs-bench` -->", "<!-- end of benchmarks -->"
NOT_ON_GPU = "**No run on a GPU is recorded yet: no GPU speed is claimed.**"

METHOD = """# Benchmarks

Written by `make docs-bench` from the CSVs in [`bench/results`](../bench/results); no figure here was typed by hand.
`brn bench` (from a checkout) measures, `brn bench plot`, `show`, `compare` and `bars` read what it wrote.

**How.** Results are checked against float64 before anything is timed. The candidates of a case take turns, in a new
order each round; before each call a GPU's L2 is flushed, of a CPU the cores' own caches (in its shared cache lives
the interpreter too); the median counts, p20 and p80 are in the CSV. On a GPU CUDA events are read; the device first
waits some 2 ms, so that the host gets ahead as it does in training; replays of CUDA graphs where the host takes
longer still. A ratio is time of a peer / our time: above 1 ours is faster. Means are geometric, each layer as often
as its network has it. The speed of a copy is that of `clone()` of the same bytes in the same turns; every tensor
counts once (forward: read x, write y; backward: read x and dy, write dx), so a backward beyond the caches, which must
read x and dy twice, cannot exceed 60 %. On CPUs more than 100 % is possible: a copy into fresh memory waits for the
system to clear its pages, and large results of ours ask for huge ones. The states of the limits are compared with
open ones in the same turns. Running statistics are at the data's and do not move (momentum 0), so that the share of
clipped channels is what the table says; clipped channels are spread evenly. "Open": the limits are open and nothing
is clipped; "closed": the phase of the schedule that is BatchNorm. Each run is of the commit it names: what has
changed since is not in its figures. "Both" is a forward and a backward through autograd. "Kept" is what a forward
keeps for its backward, counted by saved-tensor hooks, parameters left out.

**Peers.** `nn.BatchNorm*d` by the kernels that PyTorch chooses (named in brackets), with separate addition and
activation; the same compiled; Batch Renormalization written in PyTorch (float32 inside), eager and compiled; the same
over `F.batch_norm` with a multiply-add, which is what public layers do; on GPUs also a composition of the operators of
`nn.SyncBatchNorm`, and FlagGems' and attorch's layers where they are installed.
"""


def page(paths: list[Path], draw: bool = True) -> str:
    """The whole page, newest run first; figures are drawn on the way."""
    sections = [METHOD]
    if not any(_is_gpu(report.load(path)) for path in paths):
        sections.append(NOT_ON_GPU)
    for path in paths:
        rows = report.load(path)
        parts = [
            f"## {rows.iloc[0].device}, {rows.iloc[0].level}",
            f"{report.about(rows)}. [All rows](../bench/results/{path.name}).",
        ]
        figures = plot.draw(path, FIGURES / path.stem) if draw else sorted((FIGURES / path.stem).glob("*.png"))
        by_name = {figure.stem: f"![{figure.stem}](figures/{path.stem}/{figure.name})" for figure in figures}
        layers = report.timed_layers(rows)
        for title, table, figure in (
            ("Layers: time of a peer / our time", report.means(layers, ["net", "direction", *report.FORMAT]), "peers"),
            ("Speed in percent of a copy (median, inputs of 8 MB and more)", report.against_copy(rows), "roofline"),
            ("Our time in other states of the limits / open (median)", report.by_state(rows), "limits"),
            ("Whole networks: one training step", report.networks(rows), "networks"),
            ("Host time of a call, microseconds", report.host(rows), ""),
            ("The speeds aimed at", judge(rows)[0] if _is_gpu(rows) else pd.DataFrame(), ""),
            ("Not measured", report.left_out(rows), ""),
        ):  # fmt: skip
            if len(table):
                parts += [f"### {title}", report.text(table, style="github"), by_name.get(figure, "")]
        parts += [
            f"### Where a peer is faster ({report.won(rows)})",
            _fold(report.text(report.losses(rows), style="github")),
        ]
        sections.append("\n\n".join(part for part in parts if part))
    return "\n\n".join(sections) + "\n"


def readme_block(paths: list[Path]) -> str:
    """What README says between its marks: for each device the fullest, newest run."""
    parts = [BEGIN]
    chosen: dict[str, Path] = {}
    for path in paths:
        chosen.setdefault(report.load(path).iloc[0].device, path)
    for path in chosen.values():
        rows = report.load(path)
        layers = report.timed_layers(rows)
        eager = report.eager_batchnorm(layers[layers.direction == "both"])
        kernels = " or ".join(sorted({name.removeprefix(EAGER).rstrip(")") for name in eager.candidate}))
        table = report.means(eager.assign(candidate="eager"), ["net", *report.FORMAT]).eager.unstack(report.FORMAT)
        table.columns = [" ".join(names) for names in table.columns]
        parts.append(
            f"{report.about(rows)}. Time of eager BatchNorm (by {kernels}, as PyTorch chooses) / our time, forward and "
            "backward through autograd, geometric mean over a network's layers with what follows them (addition, "
            "activation); above 1 ours is faster:"
        )
        parts.append(report.text(table, style="github"))
        networks = report.networks(rows)
        if len(networks):
            table = networks["x BatchNorm"].unstack("candidate").drop(columns="BatchNorm")
            parts += ["Training of whole networks, images/s against BatchNorm's:", report.text(table, style="github")]
        worst = report.losses(rows).head(1)
        if len(worst):
            case = worst.iloc[0]
            size = " x ".join(map(str, [case.batch, case.channels, *case["size"].split("x")]))
            where = f"{case.direction}, {size}, {case['dtype']} {case.layout}, against {case.candidate}"
            parts.append(
                f"Over all layers, sizes and states of the limits, ours is {report.won(rows)}; the worst loss is "
                f"{case.ratio:.2f} ({where})."
            )
    if not any(_is_gpu(report.load(path)) for path in paths):
        parts.append(NOT_ON_GPU)
    parts.append("All tables, losses, figures and the method: [benchmarks](docs/benchmarks.md).")
    return "\n\n".join([*parts, END])


def readme(text: str, block: str) -> str:
    """README with the block in its place.

    Raises:
        ValueError: the marks are missing.
    """
    begin, end = text.find(BEGIN), text.find(END)
    if begin < 0 or end < begin:
        raise ValueError(f"README.md has no place for the table: it wants the lines {BEGIN} and {END}")
    return text[:begin] + block + text[end + len(END) :]


def recorded() -> list[Path]:
    """The finished runs, GPUs first, then the fullest level, then the newest."""
    order = {"everything": 0, "full": 1, "quick": 2, "tiny": 3}
    first = {path: report.load(path).iloc[0] for path in RESULTS.glob("*.csv")}
    newest_first = sorted(first, key=lambda path: first[path].date, reverse=True)
    return sorted(newest_first, key=lambda path: (first[path].device_type != "cuda", order.get(first[path].level, 9)))


def _is_gpu(rows: pd.DataFrame) -> bool:
    return bool((rows.device_type == "cuda").any())


def _fold(text: str) -> str:
    return f"<details><summary>every loss</summary>\n\n{text}\n\n</details>"


def main() -> int:
    """Write both."""
    paths = recorded()
    PAGE.write_text(page(paths))
    README.write_text(readme(README.read_text(), readme_block(paths)))
    print(f"{PAGE}, {README}: from {len(paths)} runs")
    return 0


if __name__ == "__main__":
    sys.exit(main())

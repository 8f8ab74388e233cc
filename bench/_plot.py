"""The command `bench plot FILE …`: a picture of all ops for a README (PNG, by matplotlib), or the page (by plotly).

The picture has a panel for each op: native's time over dlkit's, over the size of the input; a dot is a case, a line the
geometric mean of a direction's cases whose sizes lie within a factor of four.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import statistics
from pathlib import Path
from typing import Any

from . import BadInput, _report

DIRECTIONS = {"forward": "C0", "backward": "C1", "forward_backward": "C2"}  # and their colours
MARKERS = {"fp32": "o", "bf16": "s", "fp16": "^", "fp64": "D"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="several are drawn as one")
    parser.add_argument(
        "--output", type=Path, metavar="PATH", help="ending in .png or .html; default: a PNG beside the first file"
    )


def main(args: argparse.Namespace) -> int:
    output: Path = args.output or args.files[0].with_suffix(".png")
    if output.suffix not in (".png", ".html"):
        raise BadInput(f"expected --output to end in .png or .html; got {output}")
    library = {".png": "matplotlib", ".html": "plotly"}[output.suffix]
    if importlib.util.find_spec(library) is None:
        raise BadInput(f"plot to {output.suffix} needs {library}: pip install {library}")
    report = _report.merged([_report.load(file) for file in args.files])
    try:
        if output.suffix == ".png":
            picture(report, output)
        else:
            from . import _page

            return int(not _report.save_text(output, _page.html(report)))
    except OSError as error:
        raise BadInput(f"cannot write {output}: {error.strerror or error}") from None
    print(f"written: {output}")
    return 0


def picture(report: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import lines, pyplot, ticker

    # op: direction: (bytes of input, dtype, ratio) of each case that both ran
    points: dict[str, dict[str, list[tuple[int, str, float]]]] = {}
    for entry in report["cases"]:
        if ratio := _report.ratio(entry, "native"):
            panel = points.setdefault(entry["op"], {})
            panel.setdefault(entry["direction"], []).append((entry["input_bytes"], entry["dtype"], ratio))
    columns = min(len(points), 3) or 1
    rows = math.ceil(len(points) / columns) or 1
    figure, axes = pyplot.subplots(
        rows, columns, figsize=(3.6 * columns + 0.4, 2.7 * rows + 0.9), sharex=True, squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(points) :]:
        axis.axis("off")
    for axis, (op, panel) in zip(axes.flat, points.items(), strict=False):
        for direction in filter(panel.get, DIRECTIONS):
            color = DIRECTIONS[direction]
            for size, dtype, ratio in panel[direction]:
                axis.plot(size, ratio, MARKERS[dtype], markersize=3.5, color=color, alpha=0.45, markeredgewidth=0)
            near: dict[int, list[tuple[int, float]]] = {}
            for size, _, ratio in panel[direction]:
                near.setdefault(round(math.log(size, 4)), []).append((size, ratio))
            means = [
                [statistics.geometric_mean(values) for values in zip(*near[key], strict=True)] for key in sorted(near)
            ]
            axis.plot(*zip(*means, strict=True), linewidth=1.2, color=color)
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set(yscale="log")
        axis.set_title(op, fontsize=10)
        axis.set_xscale("log", base=2)
        axis.tick_params(labelbottom=True, labelsize=8)
        low, high = axis.get_ylim()
        axis.set_ylim(min(low, 0.7), max(high, 4))
        axis.xaxis.set_major_locator(ticker.LogLocator(2, numticks=7))
        axis.xaxis.set_minor_locator(ticker.NullLocator())
        axis.xaxis.set_major_formatter(lambda value, _: _report.size(value))
        ticks = [tick for tick in (0.5, 1, 2, 4, 8, 16, 32, 64) if axis.get_ylim()[0] <= tick <= axis.get_ylim()[1]]
        axis.yaxis.set_major_locator(ticker.FixedLocator(ticks))
        axis.yaxis.set_minor_locator(ticker.NullLocator())
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}x")
        axis.grid(alpha=0.3)
    seen = {(direction, dtype) for panel in points.values() for direction in panel for _, dtype, _ in panel[direction]}
    handles = [
        lines.Line2D([], [], color=color, label=direction.replace("_", " + "))
        for direction, color in DIRECTIONS.items()
        if any(direction == other for other, _ in seen)
    ]
    handles += [
        lines.Line2D([], [], color="gray", linestyle="", marker=marker, markersize=4, label=dtype)
        for dtype, marker in MARKERS.items()
        if any(dtype == other for _, other in seen)
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=8, frameon=False)
    machine = report["machine"]
    title = "native time / dlkit time over the size of the input"
    figure.suptitle(f"{title}; {_report.where(machine)}; torch {machine['torch']}", fontsize=9)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)

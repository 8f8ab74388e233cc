"""Turns a result file into lines on the terminal, a Markdown table or a picture.

Ratios are another contestant's time over dlkit's: above 1, dlkit is faster. A row where it is slower than native says
so: "slower" where it was in at least three quarters of the rounds, "~" where the two lie within each other's spread.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SUBJECT = "dlkit"


def _number(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def columns(names: Sequence[str]) -> list[str]:
    """Heads of the columns for these contestants."""
    others = [name for name in names if name != SUBJECT]
    return ["case", *(f"{name} us" for name in names), *(f"vs {name}" for name in others), "of floor", ""]


def flag(entry: dict[str, Any]) -> str:
    """Empty, "slower" or "~": see the file's header."""
    mine = entry["contestants"].get(SUBJECT, {})
    native = entry["contestants"].get("native", {})
    if "median_us" not in mine or "median_us" not in native:
        return ""
    often = mine["rounds_slower_than_native"]
    if often >= 0.75:
        return "slower"
    return "~" if often > 0.5 or mine["median_us"] > native["median_us"] else ""


def row(entry: dict[str, Any], names: Sequence[str]) -> list[str]:
    """The cells of one case. A contestant that was not timed shows why: wrong, error, or - where it has no such op."""
    found = entry["contestants"]
    times = {name: found.get(name, {}).get("median_us") for name in names}
    mine = times.get(SUBJECT)
    cells = [entry["id"]]
    for name, time in times.items():
        status = found.get(name, {}).get("status", "-")
        cells.append(_number(time) + ("*" if status == "inexact" else "") if time else status)
    cells += [f"{time / mine:.2f}" if mine and time else "-" for name, time in times.items() if name != SUBJECT]
    return [*cells, f"{entry['floor']['median_us'] / mine:.2f}" if mine else "-", flag(entry)]


def line(cells: Sequence[str], width: int) -> str:
    """One line of the terminal's table; `width` is that of the first column."""
    return (cells[0].ljust(width) + "".join(f"{cell:>12}" for cell in cells[1:])).rstrip()


def heading(report: dict[str, Any]) -> str:
    """Where and with what the figures were taken, in two lines."""
    machine = report["machine"]
    where = machine.get("gpu") or f"{machine['cpu']}, {machine['threads']} threads, {machine['simd']}"
    software = f"torch {machine['torch']}, dlkit {machine['dlkit'] or 'not installed'}"
    if machine["commit"]:
        software += f" ({machine['commit']})"
    copy = report["copy_bandwidth"][-1]
    ways = ", ".join(f"{name} {value:,.1f}" for name, value in copy.items() if name != "bytes")
    memory = "" if "gpu" in machine else f" Allocator: {report['allocator']}."
    # More than half a core at work when the run began: the figures are not to be trusted.
    load = machine["load_average"]
    busy = f" Other work was running: load average {load:.1f}." if load > 0.5 else ""
    return (
        f"{report['op']} on {where}; {software}; {report['date']}.\n"
        f"Copy of {copy['bytes'] >> 20} MB (read + write), GB/s: {ways}.{memory}{busy}"
    )


def footnotes(report: dict[str, Any]) -> str:
    """How many rows were slower than native, and why a contestant was not timed."""
    entries = report["cases"]
    flags = [flag(entry) for entry in entries]
    slower, close = flags.count("slower"), flags.count("~")
    lines = [f"{len(entries)} cases; slower than native: {slower}, as slow within the spread (~): {close}."]
    for entry in entries:
        for name, found in entry["contestants"].items():
            if found["status"] == "wrong":
                errors = ", ".join("no number" if error is None else f"{error:.2g}" for error in found["errors"])
                allowed = ", ".join(f"{limit:.2g}" for limit in entry["tolerances"])
                lines.append(f"wrong: {name} {entry['id']}: errors {errors}; allowed {allowed}")
            elif found["status"] == "inexact":
                worst = max(found["errors"])
                lines.append(f"* {name} {entry['id']}: off by {worst:.2g} of the largest value; timed as the baseline")
            elif found["status"] == "error":
                lines.append(f"error: {name} {entry['id']}: {found['message']}")
    for entry in report["memory"]:
        amounts = [
            f"{name} {found['beyond_bytes'] / 2**20:.2f} MB" if "beyond_bytes" in found else f"{name} error"
            for name, found in entry["contestants"].items()
        ]
        lines.append(f"peak memory beyond outputs, {entry['id']}: {', '.join(amounts)}")
    if report["interrupted"]:
        lines.append("interrupted: the cases above are all that was measured")
    return "\n".join(lines)


def markdown(report: dict[str, Any]) -> str:
    """The whole report as Markdown."""
    names = list(dict.fromkeys(name for entry in report["cases"] for name in entry["contestants"]))
    head = columns(names)
    rows = [head, ["---"] + ["---:"] * (len(head) - 1), *(row(entry, names) for entry in report["cases"])]
    table = "\n".join("| " + " | ".join(cells) + " |" for cells in rows)
    return f"{heading(report)}\n\n{table}\n\n{footnotes(report)}"


def plot(report: dict[str, Any], path: Path) -> Path:
    """Writes a PNG: ratio to native over the size of the input. Needs matplotlib.

    A panel per direction and layout; a colour per variant, a line style per dtype.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import lines, pyplot, ticker

    itemsize = {"fp64": 8, "fp32": 4, "bf16": 2, "fp16": 2}
    styles: dict[str, Any] = {"fp32": "-", "bf16": "--", "fp16": ":", "fp64": "-."}
    series: dict[tuple[str, str], dict[tuple[str, str], list[tuple[float, float]]]] = {}
    for entry in report["cases"]:
        times = [entry["contestants"].get(name, {}).get("median_us") for name in ("native", SUBJECT)]
        if not all(times):
            continue
        size = itemsize[entry["dtype"]] * math.prod(entry["shape"])
        panel = series.setdefault((entry.get("layout", ""), entry["direction"]), {})
        panel.setdefault((entry["variant"], entry["dtype"]), []).append((size, times[0] / times[1]))
    # Forward and backward of one layout side by side, the cases of both together last.
    layouts = list(dict.fromkeys(layout for layout, _ in series))
    panels = sorted(series, key=lambda key: (key[1] == "forward_backward", layouts.index(key[0])))
    drawn = list(dict.fromkeys(key for panel in series.values() for key in panel))
    variants = list(dict.fromkeys(variant for variant, _ in drawn))
    colors = {variant: f"C{index % 10}" for index, variant in enumerate(variants)}

    columns = 2 if len(panels) > 3 else max(len(panels), 1)
    rows = math.ceil(len(panels) / columns) or 1
    size_of_figure = (4.8 * columns + 1.6, 3.2 * rows + 1)
    figure, axes = pyplot.subplots(
        rows, columns, figsize=size_of_figure, sharex=True, sharey=True, squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    for axis, (layout, direction) in zip(axes.flat, panels, strict=False):
        for (variant, dtype), points in series[layout, direction].items():
            # Several shapes may have one size: a dot each, the line along the lowest.
            lowest = dict(sorted(points, reverse=True))
            axis.plot(*zip(*sorted(lowest.items()), strict=True), styles[dtype], linewidth=1, color=colors[variant])
            axis.plot(*zip(*points, strict=True), "o", markersize=3, color=colors[variant])
        axis.axhline(1, color="black", linewidth=0.8)
        title = direction.replace("_", " + ")
        axis.set(title=f"{title}, {layout}" if layout else title, yscale="log")
        axis.set_xscale("log", base=2)
        axis.tick_params(labelbottom=True)
        axis.xaxis.set_major_locator(ticker.LogLocator(2, numticks=9))
        axis.xaxis.set_minor_locator(ticker.NullLocator())
        axis.xaxis.set_major_formatter(lambda value, _: _size(value))
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}x")
        axis.yaxis.set_minor_formatter(lambda value, _: f"{value:g}x" if value in (0.5, 1.5, 2, 3, 5) else "")
        axis.grid(alpha=0.3)
    figure.supxlabel("input size", fontsize=10)
    figure.supylabel("native time / dlkit time", fontsize=10)
    # One legend for all panels: what is in one of them is not always in the next.
    handles = [lines.Line2D([], [], color=colors[variant], label=variant) for variant in variants]
    dtypes = [dtype for dtype in styles if any(dtype == other for _, other in drawn)]
    handles += [lines.Line2D([], [], color="gray", linestyle=styles[dtype], label=dtype) for dtype in dtypes]
    figure.legend(handles=handles, loc="outside right upper", fontsize=8, frameon=False)
    figure.suptitle(heading(report).splitlines()[0], fontsize=8)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return path


def _size(value: float) -> str:
    for unit in ("B", "KB", "MB"):
        if value < 1024:
            return f"{value:.0f} {unit}"
        value /= 1024
    return f"{value:.0f} GB"

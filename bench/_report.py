"""Turns a result file into lines on the terminal or Markdown tables, and finds the figures that pictures show.

Ratios are another contestant's time over dlkit's: above 1, dlkit is faster. A row where it is slower than native says
so: "slower" where it was in at least three quarters of the rounds, "~" where the two lie within each other's spread.
The spread is the middle half of the samples, above and below the median, of the one that scatters more.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import BadInput

SUBJECT = "dlkit"
INTERRUPTED = "interrupted: the cases above are all that was measured"
ITEMSIZE = {"fp64": 8, "fp32": 4, "bf16": 2, "fp16": 2}


def read(path: Path) -> dict[str, Any]:
    """A result file of any command."""
    try:
        report: dict[str, Any] = json.loads(path.read_text())
        report["machine"]["torch"]
    except OSError as error:
        raise BadInput(f"cannot read {path}: {error.strerror or error}") from None
    except (ValueError, KeyError, TypeError):
        raise BadInput(f"cannot read {path}: expected a result file of bench") from None
    return report


def load(path: Path) -> dict[str, Any]:
    """Reads a result file of ops, also an old one, which holds one op and no sizes of inputs."""
    report = read(path)
    if "bench" in report:
        raise BadInput(f"cannot read {path}: expected a result file of ops, got one of bench {report['bench']}")
    try:
        if "op" in report:
            report["ops"] = [report.pop("op")]
            for entry in report["cases"]:
                shape = entry["shape"]
                pairs = zip(shape[::2], shape[1::2], strict=False)
                optimizer = report["ops"] == ["optim"]
                elements = sum(map(math.prod, pairs)) if optimizer else math.prod(shape)
                entry.update(op=report["ops"][0], input_bytes=elements * ITEMSIZE[entry["dtype"]])
        report["ops"], report["cases"]
    except (KeyError, TypeError, AttributeError):
        raise BadInput(f"cannot read {path}: expected a result file of bench") from None
    return report


def merged(reports: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One report with the ops of all; the machine and the rest are the first one's."""
    together = dict(reports[0])
    for key in ("ops", "cases", "memory"):
        together[key] = [item for report in reports for item in report[key]]
    return together


def number(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def columns(names: Sequence[str]) -> list[str]:
    """Heads of the columns for these contestants."""
    others = [name for name in names if name != SUBJECT]
    return ["case", *(f"{name} us" for name in names), *(f"vs {name}" for name in others), "spread", "of floor", ""]


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


def ratio(entry: dict[str, Any], name: str) -> float | None:
    """Time of `name` over dlkit's, where both were timed."""
    times = [entry["contestants"].get(who, {}).get("median_us") for who in (name, SUBJECT)]
    return times[0] / times[1] if all(times) else None


def spread(entry: dict[str, Any]) -> float | None:
    """Half the middle half of the samples over the median: of dlkit or native, whichever is larger."""
    timed = [found for name in (SUBJECT, "native") if "q3_us" in (found := entry["contestants"].get(name, {}))]
    return max(((found["q3_us"] - found["q1_us"]) / 2 / found["median_us"] for found in timed), default=None)


def row(entry: dict[str, Any], names: Sequence[str]) -> list[str]:
    """The cells of one case. A contestant that was not timed shows why: wrong, error, or - where it has no such op."""
    found = entry["contestants"]
    times = {name: found.get(name, {}).get("median_us") for name in names}
    mine = times.get(SUBJECT)
    cells = [entry["id"]]
    for name, time in times.items():
        status = found.get(name, {}).get("status", "-")
        cells.append(number(time) + ("*" if status == "inexact" else "") if time else status)
    ratios = [ratio(entry, name) for name in names if name != SUBJECT]
    cells += [f"{value:.2f}" if value else "-" for value in ratios]
    scatter = spread(entry)
    cells.append("-" if scatter is None else f"±{scatter:.0%}")
    return [*cells, f"{entry['floor']['median_us'] / mine:.2f}" if mine else "-", flag(entry)]


def line(cells: Sequence[str], width: int) -> str:
    """One line of the terminal's table; `width` is that of the first column."""
    return (cells[0].ljust(width) + "".join(f"{cell:>12}" for cell in cells[1:])).rstrip()


def where(machine: dict[str, Any]) -> str:
    """The processor on which the figures were measured, in a few words."""
    if "gpu" in machine:
        return str(machine["gpu"])
    ours = machine.get("dlkit_simd", "")
    with_ours = f" (dlkit: {ours})" if ours and ours.split("_")[0] != machine["simd"].lower() else ""
    return f"{machine['cpu']}, {machine['threads']} threads, {machine['simd']}{with_ours}"


def busy(machine: dict[str, Any]) -> str:
    """A warning where more than half a core was at work when the run began: the figures are not to be trusted."""
    load = machine["load_average"]
    return f" Other work was running: load average {load:.1f}." if load > 0.5 else ""


def heading(report: dict[str, Any]) -> str:
    """The machine and software of the figures, in two or three lines."""
    machine = report["machine"]
    software = f"torch {machine['torch']}, dlkit {machine['dlkit'] or 'not installed'}"
    if machine["commit"]:
        software += f" ({machine['commit']})"
    copy = report["copy_bandwidth"][-1]
    ways = ", ".join(f"{name} {value:,.1f}" for name, value in copy.items() if name != "bytes")
    memory = "" if "gpu" in machine else f" Allocator: {report['allocator']}."
    found = (f"{name} {machine[name]}" for name in ("liger_kernel", "quack", "bitsandbytes") if machine.get(name))
    peers = f"\nPeers found: {', '.join(found) or 'none'}." if "gpu" in machine else ""
    absent = ", ".join(f"{name} ({reason})" for name, reason in report.get("absent", {}).items())
    return (
        f"{', '.join(report['ops'])} on {where(machine)}; {software}; {report['date']}.\n"
        f"Copy of {copy['bytes'] >> 20} MB (half read, half written), GB/s: {ways}.{memory}{busy(machine)}{peers}"
    ) + (f"\nAbsent: {absent}." if absent else "")


def counts(entries: Sequence[dict[str, Any]]) -> str:
    """How many rows were slower than native."""
    flags = [flag(entry) for entry in entries]
    slower, close = flags.count("slower"), flags.count("~")
    return f"{len(entries)} cases; slower than native: {slower}, as slow within the spread (~): {close}."


def largest_error(found: dict[str, Any]) -> str:
    errors = [math.inf if error is None else error for error in found["errors"]]
    return "is no number" if math.inf in errors else f"{max(errors):.2g} of the largest value"


def footnotes(report: dict[str, Any]) -> str:
    """How many rows were slower than native, and why a contestant was not timed."""
    entries = report["cases"]
    lines = [counts(entries)]
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
        lines.append(INTERRUPTED)
    return "\n".join(lines)


def contestants(report: dict[str, Any], op: str) -> list[str]:
    """The contestants in the cases of `op`, in the order of the columns."""
    return list(dict.fromkeys(name for entry in cases(report, op) for name in entry["contestants"]))


def cases(report: dict[str, Any], op: str) -> list[dict[str, Any]]:
    return [entry for entry in report["cases"] if entry["op"] == op]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table: words on the left, numbers on the right."""
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def markdown(report: dict[str, Any]) -> str:
    """The whole report as Markdown, a table for each op."""
    parts = [heading(report)]
    for op in report["ops"]:
        names = contestants(report, op)
        parts.append(table(columns(names), [row(entry, names) for entry in cases(report, op)]))
    return "\n\n".join([*parts, footnotes(report)])


def size(value: float) -> str:
    for unit in ("B", "KB", "MB"):
        if value < 1024:
            return f"{value:.0f} {unit}"
        value /= 1024
    return f"{value:.0f} GB"


def save(path: Path, report: dict[str, Any]) -> bool:
    """Writes a result file, as :func:`save_text` does."""
    return save_text(path, json.dumps(report, indent=1, allow_nan=False) + "\n")


def save_text(path: Path, text: str) -> bool:
    """Writes `text` to `path`, or to a new temporary folder if that cannot be written. Prints the place."""
    try:
        _write(path, text)
        return True
    except OSError as error:
        print(f"bench: cannot write {path}: {error.strerror or error}", file=sys.stderr)
    try:
        _write(Path(tempfile.mkdtemp(prefix="dlkit-bench-")) / path.name, text)
    except OSError as error:
        print(f"bench: cannot write it elsewhere: {error.strerror or error}", file=sys.stderr)
    return False


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # The old file is replaced only by a complete new one.
    part = path.with_name(path.name + ".part")
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    print(f"written: {path}")

"""`bench --compare OLD NEW`: which cases of dlkit became slower or faster between two result files.

Three times a case must have changed beyond the spread, the middle half of the samples: its time; its time over
native's; its time over the floor's. Native and the floor, a copy of as many bytes, were measured in the same rounds, so
a machine that computes slower that day, or whose memory others use, slows one of them with dlkit.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from . import _report

Interval = tuple[float, float]


def _interval(found: dict[str, Any] | None) -> Interval | None:
    return (found["q1_us"], found["q3_us"]) if found and "q1_us" in found else None


def _over(mine: Interval, other: Interval | None) -> Interval | None:
    """The ratio, least and most that the two spreads allow."""
    return other and (mine[0] / other[1], mine[1] / other[0])


def _moved(old: Interval | None, new: Interval | None) -> str | None:
    if old is None or new is None:
        return None
    return "slower" if new[0] > old[1] else "faster" if new[1] < old[0] else ""


def verdict(old: dict[str, Any], new: dict[str, Any]) -> str:
    """slower, faster, or empty; a case that was timed and now fails is slower, one that failed and now runs faster."""
    before, after = (_interval(entry["contestants"].get(_report.SUBJECT)) for entry in (old, new))
    if before is None or after is None:
        return "" if before == after else "slower" if after is None else "faster"
    found = {_moved(before, after)}
    for witness in (lambda entry: entry["contestants"].get("native"), lambda entry: entry["floor"]):
        found.add(_moved(_over(before, _interval(witness(old))), _over(after, _interval(witness(new)))))
    found.discard(None)  # one of the files lacks that witness
    return found.pop() or "" if len(found) == 1 else ""


def compare(old: dict[str, Any], new: dict[str, Any]) -> tuple[str, bool]:
    """The comparison as text, and whether anything became slower."""
    lines = []
    for what, show in (("machine", _report.where), ("torch", lambda machine: machine["torch"])):
        before, after = show(old["machine"]), show(new["machine"])
        if before != after:
            lines.append(f"warning: another {what}: {before} before, {after} now")
    entries = [{(entry["op"], entry["id"]): entry for entry in report["cases"]} for report in (old, new)]
    both = [key for key in entries[0] if key in entries[1]]
    verdicts = {key: verdict(*(side[key] for side in entries)) for key in both}
    width = max((len(key[1]) for key in both), default=0)
    for wanted in ("slower", "faster"):
        for key in both:
            if verdicts[key] == wanted:
                lines.append(f"{wanted}  {key[1].ljust(width)}  {_change(*(side[key] for side in entries))}")
    for side, other, which in ((entries[0], entries[1], "old"), (entries[1], entries[0], "new")):
        only = [key[1] for key in side if key not in other]
        if only:
            lines.append(f"only in the {which} file: {', '.join(only)}")
    counts = [list(verdicts.values()).count(wanted) for wanted in ("slower", "faster")]
    lines.append(
        f"{len(both)} cases in both files; slower: {counts[0]}, faster: {counts[1]}, beyond the spread of both."
    )
    return "\n".join(lines), counts[0] > 0


def _change(old: dict[str, Any], new: dict[str, Any]) -> str:
    found = [entry["contestants"].get(_report.SUBJECT, {}) for entry in (old, new)]
    times = [f"{one['median_us']:,.1f} us" if "median_us" in one else one.get("status", "-") for one in found]
    ratios = [f"{value:.2f}" if value else "-" for value in (_report.ratio(entry, "native") for entry in (old, new))]
    return f"{times[0]} -> {times[1]}; vs native {ratios[0]} -> {ratios[1]}"


def main(old: Path, new: Path) -> int:
    text, slower = compare(_report.load(old), _report.load(new))
    print(text)
    return int(slower)

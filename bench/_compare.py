"""`bench --compare OLD NEW...`: which cases of dlkit became slower or faster between two result files. Of several new
ones, all have to say so.

Three times a case must have changed by more than 5% beyond twice the spread, the middle half of the samples about the
median: its time; its time over native's; its time over the floor's. Native and the floor, a copy of as many bytes, were
measured in the same rounds: a machine that computes slower that day, or whose memory others use, slows one of them too.
The samples of one run do not show the differences between runs, such as the tensors' addresses: of 30 pairs of quick
runs of one build on a shared machine, 141 cases each, 21 then have none that is slower, and with the spread alone 3. A
case made 1.5 times as slow is found in 6 of 10, one made twice as slow in 9.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from . import BadInput, _report

SPREADS, MARGIN = 2, 1.05

Interval = tuple[float, float]


def _interval(found: dict[str, Any] | None) -> Interval | None:
    if not found or "q1_us" not in found:
        return None
    median = found["median_us"]
    # Half the median at least: a ratio needs a positive time.
    low = max(median - SPREADS * (median - found["q1_us"]), median / 2)
    return low, median + SPREADS * (found["q3_us"] - median)


def _over(mine: Interval, other: Interval | None) -> Interval | None:
    """The ratio, with the least and the largest value that the two spreads allow."""
    return other and (mine[0] / other[1], mine[1] / other[0])


def _moved(old: Interval | None, new: Interval | None) -> str | None:
    if old is None or new is None:
        return None
    return "slower" if new[0] > MARGIN * old[1] else "faster" if MARGIN * new[1] < old[0] else ""


def verdict(old: dict[str, Any], new: dict[str, Any]) -> str:
    """slower, faster, or empty; a case that was timed and now fails is slower, one that failed and now runs faster."""
    before, after = (_interval(entry["contestants"].get(_report.SUBJECT)) for entry in (old, new))
    if before is None or after is None:
        return "" if before == after else "slower" if after is None else "faster"
    found = {_moved(before, after)}
    for witness in (lambda entry: entry["contestants"].get("native"), lambda entry: entry["floor"]):
        found.add(_moved(_over(before, _interval(witness(old))), _over(after, _interval(witness(new)))))
    found.discard(None)  # one of the files lacks native or the floor
    return found.pop() or "" if len(found) == 1 else ""


def compare(old: dict[str, Any], *all_new: dict[str, Any]) -> tuple[str, bool]:
    """The comparison as text, and whether anything became slower in all of the new files. Times are the last one's."""
    lines = []
    new = all_new[-1]
    facts = {
        "machine": lambda report: _report.where(report["machine"]),
        "torch": lambda report: report["machine"]["torch"],
        "allocator": lambda report: report["allocator"],
    }
    for what, show in facts.items():
        before, after = show(old), show(new)
        if before != after:
            lines.append(f"warning: another {what}: {before} before, {after} now")
    entries = [{(entry["op"], entry["id"]): entry for entry in report["cases"]} for report in (old, *all_new)]
    both = [key for key in entries[0] if all(key in side for side in entries)]
    verdicts = {}
    for key in both:
        found = {verdict(entries[0][key], side[key]) for side in entries[1:]}
        verdicts[key] = found.pop() if len(found) == 1 else ""
    width = max((len(key[1]) for key in both), default=0)
    for wanted in ("slower", "faster"):
        for key in both:
            if verdicts[key] == wanted:
                lines.append(f"{wanted}  {key[1].ljust(width)}  {_change(entries[0][key], entries[-1][key])}")
    for side, other, which in ((entries[0], entries[-1], "old"), (entries[-1], entries[0], "new")):
        only = [key[1] for key in side if key not in other]
        if only:
            lines.append(f"only in the {which} file: {', '.join(only)}")
    counts = [list(verdicts.values()).count(wanted) for wanted in ("slower", "faster")]
    files = "both" if len(entries) == 2 else "all"
    lines.append(
        f"{len(both)} cases in {files} files; slower: {counts[0]}, faster: {counts[1]}, "
        f"by more than {MARGIN - 1:.0%} beyond twice the spread of both."
    )
    return "\n".join(lines), counts[0] > 0


def _change(old: dict[str, Any], new: dict[str, Any]) -> str:
    found = [entry["contestants"].get(_report.SUBJECT, {}) for entry in (old, new)]
    times = [f"{one['median_us']:,.1f} us" if "median_us" in one else one.get("status", "-") for one in found]
    ratios = [f"{value:.2f}" if value else "-" for value in (_report.ratio(entry, "native") for entry in (old, new))]
    return f"{times[0]} -> {times[1]}; vs native {ratios[0]} -> {ratios[1]}"


def main(old: Path, *new: Path) -> int:
    if not new:
        raise BadInput(f"expected --compare OLD.json NEW.json, got {old} only")
    text, slower = compare(*map(_report.load, (old, *new)))
    print(text)
    return int(slower)

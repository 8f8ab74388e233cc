"""The page that --html writes: one file that needs no network, with plotly's library inside.

For each op the bandwidth reached over size against the roof, and a table of ratios. A case's bandwidth is the least
bytes it must move over its time, and the roof a copy of as many bytes, timed in the same rounds.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from html import escape
from typing import Any

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from . import _report

# Colours of middle lightness, visible on white and on black; the symbols differ too, for readers without colour.
LOOKS = {
    "dlkit": ("#2f7fd6", "circle"),
    "native": ("#d9730d", "square"),
    "compile": ("#2a9d5c", "diamond"),
    "foreach": ("#a05cc4", "triangle-up"),
    "fused": ("#c2458f", "x"),
    "liger": ("#8f7d15", "triangle-down"),
    "quack": ("#0f96a5", "star"),
    "bitsandbytes": ("#b5524a", "cross"),
}
DTYPES = ("fp32", "bf16", "fp16", "fp64")
ROOF = "#8a8f98"

Entry = dict[str, Any]


def _kind(entry: Entry) -> str:
    """The variant, and the layout where there are two."""
    return ", ".join(filter(None, (entry["variant"], entry.get("layout", ""))))


def _span(found: dict[str, Any]) -> str:
    median, low, high = (_report.number(found[key]) for key in ("median_us", "q1_us", "q3_us"))
    return f"{median} us ({low} to {high})"


def _figure(entries: Sequence[Entry], names: Sequence[str]) -> go.Figure:
    """Bandwidth over size of cases that differ only in shape: dots with whiskers over the spread.

    Several shapes may have one size: the line runs along the slowest.
    """
    figure = go.Figure()
    timed = sorted((entry for entry in entries if entry["floor"]), key=lambda entry: entry["input_bytes"])
    roof = {entry["input_bytes"]: entry["floor"]["gb_per_s"] for entry in timed}
    figure.add_scatter(
        x=list(roof),
        y=list(roof.values()),
        name="roof (copy)",
        mode="lines+markers",
        line={"color": ROOF, "width": 6},
        marker={"size": 8, "symbol": "square"},
        opacity=0.5,
        hovertemplate="copy of as many bytes: %{y:.3g} GB/s<extra></extra>",
    )
    for name in names:
        shown = [(entry, entry["contestants"][name]) for entry in timed if name in entry["contestants"]]
        shown = [(entry, found) for entry, found in shown if "median_us" in found]
        if not shown:
            continue
        sizes = [entry["input_bytes"] for entry, _ in shown]
        median, high, low = (
            [entry["bytes"] / found[key] / 1e3 for entry, found in shown] for key in ("median_us", "q1_us", "q3_us")
        )
        slowest: dict[int, float] = {}
        for size, speed in zip(sizes, median, strict=True):
            slowest[size] = min(speed, slowest.get(size, math.inf))
        color, symbol = LOOKS.get(name, (ROOF, "circle"))
        figure.add_scatter(
            x=list(slowest),
            y=list(slowest.values()),
            mode="lines",
            line={"color": color, "width": 2.5 if name == _report.SUBJECT else 1.5},
            legendgroup=name,
            showlegend=False,
            hoverinfo="skip",
        )
        figure.add_scatter(
            x=sizes,
            y=median,
            error_y={
                "array": [most - middle for middle, most in zip(median, high, strict=True)],
                "arrayminus": [middle - least for middle, least in zip(median, low, strict=True)],
                "symmetric": False,
                "thickness": 1,
                "width": 3,
            },
            name=name,
            legendgroup=name,
            mode="markers",
            marker={"size": 7, "symbol": symbol, "color": color},
            text=[f"{'x'.join(map(str, entry['shape']))}: {_span(found)}" for entry, found in shown],
            hovertemplate="%{fullData.name}, %{text}: %{y:.3g} GB/s<extra></extra>",
        )
    exponents = range(4, 34, 4)
    figure.update_layout(
        margin={"l": 46, "r": 8, "t": 8, "b": 40},
        height=300,
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        legend={"orientation": "h", "y": -0.2, "yanchor": "top", "x": 0, "font": {"size": 11}},
        hoverlabel={"font": {"size": 12}},
        xaxis={
            "type": "log",
            "tickvals": [2.0**exponent for exponent in exponents],
            "ticktext": [_report.size(2.0**exponent) for exponent in exponents],
            "title": {"text": "size of the input", "standoff": 6},
        },
        yaxis={"rangemode": "tozero", "title": {"text": "GB/s", "standoff": 4}},
    )
    return figure


def _plots(entries: Sequence[Entry], names: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """For each kind and dtype, which the reader chooses on the page: a figure for each direction."""
    kinds: dict[str, dict[str, list[Entry]]] = {}
    for entry in entries:
        kind = f"{_kind(entry)}, {entry['dtype']}"
        kinds.setdefault(kind, {}).setdefault(entry["direction"], []).append(entry)
    return {
        kind: [
            {"title": direction.replace("_", " + "), "figure": json.loads(_figure(found, names).to_json())}
            for direction, found in directions.items()
        ]
        for kind, directions in kinds.items()
    }


def _cell(entry: Entry | None, name: str) -> str:
    """A cell of the heat table: native's time over dlkit's, or why there is none."""
    if entry is None:
        return "<td></td>"
    for who in (name, _report.SUBJECT):
        found = entry["contestants"].get(who)
        if found and found["status"] in ("error", "wrong"):
            why = found.get("message") or f"largest error {_report.largest_error(found)}"
            return f'<td class="bad"><b>{who}: {found["status"]}</b> {escape(why)}</td>'
    ratio = _report.ratio(entry, name)
    if ratio is None:
        return "<td></td>"
    # The colour is fullest from half as fast or twice as fast on, and pale even there: the number matters.
    strength = min(abs(math.log2(ratio)) / 2, 1.0) * 0.5 + 0.04
    mine, other = (entry["contestants"][who] for who in (_report.SUBJECT, name))
    share = entry["floor"]["median_us"] / mine["median_us"]
    hint = f"{entry['id']}: dlkit {_span(mine)}, {name} {_span(other)}, {share:.0%} of the roof"
    kind = "up" if ratio >= 1 else "down"
    mark = {"slower": " ▼", "~": " ~"}.get(_report.flag(entry), "") if name == "native" else ""
    return f'<td class="{kind}" style="--s:{strength:.2f}" title="{escape(hint)}">{ratio:.2f}{mark}</td>'


def _table(entries: Sequence[Entry], names: Sequence[str]) -> str:
    """Rows: kind, direction, size. Columns: for each dtype, the ratio to each contestant."""
    dtypes = [dtype for dtype in DTYPES if any(entry["dtype"] == dtype for entry in entries)]
    columns = [
        (dtype, name)
        for dtype in dtypes
        for name in names
        if name != _report.SUBJECT
        and any(entry["dtype"] == dtype and name in entry["contestants"] for entry in entries)
    ]
    groups: dict[tuple[str, str], dict[tuple[int, str], dict[str, Entry]]] = {}
    for entry in entries:
        key = (entry["input_bytes"] // _report.ITEMSIZE[entry["dtype"]], "x".join(map(str, entry["shape"])))
        rows = groups.setdefault((_kind(entry), entry["direction"].replace("_", " + ")), {})
        rows.setdefault(key, {})[entry["dtype"]] = entry
    heads = "".join(
        f'<th colspan="{sum(1 for column in columns if column[0] == dtype)}">{dtype}</th>' for dtype in dtypes
    )
    lines = [f'<tr><th></th>{heads}</tr><tr><th class="what">input</th>']
    lines[0] += "".join(f"<th>vs {name}</th>" for _, name in columns) + "</tr></thead><tbody>"
    for (kind, direction), rows in groups.items():
        title = f"<span>{escape(kind)}, {direction}</span>"
        lines.append(f'<tr class="group"><th colspan="{len(columns) + 1}">{title}</th></tr>')
        for (_, shape), found in sorted(rows.items()):
            cells = "".join(_cell(found.get(dtype), name) for dtype, name in columns)
            lines.append(f"<tr><th>{shape}</th>{cells}</tr>")
    return f'<div class="scroll"><table class="heat"><thead>{"".join(lines)}</tbody></table></div>'


def _facts(report: dict[str, Any]) -> str:
    machine = report["machine"]
    facts = {
        "command": f"<code>{escape(report.get('command', 'not recorded'))}</code>",
        "date": escape(report["date"]),
        "torch": escape(machine["torch"]),
        "dlkit": escape(f"{machine['dlkit'] or 'not installed'}, commit {machine['commit'] or 'unknown'}"),
        "absent": escape(", ".join(f"{name} ({why})" for name, why in report.get("absent", {}).items()) or "nobody"),
    }
    rows = "".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in facts.items())
    others = {name: value for name, value in machine.items() if name not in facts and name != "commit"}
    others["allocator"] = report["allocator"]
    for row in report["copy_bandwidth"]:
        speeds = ", ".join(f"{name} {value:.1f} GB/s" for name, value in row.items() if name != "bytes")
        others[f"copy of {_report.size(row['bytes'])}"] = speeds
    more = "".join(f"<dt>{escape(name)}</dt><dd>{escape(_plain(value))}</dd>" for name, value in others.items())
    return f"<dl>{rows}</dl><details><summary>All facts of the machine</summary><dl>{more}</dl></details>"


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {item}" for name, item in value.items())
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def html(report: dict[str, Any]) -> str:
    sections, plots = [], {}
    for op in report["ops"]:
        entries, names = _report.cases(report, op), _report.contestants(report, op)
        if not entries:
            continue
        # dlkit is drawn last, on top of the others.
        plots[op] = _plots(entries, [name for name in names if name != _report.SUBJECT] + [_report.SUBJECT])
        options = "".join(f"<option>{escape(kind)}</option>" for kind in plots[op])
        sections.append(
            f'<section><h2 id="{op}">{op}</h2><p>{_report.counts(entries)}</p>'
            f'<label>Plots of <select data-op="{op}">{options}</select></label>'
            f'<div class="plots" data-op="{op}"></div>{_table(entries, names)}</section>'
        )
    links = " ".join(f'<a href="#{op}">{op}</a>' for op in plots)
    where = escape(_report.where(report["machine"]))
    data = json.dumps(plots).replace("</", "<\\/")  # within a script only "</" could end it
    stopped = "<p><b>Interrupted:</b> what was measured until then is shown.</p>" if report["interrupted"] else ""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">'
        f"<title>dlkit bench, {where}</title><style>{STYLE}</style></head><body>"
        f"<header><h1>dlkit on {where}</h1>{stopped}{_facts(report)}<nav>{links}</nav><p>{LEGEND}</p></header>"
        f"<main>{''.join(sections)}</main>"
        f"<script>{get_plotlyjs()}</script>"
        f"<script>const PLOTS = {data};{SCRIPT}</script></body></html>\n"
    )


LEGEND = (
    "Plots: the least bytes an op must move over its median time, whiskers over the middle half of the samples; the "
    "roof is a copy of as many bytes, timed in the same rounds. Tables: the other's time over dlkit's, so above 1 "
    "dlkit is faster. ▼ slower than native in at least three rounds of four, ~ as fast within the spread."
)

STYLE = """
:root { --back: #fff; --text: #1c2126; --soft: #5b636d; --line: #d9dde2; --head: #f3f5f7;
  --up: 22 150 70; --down: 215 40 40; --bad: #b3261e; }
@media (prefers-color-scheme: dark) {
  :root { --back: #14171b; --text: #e6e9ec; --soft: #9aa3ad; --line: #333a42; --head: #1e2329;
    --up: 40 190 100; --down: 235 75 75; --bad: #a8281f; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 12px 16px 48px; max-width: 1280px; background: var(--back); color: var(--text);
  font: 15px/1.45 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: .3em 0 .5em; } h2 { font-size: 1.25rem; margin: 2em 0 .2em; }
p { margin: .4em 0; max-width: 75ch; } header p, section p, dt, nav { color: var(--soft); }
a { color: inherit; } nav { display: flex; flex-wrap: wrap; gap: .3em 1em; margin: .8em 0; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 2px 14px; margin: .5em 0; }
dd { margin: 0; overflow-wrap: anywhere; } summary { cursor: pointer; color: var(--soft); }
code { font-size: .92em; background: var(--head); padding: 1px 5px; border-radius: 4px; }
select { font: inherit; color: inherit; background: var(--head); border: 1px solid var(--line); border-radius: 4px;
  padding: 2px 6px; max-width: 100%; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); gap: 0 18px;
  margin: .6em 0 1em; }
.plots > div { min-width: 0; } h3 { font-size: 1rem; font-weight: 600; margin: .4em 0 0; }
.scroll { overflow: auto; scrollbar-gutter: stable; max-height: 34rem; border: 1px solid var(--line);
  border-radius: 6px; width: fit-content; max-width: 100%; }
.heat { border-collapse: separate; border-spacing: 0; font-variant-numeric: tabular-nums; font-size: .87rem; }
.heat th, .heat td { padding: 2px 10px; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
.heat thead { position: sticky; top: 0; z-index: 2; } .heat thead th { background: var(--head); text-align: center; }
.heat th:first-child { position: sticky; left: 0; z-index: 1; background: var(--back); text-align: left;
  font-weight: 400; } .heat thead th:first-child, .heat .group th { background: var(--head); }
.heat .group th { font-weight: 600; max-width: none; }
.heat .group span { position: sticky; left: 10px; white-space: nowrap; }
.heat .up { background: rgb(var(--up) / var(--s)); } .heat .down { background: rgb(var(--down) / var(--s)); }
.heat .bad { background: var(--bad); color: #fff; white-space: normal; min-width: 14em; max-width: 24em;
  text-align: left; overflow-wrap: anywhere; font-size: .8rem; }
@media (max-width: 600px) { body { padding: 8px 10px 32px; } dl { grid-template-columns: 1fr; } dt { margin-top: 4px; }
  .heat th, .heat td { padding: 2px 6px; } .heat th:first-child { min-width: 8em; max-width: 42vw; white-space: normal;
  overflow-wrap: anywhere; } .heat .group th:first-child { max-width: none; } .heat .group span { left: 6px; } }
"""

SCRIPT = """
const dark = matchMedia("(prefers-color-scheme: dark)");
function themed(layout) {
  const style = getComputedStyle(document.documentElement);
  const text = style.getPropertyValue("--text").trim(), line = style.getPropertyValue("--line").trim();
  const axis = { gridcolor: line, linecolor: line, zerolinecolor: line };
  return { ...layout, font: { color: text, family: "system-ui, sans-serif", size: 12 },
    xaxis: { ...layout.xaxis, ...axis }, yaxis: { ...layout.yaxis, ...axis } };
}
function draw(select) {
  const box = document.querySelector(`.plots[data-op="${select.dataset.op}"]`);
  for (const child of box.children) Plotly.purge(child.lastChild);
  box.replaceChildren();
  const drawn = PLOTS[select.dataset.op][select.value].map(({ title, figure }) => {
    const [cell, head, plot] = ["div", "h3", "div"].map(name => document.createElement(name));
    head.textContent = title;
    cell.append(head, plot);
    box.append(cell);
    return [plot, figure];
  });
  // Only now do the cells have the width that the plots take.
  for (const [plot, figure] of drawn)
    Plotly.newPlot(plot, figure.data, themed(figure.layout), { responsive: true, displayModeBar: false });
}
const selects = document.querySelectorAll("select[data-op]");
const drawAll = () => selects.forEach(draw);
selects.forEach(select => select.addEventListener("change", () => draw(select)));
dark.addEventListener("change", drawAll);
drawAll();
document.body.dataset.drawn = document.querySelectorAll(".plots .main-svg").length;
"""

"""The command `bench overview MODELS OPS`: one picture for a README, bars of time beside torch's.

Left: whole training steps, from a result file of `bench models`. Right: the ops in HEADLINES, from one of `bench`.
"""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path
from typing import Any

from . import BadInput, _report

# case: its label
HEADLINES = {
    "layer_norm/forward/8192x4096/fp32": "LayerNorm, forward",
    "layer_norm/backward/8192x4096/fp32": "LayerNorm, backward",
    "rms_norm/backward/8192x4096/bf16": "RMSNorm, backward, bf16",
    "batch_norm_relu/forward/128x64x56x56/fp32/contiguous": "BatchNorm + ReLU, forward",
    "batch_norm_relu/backward/128x64x56x56/fp32/contiguous": "BatchNorm + ReLU, backward",
    "dropout/forward/8192x4096/fp32": "dropout, forward",
    "dropout/backward/8192x4096/fp32": "dropout, backward",
    "dropout_add_layer_norm/forward/8192x4096/fp32": "dropout + add + LayerNorm, forward",
    "AdamW_clip/forward/24x1048576/fp32": "AdamW with clipping, step",
}
SERIES = {"native": ("torch", "#9aa0a6"), "compile": ("torch.compile", "#f2a33c"), "dlkit": ("dlkit", "#2b6cb0")}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("models", type=Path, metavar="MODELS.json", help="a result file of bench models")
    parser.add_argument("ops", type=Path, metavar="OPS.json", help="a result file of bench")
    parser.add_argument("--output", type=Path, metavar="FILE.png", required=True)


def main(args: argparse.Namespace) -> int:
    if args.output.suffix != ".png":
        raise BadInput(f"expected --output to end in .png; got {args.output}")
    if importlib.util.find_spec("matplotlib") is None:
        raise BadInput("overview needs matplotlib: pip install matplotlib")
    models, ops = _report.read(args.models), _report.load(args.ops)
    if models.get("bench") != "models":
        raise BadInput(f"cannot read {args.models}: expected a result file of bench models")
    found = {entry["id"]: entry["contestants"] for entry in ops["cases"]}
    try:
        draw(
            {
                "Whole training step": {
                    entry["model"]: _times(entry["contestants"], "median_ms")
                    for entry in models["models"]
                    if entry["memory"] == "reuse"
                },
                "One op": {
                    label: _times(found[case], "median_us") for case, label in HEADLINES.items() if case in found
                },
            },
            f"{_report.where(ops['machine'])}; torch {ops['machine']['torch']}",
            args.output,
        )
    except OSError as error:
        raise BadInput(f"cannot write {args.output}: {error.strerror or error}") from None
    print(f"written: {args.output}")
    return 0


def _times(contestants: dict[str, Any], unit: str) -> dict[str, float]:
    """Times as shares of torch's, of every series that was timed."""
    native = contestants["native"][unit]
    return {name: contestants[name][unit] / native for name in SERIES if unit in contestants.get(name, {})}


def draw(panels: dict[str, dict[str, dict[str, float]]], where: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    rows = max(map(len, panels.values()))
    figure, axes = pyplot.subplots(1, len(panels), figsize=(10, 0.55 * rows + 1), layout="constrained")
    for axis, (title, bars) in zip(axes, panels.items(), strict=True):
        for place, times in enumerate(bars.values()):
            for i, (name, (label, color)) in enumerate(SERIES.items()):
                if name not in times:
                    continue
                y, shown = place + 0.27 * (i - 1), min(times[name], 1.5)
                axis.barh(y, shown, height=0.25, color=color, label=label if place == 0 else None)
                text = f"{times[name]:.0%}" if name != "native" else ""
                axis.text(shown + 0.01, y, text, va="center", fontsize=8, color=color)
        axis.set_yticks(range(len(bars)), bars)
        axis.invert_yaxis()
        axis.set_title(f"{title}: time, torch = 100 %", fontsize=10)
        axis.set_xlim(0, 1.6)
        axis.xaxis.set_major_locator(ticker.FixedLocator([0, 0.5, 1]))
        axis.xaxis.set_major_formatter(ticker.PercentFormatter(1))
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(left=False, labelsize=9)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=9, frameon=False)
    figure.suptitle(f"Shorter is faster. {where}", fontsize=9)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)

"""A small language model with tied embeddings, trained with torch's loss and with dlkit's: losses and resident peaks.

Six blocks, vocabulary 32,000. `torch` has nn.functional.cross_entropy over whole logits, `dlkit` its own in place,
`linear` linear_cross_entropy, which has no whole logits. Each trains on the same tokens in a fresh process.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dlkit

from . import _arguments, _machine, _report

VOCABULARY, FEATURES, HEADS, BLOCKS, BATCH, LENGTH = 32_000, 256, 4, 6, 16, 128
LOSSES = ("torch", "dlkit", "linear")


class LanguageModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(VOCABULARY, FEATURES) * 0.02)  # tied: embedding and head
        self.places = nn.Parameter(torch.randn(LENGTH, FEATURES) * 0.02)
        block = nn.TransformerEncoderLayer(FEATURES, HEADS, 4 * FEATURES, 0.0, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(block, BLOCKS, nn.LayerNorm(FEATURES), enable_nested_tensor=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Features of each token, [N, FEATURES]."""
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
        x = F.embedding(tokens, self.table) + self.places[: tokens.shape[1]]
        hidden: Tensor = self.blocks(x, mask=mask, is_causal=True)
        return hidden.flatten(0, 1)


def _loss(name: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    if name == "torch":
        return lambda x, table, target: F.cross_entropy(x @ table.t(), target)
    if name == "dlkit":
        return lambda x, table, target: dlkit.functional.cross_entropy(x @ table.t(), target, inplace_backward=True)
    return lambda x, table, target: dlkit.functional.linear_cross_entropy(x, table, target)


def train(name: str, steps: int) -> None:
    """Prints losses, the peak and the time of a step as JSON. To be run on its own."""
    torch.manual_seed(0)
    model, loss_of = LanguageModel(), _loss(name)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    # Texts that can be learned: a rule gives each token from the one before, except now and then a random one.
    tokens = torch.randint(0, 500, (BATCH, LENGTH + 1))
    for i in range(1, LENGTH + 1):
        tokens[:, i] = torch.where(torch.rand(BATCH) < 0.9, (tokens[:, i - 1] * 7 + 3) % 500, tokens[:, i])
    losses, seconds = [], []
    for _ in range(steps):
        start = time.perf_counter()
        optimizer.zero_grad()
        loss = loss_of(model(tokens[:, :-1]), model.table, tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"losses": losses, "peak_mb": round(peak), "step_s": min(seconds)}))


def markdown(report: dict[str, Any]) -> str:
    rows = [
        [
            name,
            f"{run['losses'][0]:.4f}",
            f"{run['losses'][-1]:.4f}",
            f"{run['peak_mb']:,} MB",
            f"{run['step_s']:.2f} s",
        ]
        for name, run in report["found"].items()
    ]
    return _report.table(["loss by", "first loss", "last loss", "resident peak", "fastest step"], rows)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", type=int, default=20, metavar="N", help="of the training, default: 20")
    parser.add_argument("--loss", choices=LOSSES, help="train with one in this process; default: a process each")
    _arguments.add_json(parser)


def main(args: argparse.Namespace) -> int:
    if args.loss:
        train(args.loss, args.steps)
        return 0
    found = {}
    for name in LOSSES:
        command = [sys.executable, "-m", "dlkit", "bench", "language_model", "--loss", name, "--steps", str(args.steps)]
        finished = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if finished.returncode:
            print(f"bench: language_model --loss {name} ended with status {finished.returncode}", file=sys.stderr)
            return 1
        found[name] = json.loads(finished.stdout.splitlines()[-1])
    report = {"bench": "language_model", **_machine.header("cpu"), "found": found}
    print(markdown(report))
    path = _arguments.result_path(args, "language_model", _machine.slug(report["machine"]))
    worst = max(
        abs(a - b) / b
        for name in LOSSES[1:]
        for a, b in zip(found[name]["losses"], found["torch"]["losses"], strict=True)
    )
    if worst > 1e-2:
        print(f"bench: losses differ from torch's by {worst:.1%}", file=sys.stderr)
        return 1
    return int(not _report.save(path, report))

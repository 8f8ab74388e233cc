"""A run that moves from torch's optimizer to dlkit's and back by checkpoints: python examples/checkpoint.py --steps 20

The steps are torch's, then dlkit's, then torch's again. The losses are those of a run with torch only.
"""

import argparse
import io

import torch
from torch import nn

import dlkit


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> list[float]:
    losses = []
    for step in steps:
        x = torch.randn(64, 16, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        loss = (model(x) - x.flip(1)).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 64), nn.LayerNorm(64), nn.GELU(), nn.Linear(64, 16))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20, help="of each third")
    n = parser.parse_args().steps

    model = make_model()
    expected = train(model, torch.optim.AdamW(model.parameters(), lr=1e-2), range(3 * n))

    model, losses, file = make_model(), [], io.BytesIO()
    for cls in (torch.optim.AdamW, dlkit.optim.AdamW, torch.optim.AdamW):
        if cls is dlkit.optim.AdamW:
            dlkit.replace(model)  # the layers' state_dict is the same, too
        optimizer = cls(model.parameters(), lr=1e-2)
        if losses:
            optimizer.load_state_dict(torch.load(io.BytesIO(file.getvalue())))
        losses += train(model, optimizer, range(len(losses), len(losses) + n))
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)  # with 8-bit states or masters: state_dict(consolidate=True)
        print(f"{cls.__module__.partition('.')[0]:<6} step {len(losses):4d}   loss {losses[-1]:.6f}")

    print(
        f"largest difference from torch throughout: {(torch.tensor(losses) - torch.tensor(expected)).abs().max():.2e}"
    )


if __name__ == "__main__":
    main()

"""A plain training loop on the CPU or a GPU: python examples/training_loop.py --steps 200

The lines marked "dlkit" are all that changes.
"""

import argparse

import torch
from torch import nn

import dlkit  # dlkit


def make_data(samples: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Points in 20 dimensions; the class says whether a point lies inside a sphere."""
    x = torch.randn(samples, 20)
    return x, (x.square().sum(1) > 19).long()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--width", type=int, default=256)
    args = parser.parse_args()

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(dlkit.reuse_cpu_memory())  # dlkit

    def block(inputs: int) -> nn.Sequential:
        return nn.Sequential(nn.Linear(inputs, args.width), nn.LayerNorm(args.width), nn.GELU(), nn.Dropout(0.1))

    model = nn.Sequential(block(20), block(args.width), nn.Linear(args.width, 2)).to(device)
    report: list[dlkit.Change] = []
    model = dlkit.replace(model, report=report)  # dlkit
    print(*report, sep="\n")

    groups = dlkit.optim.param_groups(model, weight_decay=0.01)  # dlkit: none on biases and norms
    optimizer = dlkit.optim.AdamW(groups, lr=2e-3, max_norm=1.0)  # dlkit: clips in its own pass

    x, y = (tensor.to(device) for tensor in make_data(4096))
    for step in range(args.steps):
        rows = torch.randint(len(x), (args.batch,), device=device)
        loss = nn.functional.cross_entropy(model(x[rows]), y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()  # no clip_grad_norm_ before it
        if step % max(1, args.steps // 10) == 0 or step == args.steps - 1:
            print(f"step {step:4d}   loss {loss.item():.4f}   gradient norm {optimizer.grad_norm.item():.3f}")

    model.eval()
    with torch.no_grad():
        print(f"accuracy {(model(x).argmax(1) == y).float().mean().item():.3f}")


if __name__ == "__main__":
    main()

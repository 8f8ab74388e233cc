"""A ResNet of torchvision whose BatchNorm, residual add and ReLU run as one layer: python examples/cnn.py --steps 20

The lines marked "dlkit" are all that changes. Any model of timm is changed by the same three lines.
"""

import argparse

import torch
import torchvision
from torch import nn

import dlkit  # dlkit


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--size", type=int, default=64, help="pixels of an image's side")
    parser.add_argument("--model", default="resnet18", help="a name of torchvision.models")
    args = parser.parse_args()

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dlkit.reuse_cpu_memory()  # dlkit

    model = torchvision.models.get_model(args.model, num_classes=10).to(device, memory_format=torch.channels_last)
    keys = list(model.state_dict())
    report: list[dlkit.Change] = []
    model = dlkit.replace(model)  # dlkit
    model = dlkit.fuse(model, report=report)  # dlkit: BatchNorm takes in the add and the ReLU after it
    assert list(model.state_dict()) == keys  # checkpoints stay what they were

    norms = [change for change in report if issubclass(change.before, nn.modules.batchnorm._BatchNorm)]
    fused = [change for change in norms if change.before is not change.after]
    print(f"{args.model}: {len(fused)} BatchNorm layers fused, {len(norms) - len(fused)} left")
    print(*(change for change in norms if change not in fused), sep="\n")

    optimizer = dlkit.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, max_norm=5.0)  # dlkit

    images = torch.randn(args.batch, 3, args.size, args.size, device=device).to(memory_format=torch.channels_last)
    labels = torch.randint(10, (args.batch,), device=device)
    for step in range(args.steps):
        loss = nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"step {step:3d}   loss {loss.item():.4f}   gradient norm {optimizer.grad_norm.item():.2f}")

    dlkit.restore(model)  # torch's layers again, with the trained weights
    print(f"restored: {sum(type(m) is nn.BatchNorm2d for m in model.modules())} layers of torch.nn.BatchNorm2d")


if __name__ == "__main__":
    main()

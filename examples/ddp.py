"""DistributedDataParallel with BatchNorm over all processes: python examples/ddp.py --processes 2 --steps 20

The lines marked "dlkit" are all that changes. Runs on GPUs (NCCL) where each process has one, else on the CPU (Gloo).
"""

import argparse
import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

import dlkit  # dlkit


def train(rank: int, file: str, args: argparse.Namespace) -> None:
    torch.set_num_threads(max(1, torch.get_num_threads() // args.processes))
    gpus = torch.cuda.device_count() >= args.processes
    backend, device = ("nccl", torch.device("cuda", rank)) if gpus else ("gloo", torch.device("cpu"))
    if gpus:
        torch.cuda.set_device(device)
    dist.init_process_group(backend, init_method=f"file://{file}", rank=rank, world_size=args.processes)

    torch.manual_seed(0)  # the same weights everywhere
    model = nn.Sequential(nn.Linear(16, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, 2))
    model = dlkit.fuse(dlkit.replace(model))  # dlkit
    model = dlkit.nn.SyncBatchNorm.convert_sync_batchnorm(model)  # dlkit: torch's function refuses fused layers
    model = nn.parallel.DistributedDataParallel(model.to(device))
    # dlkit: DDP gives every process the same gradients, so the clipping norm needs no process group.
    optimizer = dlkit.optim.AdamW(model.parameters(), lr=1e-2, max_norm=1.0)

    torch.manual_seed(1 + rank)  # other data and other dropout masks in each process
    for step in range(args.steps):
        x = torch.randn(args.batch, 16, device=device)
        loss = nn.functional.cross_entropy(model(x), (x.sum(1) > 0).long())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        dist.all_reduce(loss.detach())
        if rank == 0 and (step % max(1, args.steps // 5) == 0 or step == args.steps - 1):
            mean = loss.item() / args.processes
            print(f"step {step:3d}   mean loss {mean:.4f}   gradient norm {optimizer.grad_norm.item():.3f}")

    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    every = [torch.empty_like(weights) for _ in range(args.processes)]
    dist.all_gather(every, weights)
    if rank == 0:
        print("weights are equal in all processes:", all(torch.equal(weights, other) for other in every))
    dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("processes", 2), ("steps", 20), ("batch", 32)):
        parser.add_argument(f"--{name}", type=int, default=default)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        # Not mp.spawn: its processes shut Python down at their end, and one of Gloo's threads may still need it then.
        mp.start_processes(train, (f"{folder}/rendezvous", arguments), arguments.processes, start_method="forkserver")

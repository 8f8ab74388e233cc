"""A language model of transformers, trained in bf16 with fp32 masters: python examples/transformer.py --steps 50

The lines marked "dlkit" are all that changes. The model is small and its weights are random: nothing is downloaded.
"""

import argparse

import torch
import transformers

import dlkit  # dlkit


def make_batch(batch: int, length: int, vocabulary: int) -> torch.Tensor:
    """Every third token of a ring, from some start."""
    starts = torch.randint(vocabulary, (batch, 1))
    return (starts + 3 * torch.arange(length)) % vocabulary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--width", type=int, default=64)
    args = parser.parse_args()

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dlkit.reuse_cpu_memory()  # dlkit

    sizes = {"n_embd": args.width, "n_layer": 2, "n_head": 4, "n_positions": 32, "vocab_size": 64}
    config = transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)
    model = transformers.GPT2LMHeadModel(config).to(device, torch.bfloat16)
    report: list[dlkit.Change] = []
    model = dlkit.replace(model, report=report)  # dlkit: the LayerNorms and Dropouts
    print(f"{sum(change.before is not change.after for change in report)} layers replaced")

    groups = dlkit.optim.param_groups(model, weight_decay=0.1)  # dlkit
    # dlkit: masters take 2 bytes a parameter, where a copy in fp32 takes 4; ema_decay keeps an average of the weights
    optimizer = dlkit.optim.AdamW(groups, lr=3e-3, max_norm=1.0, master_weights=True, ema_decay=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps)
    for step in range(args.steps):
        tokens = make_batch(args.batch, 32, 64).to(device)
        loss = model(input_ids=tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % max(1, args.steps // 10) == 0 or step == args.steps - 1:
            print(f"step {step:3d}   loss {loss.item():.3f}   gradient norm {optimizer.grad_norm.item():.2f}")

    model.eval()
    tokens = make_batch(args.batch, 32, 64).to(device)
    with torch.no_grad(), optimizer.ema():  # dlkit: the averaged weights, inside the block only
        print(f"loss of the averaged weights {model(input_ids=tokens, labels=tokens).loss.item():.3f}")


if __name__ == "__main__":
    main()

"""Adapt a network to digits that it has never seen: train low-rank adapters, save, load in PEFT, merge.

    python examples/lora_digits.py                                    # half a minute on two cores
    torchrun --nproc-per-node 2 examples/lora_digits.py               # the same with two processes

The base learns scikit-learn's digits 0 to 4; then it is frozen, and adapters and a new head learn 5 to 9. Under
torchrun each process trains on its share of every batch, by DistributedDataParallel.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).parent))

from digits_cnn import DigitsCNN, digits

import fxopt
from passes import LoRA, lora


def task(first: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training and held-out images of five digits, with labels from 0."""
    images, labels, held_images, held_labels = digits()
    train, held = (labels // 5 * 5 == first, held_labels // 5 * 5 == first)
    return images[train], labels[train] - first, held_images[held], held_labels[held] - first


@torch.no_grad()
def accuracy(module: nn.Module, images: Tensor, labels: Tensor) -> float:
    training = module.training
    right: float = (module.eval()(images).argmax(1) == labels).float().mean().item()
    module.train(training)
    return right


def train(module: nn.Module, images: Tensor, labels: Tensor, epochs: int, rank: int = 0, world: int = 1) -> None:
    """All that requires gradients, by AdamW; of each batch this process sees its share."""
    optimizer = torch.optim.AdamW(lora.trainable_parameters(module), 5e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(epochs):
        for batch in torch.randperm(len(images), generator=generator).split(64):
            share = batch[rank::world]
            loss = functional.cross_entropy(module(images[share]), labels[share])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def base_network() -> nn.Module:
    torch.manual_seed(0)
    images, labels, held_images, held_labels = task(0)
    model = DigitsCNN(classes=5)
    train(model.train(), images, labels, epochs=6)
    print(f"base on digits 0-4: accuracy {accuracy(model, held_images, held_labels):.3f}")
    return model.eval()


def check_in_peft(base: nn.Module, folder: Path, module: nn.Module, images: Tensor) -> None:
    from fxopt.torchvision_operators import declare_missing

    declare_missing()
    try:
        import peft
    except ImportError:
        print("peft is not installed: the adapter was not loaded there")
        return
    theirs = peft.PeftModel.from_pretrained(base, str(folder)).eval()
    with torch.no_grad():
        print(f"in PEFT: largest difference of the outputs {(theirs(images) - module(images)).abs().max().item():.1e}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=Path("out/lora_digits"))
    parser.add_argument("--epochs", type=int, default=8)
    options = parser.parse_args()
    # The layers are too small for more.
    torch.set_num_threads(1)
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:
        dist.init_process_group("gloo")
    rank = dist.get_rank() if world > 1 else 0

    base = base_network()
    images, labels, held_images, held_labels = task(5)
    torch.manual_seed(0)
    passes = [LoRA(rank=8, alpha=16, targets=("op:conv2d",), modules_to_save=("head",))]
    module = fxopt.optimize(base, images[:64], passes, devices=()).module
    before = accuracy(module, held_images, held_labels)
    # Batch norms stay as the base learned them: they are no part of an adapter.
    wrapped = DistributedDataParallel(module) if world > 1 else module
    train(wrapped.eval(), images, labels, options.epochs, rank, world)
    after = accuracy(module, held_images, held_labels)
    if rank == 0:
        trainable = sum(p.numel() for p in lora.trainable_parameters(module))
        print(f"trained {trainable:,} of {sum(p.numel() for p in module.parameters()):,} parameters")
        lora.save_adapter(module, options.out)
        check_in_peft(base, options.out, module, held_images)
        lora.merge(module, held_images)
        merged = accuracy(module, held_images, held_labels)
        print(f"digits 5-9: accuracy before {before:.3f}, after {after:.3f}, merged {merged:.3f}")
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()

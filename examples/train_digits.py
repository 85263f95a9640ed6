"""Train `digits_cnn.py` and write its weights beside it: half a minute on two cores, the same each time.

python examples/train_digits.py
"""

import torch
from digits_cnn import WEIGHTS, DigitsCNN, digits, evaluate
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

EPOCHS = 40
BATCH = 64


def shifted(images: Tensor) -> Tensor:
    """Each batch moved by up to a pixel, so that the network does not learn positions."""
    across, down = torch.randint(-1, 2, (2,)).tolist()
    padded = functional.pad(images, (1, 1, 1, 1))
    return padded[:, :, 1 + down : 9 + down, 1 + across : 9 + across]


def main() -> None:
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    images, labels, _, _ = digits()
    model = DigitsCNN()
    steps = EPOCHS * (len(images) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.01, total_steps=steps)
    for epoch in range(EPOCHS):
        model.train()
        for batch in torch.randperm(len(images)).split(BATCH)[: len(images) // BATCH]:
            loss = functional.cross_entropy(model(shifted(images[batch])), labels[batch], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        print(f"epoch {epoch + 1:2}: loss {loss.item():.3f}, accuracy {evaluate(model.eval())['accuracy']:.4f}")
    save_file(model.state_dict(), WEIGHTS)
    print(f"wrote {WEIGHTS}, {WEIGHTS.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()

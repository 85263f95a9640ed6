"""A residual network that reads handwritten digits: conv, batch norm, ReLU, and the sums around them.

    fxopt run examples/digits_cnn.py --passes fuse,qat

The images are scikit-learn's digits, 1,797 of 8x8 pixels, which come with that package. `train_digits.py`
made the weights.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

WEIGHTS = Path(__file__).with_suffix(".safetensors")


class Residual(nn.Module):
    """Two convolutions beside a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = nn.Sequential()
        if stride > 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return torch.relu(out + self.shortcut(x))


class DigitsCNN(nn.Module):
    """Three stages of residual blocks over 8x8 images."""

    def __init__(self, width: int = 16, classes: int = 10):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.stages = nn.Sequential(
            Residual(width, width), Residual(width, 2 * width, stride=2), Residual(2 * width, 3 * width, stride=2)
        )
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(0.1)
        self.head = nn.Linear(3 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.dropout(self.pool(self.stages(self.stem(x))).flatten(1)))
        return logits


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images and labels to train on, then images and labels held out: always the same 360."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(data.target)
    train, held_out = train_test_split(range(len(labels)), test_size=360, random_state=0, stratify=data.target)
    return images[train], labels[train], images[held_out], labels[held_out]


def get_model() -> nn.Module:
    """The trained network."""
    model = DigitsCNN()
    model.load_state_dict(load_file(WEIGHTS))
    return model.eval()


def example_inputs() -> Tensor:
    """What it is captured and measured with."""
    return digits()[2][:64]


def calibration_data() -> Iterator[Tensor]:
    """Images from the training split, from which quantisation learns its ranges."""
    yield from digits()[0][:512].split(64)


def evaluate(module: nn.Module) -> dict[str, float]:
    """Share of the held-out digits that are read right."""
    _, _, images, labels = digits()
    with torch.no_grad():
        return {"accuracy": (module(images).argmax(1) == labels).float().mean().item()}

"""FX604: a mask at each call: torch's pruning, in a submodule, one of the user's own in a mixin; and each baked."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune

INPUTS = (torch.randn(4, 8),)


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(8, 8)  # fault: FX604 plain
        self.fc2 = nn.Linear(8, 4)
        prune.l1_unstructured(self.fc1, "weight", amount=0.9)

    def forward(self, x):
        return self.fc2(torch.relu(self.fc1(x)))


class Part(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(8, 8)  # fault: FX604 nested
        self.fc2 = nn.Linear(8, 4)
        prune.l1_unstructured(self.fc1, "weight", amount=0.9)

    def forward(self, x):
        return self.fc2(torch.relu(self.fc1(x)))


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(Part(), nn.Identity())

    def forward(self, x):
        return self.body(x)


class InheritedMixin:
    def build(self):
        self.weight = nn.Parameter(torch.randn(4, 8))  # fault: FX604 inherited
        self.register_buffer("mask", (torch.rand(4, 8) > 0.9).float())

    def compute(self, x):
        return F.linear(x, self.weight * self.mask)


class Inherited(InheritedMixin, nn.Module):
    def __init__(self):
        super().__init__()
        self.build()

    def forward(self, x):
        return self.compute(x)


class PlainFixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(8, 8)
        self.fc2 = nn.Linear(8, 4)
        prune.l1_unstructured(self.fc1, "weight", amount=0.9)
        prune.remove(self.fc1, "weight")

    def forward(self, x):
        return self.fc2(torch.relu(self.fc1(x)))


class PartFixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(8, 8)
        self.fc2 = nn.Linear(8, 4)
        prune.l1_unstructured(self.fc1, "weight", amount=0.9)
        prune.remove(self.fc1, "weight")

    def forward(self, x):
        return self.fc2(torch.relu(self.fc1(x)))


class NestedFixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(PartFixed(), nn.Identity())

    def forward(self, x):
        return self.body(x)


class InheritedFixedMixin:
    def build(self):
        self.weight = nn.Parameter(torch.randn(4, 8))
        with torch.no_grad():
            self.weight.mul_(torch.rand(4, 8) > 0.5)

    def compute(self, x):
        return F.linear(x, self.weight)


class InheritedFixed(InheritedFixedMixin, nn.Module):
    def __init__(self):
        super().__init__()
        self.build()

    def forward(self, x):
        return self.compute(x)

"""FX402: weights that are all equal: plain, in a submodule, in a mixin; and each corrected."""

import torch
from torch import nn

INPUTS = (torch.randn(4, 8),)


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(8, 8)
        self.fc2 = nn.Linear(8, 4)
        nn.init.constant_(self.fc1.weight, 0.1)  # fault: FX402 plain

    def forward(self, x):
        return self.fc2(torch.relu(self.fc1(x)))


class Part(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(8, 8)
        self.fc2 = nn.Linear(8, 4)
        nn.init.constant_(self.fc1.weight, 0.1)  # fault: FX402 nested

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
        self.fc1 = nn.Linear(8, 8)
        self.fc2 = nn.Linear(8, 4)
        nn.init.constant_(self.fc1.weight, 0.1)  # fault: FX402 inherited

    def compute(self, x):
        return self.fc2(torch.relu(self.fc1(x)))


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
        nn.init.kaiming_normal_(self.fc1.weight)

    def forward(self, x):
        return self.fc2(torch.relu(self.fc1(x)))


class PartFixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(8, 8)
        self.fc2 = nn.Linear(8, 4)
        nn.init.kaiming_normal_(self.fc1.weight)

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
        self.fc1 = nn.Linear(8, 8)
        self.fc2 = nn.Linear(8, 4)
        nn.init.kaiming_normal_(self.fc1.weight)

    def compute(self, x):
        return self.fc2(torch.relu(self.fc1(x)))


class InheritedFixed(InheritedFixedMixin, nn.Module):
    def __init__(self):
        super().__init__()
        self.build()

    def forward(self, x):
        return self.compute(x)

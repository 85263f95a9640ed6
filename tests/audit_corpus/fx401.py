"""FX401: a layer that is never used: plain, in a submodule, in a mixin; and each corrected."""

import torch
from torch import nn

INPUTS = (torch.randn(4, 8),)


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.spare = nn.Linear(8, 8)  # fault: FX401 plain

    def forward(self, x):
        return self.fc(x)


class Part(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.spare = nn.Linear(8, 8)  # fault: FX401 nested

    def forward(self, x):
        return self.fc(x)


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(Part(), nn.Identity())

    def forward(self, x):
        return self.body(x)


class InheritedMixin:
    def build(self):
        self.fc = nn.Linear(8, 8)
        self.spare = nn.Linear(8, 8)  # fault: FX401 inherited

    def compute(self, x):
        return self.fc(x)


class Inherited(InheritedMixin, nn.Module):
    def __init__(self):
        super().__init__()
        self.build()

    def forward(self, x):
        return self.compute(x)


class PlainFixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.spare = nn.Linear(8, 8)

    def forward(self, x):
        return self.fc(x) + self.spare(x)


class PartFixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.spare = nn.Linear(8, 8)

    def forward(self, x):
        return self.fc(x) + self.spare(x)


class NestedFixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(PartFixed(), nn.Identity())

    def forward(self, x):
        return self.body(x)


class InheritedFixedMixin:
    def build(self):
        self.fc = nn.Linear(8, 8)
        self.spare = nn.Linear(8, 8)

    def compute(self, x):
        return self.fc(x) + self.spare(x)


class InheritedFixed(InheritedFixedMixin, nn.Module):
    def __init__(self):
        super().__init__()
        self.build()

    def forward(self, x):
        return self.compute(x)

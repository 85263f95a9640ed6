"""FX107: an in-place activation before two branches: plain, in a submodule, in a mixin; and each corrected."""

import torch
from torch import nn

INPUTS = (torch.randn(4, 8),)


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.act = nn.ReLU(inplace=True)
        self.left = nn.Linear(8, 8)
        self.right = nn.Linear(8, 8)

    def forward(self, x):
        x = self.left(x)
        return self.left(self.act(x)) + self.right(x)  # fault: FX107 plain


class Part(nn.Module):
    def __init__(self):
        super().__init__()
        self.act = nn.ReLU(inplace=True)
        self.left = nn.Linear(8, 8)
        self.right = nn.Linear(8, 8)

    def forward(self, x):
        x = self.left(x)
        return self.left(self.act(x)) + self.right(x)  # fault: FX107 nested


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(Part(), nn.Identity())

    def forward(self, x):
        return self.body(x)


class InheritedMixin:
    def build(self):
        self.act = nn.ReLU(inplace=True)
        self.left = nn.Linear(8, 8)
        self.right = nn.Linear(8, 8)

    def compute(self, x):
        x = self.left(x)
        return self.left(self.act(x)) + self.right(x)  # fault: FX107 inherited


class Inherited(InheritedMixin, nn.Module):
    def __init__(self):
        super().__init__()
        self.build()

    def forward(self, x):
        return self.compute(x)


class PlainFixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.act = nn.ReLU()
        self.left = nn.Linear(8, 8)
        self.right = nn.Linear(8, 8)

    def forward(self, x):
        x = self.left(x)
        return self.left(self.act(x)) + self.right(x)


class PartFixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.act = nn.ReLU()
        self.left = nn.Linear(8, 8)
        self.right = nn.Linear(8, 8)

    def forward(self, x):
        x = self.left(x)
        return self.left(self.act(x)) + self.right(x)


class NestedFixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(PartFixed(), nn.Identity())

    def forward(self, x):
        return self.body(x)


class InheritedFixedMixin:
    def build(self):
        self.act = nn.ReLU()
        self.left = nn.Linear(8, 8)
        self.right = nn.Linear(8, 8)

    def compute(self, x):
        x = self.left(x)
        return self.left(self.act(x)) + self.right(x)


class InheritedFixed(InheritedFixedMixin, nn.Module):
    def __init__(self):
        super().__init__()
        self.build()

    def forward(self, x):
        return self.compute(x)

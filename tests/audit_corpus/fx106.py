"""FX106: a tie that is lost: plain, in a submodule, in a mixin; and each corrected."""

import torch
from torch import nn

INPUTS = (torch.arange(6).view(2, 3),)


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(12, 8)
        self.head = nn.Linear(8, 12)
        self.head.weight = nn.Parameter(self.embed.weight.detach().clone())  # fault: FX106 plain

    def forward(self, x):
        return self.head(self.embed(x))


class Part(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(12, 8)
        self.head = nn.Linear(8, 12)
        self.head.weight = nn.Parameter(self.embed.weight.detach().clone())  # fault: FX106 nested

    def forward(self, x):
        return self.head(self.embed(x))


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(Part(), nn.Identity())

    def forward(self, x):
        return self.body(x)


class InheritedMixin:
    def build(self):
        self.embed = nn.Embedding(12, 8)
        self.head = nn.Linear(8, 12)
        self.head.weight = nn.Parameter(self.embed.weight.detach().clone())  # fault: FX106 inherited

    def compute(self, x):
        return self.head(self.embed(x))


class Inherited(InheritedMixin, nn.Module):
    def __init__(self):
        super().__init__()
        self.build()

    def forward(self, x):
        return self.compute(x)


class PlainFixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(12, 8)
        self.head = nn.Linear(8, 12)
        self.head.weight = self.embed.weight

    def forward(self, x):
        return self.head(self.embed(x))


class PartFixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(12, 8)
        self.head = nn.Linear(8, 12)
        self.head.weight = self.embed.weight

    def forward(self, x):
        return self.head(self.embed(x))


class NestedFixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(PartFixed(), nn.Identity())

    def forward(self, x):
        return self.body(x)


class InheritedFixedMixin:
    def build(self):
        self.embed = nn.Embedding(12, 8)
        self.head = nn.Linear(8, 12)
        self.head.weight = self.embed.weight

    def compute(self, x):
        return self.head(self.embed(x))


class InheritedFixed(InheritedFixedMixin, nn.Module):
    def __init__(self):
        super().__init__()
        self.build()

    def forward(self, x):
        return self.compute(x)

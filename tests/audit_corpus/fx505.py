"""FX505: a random buffer that is not saved: plain, in a submodule, in a mixin; and each corrected."""

import torch
from torch import nn

INPUTS = (torch.randn(4, 8),)


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.register_buffer("noise", torch.randn(8), persistent=False)  # fault: FX505 plain

    def forward(self, x):
        return self.fc(x) + self.noise


class Part(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.register_buffer("noise", torch.randn(8), persistent=False)  # fault: FX505 nested

    def forward(self, x):
        return self.fc(x) + self.noise


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(Part(), nn.Identity())

    def forward(self, x):
        return self.body(x)


class InheritedMixin:
    def build(self):
        self.fc = nn.Linear(8, 8)
        self.register_buffer("noise", torch.randn(8), persistent=False)  # fault: FX505 inherited

    def compute(self, x):
        return self.fc(x) + self.noise


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
        self.register_buffer("noise", torch.randn(8))

    def forward(self, x):
        return self.fc(x) + self.noise


class PartFixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.register_buffer("noise", torch.randn(8))

    def forward(self, x):
        return self.fc(x) + self.noise


class NestedFixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(PartFixed(), nn.Identity())

    def forward(self, x):
        return self.body(x)


class InheritedFixedMixin:
    def build(self):
        self.fc = nn.Linear(8, 8)
        self.register_buffer("noise", torch.randn(8))

    def compute(self, x):
        return self.fc(x) + self.noise


class InheritedFixed(InheritedFixedMixin, nn.Module):
    def __init__(self):
        super().__init__()
        self.build()

    def forward(self, x):
        return self.compute(x)

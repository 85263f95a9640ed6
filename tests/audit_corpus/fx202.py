"""FX202: a factory without a device: plain, in a submodule, in a mixin; and each corrected."""

import torch
from torch import nn

INPUTS = (torch.randn(4, 8),)


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x):
        mask = torch.ones(8)  # fault: FX202 plain
        return self.fc(x) * mask


class Part(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x):
        mask = torch.ones(8)  # fault: FX202 nested
        return self.fc(x) * mask


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(Part(), nn.Identity())

    def forward(self, x):
        return self.body(x)


class InheritedMixin:
    def build(self):
        self.fc = nn.Linear(8, 8)

    def compute(self, x):
        mask = torch.ones(8)  # fault: FX202 inherited
        return self.fc(x) * mask


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

    def forward(self, x):
        mask = torch.ones(8, device=x.device)
        return self.fc(x) * mask


class PartFixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x):
        mask = torch.ones(8, device=x.device)
        return self.fc(x) * mask


class NestedFixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(PartFixed(), nn.Identity())

    def forward(self, x):
        return self.body(x)


class InheritedFixedMixin:
    def build(self):
        self.fc = nn.Linear(8, 8)

    def compute(self, x):
        mask = torch.ones(8, device=x.device)
        return self.fc(x) * mask


class InheritedFixed(InheritedFixedMixin, nn.Module):
    def __init__(self):
        super().__init__()
        self.build()

    def forward(self, x):
        return self.compute(x)

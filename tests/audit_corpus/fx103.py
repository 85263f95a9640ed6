"""FX103: parameters in a plain list: plain, in a submodule, in a mixin; and each corrected."""

import torch
from torch import nn

INPUTS = (torch.randn(4, 8),)


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.scales = [nn.Parameter(torch.ones(8))]  # fault: FX103 plain
        self.fc = nn.Linear(8, 8)

    def forward(self, x):
        return self.fc(x) * self.scales[0]


class Part(nn.Module):
    def __init__(self):
        super().__init__()
        self.scales = [nn.Parameter(torch.ones(8))]  # fault: FX103 nested
        self.fc = nn.Linear(8, 8)

    def forward(self, x):
        return self.fc(x) * self.scales[0]


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(Part(), nn.Identity())

    def forward(self, x):
        return self.body(x)


class InheritedMixin:
    def build(self):
        self.scales = [nn.Parameter(torch.ones(8))]  # fault: FX103 inherited
        self.fc = nn.Linear(8, 8)

    def compute(self, x):
        return self.fc(x) * self.scales[0]


class Inherited(InheritedMixin, nn.Module):
    def __init__(self):
        super().__init__()
        self.build()

    def forward(self, x):
        return self.compute(x)


class PlainFixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.scales = nn.ParameterList([nn.Parameter(torch.ones(8))])
        self.fc = nn.Linear(8, 8)

    def forward(self, x):
        return self.fc(x) * self.scales[0]


class PartFixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.scales = nn.ParameterList([nn.Parameter(torch.ones(8))])
        self.fc = nn.Linear(8, 8)

    def forward(self, x):
        return self.fc(x) * self.scales[0]


class NestedFixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(PartFixed(), nn.Identity())

    def forward(self, x):
        return self.body(x)


class InheritedFixedMixin:
    def build(self):
        self.scales = nn.ParameterList([nn.Parameter(torch.ones(8))])
        self.fc = nn.Linear(8, 8)

    def compute(self, x):
        return self.fc(x) * self.scales[0]


class InheritedFixed(InheritedFixedMixin, nn.Module):
    def __init__(self):
        super().__init__()
        self.build()

    def forward(self, x):
        return self.compute(x)

"""FX508: control flow that depends on a shape: plain, in a submodule, in a mixin; and each corrected."""

import torch
from torch import nn

INPUTS = (torch.randn(4, 8),)


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x):
        if x.shape[0] == 4:  # fault: FX508 plain
            x = x * 2
        return self.fc(x)


class Part(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x):
        if x.shape[0] == 4:  # fault: FX508 nested
            x = x * 2
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

    def compute(self, x):
        if x.shape[0] == 4:  # fault: FX508 inherited
            x = x * 2
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

    def forward(self, x):
        return self.fc(x * 2).unsqueeze(-1).squeeze(-1)


class PartFixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x):
        return self.fc(x * 2)


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
        return self.fc(x * 2)


class InheritedFixed(InheritedFixedMixin, nn.Module):
    def __init__(self):
        super().__init__()
        self.build()

    def forward(self, x):
        return self.compute(x)

"""FX405: dropout in evaluation: plain, in a submodule, in a mixin; and each corrected."""

import torch
import torch.nn.functional as F
from torch import nn

INPUTS = (torch.randn(4, 8),)


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x):
        return F.dropout(self.fc(x), 0.5)  # fault: FX405 plain


class Part(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x):
        return F.dropout(self.fc(x), 0.5)  # fault: FX405 nested


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
        return F.dropout(self.fc(x), 0.5)  # fault: FX405 inherited


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
        return F.dropout(self.fc(x), 0.5, training=self.training)


class PartFixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x):
        return F.dropout(self.fc(x), 0.5, training=self.training)


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
        return F.dropout(self.fc(x), 0.5, training=self.training)


class InheritedFixed(InheritedFixedMixin, nn.Module):
    def __init__(self):
        super().__init__()
        self.build()

    def forward(self, x):
        return self.compute(x)

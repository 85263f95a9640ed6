"""FX502: a loop over samples: plain, in a submodule, in a base class; and each corrected."""

import torch
from torch import nn

INPUTS = (torch.randn(4, 8),)


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x):
        return torch.stack([self.fc(x[i]) for i in range(x.shape[0])])  # fault: FX502 plain


class Part(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x):
        return torch.stack([self.fc(x[i]) for i in range(x.shape[0])])  # fault: FX502 nested


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(Part(), nn.Identity())

    def forward(self, x):
        return self.body(x)


class Base(nn.Module):
    def forward(self, x):
        return torch.stack([self.fc(x[i]) for i in range(x.shape[0])])  # fault: FX502 inherited


class Inherited(Base):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)


class PlainFixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x):
        return self.fc(x)


class NestedFixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(PlainFixed(), nn.Identity())

    def forward(self, x):
        return self.body(x)


class BaseFixed(nn.Module):
    def forward(self, x):
        return self.fc(x)


class InheritedFixed(BaseFixed):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)

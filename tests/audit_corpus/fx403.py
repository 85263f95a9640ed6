"""FX403: weights too large for their activation: plain, in a submodule, in a mixin; and each corrected."""

import torch
from torch import nn

INPUTS = (torch.randn(4, 64),)


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(64, 64)
        self.fc2 = nn.Linear(64, 4)
        nn.init.normal_(self.fc1.weight, std=1.0)  # fault: FX403 plain

    def forward(self, x):
        return self.fc2(torch.tanh(self.fc1(x)))


class Part(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(64, 64)
        self.fc2 = nn.Linear(64, 4)
        nn.init.normal_(self.fc1.weight, std=1.0)  # fault: FX403 nested

    def forward(self, x):
        return self.fc2(torch.tanh(self.fc1(x)))


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(Part(), nn.Identity())

    def forward(self, x):
        return self.body(x)


class InheritedMixin:
    def build(self):
        self.fc1 = nn.Linear(64, 64)
        self.fc2 = nn.Linear(64, 4)
        nn.init.normal_(self.fc1.weight, std=1.0)  # fault: FX403 inherited

    def compute(self, x):
        return self.fc2(torch.tanh(self.fc1(x)))


class Inherited(InheritedMixin, nn.Module):
    def __init__(self):
        super().__init__()
        self.build()

    def forward(self, x):
        return self.compute(x)


class PlainFixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(64, 64)
        self.fc2 = nn.Linear(64, 4)
        nn.init.xavier_normal_(self.fc1.weight, gain=nn.init.calculate_gain("tanh"))

    def forward(self, x):
        return self.fc2(torch.tanh(self.fc1(x)))


class PartFixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(64, 64)
        self.fc2 = nn.Linear(64, 4)
        nn.init.xavier_normal_(self.fc1.weight, gain=nn.init.calculate_gain("tanh"))

    def forward(self, x):
        return self.fc2(torch.tanh(self.fc1(x)))


class NestedFixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(PartFixed(), nn.Identity())

    def forward(self, x):
        return self.body(x)


class InheritedFixedMixin:
    def build(self):
        self.fc1 = nn.Linear(64, 64)
        self.fc2 = nn.Linear(64, 4)
        nn.init.xavier_normal_(self.fc1.weight, gain=nn.init.calculate_gain("tanh"))

    def compute(self, x):
        return self.fc2(torch.tanh(self.fc1(x)))


class InheritedFixed(InheritedFixedMixin, nn.Module):
    def __init__(self):
        super().__init__()
        self.build()

    def forward(self, x):
        return self.compute(x)

"""Modules that do what few do, each a `Case` by name: capture keeps it in a graph, or leaves it whole with a reason."""

from __future__ import annotations

import random
import threading
import warnings
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import Variable
from torch.utils.checkpoint import checkpoint

from tests.models import Case, normal


class Counter(nn.Module):
    """Counts its calls in a plain attribute."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return self.fc(x) * self.calls


class BufferCounter(nn.Module):
    """Counts its calls in a buffer that it assigns anew."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x):
        self.count = self.count + 1
        return self.fc(x) * self.count


class HiddenState(nn.Module):
    """Keeps a tensor from one call to the next, unregistered."""

    def __init__(self):
        super().__init__()
        self.cell = nn.Linear(8, 4)
        self.state = torch.zeros(2, 4)

    def forward(self, x):
        self.state = torch.tanh(self.cell(torch.cat([x[:2], self.state.detach()], -1)))
        return self.state


class History(nn.Module):
    """Appends to a list in place."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.seen: deque[int] = deque(maxlen=10)

    def forward(self, x):
        self.seen.append(len(self.seen))
        return self.fc(x) + len(self.seen)


class ShapeCache(nn.Module):
    """Keeps positions for the longest input so far: a cache, not a counter."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.rows = 0
        self.positions: torch.Tensor | None = None

    def forward(self, x):
        if self.positions is None or self.rows != x.shape[0]:
            self.rows = x.shape[0]
            self.positions = torch.arange(x.shape[0]).unsqueeze(1) / 10
        return self.fc(x) + self.positions


class LastValue(nn.Module):
    """Leaves what it computed for others to look at."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.last = None

    def forward(self, x):
        self.last = torch.softmax(self.fc(x), -1)
        return self.last * x


class InitializedByData(nn.Module):
    """Sets its parameters from the first batch that it sees."""

    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(4))
        self.ready = False

    def forward(self, x):
        if not self.ready:
            self.shift.data.copy_(x.mean(0))
            self.ready = True
        return x - self.shift


class BuiltByForward(nn.Module):
    """Makes a layer in its first forward."""

    def __init__(self):
        super().__init__()
        self.layer: nn.Module | None = None

    def forward(self, x):
        if self.layer is None:
            self.layer = nn.Linear(x.shape[1], 3)
        return self.layer(x)


class Lazy(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.LazyLinear(3)

    def forward(self, x):
        return self.fc(x)


class KeyCache(nn.Module):
    """Writes its keys, with their gradients, into a plain tensor, as decoders do."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.keys = torch.zeros(8, 4)

    def forward(self, x):
        self.keys[: len(x)] = self.fc(x)
        return x @ self.keys[: len(x)].T


class WithinNoGrad(nn.Module):
    def __init__(self):
        super().__init__()
        self.frozen = nn.Linear(4, 4)
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        with torch.no_grad():
            y = torch.relu(self.frozen(x))
        return self.fc(y) + self.frozen(x).detach()


class Decorated(WithinNoGrad):
    @torch.no_grad()
    def features(self, x):
        return self.frozen(x)

    def forward(self, x):
        return self.fc(self.features(x))


class WithinAutocast(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = self.fc(x) @ x.T
        with torch.autocast("cpu", enabled=False):
            return y.float().sum(-1)


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.b = nn.Linear(4, 4)

    def forward(self, x):
        return self.b(checkpoint(lambda y: torch.tanh(self.a(y)), x, use_reentrant=False))


class Double(torch.autograd.Function):
    """Its backward is not what autograd would derive."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad * 7


class OwnBackward(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        return Double.apply(self.fc(x)) + 1


class Scripted(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.script = torch.jit.script(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))

    def forward(self, x):
        return self.script(self.fc(x))


class Vmapped(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))

    def forward(self, x):
        return torch.func.vmap(lambda row: torch.tanh(row @ self.weight).sum())(x)


class VmappedInChunks(Vmapped):
    def forward(self, x):
        return torch.func.vmap(lambda row: torch.tanh(row @ self.weight).sum(), chunk_size=2)(x)


class NestedVmap(nn.Module):
    """Makes a mask as transformers does: a function of two positions, mapped over both, with data beside it."""

    def forward(self, x):
        count, present = x.shape[0], x.sum(1) > 0

        def allowed(row, column):
            return (row >= column) & (row - column < count // 2) & present.new_ones(())

        rows = torch.arange(count)
        mask = torch.vmap(torch.vmap(allowed, in_dims=(None, 0)), in_dims=(0, None))(rows, rows)
        return mask.to(x.dtype) @ x * count, mask


class InnerGradient(nn.Module):
    """Computes a gradient within its forward."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 1)

    def forward(self, x):
        y = x.detach().requires_grad_()
        (slope,) = torch.autograd.grad(self.fc(y).pow(2).sum(), y, create_graph=True)
        return x + slope


class DecidesOnGradient(InnerGradient):
    """Checks what came of it."""

    def forward(self, x):
        y = super().forward(x)
        return y if y.detach().abs().max() < 1e6 else x


class BackwardHooked(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
        self.block.register_full_backward_hook(lambda module, inputs, outputs: (inputs[0] * 3,))

    def forward(self, x):
        return self.block(x * 2)


class TensorHooked(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        y = self.fc(x)
        if y.requires_grad:
            y.register_hook(lambda grad: grad * 3)
        return y * 2


class Hooked(nn.Module):
    """Forward hooks on the root, on a container and on a leaf."""

    def __init__(self):
        super().__init__()
        self.block = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
        self.block.register_forward_hook(lambda module, inputs, output: output * 2)
        self.block[0].register_forward_pre_hook(lambda module, inputs: (inputs[0] + 1,))
        self.register_forward_hook(lambda module, inputs, output: output - 1)

    def forward(self, x):
        return self.block(x)


class FrozenNorm(nn.Module):
    """Keeps its batch norm in evaluation mode whatever the caller says: `train` is overridden."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.bn = nn.BatchNorm1d(4)

    def train(self, mode: bool = True):
        super().train(mode)
        self.bn.eval()
        return self

    def forward(self, x):
        return self.bn(self.fc(x))


class FunctionalNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("var", torch.ones(4))

    def forward(self, x):
        return F.batch_norm(x, self.mean, self.var, training=self.training)


class Noise(nn.Module):
    """Two paths by mode, inside a module with parameters."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x):
        if self.training:
            return x + torch.randn_like(x) * self.scale
        return x * self.scale


class PartlyFrozen(nn.Module):
    """Parts that are left in evaluation mode while the rest trains."""

    def __init__(self):
        super().__init__()
        self.norm = FunctionalNorm()
        self.noise = Noise()
        self.frozen_norm = FunctionalNorm()
        self.frozen_noise = Noise()

    def forward(self, x):
        return self.frozen_noise(self.frozen_norm(self.noise(self.norm(x))))


class Pair(NamedTuple):
    left: torch.Tensor
    right: torch.Tensor


class Shapes(nn.Module):
    """Nested inputs and outputs: dicts, lists, named tuples, an input that is an output, None."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, data, *, scale=2.0, flag=None):
        left, rest = data["left"], data["rest"]
        total = self.fc(left) + sum(rest) * scale
        return {"pair": Pair(total, left), "none": None, "list": [left, {"n": len(rest), "rows": left.shape[0]}]}


class Attributes(nn.Module):
    """Opaque code that calls a method of its child, and reads attributes of it, besides calling it."""

    class Child(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)
            self.table = {"gain": 3.0}

        def score(self, x):
            return self.fc(x).sum()

        def forward(self, x):
            return torch.relu(self.fc(x))

    def __init__(self):
        super().__init__()
        self.child = self.Child()

    def forward(self, x):
        if self.child.score(x).item() > 0:
            return self.child(x) * self.child.table["gain"]
        return -self.child(x)


class SharedExpert(nn.Module):
    """Opaque code that calls one module under two names, and a graph that calls it as well."""

    def __init__(self):
        super().__init__()
        shared = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        self.experts = nn.ModuleList([shared, nn.Sequential(nn.Linear(4, 4), nn.ReLU()), shared])

    def forward(self, x):
        return self.experts[int(x.sum() > 0) * 2](x) + self.experts[1](x)


class OpaqueInside(nn.Module):
    """A router in the middle of layers that are captured, and which shares an activation with it."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        self.route = SharedExpert()
        self.last = nn.Sequential(nn.Linear(4, 4), self.first[1])

    def forward(self, x):
        return self.last(self.route(self.first(x)))


class ModeInsideOpaque(nn.Module):
    """Opaque code around a child that takes two paths by mode."""

    def __init__(self):
        super().__init__()
        self.noise = Noise()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        y = self.noise(x)
        return self.fc(y) if y.sum().item() > 0 else y


class FailsInTraining(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        if self.training:
            raise NotImplementedError("inference only")
        return self.fc(x)


class OpaqueInTraining(nn.Module):
    """A graph in evaluation; in training it decides on values."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        y = self.fc(x)
        if self.training and y.sum().item() > 0:
            return y * 2
        return y


class PlainWritten(nn.Module):
    """Writes in place into a tensor that is not registered."""

    def __init__(self):
        super().__init__()
        self.total = torch.zeros(4)

    def forward(self, x):
        self.total.add_(x.detach().mean(0))
        return x + self.total


class PythonDropout(nn.Module):
    """Skips its layer by Python's own random numbers."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        return self.fc(x) if random.random() > 0.5 else x


class LayerDrop(PythonDropout):
    """Does so in training."""

    def forward(self, x):
        return self.fc(x) if self.training and random.random() > 0.5 else x


class WritesInput(nn.Module):
    def forward(self, x):
        x[:, 0] = 0
        x.mul_(2)
        return x + 1


class MadeUnseen(nn.Module):
    """Computes as a compiled extension does: torch lets nobody see its calls."""

    def forward(self, x):
        with torch._C.DisableTorchFunction():
            doubled = x.detach() * 2
        return x + doubled


class ReadsHook(nn.Module):
    """Gives what a hook kept, which finds the model by the scope that it was made in."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
        self.kept = {"0": torch.empty(0), "1": torch.empty(0)}
        for name, layer in self.layers.named_children():
            layer.register_forward_hook(self.keep(name))

    def keep(self, name):
        def hook(module, inputs, output):
            self.kept[name] = output

        return hook

    def forward(self, x):
        self.layers(x)
        return dict(self.kept)


class ReadsHookOfCopy(ReadsHook):
    """The hook on a layer keeps what torch computes out of sight."""

    def keep(self, name):
        hook = super().keep(name)
        return lambda module, inputs, output: hook(module, inputs, output * 2)


class CallsClosure(nn.Module):
    """An attribute is a function that calls a layer."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.call = lambda x: self.layer(x).relu()

    def forward(self, x):
        return self.call(x)


class Registry(nn.Module):
    """Has functions in a dict that can't be copied, one of which calls itself."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

        def repeated(x, times):
            return repeated(self.layer(x), times - 1) if times else x

        self.functions = {"repeated": repeated, "lock": threading.Lock()}
        self.repeated = repeated

    def forward(self, x):
        return self.repeated(x, 2)


class ReadsGlobal(nn.Module):
    """Uses a tensor that was there before, and belongs to no module."""

    def forward(self, x):
        return x * GLOBAL


GLOBAL = torch.arange(4.0)


class FromArray(nn.Module):
    """Computes beside torch, in numpy."""

    def forward(self, x):
        return x + torch.from_numpy(x.detach().numpy() * 2)


class Replaces(nn.Module):
    """Registers another parameter at each call."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x):
        self.scale = nn.Parameter(self.scale.detach() * 0.9)
        return x * self.scale


class SetByOthers(nn.Module):
    """Counts the calls of a part in that part, whose own code counts too."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.part = Counter()

    def forward(self, x):
        self.part.calls += 2
        return self.part(self.fc(x))


class Queue(nn.Module):
    """Writes into a ring, at a place that it reads from a buffer."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.register_buffer("ring", torch.zeros(10, 4))
        self.register_buffer("place", torch.zeros(1, dtype=torch.long))

    def forward(self, x):
        place = int(self.place)
        y = self.fc(x)
        self.ring[place : place + 2] = y[:2].detach()
        self.place[0] = (place + 2) % 10
        return y + self.ring.sum(0)


class WarmsUp(nn.Module):
    """Does something else from its third call on."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.register_buffer("steps", torch.tensor(0))

    def forward(self, x):
        self.steps = self.steps + 1
        return self.fc(x) if self.steps < 3 else x


class MadeByClasses(nn.Module):
    """Makes its tensors as code of torch 0.4 does, and of arrays."""

    def forward(self, x):
        rows = x.size(0)
        noise = Variable(x.data.new(x.size()).normal_())
        start = Variable(torch.zeros(rows, 4)) + torch.FloatTensor(rows, 4).fill_(0.5) + torch.Tensor(x.size()).zero_()
        picked = x[:, torch.LongTensor([3, 0, 1, 2])] * torch.Tensor([1.0, 2.0, 3.0, rows])
        sums = torch.Tensor([x.detach().sum(), 1.0]).type(torch.DoubleTensor).sum().float()
        weights = Variable(torch.from_numpy(np.arange(4, dtype="float32"))) + torch.tensor(np.ones(4, "float32"))
        return Variable(start + noise + picked * weights), sums, isinstance(x, torch.FloatTensor)


class Policy(nn.Module):
    """Draws from a distribution, which checks the values that it is given."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        mean, spread = self.fc(x).chunk(2, 1)
        drawn = torch.distributions.Normal(mean, spread.exp())
        action = drawn.rsample()
        return action, drawn.log_prob(action), torch.distributions.Categorical(logits=mean).entropy()


def inside(part: type[nn.Module]) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(nn.Linear(4, 4), part(), nn.Linear(4, 4))


ODD: dict[str, Case] = {
    "queue": Case(inside(Queue), normal(3, 4)),
    "warms_up": Case(inside(WarmsUp), normal(3, 4)),
    "made_by_classes": Case(MadeByClasses, normal(3, 4)),
    "policy": Case(Policy, normal(3, 4)),
    "counter_inside": Case(inside(Counter), normal(3, 4)),
    "replaces_inside": Case(inside(Replaces), normal(3, 4)),
    "python_dropout_inside": Case(inside(PythonDropout), normal(3, 4)),
    "set_by_others": Case(SetByOthers, normal(3, 4)),
    "made_unseen": Case(MadeUnseen, normal(3, 4)),
    "reads_global": Case(ReadsGlobal, normal(3, 4)),
    "reads_hook": Case(ReadsHook, normal(3, 4)),
    "reads_hook_of_copy": Case(ReadsHookOfCopy, normal(3, 4)),
    "registry": Case(Registry, normal(3, 4)),
    "calls_closure": Case(CallsClosure, normal(3, 4)),
    "from_array": Case(FromArray, normal(3, 4)),
    "counter": Case(Counter, normal(3, 4)),
    "buffer_counter": Case(BufferCounter, normal(3, 4)),
    "hidden_state": Case(HiddenState, normal(3, 4)),
    "history": Case(History, normal(3, 4)),
    "shape_cache": Case(ShapeCache, normal(3, 4)),
    "last_value": Case(LastValue, normal(3, 4)),
    "initialized_by_data": Case(InitializedByData, normal(3, 4)),
    "within_no_grad": Case(WithinNoGrad, normal(3, 4)),
    "decorated": Case(Decorated, normal(3, 4)),
    "within_autocast": Case(WithinAutocast, normal(3, 4)),
    "checkpointed": Case(Checkpointed, normal(3, 4)),
    "own_backward": Case(OwnBackward, normal(3, 4)),
    "scripted": Case(Scripted, normal(3, 4)),
    "vmapped": Case(Vmapped, normal(3, 4)),
    "vmapped_in_chunks": Case(VmappedInChunks, normal(3, 4)),
    "nested_vmap": Case(NestedVmap, normal(3, 4)),
    "inner_gradient": Case(InnerGradient, normal(3, 4)),
    "decides_on_gradient": Case(DecidesOnGradient, normal(3, 4)),
    "backward_hooked": Case(BackwardHooked, normal(3, 4)),
    "tensor_hooked": Case(TensorHooked, normal(3, 4)),
    "hooked": Case(Hooked, normal(3, 4)),
    "frozen_norm": Case(FrozenNorm, normal(3, 4)),
    "functional_norm": Case(FunctionalNorm, normal(3, 4)),
    "noise": Case(Noise, normal(3, 4)),
    "partly_frozen": Case(PartlyFrozen, normal(3, 4)),
    "shapes": Case(
        Shapes, lambda: ({"left": torch.randn(3, 4), "rest": [torch.randn(3, 4), torch.randn(3, 4)]},), {"scale": 0.5}
    ),
    "attributes": Case(Attributes, normal(3, 4)),
    "shared_expert": Case(SharedExpert, normal(3, 4)),
    "opaque_inside": Case(OpaqueInside, normal(3, 4)),
    "mode_inside_opaque": Case(ModeInsideOpaque, normal(3, 4)),
    "layer_drop": Case(LayerDrop, normal(3, 4)),
    "opaque_in_training": Case(OpaqueInTraining, normal(3, 4)),
    "plain_written": Case(PlainWritten, normal(3, 4)),
    "python_dropout": Case(PythonDropout, normal(3, 4)),
    "writes_input": Case(WritesInput, normal(3, 4)),
}
"""Modules that run in both modes, and whose state follows from the calls alone."""

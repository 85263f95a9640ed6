"""All that rules look at, each made once and only where a rule asks: source, module tree, runs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fxopt.findings import Layer, Subject
from passes.audit.evidence import code
from passes.audit.evidence.backward import Backward, run_backward
from passes.audit.evidence.device import FakeDeviceRun, Meeting, Seen
from passes.audit.evidence.forward import Forward, run_forward
from passes.audit.evidence.gains import Gain, gains
from passes.audit.evidence.graph import Graph, look_at_graph
from passes.audit.evidence.precision import Loss, run_in_half
from passes.audit.evidence.real_device import OnDevice, run_on_device

T = TypeVar("T")
_GPU_ERROR = 1e-3
"""Kernels of two devices sum in other orders, which stays well below this."""


def _is_written(kind: type) -> bool:
    """Whether a class is not torch's or fxopt's, which make some while they run."""
    return not kind.__module__.startswith(("torch.", "fxopt."))


class Evidence:
    """What is known of one subject. Nothing here changes its module."""

    def __init__(self, subject: Subject):
        self.subject = subject
        self.notes: list[str] = []
        kinds = {type(module) for _, module in self.modules}
        hidden = sorted(kind.__name__ for kind in kinds if code.class_node(kind) is None and _is_written(kind))
        if hidden:
            names = ", ".join(f"'{name}'" for name in hidden)
            self.notes.append(f"{subject.name}: no file has the source of {names}: rules that read it said nothing")
        # It takes a process of its own, so it may as well begin before the other runs.
        self._fake_device = self._tried("the fake-device run", FakeDeviceRun)

    def __enter__(self) -> Evidence:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._fake_device is not None:
            self._fake_device.stop()

    @functools.cached_property
    def modules(self) -> list[tuple[str, nn.Module]]:
        """Every module, each once, under its first name."""
        return list(self.subject.module.named_modules()) if self.subject.module is not None else []

    @functools.cached_property
    def parameters(self) -> dict[str, nn.Parameter]:
        """Every parameter, each once, by its first name."""
        return dict(self.subject.module.named_parameters()) if self.subject.module is not None else {}

    @functools.cached_property
    def users(self) -> list[tuple[str, nn.Module]]:
        """The modules whose classes are not torch's own."""
        return [(path, module) for path, module in self.modules if code.is_users(type(module))]

    @functools.cached_property
    def classes(self) -> list[tuple[str, type[nn.Module]]]:
        """The user's classes, each with the first module of it."""
        found: dict[type[nn.Module], str] = {}
        for path, module in self.users:
            found.setdefault(type(module), path)
        return [(path, kind) for kind, path in found.items()]

    @functools.cached_property
    def bodies(self) -> list[code.Body]:
        """All functions that a forward runs, as text, each once."""
        found: dict[object, code.Body] = {}
        waiting = [body for path, kind in self.classes for body in code.forward_bodies(kind, path)]
        for body in waiting:
            if (body.path, body.node.lineno) not in found:
                found[body.path, body.node.lineno] = body
                waiting += code.called_functions(body)
        return list(found.values())

    @functools.cached_property
    def files(self) -> list[str]:
        """The source files to read: those that were named, and those of the user's classes."""
        found = {item[0] for _, kind in self.classes if (item := code.class_node(kind)) is not None}
        return sorted(found | set(self.subject.files))

    @functools.cached_property
    def forward(self) -> Forward:
        """The run in evaluation; nothing was seen where the model can't be run."""
        return self._tried("the forward run", run_forward) or Forward()

    @functools.cached_property
    def backward(self) -> Backward:
        """The run in training; nothing was seen where the model can't be run or trained."""
        return self._tried("the backward run", run_backward) or Backward()

    @functools.cached_property
    def half(self) -> list[Loss]:
        """Where low precision loses, one a precision."""
        return self._tried("the run in low precision", run_in_half) or []

    @functools.cached_property
    def devices(self) -> Seen:
        """Where tensors of two devices meet, and the plain attributes whose tensors the forward moves by itself."""
        run = self._fake_device
        seen = self._tried("the fake-device run", lambda subject: run.result()) if run is not None else None
        return seen or ([], set())

    @property
    def meetings(self) -> list[Meeting]:
        """The first of these."""
        return self.devices[0]

    @functools.cached_property
    def on_gpu(self) -> OnDevice | None:
        """What this machine's own GPU makes of it; None where it has none, or the model can't be run."""
        found = self._tried("the run on the GPU", run_on_device) if torch.cuda.is_available() else None
        if found is not None and found.difference > _GPU_ERROR:
            self.notes.append(
                f"{self.subject.name}: on {found.device} the outputs differ by {found.difference:.1e} from the CPU's"
            )
        return found

    @property
    def order(self) -> list[str]:
        """Names of the modules, in the order in which they first returned something."""
        return list(self.forward.layers)

    @functools.cached_property
    def settled(self) -> bool:
        """Whether activations in evaluation are those of training: not before batch norms have seen a batch."""
        return not any(
            isinstance(module, _BatchNorm) and module.num_batches_tracked is not None and not module.num_batches_tracked
            for _, module in self.modules
        )

    @functools.cached_property
    def gains(self) -> dict[str, Gain]:
        """By how much each layer scales its input."""
        return gains(self.modules, self.forward.steps)

    @functools.cached_property
    def graph(self) -> Graph:
        """What the captured graph shows."""
        return self._tried("capture", look_at_graph) or Graph()

    @functools.cached_property
    def _by_name(self) -> dict[str, nn.Module]:
        return dict(self.modules)

    def layers(self) -> Iterator[Layer]:
        """What was measured of each module that ran."""
        squares: dict[str, float] = {}
        for name, norm in self.backward.norms.items():
            if norm is not None:
                path = name.rpartition(".")[0]
                squares[path] = squares.get(path, 0.0) + norm**2
        for path, found in self.forward.layers.items():
            one, square = self.gains.get(path), squares.get(path)
            gradient = None if square is None else square**0.5
            numbers = (found.mean, found.variance, found.zeros, found.low, found.high, gradient)
            gain = (one.gain, one.wanted) if one is not None else (None, None)
            yield Layer(self.subject.name, path, type(self.module_at(path)).__name__, *numbers, *gain)

    def module_at(self, path: str) -> nn.Module | None:
        """The module of that name."""
        return self._by_name.get(path)

    def children(self, path: str) -> Iterator[nn.Module]:
        """The modules directly inside."""
        module = self.module_at(path)
        return module.children() if module is not None else iter(())

    def owner(self, path: str) -> Iterator[tuple[str, nn.Module]]:
        """The modules around `path`, from the inside out."""
        while path:
            path = path.rpartition(".")[0]
            if path in self._by_name:
                yield path, self._by_name[path]

    def _tried(self, what: str, run: Callable[[Subject], T]) -> T | None:
        if self.subject.module is None or self.subject.inputs is None:
            return None
        try:
            return run(self.subject)
        except Exception as error:  # whatever a user's model raises
            if run is not run_forward and self.forward.error is not None:
                return None  # a finding tells of it
            first = (str(error).splitlines() or ["no message"])[0]
            self.notes.append(f"{self.subject.name}: {what} ended early: {type(error).__name__}: {first}")
            return None

"""What the process of the fake-device run does."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend
from torch.utils.weak import WeakIdKeyDictionary

from fxopt.findings import Place, Subject
from passes.audit.evidence.device import Meeting, Seen
from passes.audit.evidence.driver import copied, telling_modules, unregistered
from passes.audit.evidence.places import running

_NAME = "fxgpu"
# These take tensors of two devices.
_MIXED = {"aten::index", "aten::index_put", "aten::index_put_", "aten::copy_", "aten::_to_copy", "aten::set_"}
_MIXED |= {"aten::_index_put_impl_", "aten::_copy_from", "aten::_unsafe_index"}
# These copy below the modes.
_FROM_DATA = {"tensor", "as_tensor", "asarray"}


class _Backend(_DummyBackendModule):
    """What torch asks of a device, autocast included."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]


def meetings(subject: Subject) -> tuple[Seen, str]:
    """All meetings and moves, and why the run ended early, if it did."""
    _setup_privateuseone_for_python_backend(_NAME, _Backend())
    assert subject.inputs is not None
    module = copied(subject, training=False)
    kept = {id(value): (path, name) for path, name, value in _plain(module)}
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    stack: list[str] = []
    watch = _Devices(mode, kept, stack)
    error = ""
    with patch("torch.cuda.is_available", lambda: True), torch.no_grad(), mode:
        device = torch.device(_NAME, 0)
        state = {name: _moved(value, device) for name, value in _named(module)}
        inputs = subject.inputs.map(lambda tensor: _moved(tensor, device))
        try:
            made_here = watch.noting(torch.from_numpy)
            with telling_modules(module, stack), watch, _Words(device, watch), patch("torch.from_numpy", made_here):
                torch.func.functional_call(module, state, inputs.args, dict(inputs.kwargs))
        except Exception as raised:  # what was found until then still holds
            first = (str(raised).splitlines() or ["no message"])[0]
            error = "" if watch.found else f"{type(raised).__name__}: {first}"
    return (watch.found, watch.moved), error


def _named(module: nn.Module) -> Any:
    yield from module.named_parameters()
    yield from module.named_buffers()


def _plain(module: nn.Module) -> Any:
    """Tensors that plain attributes hold, those of modules in lists among them."""
    for path, child in module.named_modules():
        for name, value in unregistered(child):
            for leaf in pytree.tree_leaves(value):
                held = [leaf] if isinstance(leaf, torch.Tensor) else []
                held += [tensor for _, tensor in _named(leaf)] if isinstance(leaf, nn.Module) else []
                yield from ((path, name, tensor) for tensor in held)


def _moved(tensor: torch.Tensor, device: torch.device) -> Any:
    value = torch.empty_strided(tuple(tensor.shape), tensor.stride(), dtype=tensor.dtype, device=device)
    return nn.Parameter(value, requires_grad=False) if isinstance(tensor, nn.Parameter) else value


def _is_fake(device: Any) -> bool:
    return device is not None and torch.device(device).type == _NAME


class _Words(TorchFunctionMode):
    """Takes "cuda" for the fake device."""

    def __init__(self, device: torch.device, watch: _Devices):
        super().__init__()
        self.device, self.watch = device, watch

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        kwargs = dict(kwargs or {})
        if func == torch.Tensor.is_cuda.__get__:  # type: ignore[attr-defined]
            return _is_fake(args[0].device)
        if name == "type" and "torch.cuda" in str(args[1:]):
            kind = getattr(torch.cuda, str(args[1]).strip("<>'").rpartition(".")[2])
            return args[0].to(self.device, kind.dtype)
        if name == "cuda":
            return torch.empty_strided(args[0].shape, args[0].stride(), dtype=args[0].dtype, device=self.device)
        if "cuda" in str(kwargs.get("device")):
            kwargs["device"] = self.device
        if name in ("__getitem__", "__setitem__") and _is_fake(args[0].device):
            args = (args[0], self._index(args[1]), *args[2:])
        if name == "new_tensor":
            func, name, like = torch.tensor, "tensor", args[0]
            args, kwargs = args[1:], {"dtype": like.dtype, "device": like.device, **kwargs}
        if name in _FROM_DATA and _is_fake(kwargs.get("device")):  # it has no kernels below the modes
            device = kwargs.pop("device")
            return _moved(func(*args, **kwargs), torch.device(device))
        if name in _FROM_DATA and not isinstance(args[0], torch.Tensor):
            func = self.watch.noting(func)
        if name == "to":
            args = tuple(self.device if isinstance(a, (str, torch.device)) and "cuda" in str(a) else a for a in args)
        try:
            return func(*args, **kwargs)
        except RuntimeError as error:
            if "same device" not in str(error):
                raise
            # Some ask for one device before any operator runs, as an LSTM does of its hidden state.
            args, kwargs = self.watch.together(name, args, kwargs)
            return func(*args, **kwargs)

    def _index(self, index: Any) -> tuple[Any, ...]:
        """An index with its lists of numbers as tensors, which torch would make on the device, below the modes."""
        parts = index if isinstance(index, tuple) else (index,)
        listed = (isinstance(part, list) and all(isinstance(each, int) for each in part) for part in parts)
        pairs = zip(parts, listed, strict=True)
        return tuple(_moved(torch.tensor(part), self.device) if is_list else part for part, is_list in pairs)


def _by_zeros(func: Any, args: Any, kwargs: Any) -> Any:
    """What an operator without a fake kernel returns, learned from a run of it on zeros on the CPU."""
    if func is torch.ops.aten._thnn_fused_gru_cell.default:  # accelerators alone have it: state and workspace
        state = args[2]
        return torch.empty_like(state), state.new_empty(state.shape[0], 5 * state.shape[1])
    with no_dispatch():
        real = pytree.tree_map_only(
            torch.Tensor, lambda x: torch.zeros(tuple(x.shape), dtype=x.dtype, device="cpu"), (args, kwargs)
        )
        result = func(*real[0], **real[1])
    return pytree.tree_map_only(torch.Tensor, lambda x: _moved(x, torch.device(_NAME, 0)), result)


class _Devices(TorchDispatchMode):
    """Notes each meeting, moves the tensor, and goes on, so that one run finds them all."""

    def __init__(self, mode: FakeTensorMode, kept: dict[int, tuple[str, str]], stack: list[str]):
        super().__init__()  # type: ignore[no-untyped-call]
        self.mode, self.kept, self.stack = mode, kept, stack
        self.found: list[Meeting] = []
        self.moved: set[tuple[str, str]] = set()
        self.made = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.name().partition(".")[0]
        if name == "aten::_local_scalar_dense":
            kind = args[0].dtype
            return True if kind is torch.bool else 1.0 if kind.is_floating_point else 1
        args, kwargs = pytree.tree_map_only(torch.Tensor, self._faked, (args, kwargs))
        given = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if name not in _MIXED and any(leaf.device.type == _NAME for leaf in given):
            args, kwargs = self.together(name, args, kwargs)
        try:
            result = func(*args, **kwargs)
        except RuntimeError as error:
            try:
                result = _by_zeros(func, args, kwargs)
            except Exception:  # then it was no missing kernel that the operator failed for
                raise error from None
        for leaf in pytree.tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.device.type == "cpu" and leaf not in self.made:
                self.made[leaf] = self._origin(name, given)
        if name == "aten::_to_copy" and result.device.type == _NAME and (attribute := self._of(given[0])[2]):
            self.moved.add(attribute)
        return result

    def together(self, name: str, args: Any, kwargs: Any) -> Any:
        """What an operator is given, with each tensor of the CPU noted and moved."""

        def onto_it(leaf: torch.Tensor) -> torch.Tensor:
            if leaf.device.type != "cpu" or not leaf.dim():
                return leaf
            self._note(name, leaf)
            moved: torch.Tensor = _moved(leaf, torch.device(_NAME, 0))
            return moved

        return pytree.tree_map_only(torch.Tensor, onto_it, (args, kwargs))

    def noting(self, func: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        """A function that makes a tensor of plain data, with what it makes known by the line that called it."""

        @functools.wraps(func)
        def noted(*args: Any, **kwargs: Any) -> torch.Tensor:
            made = func(*args, **kwargs)
            self.made[made] = (running(f"made here by '{func.__name__}'"), func.__name__, None)
            return made

        return noted

    def _faked(self, leaf: torch.Tensor) -> torch.Tensor:
        """A tensor from before the run, as the fake one that stands for it."""
        if isinstance(leaf, FakeTensor):
            return leaf
        fake = self.mode.from_tensor(leaf)
        self.made[fake] = self._of(leaf)
        return fake

    def _origin(self, name: str, given: list[torch.Tensor]) -> tuple[Place | None, str, tuple[str, str] | None]:
        for leaf in given:
            if leaf.device.type == "cpu":
                return self._of(leaf)
        return running(f"made here by '{name.removeprefix('aten::')}'"), name.removeprefix("aten::"), None

    def _of(self, leaf: torch.Tensor) -> tuple[Place | None, str, tuple[str, str] | None]:
        if id(leaf) in self.kept:
            return None, "", self.kept[id(leaf)]
        made: tuple[Place | None, str, tuple[str, str] | None] = self.made.get(leaf, (None, "", None))
        return made

    def _note(self, name: str, leaf: torch.Tensor) -> None:
        made, maker, attribute = self._of(leaf)
        path = self.stack[-1] if self.stack else ""
        operator = name.removeprefix("aten::")
        self.found.append(Meeting(operator, running(), path, made, maker, attribute, tuple(leaf.shape)))

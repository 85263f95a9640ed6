"""What recording has to know of torch's functions: which read values, which read shapes, which draw numbers."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from typing import Any

import torch

SHAPE_READS = frozenset("size numel nelement __len__ stride storage_offset".split())
"""Methods that answer with sizes."""

VALUE_READS = frozenset("item tolist".split())
"""Methods that answer with the values of a tensor as Python numbers, which can be traced on."""

CONCRETE_READS = frozenset(
    "__bool__ __int__ __float__ __index__ __complex__ __contains__ numpy __array__ equal allclose is_nonzero "
    "is_same_size".split()
)
"""Methods whose answer Python uses at once; nothing can be traced on."""

DTYPE_READS = frozenset("is_floating_point is_complex".split())
"""Methods that answer by the dtype."""

SILENT = frozenset("__format__ __repr__ __str__ __hash__ __dir__".split())
"""Methods for messages: what they show decides nothing."""

TENSOR_PROPERTIES = frozenset("T mT H mH real imag data grad".split())
"""Properties that are tensors."""

SHAPE_ONLY = frozenset(
    "zeros_like ones_like empty_like full_like new_zeros new_ones new_empty new_full size numel is_same_size".split()
)
"""Functions whose result depends on the shape of the tensor that they are given, not on its values."""

SIZED_BY_VALUES = frozenset(
    "nonzero unique unique_consecutive masked_select argwhere bincount nms _unique2 unique_dim".split()
)
"""Functions whose result's size depends on the values of an argument."""

SIZED_BY_SECOND = frozenset("repeat_interleave tensor_split".split())
"""Functions whose result's size depends on the values of their second argument, where that is a tensor."""

ELEMENTWISE = frozenset("add sub mul div truediv pow rsub true_divide add_ sub_ mul_ div_ clamp clamp_ fill_".split())
"""Functions whose result's size does not depend on the value of a number among the arguments."""

SHAPED_AS_FIRST = frozenset(
    "index_add index_copy index_fill index_put scatter scatter_add scatter_reduce masked_fill masked_scatter".split()
)
"""Functions whose result has the shape of their first argument, whatever the others have."""

TAKEN_APART = frozenset("unbind split chunk unsafe_split unsafe_chunk".split())
"""Functions that give as many parts as a size of their argument makes. Iterating over a tensor calls the first."""

RANKED_BY_SIZE = frozenset("squeeze squeeze_".split())
"""Functions whose result has fewer dimensions where sizes are 1."""

HOOKS = frozenset("register_hook register_post_accumulate_grad_hook".split())
"""Methods that hang the user's code on a tensor's gradient."""

IN_PLACE_NAMES = frozenset("__setitem__ backward".split())
"""Functions that return nothing and are called for their effect."""

STATE_SETTERS = frozenset("_set_grad_enabled switch_gradients".split())

_OPERATORS: dict[str, Callable[..., Any]] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "div": operator.truediv,
    "matmul": operator.matmul,
    "pow": operator.pow,
    "__getitem__": operator.getitem,
    "__setitem__": operator.setitem,
    "neg": operator.neg,
    "__contains__": operator.contains,
}
_IN_PLACE = {
    f"__{name}__": getattr(operator, name)
    for name in "iadd isub imul itruediv ifloordiv imod ipow iand ior ixor ilshift irshift".split()
}
_DUNDERS = _IN_PLACE | {
    f"__{name}__": getattr(operator, f"{name}_" if name in ("and", "or") else name)
    for name in "add sub mul truediv floordiv mod pow matmul and or xor lshift rshift eq ne lt le gt ge".split()
    + "neg pos abs invert".split()
}


def is_in_place(name: str) -> bool:
    """Whether a function or method of this name writes into its first argument."""
    return name == "__setitem__" or name in _IN_PLACE or (name.endswith("_") and not name.endswith("__"))


def as_call(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[str, Any, tuple[Any, ...]]:
    """How an fx node calls `function`: ("call_method" or "call_function", target, arguments)."""
    method = _method_name(function)
    if method == "new" or isinstance(function, type):
        args = _with_sizes(args, 0 if method is None else 1)
    if method is None:
        return "call_function", function, args
    name = method
    if len(args) <= 2 and not kwargs and name in _OPERATORS and (len(args) == 2 or name == "neg"):
        return "call_function", _OPERATORS[name], args
    if name in _OPERATORS and name.startswith("__"):
        return "call_function", _OPERATORS[name], args
    if name in _DUNDERS:
        return "call_function", _DUNDERS[name], args
    if name.startswith("__r") and f"__{name[3:]}" in _DUNDERS and len(args) == 2:
        return "call_function", _DUNDERS[f"__{name[3:]}"], (args[1], args[0])
    return "call_method", name, args


def _with_sizes(args: tuple[Any, ...], place: int) -> tuple[Any, ...]:
    """Old constructors take a `torch.Size` for sizes, and any other sequence for values."""
    alone = len(args) == place + 1 and isinstance(args[place], torch.Size)
    return (*args[:place], *args[place]) if alone else args


def _method_name(function: Any) -> str | None:
    """The name under which torch.Tensor has a function: `__pow__` is a function that calls itself `pow`."""
    name: str = function.__name__
    if getattr(torch.Tensor, name, None) is function:
        return name
    return _RENAMED.get(function)


_RENAMED: dict[Any, str] = {
    value: name
    for name in dir(torch.Tensor)
    if callable(value := inspect.getattr_static(torch.Tensor, name)) and getattr(value, "__name__", name) != name
}

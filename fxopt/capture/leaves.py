"""Which modules are kept whole, as one call in the graph."""

from __future__ import annotations

import torch
from torch import nn

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_INHERITABLE = frozenset(
    "__init__ __module__ __doc__ __dict__ __weakref__ __annotations__ __constants__ __firstlineno__ "
    "__static_attributes__ __qualname__ __parameters__ __orig_bases__ reset_parameters extra_repr __repr__ "
    "__setstate__ _init_weights init_weights".split()
)


def is_leaf(module: nn.Module) -> bool:
    """Whether `module` runs torch's own forward: everything in torch.nn but containers and wrappers.

    A subclass that changes nothing that torch's class does at run time counts as that class. Modules that passes put
    into a graph say `stays_whole`, so that what is captured once more finds them again.
    """
    if isinstance(module, torch.jit.ScriptModule) or getattr(type(module), "stays_whole", False):
        return True
    for cls in type(module).__mro__:
        origin = cls.__module__
        if origin.startswith(("torch.nn.modules", "torch.nn.utils.parametrize", "torch.ao.nn", "torch.nn.quantized")):
            return cls is not nn.Module and not issubclass(cls, _CONTAINERS)
        if set(vars(cls)) - _INHERITABLE - set(_new_names(cls)):
            return False
    return False


def switches_by_mode(module: nn.Module) -> bool:
    """Whether `module` has no state and no children and asks for its mode: stochastic depth, DropPath.

    Such a module is one operation that means something else in each mode, as nn.Dropout is.
    """
    if module._modules or module._parameters or module._buffers:
        return False
    code = getattr(type(module).forward, "__code__", None)
    return code is not None and "training" in code.co_names


def _new_names(cls: type) -> list[str]:
    """Attributes of a class that none of its bases has: they don't change what the bases do."""
    return [name for name in vars(cls) if not any(hasattr(base, name) for base in cls.__mro__[1:])]

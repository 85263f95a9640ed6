"""All tensors of a module, by name: written once where two names share one, and put back in place."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from fxopt.errors import ArtifactError


def named_tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers by name, those too that a state_dict leaves out, and each name of a shared one."""
    return {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }


def collect(module: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """What to write, and for each further name of a tensor the name that it is written under."""
    kept: dict[str, torch.Tensor] = {}
    tied: dict[str, str] = {}
    first: dict[int, str] = {}
    for name, tensor in named_tensors(module).items():
        if id(tensor) in first:
            tied[name] = first[id(tensor)]
            continue
        first[id(tensor)] = name
        kept[name] = tensor.detach().cpu().contiguous().clone()
    return kept, tied


def restore(module: nn.Module, saved: Mapping[str, torch.Tensor], tied: Mapping[str, str], where: str) -> None:
    """Put saved tensors into a module, name by name; tensors that were one stay one, and those that were not are none.

    Raises:
        ArtifactError: where the names, shapes or dtypes are not those of the module; nothing is changed then.
    """
    present = named_tensors(module)
    wanted = {**saved, **{name: saved[kept] for name, kept in tied.items() if kept in saved}}
    missing, unexpected = sorted(wanted.keys() - present.keys()), sorted(present.keys() - wanted.keys())
    parameters = dict(module.named_parameters(remove_duplicate=False))
    # A buffer may have grown since it was made, as the ranges of an observer do; a parameter may not.
    wrong = sorted(
        name
        for name in wanted.keys() & present.keys()
        if wanted[name].dtype is not present[name].dtype
        or (name in parameters and wanted[name].shape != present[name].shape)
    )
    if missing or unexpected or wrong:
        parts = [
            ("not in the module", missing),
            ("not in the result", unexpected),
            ("of another shape or dtype", wrong),
        ]
        listed = "; ".join(f"{what}: {_some(names)}" for what, names in parts if names)
        raise ArtifactError(
            f"the weights in '{where}' are not those of this module ({listed}): expected the module that "
            "`fxopt run` was given, of the same code and configuration"
        )
    first: dict[int, str] = {}
    for name, parameter in parameters.items():
        written = tied.get(name, name)
        if first.setdefault(id(parameter), written) != written:
            owner, _, leaf = name.rpartition(".")
            own = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
            setattr(module.get_submodule(owner), leaf, own)
    for name, value in wanted.items():
        owner, _, leaf = name.rpartition(".")
        # Elements that share memory, as those of an expanded tensor do, cannot be written one by one.
        expanded = any(stride == 0 for stride in present[name].stride())
        if name not in parameters and (present[name].shape != value.shape or expanded):
            module.get_submodule(owner)._buffers[leaf] = torch.empty_like(value, device=present[name].device)
    # Modules may read more off their tensors as they load them, so all that a state_dict has goes that way.
    module.load_state_dict({name: wanted[name] for name in module.state_dict() if name in wanted}, strict=False)
    with torch.no_grad():
        for name, tensor in named_tensors(module).items():
            tensor.copy_(wanted[name])


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")

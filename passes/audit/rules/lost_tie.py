"""FX106: two parameters that were one tensor."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import torch
from torch import nn

from fxopt.findings import Place
from passes.audit.evidence import Evidence, code
from passes.audit.rule import Found, rule


def _memory(tensor: torch.Tensor) -> tuple[int, int]:
    # Not `data_ptr`: it takes whoever asks for one who will write, and copies what is shared until then.
    return tensor.untyped_storage()._cdata, int(tensor.storage_offset())


def _place(evidence: Evidence, path: str) -> Place | None:
    leaf = path.rpartition(".")[2]
    for _, owner in evidence.owner(path):
        if not code.is_users(type(owner)):
            continue
        for file, function in code.methods(type(owner)):
            for statement in code.parts(ast.Assign, function):
                if f"self.{leaf}.weight" in ast.unparse(statement.targets[0]):
                    return code.at(file, statement)
        return code.assigned(type(owner), leaf)
    return None


@rule("FX106")
def lost_tie(evidence: Evidence) -> Iterator[Found]:
    """Two parameters that were one tensor.

    Equal values are trained apart; what shares only memory is parted by the next `to()`.

    Bad:
        self.head.weight = nn.Parameter(self.embed.weight.clone())

    Good:
        self.head.weight = self.embed.weight

    Fix: assign the parameter itself.
    """
    weights = [
        (f"{path}.weight".lstrip("."), path, module.weight)
        for path, module in evidence.modules
        if isinstance(module, (nn.Embedding, nn.Linear)) and isinstance(module.weight, nn.Parameter)
    ]
    for position, (name, path, one) in enumerate(weights):
        for other_name, _, other in weights[:position]:
            if one is other or one.shape != other.shape or one.dtype != other.dtype or one.numel() < 2:
                continue
            shares = _memory(one) == _memory(other)
            mixed = type(evidence.module_at(path)) is not type(evidence.module_at(other_name.rpartition(".")[0]))
            if shares or (mixed and bool(one.std() > 0) and torch.equal(one, other)):
                how = "share memory" if shares else "have equal values"
                yield Found(f"'{other_name}' and '{name}' {how} but are two parameters", _place(evidence, path), path)

"""FX205: parameters of several floating-point types."""

from __future__ import annotations

import collections
from collections.abc import Iterator

import torch

from passes.audit.evidence import Evidence
from passes.audit.evidence.trail import place_of
from passes.audit.rule import Found, rule


@rule("FX205")
def mixed_dtypes(evidence: Evidence) -> Iterator[Found]:
    """Parameters of several floating-point types.

    An operator that is given two of them raises, or silently computes in the wider one.

    Bad:
        self.head = nn.Linear(8, 2).double()

    Good:
        self.head = nn.Linear(8, 2)

    Fix: use one type, or cast at the border.
    """
    counts: collections.Counter[torch.dtype] = collections.Counter()
    for _, module in evidence.modules:
        for parameter in module._parameters.values():
            if parameter is not None and parameter.is_floating_point():
                counts[parameter.dtype] += parameter.numel()
    usual = counts.most_common(1)[0][0] if len(counts) > 1 else None
    for path, module in evidence.modules if usual else []:
        own = [(name, p) for name, p in module._parameters.items() if p is not None and p.is_floating_point()]
        odd = [(name, parameter) for name, parameter in own if parameter.dtype != usual]
        if odd:
            kinds = " and ".join(str(dtype).removeprefix("torch.") for dtype in (odd[0][1].dtype, usual))
            place = place_of(evidence, path, odd[0][0])
            yield Found(f"'{path}' and the rest have parameters of {kinds}", place, path)

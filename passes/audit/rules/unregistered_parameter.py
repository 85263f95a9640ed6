"""FX103: parameters in a plain list, tuple or dict."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from torch.utils import _pytree as pytree

from fxopt.findings import Severity
from passes.audit.evidence import Evidence, code
from passes.audit.evidence.driver import unregistered
from passes.audit.rule import Found, rule


@rule("FX103", Severity.ERROR)
def unregistered_parameter(evidence: Evidence) -> Iterator[Found]:
    """Parameters in a plain list, tuple or dict.

    `parameters()` doesn't give them to the optimizer, and they are neither moved nor saved.

    Bad:
        self.scales = [nn.Parameter(torch.ones(3))]

    Good:
        self.scales = nn.ParameterList([nn.Parameter(torch.ones(3))])

    Fix: use `nn.ParameterList` or `nn.ParameterDict`.
    """
    known = {id(each) for _, module in evidence.modules for each in module._parameters.values()}
    for path, module in evidence.users:
        for name, value in unregistered(module):
            leaves = [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, nn.Parameter)]
            hidden = [leaf for leaf in leaves if id(leaf) not in known]
            if hidden:
                message = f"'self.{name}' holds {len(hidden)} parameters that are not registered"
                yield Found(message, code.assigned(type(module), name), path)

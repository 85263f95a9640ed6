"""FX201: a device that is written into the forward."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from passes.audit.evidence import Evidence, code
from passes.audit.rule import Found, rule

_DEVICES = ("cuda", "mps", "xpu", "hpu", "npu")


def _names_device(node: ast.expr, body: code.Body) -> bool:
    """Whether it is the name of a device, one of two names, or a variable of the function that is."""
    if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.device" and node.args:
        node = node.args[0]
    if isinstance(node, ast.IfExp):
        return _names_device(node.body, body) or _names_device(node.orelse, body)
    if isinstance(node, ast.Name):
        assigned = code.parts(ast.Assign, body.node)
        values = [each.value for each in assigned if node.id in map(ast.unparse, each.targets)]
        return any(not isinstance(value, ast.Name) and _names_device(value, body) for value in values)
    return isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith(_DEVICES)


@rule("FX201")
def fixed_device(evidence: Evidence) -> Iterator[Found]:
    """A device that is written into the forward.

    The model then runs on that device only, and never on the second GPU, the CPU or another accelerator.

    Bad:
        x = x.cuda()

    Good:
        x = x.to(self.weight.device)

    Fix: take the device of a parameter or of the input.
    """
    for body in evidence.bodies:
        for call in body.calls():
            name = call.func.attr if isinstance(call.func, ast.Attribute) else ""
            devices = [item.value for item in call.keywords if item.arg == "device"]
            fixed = any(_names_device(each, body) for each in [*devices, *(call.args if name == "to" else [])])
            if fixed or (name == "cuda" and not call.args):
                text = ast.unparse(call)
                yield Found(f"'{text}' always means the same device", code.at(body.path, call), body.module)

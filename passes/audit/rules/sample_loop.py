"""FX502: a Python loop over the samples of a batch."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from fxopt.findings import Precision
from passes.audit.evidence import Evidence, code
from passes.audit.rule import Found, rule

_SIZES = ("len({0})", "{0}.shape[0]", "{0}.size(0)", "{0}.size()[0]")
_SHAPES = ("{0}.shape", "{0}.size()")


def _is_batch_size(node: ast.expr, body: code.Body) -> bool:
    """Whether it is the first dimension of an argument of the forward, or a variable that holds that."""
    if not isinstance(node, ast.Name):
        return _is_of_argument(node, _SIZES, body)
    pairs = [(each.targets[0], each.value) for each in code.parts(ast.Assign, body.node) if len(each.targets) == 1]
    if any(ast.unparse(target) == node.id and _is_of_argument(value, _SIZES, body) for target, value in pairs):
        return True
    firsts = [(target.elts[0], value) for target, value in pairs if isinstance(target, ast.Tuple) and target.elts]
    return any(ast.unparse(first) == node.id and _is_of_argument(value, _SHAPES, body) for first, value in firsts)


def _is_of_argument(node: ast.expr, forms: tuple[str, ...], body: code.Body) -> bool:
    """Whether it is one of these forms of an argument that was not bound anew before."""
    text, names = ast.unparse(node), code.parts(ast.Name, body.node)
    bound = {name.id for name in names if isinstance(name.ctx, ast.Store) and name.lineno < node.lineno}
    return any(text == form.format(item.arg) for item in body.arguments if item.arg not in bound for form in forms)


@rule("FX502", precision=Precision.MEDIUM)
def sample_loop(evidence: Evidence) -> Iterator[Found]:
    """A Python loop over the samples of a batch.

    It costs a kernel a sample, and an exported graph holds the batch size of the example.

    Bad:
        torch.stack([self.fc(x[i]) for i in range(x.shape[0])])

    Good:
        self.fc(x)

    Fix: compute the batch at once, or use `torch.vmap`.
    """
    for body in evidence.bodies:
        for node in ast.walk(body.node) if body.node.name == "forward" else ():
            loop = node.iter if isinstance(node, (ast.For, ast.comprehension)) else None
            if not isinstance(loop, ast.Call) or ast.unparse(loop.func) != "range" or len(loop.args) != 1:
                continue
            if _is_batch_size(loop.args[0], body):
                message = f"'{ast.unparse(loop)}' goes over the samples one by one"
                yield Found(message, code.at(body.path, loop), body.module)

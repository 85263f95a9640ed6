"""Which nodes write, which share memory, and what may be removed because nothing can see it.

torch.fx's own dead-code elimination removes in-place calls whose result is unused, although the tensor that
they wrote into is used. Here every call is read by the schema of the operator behind it: which arguments it
writes, and whether its result may be a view of an argument.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.fx as fx
import torch.nn.functional as F
from torch import nn

from fxopt.graph.region import Program, Region, memory_of
from fxopt.modules import FakeQuantize, Fused, Mask, fused_call

_PURE_MODULES: tuple[type[nn.Module], ...] = (
    nn.Linear,
    nn.Bilinear,
    nn.modules.conv._ConvNd,
    nn.modules.pooling._MaxPoolNd,
    nn.modules.pooling._AvgPoolNd,
    nn.modules.pooling._AdaptiveAvgPoolNd,
    nn.modules.pooling._AdaptiveMaxPoolNd,
    nn.modules.pooling._LPPoolNd,
    nn.modules.pooling._MaxUnpoolNd,
    nn.LayerNorm,
    nn.RMSNorm,
    nn.GroupNorm,
    nn.Embedding,
    nn.EmbeddingBag,
    nn.RNNBase,
    nn.RNNCellBase,
    nn.modules.loss._Loss,
    nn.LocalResponseNorm,
    nn.GELU,
    nn.GLU,
    nn.Tanh,
    nn.Sigmoid,
    nn.LogSigmoid,
    nn.Softmax,
    nn.Softmax2d,
    nn.LogSoftmax,
    nn.Softmin,
    nn.Softplus,
    nn.Softsign,
    nn.Softshrink,
    nn.Hardshrink,
    nn.Tanhshrink,
    nn.PReLU,
    nn.Upsample,
    nn.PixelShuffle,
    nn.PixelUnshuffle,
    nn.Fold,
    nn.Unfold,
    nn.CosineSimilarity,
    nn.PairwiseDistance,
    nn.ReLU,
    nn.LeakyReLU,
    nn.ELU,
    nn.SELU,
    nn.CELU,
    nn.SiLU,
    nn.Mish,
    nn.Hardswish,
    nn.Hardsigmoid,
    nn.Hardtanh,
    nn.Threshold,
    nn.modules.padding._ConstantPadNd,
    nn.modules.padding._ReflectionPadNd,
    nn.modules.padding._ReplicationPadNd,
    nn.modules.padding._CircularPadNd,
    nn.MultiheadAttention,
    Mask,
)
_VIEW_MODULES: tuple[type[nn.Module], ...] = (nn.Identity, nn.Flatten, nn.Unflatten, nn.ChannelShuffle, FakeQuantize)
_NORMS = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)
RANDOM = frozenset(
    "rand rand_like randn randn_like randint randint_like randperm bernoulli multinomial normal poisson gumbel_softmax "
    "binomial _standard_gamma _sample_dirichlet uniform_ normal_ bernoulli_ random_ exponential_ geometric_ cauchy_ "
    "log_normal_".split()
)
"""Functions that draw random numbers in either mode."""
OF_SYMBOLS: frozenset[Any] = frozenset(
    {torch.sym_float, torch.sym_int, torch.sym_max, torch.sym_min, torch.sym_sqrt, torch.sym_sum}
)
"""Those of torch that compute numbers of numbers, or of symbols that stand for them."""
OF_NUMBERS: frozenset[Any] = (
    OF_SYMBOLS | {round, torch.broadcast_shapes} | frozenset(filter(callable, vars(math).values()))
)
"""Functions that compute numbers of numbers."""
_PURE_FUNCTIONS: frozenset[Any] = OF_NUMBERS | frozenset(
    {fused_call, getattr, operator.getitem, len, *(getattr(operator, name) for name in (
        "add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "neg", "pos", "abs", "matmul", "and_", "or_",
        "xor", "invert", "lshift", "rshift", "eq", "ne", "lt", "le", "gt", "ge", "index", "truth",
    ))}
) | frozenset(getattr(F, name) for name in (
    "interpolate", "upsample", "grid_sample", "affine_grid", "fold", "normalize", "local_response_norm", "softmin",
    "softsign", "tanhshrink", "lp_pool1d", "lp_pool2d", "lp_pool3d", "cross_entropy",
))  # fmt: skip
"""Functions that write into nothing and draw nothing, and have no schema of their own to say so."""

ADDS_INTO: frozenset[Any] = frozenset({operator.iadd, "add_"})
ADDS: frozenset[Any] = ADDS_INTO | {operator.add, torch.add, "add"}


class Effects:
    """Effects of the nodes of one region.

    Anything that is not known to be harmless counts as writing into all that it is given.
    """

    def __init__(self, region: Region):
        self._region = region

    def writes(self, node: fx.Node) -> tuple[fx.Node, ...]:
        """The arguments of `node` that it writes into."""
        if node.op == "call_module":
            return self._module_writes(node)
        if node.op not in ("call_function", "call_method"):
            return ()
        name = _operator_name(node)
        written = [node.kwargs.get("out")]
        if node.kwargs.get("inplace") is True or _is_inplace(node, name):
            written.append(_first(node))
        if name == "batch_norm" and _training_argument(node):
            written += [_argument(node, 1, "running_mean"), _argument(node, 2, "running_var")]
        if name in ("embedding", "embedding_bag") and _argument(node, 3, "max_norm") is not None:
            written.append(_argument(node, 1, "weight"))
        return tuple(_nodes(written))

    def is_random(self, node: fx.Node) -> bool:
        """Whether `node` draws from the random stream (in training mode, for what draws only there)."""
        if node.op == "call_module":
            module = self._region.submodule(node)
            drops = isinstance(module, (nn.RNNBase, nn.MultiheadAttention)) and module.dropout > 0
            return module.training and (drops or isinstance(module, (nn.modules.dropout._DropoutNd, nn.RReLU)))
        if node.op not in ("call_function", "call_method"):
            return False
        name = _operator_name(node)
        if "dropout" in name or name == "rrelu":
            return _training_argument(node)
        if name == "scaled_dot_product_attention":
            return bool(_argument(node, 4, "dropout_p"))
        return name in RANDOM

    def may_alias(self, node: fx.Node) -> tuple[fx.Node, ...]:
        """The arguments whose memory the result of `node` may share."""
        if node.op == "call_module":
            module = self._region.submodule(node)
            if isinstance(module, (*_PURE_MODULES, *_NORMS)) and not getattr(module, "inplace", False):
                return ()
            return tuple(node.all_input_nodes)
        if node.op not in ("call_function", "call_method"):
            return ()
        if node.target in (operator.getitem, getattr):
            return tuple(node.all_input_nodes[:1])
        if node.target is fused_call:
            return ()
        name = _operator_name(node)
        multiplies = name == "einsum" and len(node.all_input_nodes) > 1  # of one tensor it gives a view
        if multiplies or (node.kwargs.get("inplace") is not True and _returns_fresh(name)):
            return tuple(_nodes([node.kwargs.get("out")]))
        if _is_inplace(node, name) and name != "set_" and (node.target in _INPLACE_OPERATORS or _schemas(name)):
            return self.writes(node)
        return tuple(node.all_input_nodes)

    def is_known(self, node: fx.Node) -> bool:
        """Whether the effects of `node` are wholly described by `writes` and `is_random`."""
        if node.op == "call_module":
            module = self._region.submodule(node)
            known = (*_PURE_MODULES, *_VIEW_MODULES, *_NORMS, nn.modules.dropout._DropoutNd)
            hooked = module._forward_hooks or module._forward_pre_hooks
            renormalises = getattr(module, "max_norm", None) is not None  # an embedding: the rows that it reads
            return isinstance(module, known) and not hooked and not renormalises
        if node.op in ("call_function", "call_method"):
            named = node.target in _PURE_FUNCTIONS or node.target in _INPLACE_OPERATORS
            return named or bool(_schemas(_operator_name(node)))
        return node.op == "get_attr"

    def is_pure(self, node: fx.Node) -> bool:
        """Whether `node` always gives the same for the same arguments, and does nothing else."""
        return self.is_known(node) and not self.is_random(node) and not self.writes(node)

    def is_fresh(self, value: fx.Node) -> bool:
        """Whether nothing but its only user ever sees the memory of `value`."""
        if not value.op.startswith("call_") or len(value.users) > 1:
            return False
        return self.is_known(value) and not self.may_alias(value) and not self.writes(value)

    def written(self) -> frozenset[fx.Node]:
        """The nodes whose memory something writes into, whether by them or by others that share it."""
        aliases = self.aliases()
        targets = {target for node in self._region.graph.nodes for target in self.writes(node)}
        return frozenset[fx.Node]().union(*map(aliases, targets))

    def written_between(self, value: fx.Node, start: fx.Node, end: fx.Node) -> fx.Node | None:
        """The first node after `start` and before `end` that may write into the memory of `value`."""
        shared: frozenset[fx.Node] | None = None
        node = start.next
        while node is not end and node.op != "root":
            written = self.writes(node)
            if written and shared is None:
                shared = self.aliases()(value)
            if shared is not None and any(target in shared for target in written):
                return node
            node = node.next
        return None

    def aliases(self) -> Callable[[fx.Node], frozenset[fx.Node]]:
        """A question: which nodes may share memory with a node (itself included)?"""
        parent: dict[fx.Node, fx.Node] = {node: node for node in self._region.graph.nodes}

        def root(node: fx.Node) -> fx.Node:
            while parent[node] is not node:
                parent[node] = parent[parent[node]]
                node = parent[node]
            return node

        memory: dict[int, fx.Node] = {}
        numbers: set[fx.Node] = set()
        for node in self._region.graph.nodes:
            if _is_number(node, numbers):
                numbers.add(node)
                continue
            for other in (*self.may_alias(node), *self.writes(node)):
                if other not in numbers:  # a size is an argument of many, and shares memory with none
                    parent[root(node)] = root(other)
            held = self._region.attribute(node) if node.op == "get_attr" else None
            if isinstance(held, torch.Tensor):
                parent[root(node)] = root(memory.setdefault(memory_of(held), node))
        groups: dict[fx.Node, set[fx.Node]] = {}
        for node in parent:
            groups.setdefault(root(node), set()).add(node)
        frozen = {key: frozenset(group) for key, group in groups.items()}
        return lambda node: frozen[root(node)]

    def _module_writes(self, node: fx.Node) -> tuple[fx.Node, ...]:
        module = self._region.submodule(node)
        if getattr(module, "inplace", False):
            return tuple(node.all_input_nodes[:1])
        if self.is_known(node):
            return ()
        return tuple(node.all_input_nodes)

    def keeps_state(self, node: fx.Node) -> bool:
        """Whether running `node` changes a module's own state, such as running statistics."""
        if node.op == "call_module":
            module = self._region.submodule(node)
            if isinstance(module, _NORMS):
                return module.training and bool(module.track_running_stats)
            if isinstance(module, Fused) and module.bn is not None:
                return module.training
            return not self.is_known(node)
        return False


def is_written(tensor: torch.Tensor, program: Program) -> bool:
    """Whether a graph writes into `tensor`, a parameter or buffer: what is computed of it once does not last.

    What layers and batch norms do to their own is left to those who read them.
    """
    waiting = [reader for reader in program.readers(tensor) if reader.op == "get_attr"]
    seen = set(waiting)
    for value in waiting:
        effects = Effects(program.region_of(value))
        for user in value.users:
            if value in effects.writes(user) and _operator_name(user) != "batch_norm":
                return True
            if user not in seen and value in effects.may_alias(user):
                seen.add(user)
                waiting.append(user)
    return False


def eliminate_dead(region: Region) -> list[fx.Node]:
    """Erase the nodes whose effects nothing can see, and return them.

    Kept are: what outputs need; writes into memory that an input, a parameter, a buffer or a live node
    shares; random draws (a later draw would change); and whatever is not known to be harmless.
    """
    effects = Effects(region)
    aliases = effects.aliases()
    live: set[fx.Node] = set()
    work = [node for node in region.graph.nodes if _is_root(node, effects)]
    # By group of aliases: chains of modules that may write what they are given are one large group.
    writers: dict[int, list[fx.Node]] = {}
    seen: dict[int, bool] = {}
    for node in region.graph.nodes:
        for target in effects.writes(node):
            group = aliases(target)
            writers.setdefault(id(group), []).append(node)
            if id(group) not in seen:
                seen[id(group)] = any(member.op in ("placeholder", "get_attr") for member in group)
            if seen[id(group)]:
                work.append(node)
    while work:
        node = work.pop()
        if node in live:
            continue
        live.add(node)
        work.extend(node.all_input_nodes)
        work.extend(writers.pop(id(aliases(node)), ()))
    dead = [node for node in reversed(region.graph.nodes) if node not in live]
    for node in dead:
        region.graph.erase_node(node)
    return dead[::-1]


def _is_root(node: fx.Node, effects: Effects) -> bool:
    if node.op in ("placeholder", "output"):
        return True
    if node.op == "get_attr":
        return False
    return not effects.is_known(node) or effects.is_random(node) or effects.keeps_state(node)


def _operator_name(node: fx.Node) -> str:
    if node.op == "call_method":
        return str(node.target)
    name: str = getattr(node.target, "__name__", "")
    # These two are written so since Python has the words, and change nothing in place.
    return name.rstrip("_") if node.target in (operator.and_, operator.or_) else name


def _is_number(node: fx.Node, numbers: set[fx.Node]) -> bool:
    """Whether the result is a size, or computed of sizes that are in `numbers`."""
    if node.op == "call_method" and node.target == "size":
        return len(node.args) + len(node.kwargs) == 2
    if node.op != "call_function" or node.target not in _PURE_FUNCTIONS or node.target is operator.getitem:
        return False
    return bool(node.all_input_nodes) and numbers.issuperset(node.all_input_nodes)


# Methods that are, or read of a tensor as, another operator.
_SHORT_FOR = {
    **dict.fromkeys("float double half bfloat16 cfloat cdouble long int short char byte bool type".split(), "to"),
    "tolist": "item",
}


@functools.cache
def _schemas(name: str) -> tuple[Any, ...]:
    name = _SHORT_FOR.get(name, name)
    for candidate in (name, f"__{name}__"):
        schemas = torch._C._jit_get_schemas_for_operator(f"aten::{candidate}")
        if schemas:
            return tuple(schemas)
    return ()


_INPLACE_OPERATORS = frozenset(
    getattr(operator, name)
    for name in "iadd isub imul itruediv ifloordiv imod ipow imatmul iand ior ixor ilshift irshift setitem".split()
)


def _is_inplace(node: fx.Node, name: str) -> bool:
    if node.target in _INPLACE_OPERATORS:
        return True
    return name.endswith("_") and not name.endswith("__")


_MAY_RETURN_ARGUMENT = frozenset(
    "alpha_dropout atleast_1d atleast_2d atleast_3d broadcast_tensors cartesian_prod conj_physical dequantize dropout "
    "einsum feature_alpha_dropout feature_dropout meshgrid sum_to_size to_dense type_as unsafe_chunk unsafe_split "
    "unsafe_split_with_sizes".split()
)
"""Operators that give an argument, or a view of one, although their schema does not say so."""


@functools.cache
def _returns_fresh(name: str) -> bool:
    if name in _MAY_RETURN_ARGUMENT:
        return False
    schemas = _schemas(name)
    plain = [s for s in schemas if not s.overload_name.endswith("out")]
    return bool(plain) and all(r.alias_info is None for s in plain for r in s.returns)


def _first(node: fx.Node) -> Any:
    return node.args[0] if node.args else next(iter(node.kwargs.values()), None)


def _argument(node: fx.Node, index: int, name: str) -> Any:
    return node.args[index] if len(node.args) > index else node.kwargs.get(name)


def _training_argument(node: fx.Node) -> bool:
    index = {"batch_norm": 5, "rrelu": 3}.get(_operator_name(node), 2)
    return _argument(node, index, "training") is not False


def _nodes(values: list[Any]) -> Iterator[fx.Node]:
    for value in values:
        if isinstance(value, fx.Node):
            yield value

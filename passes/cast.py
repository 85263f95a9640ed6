"""cast: layers and products in bfloat16 or float16, what loses by it in float32."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
import torch.fx as fx
import torch.nn.functional as F
from torch import nn

from fxopt import bench
from fxopt.contract import Change, Pass, Promise, Skip
from fxopt.errors import SpecError
from fxopt.graph import Affine, Effects, Region, inherit, name_of, read_affine, read_product, source_of
from fxopt.modules import Mask, rebuild

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
_FAST = {"bf16": {"amx_bf16", "avx512_bf16", "bf16"}, "fp16": {"amx_fp16", "avx512_fp16", "fphp"}}
_PRODUCTS: frozenset[Any] = frozenset({operator.matmul, torch.matmul, torch.bmm, "matmul", "bmm"})
_FOLLOWING_MODULES = (
    nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.LeakyReLU, nn.Hardswish, nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.Flatten,
)  # fmt: skip
_FOLLOWING = frozenset(
    "add relu relu6 hardtanh leaky_relu hardswish max_pool1d max_pool2d max_pool3d flatten reshape view permute "
    "transpose cat contiguous".split()
)


@dataclass(frozen=True)
class Cast(Pass):
    """Runs convolutions, linear layers and matrix products in fewer bits.

        layer(x)  =>  float32( layer'( low(x) ) )      layer' holds its parameters in `dtype`

    What only moves or compares such values follows them; normalisations, softmax, reductions, losses and all other
    operators stay in float32, and so do the inputs and outputs of the model. Batch norms that `fuse` folds are folded
    in float32, since it comes first. The error against the original is measured and reported; with `max_error` it is
    a promise.

    Sources: Micikevicius et al. 2018; the lists of operators of torch.amp.
    """

    name: ClassVar[str] = "cast"
    promise: ClassVar[Promise] = Promise.CHANGES
    after: ClassVar[tuple[str, ...]] = ("clean", "fuse")
    conflicts: ClassVar[tuple[str, ...]] = ("qat",)
    for_speed: ClassVar[bool] = True

    dtype: Literal["bf16", "fp16"] = field(default="bf16", metadata={"help": "what layers compute in: bf16 or fp16"})
    max_error: float = field(default=0.0, metadata={"help": "relative error that is allowed; 0 only reports it"})

    def __post_init__(self) -> None:
        if self.dtype not in _DTYPES:
            raise SpecError(f"cast: 'dtype' is bf16 or fp16, not {self.dtype!r}")
        if not self.max_error >= 0:
            raise SpecError(f"cast: 'max_error' is 0 or more, not {self.max_error}")

    @property
    def bound(self) -> float | None:
        """`max_error`, where there is one."""
        return self.max_error or None

    def run(self, region: Region) -> Iterator[Change | Skip]:
        """One sweep in the order of the graph: each layer finds the values before it cast already, where they are."""
        if region.mode is False and not region.module.training and _has_layers(region):
            # Layers in fewer bits do not train, and the training graph calls the same ones.
            region.take_both_modes()
            yield Change("runs in both modes from now on, with its layers cast", region.path or "evaluation graph")
        casting = _Casting(region, _DTYPES[self.dtype])
        changed = False
        for node in list(region.graph.nodes):
            if region.is_spared(node):
                continue
            affine = read_affine(node, region)
            product = read_product(node, region) if affine is None else None
            outcome: Change | Skip | None = None
            if isinstance(affine, Affine):
                read = [affine.weight_node, affine.bias_node]
                outcome = casting.layer(affine) if affine.module else casting.function(node, affine.input, read)
            elif product is not None and product.kind == "matmul":
                outcome = casting.function(node, product.input, [product.weight_node, product.bias_node])
            elif node.op in ("call_function", "call_method") and node.target in _PRODUCTS:
                outcome = casting.product(node, node.all_input_nodes)
            elif node.target is F.scaled_dot_product_attention:
                outcome = casting.attention(node)
            elif affine is None:
                casting.follow(node)
            else:
                outcome = casting.refused(node, affine)
            changed = changed or isinstance(outcome, Change)
            if outcome is not None:
                yield outcome
        flags = set(bench.fingerprint().cpu_flags)
        if changed and not flags & _FAST[self.dtype] and not torch.cuda.is_available():
            reason = f"this CPU has no instructions for {self.dtype}: it will be slower here than float32"
            yield Skip("(the machine)", reason)


class _Casting:
    """Casts in one graph.

    `_low` maps a float32 value to the same in fewer bits, `_masks` one that is added to scores. `_written` are the
    values whose memory something writes into.
    """

    def __init__(self, region: Region, dtype: torch.dtype):
        self._region = region
        self._dtype = dtype
        self._low: dict[fx.Node, fx.Node] = {}
        self._masks: dict[fx.Node, fx.Node] = {}
        self._written = Effects(region).written()

    def layer(self, affine: Affine) -> Change | Skip | None:
        """Let a layer compute in fewer bits."""
        region, node, module = self._region, affine.node, affine.module
        assert module is not None
        if affine.weight.dtype is not torch.float32:
            return None
        reason = self._why_not(affine.input)
        if reason is None and not self._is_alone(node, module):
            reason = "it is called at more than one place, or its parameters are read out of it"
        elif reason is None and any(not isinstance(child, Mask) for child in module.children()):
            reason = "it holds a batch norm or a fake quantiser"
        if reason is not None:
            return Skip(region.qualified(node), reason, source_of(node))
        parameters = {name: value.detach().to(self._dtype) for name, value in module.named_parameters(recurse=False)}
        region.swap(node, rebuild(module, type(module), **parameters))
        return self._low_now(node)

    def function(self, node: fx.Node, source: fx.Node, read: Iterable[fx.Node | None]) -> Change | Skip | None:
        """Let a function of `source` and of parameters that it reads compute in fewer bits."""
        region = self._region
        parameters = {each: region.attribute(each) for each in read if each is not None}
        if any(value.dtype is not torch.float32 for value in parameters.values()):
            return None
        reason = self._why_not(source)
        if reason is None and not all(
            [*each.users] == [node] and region.program.readers(value) == [each] for each, value in parameters.items()
        ):
            reason = "its parameters are read at more than one place"
        if reason is not None:
            return Skip(region.qualified(node), reason, source_of(node))
        for each, value in parameters.items():
            region.swap_parameter(each, value.detach().to(self._dtype))
            each.meta["tensor_meta"] = each.meta["tensor_meta"]._replace(dtype=self._dtype)
        return self._low_now(node)

    def refused(self, node: fx.Node, why: Skip) -> Change | Skip | None:
        """Let a function by a computed weight compute in fewer bits, as a product does; other layers keep theirs."""
        tensors = [operand for operand in node.all_input_nodes if "tensor_meta" in operand.meta]
        done = self.product(node, tensors) if node.op == "call_function" else None
        return done or (why if _is_float32(node) else None)

    def product(self, node: fx.Node, operands: Sequence[fx.Node]) -> Change | None:
        """Let a product of values, none of them a parameter, compute in fewer bits."""
        if self._region.training or not all(map(_is_float32, [node, *operands])):
            return None
        if all(operand.op == "get_attr" for operand in operands):
            return None
        return self._low_now(node, operands)

    def attention(self, node: fx.Node) -> Change | None:
        """Let queries, keys and values be multiplied in fewer bits; a mask is of booleans, or in as many bits as they.

        Its smallest number stays one: as infinity it would leave nothing where all keys of a query are masked.
        """
        names = ("query", "key", "value", "attn_mask")
        *operands, mask = ({**dict(zip(names, node.args, strict=False)), **node.kwargs}.get(name) for name in names)
        found = self.product(node, [value for value in operands if isinstance(value, fx.Node)])
        if found is None or not isinstance(mask, fx.Node) or not _is_float32(mask):
            return found
        if not self._is_current(mask, node, self._masks):
            limits, graph = torch.finfo(self._dtype), self._region.graph
            with graph.inserting_before(node):
                held = graph.call_method("clamp", (mask, limits.min, limits.max))
                held = graph.call_function(torch.where, (graph.call_method("isinf", (mask,)), mask, held))
                self._masks[mask] = inherit(graph.call_method("to", (held, self._dtype)), mask)
        node.replace_input_with(mask, self._masks[mask])
        return found

    def follow(self, node: fx.Node) -> None:
        """Let an operator that loses nothing take values as they are, where all of them have few bits already."""
        if node.op == "call_module":
            follows = type(self._region.submodule(node)) in _FOLLOWING_MODULES
        else:
            follows = name_of(node) in _FOLLOWING
        operands = node.all_input_nodes
        tensors = [operand for operand in operands if "tensor_meta" in operand.meta]
        effects = Effects(self._region)
        if not follows or not tensors or effects.writes(node) or not _is_float32(node):
            return
        if node in self._written and effects.may_alias(node):  # what is written into a view has to reach what it views
            return
        if all(self._is_current(operand, node, self._low) for operand in tensors):
            for operand in tensors:
                node.replace_input_with(operand, self._low[operand])
            self._cast_back(node)

    def _is_alone(self, node: fx.Node, module: nn.Module) -> bool:
        """Whether nothing but `node` sees `module`. What shares its parameters, as a tied table, keeps them."""
        program = self._region.program
        if program.sites(module) != [node] or program.inside_opaque(module):
            return False
        readers = {reader for value in module.parameters() for reader in program.readers(value)} - {node}
        return not any(_sees(reader, module, program.region_of(reader)) for reader in readers)

    def _why_not(self, source: fx.Node) -> str | None:
        if self._region.training:
            return "in training mode parameters stay in float32: torch.autocast is for that"
        return None if _is_float32(source) else "its input is not float32"

    def _low_now(self, node: fx.Node, operands: Sequence[fx.Node] | None = None) -> Change:
        self._replace_inputs(node, node.all_input_nodes if operands is None else operands)
        self._cast_back(node)
        return Change(f"computed in {_name(self._dtype)}", self._region.qualified(node), source_of(node))

    def _replace_inputs(self, node: fx.Node, operands: Sequence[fx.Node]) -> None:
        for operand in operands:
            if not _is_float32(operand):
                continue
            if not self._is_current(operand, node, self._low):
                with self._region.graph.inserting_before(node):
                    low = self._region.graph.call_method("to", (operand, self._dtype))
                self._low[operand] = inherit(low, operand)
            node.replace_input_with(operand, self._low[operand])

    def _is_current(self, operand: fx.Node, user: fx.Node, casts: Mapping[fx.Node, fx.Node]) -> bool:
        """Whether there is a cast of `operand` that nothing has been written into since."""
        low = casts.get(operand)
        if low is None:
            return False
        return Effects(self._region).written_between(operand, min(low, operand), user) is None

    def _cast_back(self, node: fx.Node) -> None:
        with self._region.graph.inserting_after(node):
            wide = self._region.graph.call_method("to", (node, torch.float32))
        node.replace_all_uses_with(wide, delete_user_cb=lambda user: user is not wide)
        self._low[inherit(wide, node)] = node


def _has_layers(region: Region) -> bool:
    layers = (read_affine(node, region) for node in region.graph.nodes)
    return any(isinstance(layer, Affine) and layer.weight.dtype is torch.float32 for layer in layers)


def _sees(reader: fx.Node, module: nn.Module, region: Region) -> bool:
    """Whether what a node reads is read out of `module`."""
    if reader.op == "get_attr":
        return region.module.get_submodule(str(reader.target).rpartition(".")[0]) is module
    return any(each is module for each in region.submodule(reader).modules())


def _is_float32(node: fx.Node) -> bool:
    meta = node.meta.get("tensor_meta")
    return meta is not None and meta.dtype is torch.float32


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

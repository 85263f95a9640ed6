"""What a pass works on: one graph at a time, and the answers that need the whole program."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Set
from typing import Any

import torch
import torch.fx as fx
from torch import nn

from fxopt.graph.absorbed import Absorbed
from fxopt.graph.module import GraphModule
from fxopt.graph.source import inherit


class Program:
    """A captured module with all of its graphs: the root's, and those inside opaque parts.

    Built anew for each pass, so that its indexes describe the program as that pass found it; edits made
    through `Region` keep them current.

    Args:
        root: the captured module.
        spared: qualified names of nodes that the pass is to leave alone.
    """

    def __init__(self, root: GraphModule, spared: Set[str] = frozenset()):
        self.root = root
        self.spared = spared
        self.regions: list[Region] = []
        self.absorbed: list[Absorbed] = []
        self._sites: dict[nn.Module, list[fx.Node]] = defaultdict(list)
        self._readers: dict[int, list[fx.Node]] = defaultdict(list)
        # Where modules and memory are registered, by owner and name there; places that were given up stay listed.
        self._owners: dict[nn.Module, dict[tuple[nn.Module, str], None]] = defaultdict(dict)
        self._holders: dict[int, dict[tuple[nn.Module, str], None]] = defaultdict(dict)
        self._inside_opaque: set[nn.Module] = set()
        self._index()

    def sites(self, module: nn.Module) -> list[fx.Node]:
        """All live nodes, in any graph, that call `module` itself."""
        return [node for node in self._sites[module] if _alive(node)]

    def readers(self, tensor: torch.Tensor) -> list[fx.Node]:
        """All live nodes, in any graph, that read `tensor` or memory shared with it.

        These are `get_attr` nodes, and calls of the modules that hold the tensor anywhere inside, but for
        what lies in a graph of its own, whose nodes say themselves what they read.
        """
        return [node for node in self._readers[memory_of(tensor)] if _alive(node)]

    def names(self, tensor: torch.Tensor) -> list[str]:
        """All qualified names under which `tensor`, or memory shared with it, is registered."""
        return [name for owner, leaf, _ in self._held(tensor) for name in self._qualified(owner, leaf)]

    def inside_opaque(self, module: nn.Module) -> bool:
        """Whether the Python code of an opaque part may call or read `module` unseen by any graph."""
        return module in self._inside_opaque

    def is_exclusive(self, node: fx.Node, module: nn.Module) -> bool:
        """Whether nothing but `node` calls `module` or reads any tensor that it holds.

        Only then may `module` be rewritten in place of a clone.
        """
        if self.inside_opaque(module) or self.sites(module) != [node]:
            return False
        tensors = [*module.parameters(), *module.buffers()]
        return all(reader is node for tensor in tensors for reader in self.readers(tensor))

    def region_of(self, node: fx.Node) -> Region:
        """The region whose graph holds `node`."""
        return next(region for region in self.regions if region.graph is node.graph)

    def replace_module(self, old: nn.Module, new: nn.Module) -> None:
        """Put `new` in the place of `old` under all of its names: all sites, in any graph, call it then."""
        sites = self.sites(old)
        for owner, leaf in self._places(old):
            owner._modules[leaf] = new
            self.note_place(owner, leaf)
        for node in sites:
            self._forget(node, old)
            self._note_call(node, new)

    def replace_parameter(self, old: nn.Parameter, value: torch.Tensor) -> None:
        """Put a new parameter in the place of `old` under all of its names; it trains if the old one did."""
        new = nn.Parameter(value, requires_grad=old.requires_grad)
        self._readers[memory_of(new)] = self.readers(old)
        for owner, leaf, tensor in self._held(old):
            if tensor is old:
                owner._parameters[leaf] = new
                self.note_place(owner, leaf)

    def paths(self, module: nn.Module) -> list[str]:
        """All qualified names under which `module` is registered."""
        if module is self.root:
            return [""]
        return [path for owner, leaf in self._places(module) for path in self._qualified(owner, leaf)]

    def remove_module(self, module: nn.Module) -> None:
        """Take `module` out of the tree, under all of its names."""
        for owner, leaf in self._places(module):
            del owner._modules[leaf]

    def note_place(self, owner: nn.Module, leaf: str) -> None:
        """Take up what is registered in `owner` by this name."""
        held: Any = owner._parameters.get(leaf, owner._buffers.get(leaf, owner._modules.get(leaf)))
        if isinstance(held, nn.Module):
            self._owners[held][owner, leaf] = None
            self._note_held(held)
        elif held is not None:
            self._holders[memory_of(held)][owner, leaf] = None

    def _note_held(self, module: nn.Module) -> None:
        for leaf in (*module._parameters, *module._buffers, *module._modules):
            self.note_place(module, leaf)

    def _places(self, module: nn.Module) -> list[tuple[nn.Module, str]]:
        """The owners of `module` in the tree, each with its name there."""
        if module not in self._owners:  # a pass registered it by itself
            self._note_held(self.root)
        places = self._owners[module]
        return [(owner, leaf) for owner, leaf in places if owner._modules.get(leaf) is module and self._is_there(owner)]

    def _is_there(self, module: nn.Module) -> bool:
        return module is self.root or bool(self._places(module))

    def _held(self, tensor: torch.Tensor) -> Iterator[tuple[nn.Module, str, torch.Tensor]]:
        """Where `tensor`, or memory shared with it, is registered: the owner, the name there, and what has it."""
        memory = memory_of(tensor)
        for owner, leaf in list(self._holders[memory]):
            held = owner._parameters.get(leaf, owner._buffers.get(leaf))
            if held is not None and memory_of(held) == memory and self._is_there(owner):
                yield owner, leaf, held

    def _qualified(self, owner: nn.Module, leaf: str) -> list[str]:
        return [f"{path}.{leaf}" if path else leaf for path in self.paths(owner)]

    def _forget(self, node: fx.Node, module: nn.Module) -> None:
        """`node` calls `module` no longer."""
        self._sites[module] = [site for site in self._sites[module] if site is not node]
        for tensor in _read_by_call(module):
            self._readers[tensor] = [reader for reader in self._readers[tensor] if reader is not node]

    def _index(self) -> None:
        for path, module in self.root.named_modules():
            if isinstance(module, GraphModule):
                for mode, graph in module.graphs.items():
                    self.regions.append(Region(self, module, path, graph, mode))
        self._note_held(self.root)
        for region in self.regions:
            for node in region.graph.nodes:
                self.note(node, region)

    def note(self, node: fx.Node, region: Region) -> None:
        """Take up a node that calls a module or reads an attribute."""
        if node.op == "call_module":
            self._note_call(node, region.submodule(node))
        elif node.op == "get_attr":
            value = region.attribute(node)
            if isinstance(value, torch.Tensor):
                self._readers[memory_of(value)].append(node)

    def _note_call(self, node: fx.Node, module: nn.Module) -> None:
        self._sites[module].append(node)
        for tensor in _read_by_call(module):
            self._readers[tensor].append(node)
        if any(isinstance(child, GraphModule) for child in module.modules()):
            self._inside_opaque.update(_outside_of_graphs(module))


class Region:
    """One graph of a program and the graph module that runs it.

    Attributes:
        graph: the graph to rewrite.
        module: the graph module that owns it; node targets are relative to it.
        path: qualified name of `module` in the program, "" for the root.
        mode: True or False where this graph runs in training or evaluation only, None where in both.
        program: the whole of it.
    """

    def __init__(self, program: Program, module: GraphModule, path: str, graph: fx.Graph, mode: bool | None):
        self.program = program
        self.module = module
        self.path = path
        self.graph = graph
        self.mode = mode

    @property
    def training(self) -> bool:
        """Whether this graph is to be rewritten for training."""
        return self.module.training if self.mode is None else self.mode

    def take_both_modes(self) -> None:
        """Let this graph run in the other mode too; the one that ran there is gone then.

        Where layers are to be rewritten that both graphs call, in a way that only this one can follow.
        """
        other = next(one for one in self.program.regions if one is not self and one.module is self.module)
        self.program.regions.remove(other)
        for node in reversed(other.graph.nodes):
            other.graph.erase_node(node)
        self.module.keep_only(self.graph)
        self.mode = None
        for flag in [node for node in self.graph.nodes if self._is_training_flag(node)]:
            # What uses a flag and gives nothing is a guard: it holds the module to the mode of its graph.
            for guard in [user for user in flag.users if not user.users]:
                self.graph.erase_node(guard)

    def submodule(self, node: fx.Node) -> nn.Module:
        """The module that a `call_module` node calls."""
        module: nn.Module = self.module
        for part in str(node.target).split("."):
            # `get_submodule` looks each name up three times, which adds up where a pass asks for every call.
            module = module._modules.get(part) or getattr(module, part)
        return module

    def attribute(self, node: fx.Node) -> Any:
        """The parameter, buffer or constant that a `get_attr` node reads."""
        value: Any = self.module
        for part in str(node.target).split("."):
            value = getattr(value, part)
        return value

    def flag(self, argument: Any) -> Any:
        """`argument`, or the value that the `training` flag which it reads has in this graph's mode.

        Capture makes `F.dropout(x, training=self.training)` read the flag of the module that ran it.
        """
        if not isinstance(argument, fx.Node) or not self._is_training_flag(argument):
            return argument
        return self.training and bool(self.attribute(argument))

    def qualified(self, node: fx.Node) -> str:
        """What a report calls the node: the qualified name of its module or attribute, else its own name."""
        if node.op in ("call_module", "get_attr"):
            name = str(node.target)
        else:
            inside = node.meta.get("module_path", "")
            name = f"{inside}.{node.name}" if inside else node.name
        return self.qualified_path(name)

    def qualified_path(self, path: str) -> str:
        """What a path in `module` is in the program."""
        return f"{self.path}.{path}" if self.path else path

    @staticmethod
    def _is_training_flag(node: fx.Node) -> bool:
        return node.op == "get_attr" and str(node.target).rpartition(".")[2] == "training"

    def is_erased(self, node: fx.Node) -> bool:
        """Whether an earlier edit took `node` out of the graph."""
        return not _alive(node)

    def is_spared(self, node: fx.Node) -> bool:
        """Whether the pass is to leave `node` alone, since a change there was measured not to pay."""
        return self.qualified(node) in self.program.spared

    def add_module(self, hint: str, module: nn.Module) -> str:
        """Register `module` under `hint`, or the first free name like it, in the mode at hand; return that name."""
        module.train(self.module.training)
        return self._register(hint, lambda owner, leaf: owner.add_module(leaf, module))

    def add_parameter(self, hint: str, value: torch.Tensor, *, trainable: bool = True) -> str:
        """Register a parameter under `hint`, or the first free name like it, and return that name."""
        made = nn.Parameter(value, requires_grad=trainable)
        return self._register(hint, lambda owner, leaf: owner.register_parameter(leaf, made))

    def add_buffer(self, hint: str, value: torch.Tensor, *, persistent: bool = True) -> str:
        """Register a buffer under `hint`, or the first free name like it, and return that name."""
        return self._register(hint, lambda owner, leaf: owner.register_buffer(leaf, value, persistent=persistent))

    def swap(self, node: fx.Node, module: nn.Module) -> str:
        """Let `node` call `module` in place of the one that it calls now, and return its name.

        Where `node` was the only site the name stays; else the old module stays for the other sites and the
        new one is registered beside it.
        """
        old = self.submodule(node)
        module.train(old.training)
        name = str(node.target)
        if self.program.sites(old) == [node] and not self.program.inside_opaque(old):
            self.program.replace_module(old, module)
        else:
            name = self.add_module(name, module)
            node.target = name
            self.program._forget(node, old)
            self.program.note(node, self)
        return name

    def swap_parameter(self, node: fx.Node, value: torch.Tensor) -> None:
        """Put a new parameter in the place of the one that a `get_attr` node reads, under all of its names.

        Whatever reads the old one reads the new one then; it trains if the old one did.
        """
        self.program.replace_parameter(self.attribute(node), value)

    def insert_module(self, before: fx.Node, hint: str, module: nn.Module, args: tuple[Any, ...]) -> fx.Node:
        """Register `module`, insert a call of it before a node, and return the call."""
        name = self.add_module(hint, module)
        with self.graph.inserting_before(before):
            node = self.graph.call_module(name, args)
        self.program.note(node, self)
        return node

    def insert_function(self, before: fx.Node, function: Any, args: tuple[Any, ...], kwargs: Any = None) -> fx.Node:
        """Insert a call of `function` before a node and return it."""
        with self.graph.inserting_before(before):
            return self.graph.call_function(function, args, kwargs or {})

    def insert_attribute(self, before: fx.Node, name: str) -> fx.Node:
        """Insert a read of a registered parameter or buffer before a node and return it."""
        with self.graph.inserting_before(before):
            # Nested names are as valid as flat ones; torch warns where it cannot see them.
            node = self.graph.create_node("get_attr", name)
        self.program.note(node, self)
        return node

    def replace(self, old: fx.Node, new: fx.Node) -> None:
        """Let all users of `old` use `new`, which inherits its origin, and erase `old`."""
        inherit(new, old)
        old.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
        self.graph.erase_node(old)

    def absorb(self, node: fx.Node, layer: fx.Node, *, passes_on: bool = True, repeatable: bool = False) -> None:
        """Say that `layer` computes from now on what `node` does, before an edit takes `node` out of the graph.

        Once the pass has run, the Python code of the modules that make these calls does not compute it twice.

        Args:
            node: what is to go.
            layer: the call of the layer.
            passes_on: whether nothing is missing where the code of `node` passes on its input instead.
            repeatable: whether nothing changes where it is computed once more.
        """
        self.program.absorbed.append(Absorbed.of(node, layer, self, passes_on, repeatable))

    def _register(self, hint: str, add: Callable[[nn.Module, str], None]) -> str:
        name = self._free(hint)
        path, _, leaf = name.rpartition(".")
        owner = self._owner(path)
        add(owner, leaf)
        self.program.note_place(owner, leaf)
        return name

    def _free(self, hint: str) -> str:
        name, count = hint, 0
        while self._taken(name):
            count += 1
            name = f"{hint}_{count}"
        return name

    def _taken(self, name: str) -> bool:
        value: Any = self.module
        for part in name.split("."):
            if not hasattr(value, part):
                return False
            value = getattr(value, part)
        return True

    def _owner(self, path: str) -> nn.Module:
        owner: nn.Module = self.module
        for part in path.split(".") if path else ():
            if part not in owner._modules:
                owner.add_module(part, nn.Module().train(self.module.training))
                self.program.note_place(owner, part)
            owner = owner.get_submodule(part)
        return owner


def _alive(node: fx.Node) -> bool:
    return not node._erased


def memory_of(tensor: torch.Tensor) -> int:
    """What two tensors share exactly where writing one shows in the other."""
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):  # sparse tensors have no storage
        return id(tensor)


def _read_by_call(module: nn.Module) -> set[int]:
    outside = [module, *_outside_of_graphs(module)] if not isinstance(module, GraphModule) else []
    return {
        memory_of(t) for part in outside for t in (*part._parameters.values(), *part._buffers.values()) if t is not None
    }


def _outside_of_graphs(module: nn.Module) -> Iterator[nn.Module]:
    """The modules that the Python code of an opaque module can reach without passing through a graph."""
    for child in module.children():
        if isinstance(child, GraphModule):
            continue
        yield child
        yield from _outside_of_graphs(child)

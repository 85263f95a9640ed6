"""torch.compile's default backend: loops and fusions generated and compiled for this machine."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

import torch
from torch import nn
from torch.utils import _pytree as pytree

from fxopt.capture.independent import same_tensors_copy
from fxopt.capture.state import state_kept
from fxopt.contract import Skip
from fxopt.engines.binding import named
from fxopt.engines.contract import Built, Engine
from fxopt.engines.saturation import SATURATES, saturates
from fxopt.engines.written import refuse_writes
from fxopt.errors import EngineError
from fxopt.graph import GraphModule
from fxopt.inputs import Inputs
from fxopt.modules import for_inductor, is_quantized


@dataclass(frozen=True)
class Inductor(Engine):
    """Compiles the graph by TorchInductor; weights become constants where `freezing` says so.

    The first call with other sizes compiles once more. Layers of a quantised module run on integers if weights are
    constants.
    """

    name: ClassVar[str] = "inductor"
    devices: ClassVar[tuple[str, ...]] = ("cpu", "cuda")
    integers: ClassVar[bool] = True

    freezing: bool = field(default=True, metadata={"help": "treat weights as constants: fold and pack them"})
    max_autotune: bool = field(default=False, metadata={"help": "try more kernels, for a longer build"})

    def unavailable(self) -> str | None:
        """It needs a C++ compiler."""
        names = [name for name in (*_listed(_config().cpp.cxx), "g++", "clang++", "cl") if name]
        if any(shutil.which(name) for name in names):
            return None
        return "torch.compile needs a C++ compiler; `apt-get install g++` brings one"

    def build(self, module: GraphModule, inputs: Inputs, choices: Mapping[str, Any]) -> Built:
        """See `Engine.build`; the first call compiles, and is made here."""
        config = _config()
        with _quiet():
            from torch._inductor.compile_fx import compile_fx

            from fxopt.engines.inductor_integers import CountIntegers

        copy: nn.Module = cast(GraphModule, same_tensors_copy(module))
        if self.freezing:
            _copy_constants(cast(GraphModule, copy))
        options: dict[str, Any] = {"max_autotune": self.max_autotune}
        reasons: list[Skip] = []
        integers = False
        if is_quantized(module):
            try:
                given = inputs.map(lambda tensor: tensor.detach().clone())
                # What runs on integers is a copy that is given copies.
                with torch.no_grad(), refuse_writes(self.name, module, given.tensors):
                    module(*given.args, **given.kwargs)
                copy = for_inductor(copy)
                options["post_grad_custom_pre_pass"] = CountIntegers(reasons)
                integers = True
            except EngineError as error:
                reasons.append(Skip("", f"the rounding is simulated in floats: {error}"))

        def compiler(graph: torch.fx.GraphModule, given: list[torch.Tensor]) -> Any:
            # Here and not around the first call alone, since other sizes are compiled whenever they come.
            with _quiet():
                return compile_fx(graph, given, config_patches=options)

        compiled = torch.compile(copy, backend=compiler)

        def run(*args: Any, **kwargs: Any) -> Any:
            # As an option of torch.compile it would not reach Dynamo, which hands weights on as inputs then.
            before = config.freezing
            config.freezing = self.freezing
            try:
                if integers:
                    # Its integer kernels add into what a layer is added to, even where that is the caller's input.
                    args, kwargs = pytree.tree_map_only(torch.Tensor, torch.clone, (args, kwargs))
                return compiled(*args, **kwargs)
            finally:
                config.freezing = before

        try:
            with torch.no_grad(), _quiet(), state_kept(copy):
                given = inputs.map(lambda tensor: tensor.detach().clone())
                run(*given.args, **given.kwargs)
        except Exception as error:  # whatever a compiler raises
            raise EngineError(
                f"engine 'inductor' cannot compile the module: {type(error).__name__}: {_first_line(error)}"
            ) from error
        if integers and saturates(module):
            reasons.append(SATURATES)

        def run_others(*args: Any, **kwargs: Any) -> Any:
            try:
                return run(*args, **kwargs)
            except (AssertionError, torch._dynamo.exc.TorchDynamoException) as error:
                raise EngineError(
                    f"engine 'inductor' fails for inputs of these sizes: {type(error).__name__}: {_first_line(error)}; "
                    "lower the module again with such inputs"
                ) from error

        return Built(run_others, tuple(reasons), holds=(copy,))


def _copy_constants(module: GraphModule) -> None:
    """Give copies of outputs that depend on no input: frozen, they are the compiler's own, and a caller may write."""
    copied = torch.compiler.disable(lambda value: pytree.tree_map_only(torch.Tensor, torch.clone, value))
    graph, reached = module.graph, set[torch.fx.Node]()
    for node in graph.nodes:
        if node.op == "placeholder" or not reached.isdisjoint(node.all_input_nodes):
            reached.add(node)
    output = next(iter(reversed(graph.nodes)))
    for value in output.all_input_nodes:
        if value not in reached and value.op != "get_attr":
            with graph.inserting_before(output):
                output.replace_input_with(value, graph.call_function(named(copied, "copied"), (value,)))
    module.recompile()


def _config() -> Any:
    """TorchInductor's settings, imported here since that takes as long as importing torch."""
    with _quiet():
        from torch._inductor import config
    return config


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what the compiler says of its own deprecated parts."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _listed(names: Any) -> list[str]:
    return [names] if isinstance(names, str) else [name for name in names or () if isinstance(name, str)]


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "")

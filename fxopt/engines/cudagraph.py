"""A CUDA graph around another engine: all launches of a forward as one."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch

from fxopt.capture.copy_on_write import lazy_copy
from fxopt.engines.contract import Built, Engine, Sizes
from fxopt.engines.cudnn import CuDNN
from fxopt.engines.inductor import Inductor
from fxopt.engines.written import refuse_writes
from fxopt.errors import EngineError
from fxopt.graph import GraphModule
from fxopt.inputs import Inputs
from fxopt.nested import tensors_in, with_tensors

_WARM_UP_CALLS = 3


@dataclass(frozen=True)
class CudaGraph(Engine):
    """Records what another engine launches for the example, and replays it on the values of each call.

    Sizes are those of the example. Outputs are copied out, so that a later call leaves them as they are.
    """

    name: ClassVar[str] = "cudagraph"
    devices: ClassVar[tuple[str, ...]] = ("cuda",)
    sizes: ClassVar[Sizes] = Sizes.FIXED

    around: Literal["eager", "cudnn", "inductor"] = field(
        default="cudnn", metadata={"help": "what is recorded: eager, cudnn or inductor"}
    )
    tf32: bool = field(default=False, metadata={"help": "of cudnn: round the operands of float32 products to TF32"})

    def __post_init__(self) -> None:
        if self.around not in ("eager", "cudnn", "inductor"):
            raise EngineError(f"engine 'cudagraph': around is 'eager', 'cudnn' or 'inductor', not {self.around!r}")

    def unavailable(self) -> str | None:
        """As what it is around, on a GPU."""
        inner = self._inner()
        return CuDNN().unavailable() or (inner.unavailable() if inner is not None else None)

    def tolerance(self, dtype: torch.dtype) -> float:
        """That of what it is around."""
        inner = self._inner()
        return super().tolerance(dtype) if inner is None else inner.tolerance(dtype)

    def build(self, module: GraphModule, inputs: Inputs, choices: Mapping[str, Any]) -> Built:
        """See `Engine.build`."""
        inner = self._inner()
        built = Built(module) if inner is None else inner.build(module, inputs, choices)
        # What the graph reads: the tensors of each call are copied into these.
        held = inputs.map(lambda tensor: tensor.detach().clone())
        own = held.tensors
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        try:
            # Kernels are chosen and workspaces taken before the recording.
            with torch.cuda.stream(stream), refuse_writes(self.name, module, own):
                for _ in range(_WARM_UP_CALLS):
                    built.run(*held.args, **held.kwargs)
            torch.cuda.current_stream().wait_stream(stream)
            with torch.cuda.graph(graph):
                output = built.run(*held.args, **held.kwargs)
        except RuntimeError as error:
            raise EngineError(
                f"engine 'cudagraph' cannot record '{self.around}': {error}; a forward that waits for the GPU, by "
                "`.item()` or a copy to the CPU, can't be replayed"
            ) from error

        # It reads memory by address: what the inner engine packed has to live on, and so has the memory of a weight,
        # which a tensor leaves when it is written while a lazy copy shares it.
        alive = (graph, built, [lazy_copy(tensor) for tensor in (*module.parameters(), *module.buffers())])
        one_at_a_time = threading.Lock()  # calls of other threads would write into the same inputs

        def run(*args: Any, **kwargs: Any) -> Any:
            with one_at_a_time:
                for tensor, given in zip(own, tensors_in((args, kwargs)), strict=True):
                    tensor.copy_(given)
                alive[0].replay()
                return with_tensors(output, torch.clone)

        return Built(run, built.reasons, built.choices, holds=built.holds)

    def _inner(self) -> Engine | None:
        return {"eager": None, "cudnn": CuDNN(self.tf32), "inductor": Inductor()}[self.around]

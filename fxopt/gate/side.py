"""One side of a gate, inside of its process: the module as it is after some passes, timed and looked at on request."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fxopt import spec
from fxopt.bench.arm import Arm
from fxopt.bench.cuda import CudaTimer
from fxopt.bench.device import measurable
from fxopt.bench.idle import wait_until_idle
from fxopt.bench.profiling import profile
from fxopt.bench.roofline import Roofline
from fxopt.bench.size import measure_size
from fxopt.bench.surroundings import quiet
from fxopt.bench.timer import CpuTimer, Timer
from fxopt.capture import capture
from fxopt.capture.independent import apart_in_memory, independent_copy
from fxopt.contract import Pass
from fxopt.engines import Executable, lower
from fxopt.engines.once import once
from fxopt.errors import BaselineError
from fxopt.evaluation import evaluated
from fxopt.inputs import Inputs
from fxopt.pipeline import aimed_at, run_passes
from fxopt.record import plain
from fxopt.relative_error import relative_error
from fxopt.rewriting import run_pass
from fxopt.target import load
from fxopt.verify import Oracle

_PACKAGE = Path(__file__).resolve().parents[1]


class Side:
    """A target of one checkout.

    Args:
        order: `target`, `inputs`, `weights`, `passes`, `engine`, `device`, `threads`, `seed`; `foreign`, a directory
            from which no module may come, but for those of the environments in `kept`.
    """

    def __init__(self, order: dict[str, Any]):
        torch.manual_seed(0)
        self._order = order
        # With more, torch would start threads here, and then no twin could be forked.
        torch.set_num_threads(1)
        weights = None if order["weights"] is None else Path(order["weights"])
        self._target = load(order["target"], inputs=order["inputs"], weights=weights)
        _refuse_foreign(order["foreign"], order["kept"])
        self._passes = aimed_at(order["engine"], spec.parse(order["passes"]) if order["passes"] else ())
        self._inputs = self._target.inputs
        self._device = measurable(order["device"])
        self._module: Callable[..., Any] = self._target.module
        self._copies = True
        self._held = ExitStack()
        self._outputs: list[torch.Tensor] = []
        self._arm: Arm | None = None
        self._timer: Timer | None = None
        self._rests = True

    @property
    def forkable(self) -> bool:
        """Whether a fork would be whole, and another process of the same speed.

        Threads and CUDA don't survive a fork. A twin times a copy of the module: what can't be copied would lie where
        it lies in all of them.
        """
        tasks = Path("/proc/self/task")
        alone = tasks.is_dir() and len(list(tasks.iterdir())) == 1
        return alone and self._device.type == "cpu" and not torch.cuda.is_initialized() and self._copies

    def give_inputs(self, keep: str) -> None:
        """Leave the inputs in a file, for the other side."""
        torch.save(self._inputs, keep)

    def take_inputs(self, kept: str) -> None:
        """Use those of the other side.

        Raises:
            BaselineError: where they differ in shape or dtype from the target's own.
        """
        inputs, own = torch.load(kept, weights_only=False), self._inputs
        assert isinstance(inputs, Inputs)
        if inputs.describe() != own.describe():
            raise BaselineError(
                f"the inputs are {own.describe()}, in the base {inputs.describe()}: times of unequal work can't be "
                "compared; give both the same by --input, or change the inputs in a commit of its own"
            )
        self._inputs = inputs

    def build(self, stages: int | None = None, changes: int | None = None) -> None:
        """Make what is to be timed.

        Args:
            stages: how many of the passes to apply; None for all.
            changes: how many changes of the last of these.
        """
        with quiet(self._device, 1):
            module = self._after(self._target.module, self._passes[:stages], changes)
        if self._order["engine"]:
            # Its own call: a copy would have to be built again.
            self._module, self._copies = self._lowered(module).forward, False
            return
        self._module = module
        try:
            apart_in_memory(module)
        except Exception:  # whatever the user's module raises; it is then timed itself
            self._copies = False

    def warm(self, cores: Sequence[int] | None = None) -> bool:
        """Make the first two calls, from now on on these cores.

        Returns:
            Whether calls write into the inputs; these are then put back before whatever is timed together.
        """
        self._hold_still(cores)
        self._arm = Arm(self._order["side"], self._module, self._inputs, self._device)
        self._timer = CudaTimer(self._device) if self._device.type == "cuda" else CpuTimer()
        self.time(1)
        writes = self._arm.writes_inputs
        if writes:
            self._arm.keep_inputs(self._inputs)
        self.time(1)
        return writes

    def time(self, calls: int) -> dict[str, Any]:
        """Time so many calls together, and answer once no thread is left that would disturb another side."""
        assert self._arm is not None and self._timer is not None
        timer = self._timer
        sample = self._arm.under(lambda call: timer.time(call, calls))
        self._rests = self._rests and wait_until_idle()
        clock = None if sample.clocks is None else sample.clocks.sm_mhz
        return {"seconds": sample.seconds, "preempted": sample.preempted, "mhz": clock}

    def modules(self) -> list[dict[str, Any]]:
        """Where the time goes, by submodule."""
        self._hold_still()
        found = profile(self._target.module, self._inputs, self._device, roofline=Roofline(1.0, 1.0, ""), threads=None)
        return [{"name": cost.name, "kind": cost.kind, "seconds": cost.seconds} for cost in found.modules]

    def facts(self, keep: str) -> dict[str, Any]:
        """Run and verify the passes, and find everything but the latency; leave weights and outputs in a file."""
        self._hold_still()
        target = self._target
        result: nn.Module = target.module
        facts: dict[str, Any] = {"inputs": self._inputs.describe(), "passes": [], "coverage": None}
        if self._passes:
            oracle = Oracle(target.module, self._inputs, self._order["seed"])
            captured = capture(target.module, self._inputs)
            ledger = run_passes(captured, self._passes, oracle, self._batches)
            result = captured.module
            facts["coverage"] = asdict(captured.coverage)
            facts["passes"] = [
                {
                    "name": entry.pass_name,
                    "changes": [asdict(change) for change in entry.changes],
                    "skips": [asdict(skip) for skip in entry.skips],
                    "relative_error": plain(entry.relative_error),
                }
                for entry in ledger
            ]
            facts["graph"] = _graph(captured.module)
        facts["metrics"] = None if target.evaluate is None else plain(evaluated(target.evaluate, result))
        facts["size"] = asdict(measure_size(result, self._inputs, self._device))
        if self._order["engine"]:
            facts["size"]["peak_memory"] = None  # which the operators of torch tell, and not an engine
        self._outputs = self._outputs_of(result)
        torch.save({"state": _tensors(target.module), "outputs": self._outputs}, keep)
        return facts

    def output_error(self, kept: str) -> float | str:
        """After `facts`: the largest difference of an output over the largest output, with the other side's weights.

        Args:
            kept: what `facts` has left there.

        Returns:
            The error, or why there is none.
        """
        other, state = torch.load(kept, weights_only=False), _tensors(self._target.module)
        theirs = other["state"]
        if theirs.keys() != state.keys() or any(theirs[name].shape != value.shape for name, value in state.items()):
            return "parameters have other names or shapes than in the base, so equal weights can't be given to both"
        outputs = self._outputs
        if any(not torch.equal(theirs[name], value) for name, value in state.items()):
            twin = independent_copy(self._target.module)
            twin.load_state_dict(theirs, strict=False)
            try:
                outputs = self._outputs_of(self._after(twin, self._passes))
            except Exception as error:  # whatever a module raises where its weights are not its own
                return f"the head fails with the weights of the base: {type(error).__name__}: {error}"
        if [one.shape for one in outputs] != [one.shape for one in other["outputs"]]:
            return "the outputs have other shapes than in the base"
        return max(map(relative_error, other["outputs"], outputs), default=0.0)

    def _hold_still(self, cores: Sequence[int] | None = None) -> None:
        """Until the process ends, as many threads as are asked for, and nothing that disturbs."""
        self._held.enter_context(quiet(self._device, self._order["threads"], cores))

    def _after(self, module: nn.Module, passes: Sequence[Pass], changes: int | None = None) -> nn.Module:
        """A module after passes; of the last one so many changes, None for all."""
        if not passes:
            return module
        captured, batches = capture(module, self._inputs), self._batches
        run_passes(captured, passes if changes is None else passes[:-1], None, batches)
        if changes:
            run_pass(passes[-1], captured.module, (), limit=changes)
            for _ in passes[-1].finish(captured.module, batches):
                pass  # it works while it is asked what it did
        return captured.module

    def _lowered(self, module: nn.Module) -> Executable:
        """Built for as many threads as it will have."""
        with quiet(self._device, self._order["threads"]):
            inputs = self._inputs.map(lambda tensor: tensor.detach().to(self._device, copy=True))
            return lower(independent_copy(module).to(self._device), inputs, self._order["engine"])

    def _outputs_of(self, module: nn.Module) -> list[torch.Tensor]:
        """What is given by what would be timed: the module, or the engine that runs it."""
        inputs, run, holds = self._inputs, module, [module]
        if self._order["engine"]:
            run = executable = self._lowered(module)
            inputs, holds = inputs.to(self._device), [*executable.holds]
        with torch.no_grad():
            values, _ = once(run, holds, inputs)
        found = [value for value in values if isinstance(value, torch.Tensor) and value.layout is torch.strided]
        return [tensor.detach().cpu() for tensor in found]

    @functools.cached_property
    def _batches(self) -> list[Inputs]:
        """The calibration data, asked for once: an iterator gives it no second time."""
        return [Inputs.of(batch) for batch in self._target.calibration_data or ()]


def _tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value for name, value in module.state_dict().items() if isinstance(value, torch.Tensor)}


def _graph(module: Any) -> list[dict[str, str]]:
    from fxopt.graph import Program, source_of

    lines = []
    for region in Program(module).regions:
        for node in region.graph.nodes:
            if node.op != "output":
                name = region.qualified(node)
                what = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", node.target)
                if node.op == "call_module":
                    what = type(region.submodule(node)).__name__
                file = os.path.relpath(node.meta["source"].file) if node.meta.get("source") else ""
                found = {"op": node.op, "what": str(what), "name": name}
                lines.append(found | {"source": source_of(node), "file": Path(file).as_posix() if file else ""})
    return lines


def _refuse_foreign(directory: str | None, kept: Sequence[str]) -> None:
    """The other checkout must not have lent any code: what is compared would be the same."""
    if directory is None:
        return
    allowed = [Path(sys.prefix).resolve(), _PACKAGE, *map(Path, kept)]
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if file is None or not Path(file).is_absolute():
            continue
        path = Path(file).resolve()
        if path.is_relative_to(directory) and not any(map(path.is_relative_to, allowed)):
            raise BaselineError(
                f"the base imports '{name}' from the working tree ('{file}'), so both sides would be the same code: "
                "install the package in editable mode by its path, or put the repository on PYTHONPATH"
            )

"""One side of a gate, inside of its process: the module as it is after some passes, timed and looked at on request."""

from __future__ import annotations

import copy
import sys
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from fxopt import spec
from fxopt.bench.arm import Arm
from fxopt.bench.cuda import CudaTimer
from fxopt.bench.device import measurable
from fxopt.bench.profiling import profile
from fxopt.bench.roofline import Roofline
from fxopt.bench.size import measure_size
from fxopt.bench.surroundings import quiet
from fxopt.bench.timer import CpuTimer, Timer
from fxopt.capture import capture
from fxopt.contract import Pass
from fxopt.errors import BaselineError
from fxopt.inputs import Inputs
from fxopt.pipeline import replay, run_passes
from fxopt.record import plain
from fxopt.rewriting import run_pass
from fxopt.target import load
from fxopt.verify import Oracle

_PACKAGE = Path(__file__).parents[1]


class Side:
    """A target of one checkout. A context: surroundings are held still inside of it.

    Args:
        order: `target`, `inputs`, `weights`, `passes`, `device`, `threads`, `seed`; `stages`, how many of the passes
            to apply (None for all), and `changes`, how many changes of the last of these; `shared`, a file with
            inputs to use; `foreign`, a directory from which no module may come.
    """

    def __init__(self, order: dict[str, Any]):
        torch.manual_seed(0)
        self._held = ExitStack()
        self._order = order
        weights = None if order["weights"] is None else Path(order["weights"])
        torch.set_num_threads(order["threads"])
        self._target = load(order["target"], inputs=order["inputs"], weights=weights)
        _refuse_foreign(order["foreign"])
        self._passes = spec.parse(order["passes"]) if order["passes"] else ()
        self._inputs = self._target.inputs
        if order["shared"] is not None:
            self._inputs = _shared_inputs(Path(order["shared"]), self._inputs)
        self._device = measurable(order["device"])
        self._arm: Arm | None = None
        self._timer: Timer | None = None

    def __enter__(self) -> Side:
        self._held.enter_context(quiet(self._device, self._order["threads"]))
        return self

    def __exit__(self, *error: object) -> None:
        self._held.close()

    def warm(self) -> float:
        """Build what is to be timed, and make its first two calls; seconds of the second."""
        module = self._rewritten(self._target.module)
        self._arm = Arm(self._order["side"], module, self._inputs, self._device)
        self._timer = CudaTimer(self._device) if self._device.type == "cuda" else CpuTimer()
        self.time(1)
        if self._arm.writes_inputs:
            self._arm.keep_inputs(self._inputs)
        return float(self.time(1)["seconds"])

    def time(self, calls: int) -> dict[str, Any]:
        """Time so many calls together."""
        assert self._arm is not None and self._timer is not None
        timer = self._timer
        sample = self._arm.under(lambda call: timer.time(call, calls))
        clock = None if sample.clocks is None else sample.clocks.sm_mhz
        return {"seconds": sample.seconds, "preempted": sample.preempted, "mhz": clock}

    def modules(self) -> list[dict[str, Any]]:
        """Where the time goes, by submodule."""
        found = profile(self._target.module, self._inputs, self._device, roofline=Roofline(1.0, 1.0, ""), threads=None)
        return [{"name": cost.name, "kind": cost.kind, "seconds": cost.seconds} for cost in found.modules]

    def facts(self, keep: str, held: str | None) -> dict[str, Any]:
        """Run and verify the passes, and find everything but the latency.

        Args:
            keep: file to leave inputs, weights and outputs in.
            held: such a file of the other side, to compare the outputs with.
        """
        target, captured = self._target, None
        result: nn.Module = target.module
        facts: dict[str, Any] = {"inputs": self._inputs.describe(), "passes": [], "coverage": None}
        if self._passes:
            oracle = Oracle(target.module, self._inputs, self._order["seed"])
            captured = capture(target.module, self._inputs.args, self._inputs.kwargs)
            ledger = run_passes(captured, self._passes, oracle, self._batches())
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
        facts["metrics"] = plain(target.evaluate(result)) if target.evaluate is not None else None
        facts["size"] = asdict(measure_size(result, self._inputs, self._device))
        outputs = _outputs(result, self._inputs)
        state = {name: value for name, value in target.module.state_dict().items() if isinstance(value, torch.Tensor)}
        torch.save({"inputs": self._inputs, "state": state, "outputs": outputs}, keep)
        if held is not None:
            facts["output_error"] = self._error(result, state, torch.load(held, weights_only=False))
        return facts

    def _rewritten(self, module: nn.Module) -> nn.Module:
        stages, changes = self._order["stages"], self._order["changes"]
        passes: tuple[Pass, ...] = tuple(self._passes if stages is None else self._passes[:stages])
        if not passes:
            return module
        captured = capture(module, self._inputs.args, self._inputs.kwargs)
        if changes is None:
            run_passes(captured, passes, None, self._batches())
        else:
            run_passes(captured, passes[:-1], None, self._batches())
            if changes:
                run_pass(passes[-1], captured.module, (), limit=changes)
        return captured.module

    def _batches(self) -> list[Inputs]:
        return [Inputs.of(batch) for batch in self._target.calibration_data or ()]

    def _error(self, result: nn.Module, state: dict[str, torch.Tensor], other: dict[str, Any]) -> float | str:
        """The largest difference of an output over the largest output, with the other side's weights; or why none."""
        theirs = other["state"]
        if theirs.keys() != state.keys() or any(theirs[name].shape != value.shape for name, value in state.items()):
            return "parameters have other names or shapes than in the base, so equal weights can't be given to both"
        outputs = None
        if any(not torch.equal(theirs[name], value) for name, value in state.items()):
            twin = copy.deepcopy(self._target.module)
            twin.load_state_dict(theirs, strict=False)
            result = replay(twin, self._inputs, self._passes) if self._passes else twin
        outputs = _outputs(result, self._inputs)
        if [one.shape for one in outputs] != [one.shape for one in other["outputs"]]:
            return "the outputs have other shapes than in the base"
        worst = 0.0
        for mine, their in zip(outputs, other["outputs"], strict=True):
            one, two = mine.double(), their.double()
            scale = float(two.abs().max()) if two.numel() else 0.0
            gap = float((one - two).abs().max()) if two.numel() else 0.0
            worst = max(worst, gap / scale if scale else gap)
        return worst


def _shared_inputs(path: Path, own: Inputs) -> Inputs:
    inputs = torch.load(path, weights_only=False)["inputs"]
    assert isinstance(inputs, Inputs)
    if inputs.describe() != own.describe():
        raise BaselineError(
            f"the inputs are {own.describe()}, in the base {inputs.describe()}: times of unequal work can't be "
            "compared; give both the same by --input, or change the inputs in a commit of its own"
        )
    return inputs


def _outputs(module: nn.Module, inputs: Inputs) -> list[torch.Tensor]:
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        given = inputs.map(torch.clone)
        leaves = pytree.tree_leaves(copy.deepcopy(module)(*given.args, **given.kwargs))
    return [leaf.detach().clone() for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.layout is torch.strided]


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
                lines.append({"op": node.op, "what": str(what), "name": name, "source": source_of(node)})
    return lines


def _refuse_foreign(directory: str | None) -> None:
    """The other checkout must not have lent any code: what is compared would be the same."""
    if directory is None:
        return
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if file is None or not Path(file).is_absolute():
            continue
        path = Path(file)
        if path.is_relative_to(directory) and not path.is_relative_to(sys.prefix) and not path.is_relative_to(_PACKAGE):
            raise BaselineError(
                f"the base imports '{name}' from the working tree ('{file}'), so both sides would be the same code: "
                "install the package in editable mode by its path, or put the repository on PYTHONPATH"
            )

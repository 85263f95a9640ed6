"""What integers gain and what they cost: latency, size and faithfulness of int8 models, and training towards them.

    python benchmarks/quantization.py [--out benchmarks/results] [--budget 4] [--forms FORM ...] [MODEL ...]

Each model is quantised after training (random weights, random calibration data: the speed and the parity of the file do
not depend on them, accuracy does) and frozen, then run by each engine that is installed. All forms of a model and eager
float32 are timed in turns, by blocks of calls. SQNR is that of the outputs for 16 inputs against the float model's: of
the file, of its simulation in torch, and of the one against the other. Of bert-base only the file is weighed. Training
steps and the time for insertion follow; all of it takes over 20 minutes on two cores. The record is written
after each model, and what is in it is not measured again.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import onnx
import torch
import torch.nn.functional as F
from quantization_models import BERT, MODELS
from tabulate import tabulate
from torch import nn
from turns import Run, in_turns

import fxopt
from fxopt import bench
from fxopt.bench.statistics import paired_interval
from fxopt.bench.surroundings import quiet
from fxopt.errors import EngineError
from passes import PTQ, QAT, Clean, Fuse, QuantizeFreeze

Row = dict[str, Any]
FORMS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "onednn, float32": ("onednn", "float", {}),
    "onnxruntime, float32": ("onnxruntime", "float", {}),
    "onnxruntime, int8": ("onnxruntime", "onnxruntime", {}),
    "onnxruntime, int8 as placed for none": ("onnxruntime", "generic", {}),
    "openvino, float32": ("openvino", "float", {}),
    "openvino, bf16": ("openvino", "float", {"precision": "bf16"}),
    "openvino, int8": ("openvino", "openvino", {}),
    "openvino, int8 as placed for onnxruntime": ("openvino", "onnxruntime", {}),
    "openvino, int8 and bf16": ("openvino", "openvino", {"precision": "bf16"}),
    "inductor, int8": ("inductor", "inductor", {}),
}
_WEIGHT_FILES = (".onnx", ".data", ".bin")
_GRAPH_FILES = (".xml",)
_WEIGHED = "onnxruntime, int8"
_TRAINING = {
    "qat, batch norms train": "fuse,qat",
    "qat, batch norms folded": "clean,fuse,qat",
}
_TRAINED, _INSERTED = "resnet18", "resnet50"
_PROBES = 16
"""Inputs of which the outputs are compared."""
_STEPS = 8
"""Times the budget of a row: a step is long."""


def main() -> None:
    """Measure and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL", help="those named alone, and neither of the costs")
    parser.add_argument("--forms", nargs="*", default=list(FORMS), choices=FORMS, metavar="FORM")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--budget", type=float, default=4.0, help="seconds for each form")
    parser.add_argument("--costs", action="store_true", help="measure training and inserting, whatever is named")
    options = parser.parse_args()
    path = options.out / "quantization.json"
    record = json.loads(path.read_text()) if path.exists() else {"models": {}, "costs": {}}
    record["machine"] = dataclasses.asdict(bench.fingerprint())

    def add(section: Row, names: Sequence[str], measured: Callable[[Sequence[str]], Row]) -> None:
        missing = [name for name in names if "not_measured" in section.get(name, {"not_measured": "yet"})]
        if not missing:
            return
        section |= measured(missing)
        options.out.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        (options.out / "quantization.md").write_text(render(record), encoding="utf-8")
        for name in missing:
            print(section[name].get("model", ""), name, json.dumps(section[name]), flush=True)

    for name in options.models or MODELS:
        rows = record["models"].setdefault(name, {})
        forms = [_WEIGHED] if name == BERT else options.forms
        add(rows, forms, lambda missing, name=name: Subject(name).rows(missing, options.budget))  # type: ignore[misc]
    if options.costs or not options.models:
        costs = {name: functools.partial(training, spec, options.budget * _STEPS) for name, spec in _TRAINING.items()}
        for name, measured in {**costs, "insertion": insertion}.items():
            add(record["costs"], [name], lambda missing, run=measured: {missing[0]: run()})  # type: ignore[misc]
    print(render(record))


class Subject:
    """A model with its graphs, which several rows share."""

    def __init__(self, name: str):
        torch.manual_seed(0)
        self.name = name
        self.model, self.inputs = MODELS[name]()
        self.model.eval()
        self.graph = functools.cache(self._graph)
        self.probes = [self.inputs, *self._batches(_PROBES - 1, seed=2, batch=len(self.inputs))]
        self.wanted = self.outputs(self.model)

    @torch.no_grad()
    def outputs(self, run: Callable[[torch.Tensor], Any]) -> torch.Tensor:
        """Those of all probes: what one input shows of the error is chance."""
        return torch.stack([first(run(probe)) for probe in self.probes])

    def _graph(self, target: str) -> nn.Module:
        """What goes to the engine: fused, and quantised for it unless it is the float one."""
        passes: list[fxopt.contract.Pass] = [Clean(), Fuse()]
        if target != "float":
            passes += [PTQ(target=target), QuantizeFreeze()]  # type: ignore[arg-type]
        data = self._batches(4 if self.inputs.is_floating_point() else 2, seed=1, batch=4)
        return fxopt.optimize(self.model, self.inputs, passes, devices=(), calibration_data=data).module

    def _batches(self, count: int, seed: int, batch: int) -> list[torch.Tensor]:
        torch.manual_seed(seed)
        shape = (batch, *self.inputs.shape[1:])
        if self.inputs.is_floating_point():
            return [torch.randn(shape) for _ in range(count)]
        return [torch.randint(0, 30000, shape) for _ in range(count)]

    def rows(self, forms: Sequence[str], budget: float) -> dict[str, Row]:
        """Forms of the model, timed beside eager float32 with `budget` seconds for each."""
        rows: dict[str, Row] = {}
        runs: dict[str, Run] = {}
        for form in forms:
            try:
                rows[form], executable = self._built(form)
            except EngineError as error:
                rows[form] = {"not_measured": str(error)}
                continue
            runs[form] = functools.partial(executable, self.inputs)
        if self.name == BERT:
            return rows
        eager = functools.partial(self.model, self.inputs)
        with quiet(torch.device("cpu")):
            times = in_turns({"eager": eager, "again": eager, **runs}, budget * len(runs))
        noise = paired_interval(times["eager"], times["again"]).reach
        for form in runs:
            found = paired_interval(times["eager"], times[form])
            medians = {"before_ms": 1e3 * median(times["eager"]), "after_ms": 1e3 * median(times[form])}
            rows[form] |= medians | dataclasses.asdict(found) | {"noise_floor": noise, "rounds": len(times[form])}
        return rows

    def _built(self, form: str) -> tuple[Row, fxopt.Executable]:
        """What is known of a form but its latency."""
        engine, target, engine_options = FORMS[form]
        executable = fxopt.lower(self.graph(target), self.inputs, engine=engine, **engine_options)
        deployed, simulated = self.outputs(executable), self.outputs(self.graph(target))
        return {
            "model": self.name,
            "build_seconds": executable.build_seconds,
            "sqnr_db": sqnr(deployed, self.wanted),
            "simulated_sqnr_db": sqnr(simulated, self.wanted),
            "sqnr_to_simulation_db": sqnr(deployed, simulated),
            "float_bytes": sum(each.numel() * each.element_size() for each in self.model.state_dict().values()),
            **sizes(executable),
            "reasons": [f"{skip.where}: {skip.reason}" for skip in executable.reasons[:1]],
        }, executable


def training(spec: str, budget: float) -> Row:
    """A training step of the quantised model over one of the float model: forward, backward, SGD."""
    torch.manual_seed(0)
    model, image = MODELS[_TRAINED]()
    images, labels = torch.randn(8, *image.shape[1:]), torch.randint(0, 1000, (8,))
    model.train(spec == _TRAINING["qat, batch norms train"])
    quantised = fxopt.optimize(model, images, spec, devices=(), calibration_data=[images]).module
    found = fxopt.compare(step(model, labels), step(quantised, labels), images, budget_seconds=budget)
    return {"model": _TRAINED, **times(found)}


def step(module: nn.Module, labels: torch.Tensor) -> Callable[[torch.Tensor], None]:
    """A training step, as a function of the images."""
    module.train()
    optimizer = torch.optim.SGD(module.parameters(), 1e-3)

    def run(images: torch.Tensor) -> None:
        with torch.enable_grad():
            optimizer.zero_grad()
            F.cross_entropy(module(images), labels).backward()
            optimizer.step()

    return run


def insertion(repeats: int = 5) -> Row:
    """Seconds that inserting quantisers takes, least of several: the pass alone, and all from the module on."""
    model, image = MODELS[_INSERTED]()
    model.eval()
    seconds: dict[str, list[float]] = {"seconds": [], "seconds_with_capture": [], "seconds_verified": []}
    for _ in range(repeats):
        began = time.perf_counter()
        result = fxopt.optimize(model, image, [Fuse(), QAT()], devices=())
        seconds["seconds_verified"].append(time.perf_counter() - began)
        fused, inserted = result.ledger.entries
        seconds["seconds"].append(inserted.seconds)
        seconds["seconds_with_capture"].append(result.captured.seconds + fused.seconds + inserted.seconds)
    return {"model": _INSERTED, **{name: min(each) for name, each in seconds.items()}}


def first(outputs: Any) -> torch.Tensor:
    """The first tensor of nested outputs."""
    return next(leaf for leaf in torch.utils._pytree.tree_leaves(outputs) if isinstance(leaf, torch.Tensor))


def times(found: bench.Comparison) -> Row:
    """What a comparison found, for the record."""
    names = ("before_ms", "after_ms", "ratio", "low", "high", "noise_floor", "pairs")
    return {**{name: getattr(found, name) for name in names}, "verdict": str(found.verdict)}


def sqnr(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Signal to quantisation noise in dB."""
    noise = (found - wanted).square().mean().clamp(min=1e-30)
    return float(10 * torch.log10(wanted.square().mean() / noise))


def sizes(executable: fxopt.Executable) -> dict[str, int | None]:
    """Bytes of the runtime's own form of the model: its weights, and all of its files; None where it has none."""
    with tempfile.TemporaryDirectory() as directory:
        executable.save(Path(directory) / "model")
        files = [file for file in Path(directory).rglob("*") if file.suffix in (*_WEIGHT_FILES, *_GRAPH_FILES)]
        weights = [weight_bytes(file) for file in files if file.suffix not in _GRAPH_FILES]
        return {"weight_bytes": sum(weights) or None, "file_bytes": sum(file.stat().st_size for file in files) or None}


def weight_bytes(file: Path) -> int:
    """Of a file that holds weights alone, or of the initializers in an ONNX file."""
    if file.suffix != ".onnx":
        return file.stat().st_size
    tensors = onnx.load(file, load_external_data=False).graph.initializer
    return sum(onnx.numpy_helper.to_array(each).nbytes for each in tensors if not each.external_data)


def render(record: Row) -> str:
    """Markdown: speed-ups over eager with their intervals, SQNR, how much smaller, and the costs."""
    models, costs, machine = record["models"], record["costs"], record["machine"]
    there = [form for form in FORMS if any(form in rows for rows in models.values())]
    table = [[form, *(cell(rows.get(form), form) for rows in models.values())] for form in there]
    lines = [
        "# What integers gain",
        "",
        f"{machine['cpu']} ({machine['cpu_capability']}), {machine['threads']} threads, torch {machine['torch']}, "
        f"{machine['os']}: `python benchmarks/quantization.py`. Random weights.",
        "",
        "Speed-up over eager float32 at batch 1 with its 95 % interval, all called again and again in turns; SQNR "
        "against it over 16 inputs (and that of the simulation in torch), and the weights in the runtime's file, or "
        "all that it is saved as, against what the float model's `state_dict` holds.",
        "",
        tabulate(table, ["", *models], tablefmt="github", disable_numparse=True),
        *(["", "# What training towards them costs", ""] if costs else []),
    ]
    for name in [name for name in _TRAINING if name in costs]:
        row = costs[name]
        lines.append(
            f"- {row['model']}, {name}: a training step takes {row['ratio']:.2f} [{row['low']:.2f}, {row['high']:.2f}] "
            f"of a float32 step ({row['before_ms']:.0f} ms, 8 images)"
        )
    if "insertion" in costs:
        row = costs["insertion"]
        lines.append(
            f"- {row['model']}: inserting takes {row['seconds']:.2f} s, {row['seconds_with_capture']:.2f} s with "
            f"capture and fusing, {row['seconds_verified']:.2f} s with all that verifies them"
        )
    return "\n".join(lines) + "\n"


def cell(row: Row | None, form: str) -> str:
    """One row of the record in the table."""
    if row is None or "not_measured" in row:
        return "-"
    parts = []
    if "ratio" in row:
        parts.append(f"{1 / row['ratio']:.2f} [{1 / row['high']:.2f}, {1 / row['low']:.2f}]")
    if form.endswith(", bf16"):
        parts.append(f"{row['sqnr_db']:.1f} dB")
    if "int8" in form:
        parts.append(f"{row['sqnr_db']:.1f} ({row['simulated_sqnr_db']:.1f}) dB")
    if form.endswith("int8") and row["file_bytes"]:
        weights, file = (row["float_bytes"] / row[what] for what in ("weight_bytes", "file_bytes"))
        parts.append(f"{weights:.2f}x smaller ({file:.2f}x with the graph)")
    return ", ".join(parts)


if __name__ == "__main__":
    main()

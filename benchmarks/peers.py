"""The latency of fxopt's engines beside their peers: every arm of a row in one process, timed in turns.

    python benchmarks/peers.py [--out benchmarks/results] [--threads 2] [--seconds 40] [--again] [MODEL[:BATCH] ...]

A row is a model at a batch size and runs in a process of its own; it is written to peers.json as soon as it is there,
and rows that are there are not run again, so a stopped run goes on where it was. peers.md has the tables of all rows:
speed-ups over eager, each of ours beside each peer, geometric means, builds and memory; peers.svg draws the first. The
plot needs matplotlib, which the extra `bench` brings. The fastest peers are built twice: what the two builds differ by
is chance, and so is as small a difference of another arm.

Models come with random weights; outputs of every arm are held against eager's. Compilers begin each row with empty
caches. Times hold for the machine that peers.json names, and only if nothing else ran on it.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peers_report import TWICE, again, plot, render
from torch import nn
from torch.utils import _pytree as pytree
from turns import Run, in_turns
from zoo_models.memory import begin_peak, peak

import fxopt
from fxopt import Inputs, bench, spec
from fxopt.bench.surroundings import quiet
from fxopt.engines import climb
from fxopt.pipeline import replay
from fxopt.relative_error import relative_error
from fxopt.torchvision_operators import declare_missing
from fxopt.verify import Oracle

CONVOLUTIONS = (
    "resnet18",
    "resnet50",
    "mobilenet_v3_large",
    "efficientnet_b0",
    "convnext_tiny",
    "regnet_y_1_6gf",
    "densenet121",
    "fcn_resnet50",
)
TRANSFORMERS = ("deit_small", "swin_t", "bert", "gpt2")
MODELS = (*CONVOLUTIONS, *TRANSFORMERS)
BATCHES = (1, 8)
_ROW_SECONDS = 1800


def main() -> None:
    """Run what is missing, and write the table of all that is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", metavar="MODEL[:BATCH]", help="all models at all batch sizes by default")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=40.0, help="for the timing of one row, without builds")
    parser.add_argument("--budget", type=float, default=60.0, help="seconds for `auto` to build and measure engines")
    parser.add_argument("--arms", default="", help="only these, by name, with semicolons; eager always runs")
    parser.add_argument("--again", action="store_true", help="run rows that are there once more")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    asked = [_row(text) for text in options.rows] or [[(model, batch) for batch in BATCHES] for model in MODELS]
    wanted = [pair for row in asked for pair in row]
    if options.one:
        torch.set_num_threads(options.threads)
        wanted_arms = [name for name in options.arms.split(";") if name]
        found = measure(*wanted[0], seconds=options.seconds, budget=options.budget, only=wanted_arms)
        print(json.dumps(found))
        return
    options.out.mkdir(parents=True, exist_ok=True)
    record = options.out / "peers.json"
    for model, batch in wanted:
        rows = read(record)
        if (model, batch) in rows and not options.again:
            continue
        found = _in_a_process(model, batch, options)
        rows[model, batch] = found
        record.write_text(written(rows.values()), encoding="utf-8")
        (options.out / "peers.md").write_text(render(list(rows.values())), encoding="utf-8")
        plot(list(rows.values()), options.out / "peers.svg")
        print(f"{model} at {batch}: {found.get('failed') or 'done'}", file=sys.stderr)
    print(render(list(read(record).values())))


def read(record: Path) -> dict[tuple[str, int], dict[str, Any]]:
    """All rows, by model and batch size."""
    if not record.is_file():
        return {}
    rows = json.loads(record.read_text(encoding="utf-8"))["rows"]
    return {(row["model"], row["batch"]): row for row in rows}


def written(rows: Iterable[Mapping[str, Any]]) -> str:
    """All rows as JSON, each in one line."""
    return '{"rows": [\n' + ",\n".join(json.dumps(row) for row in rows) + "\n]}\n"


def _row(text: str) -> list[tuple[str, int]]:
    model, _, batch = text.partition(":")
    if model not in MODELS:
        sys.exit(f"unknown model {model!r}; there are {', '.join(MODELS)}")
    return [(model, int(batch))] if batch else [(model, size) for size in BATCHES]


def _in_a_process(model: str, batch: int, options: argparse.Namespace) -> dict[str, Any]:
    order = [sys.executable, __file__, "--one", f"{model}:{batch}", "--threads", str(options.threads)]
    order += ["--seconds", str(options.seconds), "--budget", str(options.budget), "--arms", options.arms]
    failed = {"model": model, "batch": batch, "arms": {}}
    try:
        with tempfile.TemporaryDirectory() as cache:
            environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}
            done = subprocess.run(order, capture_output=True, text=True, timeout=_ROW_SECONDS, env=environment)
    except subprocess.TimeoutExpired:
        return {**failed, "failed": f"it took more than {_ROW_SECONDS} s"}
    try:
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        return {**failed, "failed": (done.stderr.strip().splitlines() or ["it said nothing"])[-1][:300]}
    return found


# Models


def build(name: str, batch: int) -> tuple[nn.Module, Inputs]:
    """A model in evaluation mode with random weights, and inputs for it."""
    torch.manual_seed(0)
    declare_missing()  # transformers and timm import torchvision too
    if name in ("bert", "gpt2"):
        return _of_transformers(name, batch)
    images = Inputs((torch.randn(batch, 3, 224, 224),))
    if name == "deit_small":
        import timm

        made: nn.Module = timm.create_model("deit_small_patch16_224", pretrained=False)
        return made.eval(), images
    import torchvision

    extra: dict[str, Any] = {"weights_backbone": None} if name.startswith("fcn") else {}
    return torchvision.models.get_model(name, weights=None, **extra).eval(), images


def _of_transformers(name: str, batch: int) -> tuple[nn.Module, Inputs]:
    import transformers

    if name == "bert":
        config = transformers.BertConfig(
            hidden_size=384, num_hidden_layers=6, num_attention_heads=6, intermediate_size=1536
        )
        model: nn.Module = transformers.BertModel(config)
    else:
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(use_cache=False))
    nn.Module.eval(model)
    return model, Inputs((torch.randint(0, 30000, (batch, 128)),))


# Arms: each takes a model and inputs and gives what runs one forward. What it does before that is its build.


@dataclasses.dataclass(frozen=True)
class Ours:
    """One of fxopt's executables, called with its inputs; `label` is what `auto` calls it."""

    executable: fxopt.Executable
    inputs: Inputs
    label: str | None = None

    def __call__(self) -> Any:
        """One forward."""
        return self.executable(*self.inputs.args, **self.inputs.kwargs)


def _call(run: Callable[..., Any], inputs: Inputs) -> Run:
    return lambda: run(*inputs.args, **inputs.kwargs)


def _eager(model: nn.Module, inputs: Inputs) -> Run:
    return _call(model, inputs)


def _fx_fuse(model: nn.Module, inputs: Inputs) -> Run:
    from torch.fx.experimental.optimization import fuse

    return _call(fuse(model), inputs)


def _fx_fuse_channels_last(model: nn.Module, inputs: Inputs) -> Run:
    from torch.fx.experimental.optimization import fuse

    fused = fuse(model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    images = inputs.map(lambda x: x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x)
    return _call(fused, images)


def _jit_freeze(model: nn.Module, inputs: Inputs) -> Run:
    traced = torch.jit.trace(model, inputs.args, strict=False)
    return _call(torch.jit.optimize_for_inference(torch.jit.freeze(traced)), inputs)


def _compile(model: nn.Module, inputs: Inputs) -> Run:
    return _call(torch.compile(model), inputs)


def _compile_freezing(model: nn.Module, inputs: Inputs) -> Run:
    return _call(torch.compile(model, options={"freezing": True}), inputs)


def _exported(engine: str, **options: Any) -> Callable[[nn.Module, Inputs], Run]:
    """A peer from its own export of the model as it is: no pass of ours runs before."""

    def arm(model: nn.Module, inputs: Inputs) -> Run:
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / "model.onnx"
            program = torch.onnx.export(model, inputs.args, kwargs=dict(inputs.kwargs), dynamo=True, verbose=False)
            assert program is not None
            program.save(path)
            load = _onnxruntime if engine == "onnxruntime" else _openvino
            return load(path, [tensor.numpy() for tensor in inputs.tensors], **options)

    return arm


def _onnxruntime(path: Path, arrays: Sequence[Any]) -> Run:
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, settings, providers=["CPUExecutionProvider"])
    feed = dict(zip([one.name for one in session.get_inputs()], arrays, strict=True))
    return lambda: session.run(None, feed)


def _openvino(path: Path, arrays: Sequence[Any], precision: str) -> Run:
    import openvino

    settings = {
        "INFERENCE_PRECISION_HINT": precision,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    compiled = openvino.Core().compile_model(path, "CPU", settings)
    return lambda: list(compiled(list(arrays)).values())


def _onednn(model: nn.Module, inputs: Inputs) -> Run:
    return Ours(fxopt.lower(replay(model, inputs, spec.parse("clean,fuse")), inputs, "onednn"), inputs)


def _auto(max_error: float | None, budget: float) -> Callable[[nn.Module, Inputs], Run]:
    def arm(model: nn.Module, inputs: Inputs) -> Run:
        fused = replay(model, inputs, spec.parse("clean,fuse"))
        oracle = Oracle(model, inputs)
        ladder = climb("auto", model, fused, inputs, oracle=oracle, max_error=max_error, budget_seconds=budget)
        assert ladder.chosen is not None and ladder.chosen.executable is not None
        return Ours(ladder.chosen.executable, inputs, ladder.chosen.label)

    return arm


PEERS: Mapping[str, Callable[[nn.Module, Inputs], Run]] = {
    "eager": _eager,
    "fx fuse": _fx_fuse,
    "fx fuse, channels_last": _fx_fuse_channels_last,
    "jit freeze": _jit_freeze,
    "torch.compile": _compile,
    "compile + freezing": _compile_freezing,
    "onnxruntime": _exported("onnxruntime"),
    "openvino": _exported("openvino", precision="f32"),
    "openvino bf16": _exported("openvino", precision="bf16"),
}


def measure(name: str, batch: int, *, seconds: float, budget: float, only: Sequence[str]) -> dict[str, Any]:
    """Build all arms of a row, hold them against eager, and time them in turns."""
    model, inputs = build(name, batch)
    every = {**PEERS, "onednn": _onednn, "auto": _auto(None, budget), "auto 1e-2": _auto(1e-2, budget)}
    every |= {again(peer): PEERS[peer] for peer in TWICE}
    runs: dict[str, Run] = {}
    arms: dict[str, dict[str, Any]] = {}
    with quiet(torch.device("cpu")), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = _tensors(model(*inputs.args, **inputs.kwargs))
        for arm, make in every.items():
            if only and arm not in ("eager", *only):
                continue
            resident = _resident()
            begin_peak()
            began = time.perf_counter()
            try:
                run = make(model, inputs)
                found = _tensors(run())
                arms[arm] = {
                    "build_seconds": time.perf_counter() - began,
                    "peak_bytes": peak() - resident,
                    "relative_error": max(map(relative_error, expected, found)),
                }
                if isinstance(run, Ours):
                    arms[arm] |= {"chosen": run.label, "engine_seconds": run.executable.build_seconds}
                runs[arm] = run
            except Exception as error:  # a peer that can't take a model is a result too
                text = (str(error).strip().splitlines() or [""])[0]
                arms[arm] = {"failed": f"{type(error).__name__}: {text[:200]}"}
        times = in_turns(runs, seconds)
    for arm, taken in times.items():
        arms[arm] |= {"ms": 1e3 * statistics.median(taken), "times": [round(one, 7) for one in taken]}
    return {
        "model": name,
        "batch": batch,
        "kind": "convolutions" if name in CONVOLUTIONS else "transformers",
        "weights_bytes": sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers())),
        "inputs": inputs.describe(),
        "machine": dataclasses.asdict(bench.fingerprint()),
        "versions": _versions(),
        "arms": arms,
    }


def _resident() -> int:
    """Bytes of this process that are in memory, once what is free was handed back."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    begin_peak()
    return peak()


def _tensors(output: Any) -> list[torch.Tensor]:
    if hasattr(output, "to_tuple"):
        output = output.to_tuple()
    return [torch.as_tensor(leaf) for leaf in pytree.tree_leaves(output) if hasattr(leaf, "shape")]


def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for package in ("torch", "torchvision", "onnxruntime", "openvino", "timm", "transformers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


if __name__ == "__main__":
    main()

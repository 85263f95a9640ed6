"""The engines for CUDA: their logic with stand-ins on the CPU, and the real thing where there is a GPU."""

from __future__ import annotations

import contextlib
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils import _pytree as pytree

import fxopt
from fxopt import Inputs, bench, spec
from fxopt.engines import executable
from fxopt.engines.candidates import ON_CUDA, Rung, candidates
from fxopt.engines.contract import Built
from fxopt.engines.cudagraph import CudaGraph
from fxopt.engines.cudnn import CuDNN
from fxopt.engines.eager import Eager
from fxopt.engines.gpu import TF32_TOLERANCE, current_among, products_in_float32, rounding_of_torch
from fxopt.engines.place import on, place_for
from fxopt.engines.table import ENGINES
from fxopt.errors import EngineError
from fxopt.graph import GraphModule
from fxopt.pipeline import replay
from tests.engines.test_contract import Running, assert_agree
from tests.models import STATIC

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def fused(name: str) -> tuple[nn.Module, GraphModule, tuple[torch.Tensor, ...]]:
    case = STATIC[name]
    model, example = case.build(), case.example()
    return model, replay(model, Inputs(example), spec.parse("clean,fuse")), example


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """cuDNN's operators, computed on the CPU; the names of those that are called."""
    made: list[str] = []

    def relu(x: Any, w: Any, b: Any, stride: Any, padding: Any, dilation: Any, groups: int) -> torch.Tensor:
        made.append("relu")
        return F.relu(F.conv2d(x, w, b, stride, padding, dilation, groups))

    def add_relu(x: Any, w: Any, z: Any, alpha: float, b: Any, *geometry: Any) -> torch.Tensor:
        made.append("add_relu")
        assert alpha == 1
        out = F.conv2d(x, w, b, *geometry)
        assert z.shape == out.shape, "cuDNN does not broadcast"
        return F.relu(out + z)

    monkeypatch.setattr(torch, "cudnn_convolution_relu", relu)
    monkeypatch.setattr(torch, "cudnn_convolution_add_relu", add_relu)
    return made


def test_cudnn_fuses_what_it_can_and_says_what_it_cannot(calls: list[str]) -> None:
    model, module, example = fused("staged_cnn")
    built = CuDNN().build(module, Inputs(example), {})
    with torch.no_grad():
        assert_agree(built.run(*example), model(*example))
    assert calls.count("add_relu") == 2
    assert calls.count("relu") >= 4
    reasons = {skip.reason for skip in built.reasons}
    assert "cuDNN fuses a ReLU behind a convolution, here is none" in reasons
    assert any("this is 'linear'" in reason for reason in reasons)


def test_what_is_added_is_broadcast_where_batches_differ(calls: list[str]) -> None:
    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3, 2, 1)
            self.shift = nn.Parameter(torch.randn(1, 4, 3, 3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.relu(self.conv(x) + self.shift)

    model, x = Shifted().eval(), torch.randn(2, 3, 5, 5)
    built = CuDNN().build(replay(model, Inputs((x[:1],)), spec.parse("clean,fuse")), Inputs((x[:1],)), {})
    with torch.no_grad():
        for given in (x[:1], x):
            assert_agree(built.run(given), model(given))
    assert calls == ["add_relu"]


def test_cudnn_keeps_float32_unless_asked(calls: list[str]) -> None:
    _, module, example = fused("conv_block")
    before = (*tf32_settings(), torch.backends.cudnn.benchmark)
    for tf32 in (False, True):
        engine = CuDNN(tf32=tf32)
        built = engine.build(module, Inputs(example), {})
        built.run(*example)
        assert (*tf32_settings(), torch.backends.cudnn.benchmark) == before
        assert engine.tolerance(torch.float32) == (5e-3 if tf32 else 1e-4)


class Recording:
    """A CUDA graph that only counts."""

    def __init__(self) -> None:
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[Recording]:
    made: list[Recording] = []

    def new() -> Recording:
        made.append(Recording())
        return made[-1]

    @contextlib.contextmanager
    def entered(_: Any) -> Iterator[None]:
        yield

    stream = SimpleNamespace(wait_stream=lambda _: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", new)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", entered)
    monkeypatch.setattr(torch.cuda, "graph", entered)
    return made


def test_what_a_cuda_graph_reads_lives_as_long_as_it(graphs: list[Recording], monkeypatch: pytest.MonkeyPatch) -> None:
    packed: list[weakref.ref[Any]] = []

    def build(*_: Any) -> Built:
        weight = torch.ones(3)
        packed.append(weakref.ref(weight))
        return Built(lambda x: x * weight)

    monkeypatch.setattr(CuDNN, "build", build)
    _, module, _ = fused("simple_net")
    built = CudaGraph().build(module, Inputs((torch.ones(3),)), {})
    assert packed[0]() is not None
    del built
    assert packed[0]() is None


class WritesInput(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mul_(2) + 1


@pytest.mark.parametrize(
    ("model", "what"), [(WritesInput(), "input 0"), (Running(gives_mean=False), "'mean'")], ids=["input", "buffer"]
)
def test_a_cuda_graph_is_not_recorded_of_writes(graphs: list[Recording], model: nn.Module, what: str) -> None:
    x = torch.ones(3, 4)
    module = fxopt.capture(model.eval(), (x,)).module
    with pytest.raises(EngineError, match=f"would lose what the module writes into {what}"), torch.no_grad():
        CudaGraph(around="eager").build(module, Inputs((x,)), {})
    assert torch.equal(x, torch.ones(3, 4))


def test_a_cuda_graph_is_replayed_on_its_own_tensors(graphs: list[Recording]) -> None:
    model, module, example = fused("simple_net")
    built = CudaGraph(around="eager").build(module, Inputs(example), {})
    with torch.no_grad():
        one, two = built.run(*example), built.run(*example)
        assert_agree(one, model(*example))
    assert graphs[0].replays == 2
    assert one.data_ptr() != two.data_ptr(), "a later call leaves an output as it is"


@dataclass
class Batch:
    """An object that holds a tensor."""

    x: torch.Tensor


class Cropped(nn.Module):
    """Takes a tensor out of an object, and gives a part of it in another one."""

    def forward(self, batch: Batch) -> Batch:
        return Batch(batch.x[:, 1:])


def test_a_cuda_graph_reads_and_gives_the_tensors_of_objects(graphs: list[Recording]) -> None:
    module = fxopt.capture(Cropped().eval(), (Batch(torch.ones(3, 4)),)).module
    run = CudaGraph(around="eager").build(module, Inputs((Batch(torch.ones(3, 4)),)), {}).run
    one, two = run(Batch(torch.zeros(3, 4))), run(Batch(torch.full((3, 4), 2.0)))
    assert torch.equal(one.x, torch.zeros(3, 3)), "a later call leaves an output as it is"
    assert torch.equal(two.x, torch.full((3, 3), 2.0))


def test_threads_that_share_a_cuda_graph_get_what_is_their_own(
    graphs: list[Recording], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Recording, "replay", lambda _: time.sleep(0.01))
    module = fxopt.capture(Cropped().eval(), (Batch(torch.ones(3, 4)),)).module
    run = CudaGraph(around="eager").build(module, Inputs((Batch(torch.ones(3, 4)),)), {}).run
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(run, [Batch(torch.full((3, 4), float(number))) for number in range(4)]))
    assert [each.x.unique().tolist() for each in found] == [[0.0], [1.0], [2.0], [3.0]]


def test_a_forward_that_waits_cannot_be_recorded(graphs: list[Recording]) -> None:
    def fails(*_: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing")

    _, module, example = fused("simple_net")
    module.forward = fails  # type: ignore[method-assign]
    with pytest.raises(EngineError, match=r"cannot record 'eager'.*\.item\(\)"):
        CudaGraph(around="eager").build(module, Inputs(example), {})


def test_wrong_options() -> None:
    with pytest.raises(EngineError, match="around is 'eager', 'cudnn' or 'inductor', not 'onednn'"):
        CudaGraph(around="onednn")  # type: ignore[arg-type]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("engine", ["cudnn", "cudagraph"])
def test_without_a_gpu_they_say_so(engine: str) -> None:
    with pytest.raises(EngineError, match="there is no CUDA device"):
        fxopt.lower(nn.Linear(2, 2).eval(), torch.randn(1, 2), engine)


@pytest.mark.parametrize(
    ("asked", "devices", "gpu", "place"),
    [
        ("auto", ("cpu", "cuda"), True, "cpu"),
        ("auto", ("cuda",), True, "cuda"),
        ("all", ("cuda:1", "cpu"), True, "cuda:1"),
        ("auto", ("cuda", "cpu"), False, "cpu"),
        ("auto", (), True, "cpu"),
        ("eager", ("cuda",), True, "cuda"),
        ("cudagraph{tf32=true}", ("cpu", "cuda"), True, "cuda"),
        ("cudnn", ("cpu",), True, "cuda"),
        ("openvino", ("cuda", "cpu"), True, "cpu"),
        ("openvino", ("cuda",), True, "cpu"),
    ],
)
def test_an_engine_runs_on_the_first_device_that_suits_it(
    asked: str, devices: tuple[str, ...], gpu: bool, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    reasons = {"cpu": None, "cuda": None if gpu else "no CUDA device", "cuda:1": None}
    monkeypatch.setattr(bench, "unavailable", reasons.__getitem__)
    assert place_for(asked, devices, Inputs.of(torch.zeros(1))) == torch.device(place)


def test_an_engine_runs_where_the_inputs_are_that_a_gpu_holds() -> None:
    assert place_for("auto", ("cpu",), Inputs.of(torch.zeros(1, device="meta"))) == torch.device("meta")


@pytest.mark.parametrize("rung", ON_CUDA, ids=lambda rung: rung.label)
def test_candidates_for_a_gpu_run_there(rung: Rung) -> None:
    kind = ENGINES[rung.engine]
    assert "cuda" in kind.devices
    assert kind(**rung.options).name == rung.engine


@pytest.mark.parametrize("asked", ["auto", "all"])
def test_on_a_gpu_the_candidates_are_others(asked: str) -> None:
    _, module, _ = fused("simple_net")
    on_cpu, on_cuda = (
        [rung.label for rung in candidates(asked, module, torch.device(place))] for place in ("cpu", "cuda")
    )
    assert on_cpu[0] == on_cuda[0] == "eager"
    assert {*on_cpu} & {*on_cuda} == {"eager", "inductor"}


def test_what_torch_rounds_to_tf32_is_allowed_of_all_engines() -> None:
    for allowed, error in ((True, TF32_TOLERANCE), (False, 0.0)):
        with torch.backends.cudnn.flags(allow_tf32=allowed):
            assert rounding_of_torch(torch.device("cuda")) == error
            assert rounding_of_torch(torch.device("cpu")) == 0.0


@pytest.mark.parametrize(
    ("there", "asked", "moves"),
    [
        ("cuda:0", "cuda", False),
        ("cuda:1", "cuda:1", False),
        ("cuda:0", "cuda:1", True),
        ("cpu", "cuda", True),
        ("cpu", "cpu", False),
    ],
)
def test_a_module_is_moved_where_it_is_not_there_yet(
    there: str, asked: str, moves: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fxopt.engines.place.independent_copy", lambda module: SimpleNamespace(to=str))
    tensor = SimpleNamespace(device=torch.device(there))
    module: Any = SimpleNamespace(parameters=lambda: [tensor], buffers=list)
    assert on(torch.device(asked), module) == (asked if moves else module)


def tf32_settings() -> tuple[str, ...]:
    cudnn: Any = torch.backends.cudnn
    return (torch.backends.cuda.matmul.fp32_precision, cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision)


def set_generic(precision: str) -> None:
    torch._C._set_fp32_precision_setter("generic", "all", precision)


def set_matmul(precision: str) -> None:
    torch.backends.cuda.matmul.fp32_precision = precision


def set_conv(precision: str) -> None:
    cudnn: Any = torch.backends.cudnn
    cudnn.conv.fp32_precision = precision


SETS: dict[str, tuple[Callable[[str], None], str]] = {
    "nothing": (lambda value: None, ""),
    "the old setting of torch": (torch.set_float32_matmul_precision, "high"),
    "the new setting of products": (set_matmul, "tf32"),
    "the new setting of convolutions": (set_conv, "ieee"),
    "the new setting of all": (set_generic, "tf32"),
}


@pytest.fixture
def settings_kept() -> Iterator[None]:
    yield
    set_generic("none")
    torch.backends.cudnn.allow_tf32 = True
    torch.set_float32_matmul_precision("highest")


@pytest.mark.usefixtures("settings_kept")
@pytest.mark.parametrize("name", SETS)
def test_products_are_rounded_as_asked_whatever_torch_is_set_to(name: str) -> None:
    change, value = SETS[name]
    change(value)
    before = tf32_settings()
    assert rounding_of_torch(torch.device("cuda")) == (TF32_TOLERANCE if "tf32" in before else 0.0)
    for tf32 in (False, True):
        with products_in_float32(tf32=tf32):
            assert set(tf32_settings()) == {"tf32" if tf32 else "ieee"}
            assert rounding_of_torch(torch.device("cuda")) == (TF32_TOLERANCE if tf32 else 0.0)
        assert tf32_settings() == before


@pytest.mark.usefixtures("settings_kept")
def test_what_follows_the_setting_of_all_follows_it_afterwards() -> None:
    set_matmul("none")
    set_generic("tf32")
    with products_in_float32(tf32=False):
        pass
    set_generic("ieee")
    assert tf32_settings()[0] == "ieee"


def test_an_engine_is_built_with_its_gpu_as_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    entered: list[str] = []

    @contextlib.contextmanager
    def device(place: torch.device) -> Iterator[None]:
        entered.append(str(place))
        yield
        entered.append("left")

    monkeypatch.setattr(torch.cuda, "device", device)
    with current_among([torch.device("cpu")]):
        assert not entered
    with current_among([torch.device("cpu"), torch.device("cuda:1")]):
        assert entered == ["cuda:1"]

    def among(_: Iterable[torch.device]) -> contextlib.AbstractContextManager[None]:
        return device(torch.device("cuda:1"))

    monkeypatch.setattr(executable, "current_among", among)
    built: list[list[str]] = []
    monkeypatch.setattr(Eager, "build", lambda self, module, *_: (built.append([*entered]), Built(module))[1])
    fxopt.lower(nn.Linear(2, 2).eval(), torch.randn(1, 2), "eager")
    assert built == [["cuda:1", "left", "cuda:1"]]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="less than two CUDA devices")
def test_a_graph_is_recorded_on_the_second_gpu() -> None:
    model = nn.Linear(3, 3).eval().to("cuda:1")
    lowered = fxopt.lower(model, torch.randn(2, 3, device="cuda:1"), "cudagraph", around="eager")
    fresh = torch.randn(2, 3, device="cuda:1")
    assert_agree(on_cpu(lowered(fresh)), on_cpu(model(fresh)))


def on_cpu(value: Any) -> Any:
    return pytree.tree_map_only(torch.Tensor, torch.Tensor.cpu, value)


@on_gpu
@pytest.mark.parametrize("engine", ["eager", "inductor", "cudnn", "cudagraph"])
@pytest.mark.parametrize("name", ["staged_cnn", "simple_net", "encoder"])
def test_on_a_gpu(name: str, engine: str) -> None:
    model, module, example = fused(name)
    fresh = tuple(torch.randn_like(value) for value in example)
    executable = fxopt.lower(module.cuda(), tuple(value.cuda() for value in example), engine)
    allowed = 1e-4 if engine in ("cudnn", "cudagraph") else rounding_of_torch(torch.device("cuda"))
    for values in (example, fresh):
        with torch.no_grad():
            assert_agree(on_cpu(executable(*(value.cuda() for value in values))), model(*values), allowed)


@on_gpu
@pytest.mark.parametrize(("engine", "max_error"), [("auto", None), ("auto", 2e-2), ("cudagraph", None)])
def test_a_module_on_the_cpu_is_built_and_measured_on_a_gpu(engine: str, max_error: float | None) -> None:
    case = STATIC["staged_cnn"]
    model, example = case.build(), case.example()
    options: dict[str, Any] = {"engine": engine, "max_error": max_error, "engine_seconds": 20.0}
    result = fxopt.optimize(model, example, "clean,fuse", devices=("cuda",), budget_seconds=1.0, **options)
    engines = result.record["engines"]
    assert engines is not None and engines["device"] == "cuda"
    assert result.executable is not None
    with torch.no_grad():
        found = on_cpu(result.executable(*(value.cuda() for value in example)))
        assert_agree(found, model(*example), max_error or TF32_TOLERANCE)

"""Models that take and give objects, such as the cache of a language model, which calls change."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxopt
from fxopt.bench.arm import Arm
from fxopt.contract import Promise
from fxopt.engines.contract import Engine
from fxopt.engines.onnxruntime import OnnxRuntime
from fxopt.engines.openvino import OpenVINO
from fxopt.errors import EngineError
from fxopt.inputs import Inputs
from fxopt.nested import flatten, tensors_in, with_tensors
from fxopt.outcome import compare_outcomes
from fxopt.torchvision_operators import declare_missing
from fxopt.verify import Oracle


class Cache:
    """Keys of all steps so far."""

    def __init__(self, keys: torch.Tensor) -> None:
        self.keys, self.dtype = keys, keys.dtype

    def update(self, keys: torch.Tensor) -> torch.Tensor:
        self.keys = torch.cat([self.keys, keys], 1)
        return self.keys


class Decoder(nn.Module):
    """Attends to its cache, which it makes where it is given none, and hands on."""

    def __init__(self, kept: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.project, self.kept = nn.Linear(4, 4), kept

    def forward(self, x: torch.Tensor, cache: Cache | None = None) -> dict[str, Any]:
        cache = Cache(x.new_zeros(x.shape[0], 0, 4)) if cache is None else cache
        keys = cache.update(torch.relu(self.project(x)))
        cache.keys = cache.keys * self.kept
        return {"out": F.softmax(x @ keys.transpose(1, 2), -1) @ keys, "cache": cache}


class Counts(Decoder):
    """Notes how long the cache is that it is given."""

    seen: list[int]

    def forward(self, x: torch.Tensor, cache: Cache | None = None) -> dict[str, Any]:
        assert cache is not None
        self.seen.append(cache.keys.shape[1])
        return super().forward(x, cache)


X = torch.randn(2, 1, 4)


def cache(length: int = 3) -> Cache:
    torch.manual_seed(1)
    return Cache(torch.randn(2, length, 4))


@pytest.mark.parametrize("given", [False, True], ids=["made by the model", "given"])
@pytest.mark.parametrize("engine", [None, "eager", "onednn"])
def test_a_cache_is_verified_and_stays_as_it_is(given: bool, engine: str | None) -> None:
    model, mine = Decoder().eval(), cache()
    inputs = {"x": X, "cache": mine} if given else {"x": X}
    result = fxopt.optimize(model, inputs, "clean,fuse", devices=(), engine=engine, engine_seconds=1.0)
    assert result.record["verified"] and sum(len(entry.changes) for entry in result.ledger.entries) == 1
    assert max(entry.relative_error for entry in result.ledger.entries) < 1e-6, "in float64 its dtype is another"
    assert torch.equal(mine.keys, cache().keys)
    with torch.no_grad():
        expected = model(**({"x": X, "cache": cache()} if given else {"x": X}))
        found = (result.executable or result.module)(**inputs)
    torch.testing.assert_close(found["out"], expected["out"])
    torch.testing.assert_close(found["cache"].keys, expected["cache"].keys)


@pytest.mark.parametrize("engine", ["eager", "onednn", "inductor"])
def test_an_executable_decodes_step_by_step(engine: str) -> None:
    model = Decoder().eval()
    executable = fxopt.lower(model, (X, cache()), engine)
    mine, theirs = cache(5), cache(5)
    with torch.no_grad():
        for _ in range(3):
            x = torch.randn(2, 1, 4)
            torch.testing.assert_close(executable(x, mine)["out"], model(x, theirs)["out"])
    assert mine.keys.shape == theirs.keys.shape == (2, 8, 4)


class Silent(Decoder):
    """Does not hand its cache on."""

    def forward(self, x: torch.Tensor, cache: Cache | None = None) -> Any:
        return super().forward(x, cache)["out"]


@pytest.mark.parametrize("form", [Decoder, Silent])
def test_what_a_model_leaves_in_a_cache_that_it_was_given_is_compared(form: type[Decoder]) -> None:
    inputs = Inputs((X, cache()))
    oracle = Oracle(form().eval(), inputs)
    for kept, broken in ((1.0, False), (0.5, True)):
        module = fxopt.capture(form(kept).eval(), inputs.args).module
        assert compare_outcomes(oracle.expected(), oracle.outcomes(module), Promise.CLOSE).is_broken is broken


def test_every_timed_call_finds_the_cache_as_it_was_given() -> None:
    Counts.seen = []
    model, mine = Counts().eval(), cache()
    found = fxopt.compare(model, model, (X, mine), pairs=3, budget_seconds=0.1)
    assert found.calls == 1
    assert set(Counts.seen) == {3} and len(Counts.seen) > 9
    assert mine.keys.shape == (2, 3, 4)


def test_no_cuda_graph_replays_what_a_call_does_to_an_object() -> None:
    arm = Arm("before", Decoder().eval(), Inputs((X, cache())), torch.device("cpu"))
    with pytest.raises(EngineError, match=r"'before' \(Decoder\): a CUDA graph replays kernels alone"):
        arm.replay_graph()


@pytest.mark.parametrize("engine", [OnnxRuntime(), OpenVINO()], ids=lambda engine: engine.name)
@pytest.mark.parametrize("named", [False, True])
def test_engines_that_read_files_give_a_cache_and_take_none(engine: Engine, named: bool) -> None:
    if engine.unavailable() is not None:
        pytest.skip(f"{engine.name} is not installed")
    model = Decoder().eval()
    executable = fxopt.lower(model, {"x": X} if named else X, engine.name)
    assert not executable.reasons, "the batch size is free"
    for x in (X, torch.randn(5, 1, 4)):
        with torch.no_grad():
            found, again = (executable(x=each) if named else executable(each) for each in (x, x + 1))
            expected = model(x)
        assert type(found["cache"]) is Cache and found["cache"] is not again["cache"]
        torch.testing.assert_close(found["out"], expected["out"])
        torch.testing.assert_close(found["cache"].keys, expected["cache"].keys)
    with pytest.raises(EngineError, match=r"no object that a call may change, as among 2x1x4 float32, Cache"):
        fxopt.lower(model, (X, cache()), engine.name)


def test_inputs_with_an_object() -> None:
    mine = cache()
    inputs = Inputs((X,), {"cache": mine})
    assert inputs.objects == [mine] and not Inputs((X, None, 3, "text", X.dtype, X.shape), {"sizes": [X]}).objects
    assert [tensor.shape for tensor in inputs.tensors] == [X.shape, mine.keys.shape]
    assert inputs.batch_size == 2
    wide, more = inputs.double().kwargs["cache"], inputs.with_batch(3)
    assert (type(wide), wide.keys.dtype, mine.keys.dtype) == (Cache, torch.float64, torch.float32)
    assert more is not None and more.kwargs["cache"].keys.shape == (3, 3, 4)
    assert inputs.call(Decoder())["cache"].keys.shape == (2, 4, 4)
    assert mine.keys.shape == (2, 3, 4)


def test_objects_are_taken_apart() -> None:
    one, other = Cache(X), Cache(X + 1)
    leaves, structure = flatten({"a": [one, 3], "b": X})
    assert [leaf is X or leaf for leaf in leaves] == [True, X.dtype, None, 3, True], (
        "an object's attributes, then its items"
    )
    assert structure == flatten({"a": [other, 4], "b": X})[1]

    class Another(Cache):
        pass

    assert structure != flatten({"a": [Another(X), 3], "b": X})[1]
    one.keys = one  # type: ignore[assignment]
    assert flatten(one)[0] == [one, X.dtype, None], "what holds itself ends there"
    assert list(tensors_in(one)) == []


def test_what_cannot_be_copied_is_shared() -> None:
    mine = cache()
    mine.lock = threading.Lock()  # type: ignore[attr-defined]
    assert with_tensors([mine], torch.clone)[0] is mine


def test_tensors_are_told_and_changed_in_one_order_each_as_often_as_it_is_there() -> None:
    mine, sizes = cache(), [X]
    mine.last = mine.keys  # type: ignore[attr-defined]
    value = (sizes, mine, X, {"again": mine}, sizes)
    changed: list[torch.Tensor] = []
    with_tensors(value, lambda tensor: (changed.append(tensor), tensor)[1])
    expected = [X, mine.keys, mine.keys, X, mine.keys, mine.keys, X]
    for found in (changed, list(tensors_in(value))):
        assert list(map(id, found)) == list(map(id, expected))


def test_one_object_given_twice_stays_one() -> None:
    mine = cache()
    one, two = with_tensors((mine, {"again": mine}), torch.Tensor.double)
    assert one is two["again"] and one is not mine


@pytest.mark.parametrize("step", [False, True], ids=["first call", "next token"])
def test_a_language_model_of_transformers_by_its_defaults(step: bool) -> None:
    transformers = pytest.importorskip("transformers")
    declare_missing()
    config = transformers.LlamaConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=64,
        vocab_size=50,
    )  # fmt: skip
    torch.manual_seed(0)
    model, ids = transformers.LlamaForCausalLM(config).eval(), torch.randint(0, 50, (2, 5))
    inputs = {"input_ids": ids}
    if step:
        with torch.no_grad():
            inputs = {"input_ids": ids[:, :1], "past_key_values": model(ids).past_key_values}
    result = fxopt.optimize(model, inputs, "clean,merge,attention,fuse", devices=("cpu",), budget_seconds=0.2)
    assert result.record["verified"]
    assert [entry.pass_name for entry in result.ledger.entries if entry.changes][:3] == ["clean", "merge", "attention"]
    assert max(entry.relative_error for entry in result.ledger.entries) < 1e-5
    with torch.no_grad():
        found, expected = (Inputs.of(inputs).call(each) for each in (result.module, model))
    torch.testing.assert_close(found.logits, expected.logits)

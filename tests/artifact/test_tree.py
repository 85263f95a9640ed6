"""Nested inputs go to JSON and back as they were."""

from __future__ import annotations

import json
import math
from collections import OrderedDict, namedtuple

import pytest
import torch

from fxopt.artifact.tree import decode, encode
from fxopt.errors import ArtifactError


def there_and_back(value):
    tensors: dict[str, torch.Tensor] = {}
    return decode(json.loads(json.dumps(encode(value, "args", tensors))), tensors)


@pytest.mark.parametrize(
    "value",
    [
        (),
        (1, 2.5, True, None, "text", math.inf),
        ([1, (2,)], {"a": {"b": [3]}, 4: "four", ("t", 1): None}),
        (torch.float16, torch.device("cpu"), torch.Size([1, 2]), slice(None, 3)),
        {"tensor": "not one", "dict": {"list": []}},
    ],
)
def test_plain_values(value):
    again = there_and_back(value)
    assert again == value
    assert repr(again) == repr(value)


def test_tensors_of_any_shape_and_dtype():
    base = torch.arange(12.0).reshape(3, 4)
    value = ([base, base.t(), base[1]], {"ids": torch.tensor(3), "mask": torch.ones(0, dtype=torch.bool)})
    again = there_and_back(value)
    assert torch.equal(again[0][1], base.t())
    assert [t.dtype for t in again[1].values()] == [torch.int64, torch.bool]
    assert again[1]["ids"].shape == ()


def test_tensors_under_keys_that_read_alike():
    value = {"a": {"b": torch.zeros(1)}, "a.b": torch.ones(1), 1: torch.zeros(2), "1": torch.ones(2)}
    again = there_and_back(value)
    assert torch.equal(again["a"]["b"], value["a"]["b"])
    assert all(torch.equal(again[key], value[key]) for key in ("a.b", 1, "1"))


@pytest.mark.parametrize(
    "value", [object(), namedtuple("Pair", "a b")(1, 2), OrderedDict(a=1), torch.eye(2).to_sparse()]
)
def test_what_only_pickle_could_write_is_refused(value):
    with pytest.raises(ArtifactError, match=r"args\.0 is a"):
        encode((value,), "args", {})

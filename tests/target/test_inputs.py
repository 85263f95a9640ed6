"""Inputs by flag, from the file, and guessed."""

from __future__ import annotations

import pytest
import torch

from fxopt.errors import LoadError
from fxopt.target import load


def fails(target: str, **options) -> str:
    with pytest.raises(LoadError) as raised:
        load(target, **options)
    return str(raised.value)


TWO = """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(50, 4)
    def forward(self, ids, mask=None, *, scale): return self.table(ids) * scale
"""


def test_flags_positional_and_named(write):
    write(TWO)
    inputs = load("model.py", inputs=["2x7:int64:10..20", "scale=1x4:0.5..0.75"]).inputs
    (ids,) = inputs.args
    assert (ids.shape, ids.dtype) == ((2, 7), torch.int64)
    assert ids.min() >= 10
    assert ids.max() < 20
    scale = inputs.kwargs["scale"]
    assert (scale.shape, scale.dtype) == ((1, 4), torch.float32)
    assert scale.min() >= 0.5
    assert scale.max() < 0.75


def test_flags_give_the_same_tensors_each_time(write):
    write("")
    assert torch.equal(*(load("model.py", inputs=["4x3"]).inputs.args[0] for _ in range(2)))


@pytest.mark.parametrize(
    ("flag", "dtype"),
    [("3:bf16", torch.bfloat16), ("3:bool", torch.bool), ("3:uint8:0..256", torch.uint8), ("scalar", torch.float32)],
)
def test_dtypes_of_flags(write, flag, dtype):
    write("")
    assert load("model.py", inputs=[flag]).inputs.tensors[0].dtype is dtype


def test_a_flag_takes_the_floating_type_of_the_module(write):
    write("model = Net().double()")
    assert load("model.py", inputs=["1x3"]).inputs.tensors[0].dtype is torch.float64


def test_integers_without_a_range_stay_within_the_embedding_and_are_said(write):
    write(TWO)
    target = load("model.py", inputs=["ids=1x100:long", "scale=1"])
    assert target.inputs.kwargs["ids"].max() < 50
    assert target.notes == ("inputs: 'ids' holds integers from 0 up to 50; change it by adding :low..high",)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["1x3x"], "--input 1x3x: '1x3x' is not a shape of positive sizes; expected [name=]SHAPE[:dtype][:low..high]"),
        (["0x3"], "'0x3' is not a shape of positive sizes"),
        (["1x3:floaty"], "cannot read 'floaty'"),
        (["1x3:int64:5..5"], "the range '5..5' is empty"),
        (["1x3:int64:a..b"], "cannot read the range 'a..b'"),
        (["1-2=1x3"], "'1-2' is not the name of an argument"),
        (["x=1x3", "x=1x3"], "'x' is given twice"),
        (["99999999999x99999999999"], "cannot make this tensor"),
        (["2x99999999999999999999"], "cannot make this tensor"),
        (["1x3:int64:0..inf"], "cannot make this tensor"),
        (["1x3:int64:0..1e30"], "cannot make this tensor"),
        (["1x3:uint8:0..300"], "cannot make this tensor"),
        (["y=1x3"], "do not fit `Net.forward(x)`: missing a required argument: 'x'; give `fxopt run model.py:Net"),
        (["1x3", "1x3"], "too many positional arguments"),
    ],
)
def test_flags_that_are_wrong(write, flags, message):
    write("")
    said = fails("model.py", inputs=flags)
    assert message in said and "\n" not in said.partition("do not fit")[0]


def test_narrow_integers_are_drawn_from_what_they_hold(write):
    write(TWO.replace("50", "30000"))
    ids = load("model.py", inputs=["ids=1x1000:uint8", "scale=1"]).inputs.kwargs["ids"]
    assert ids.dtype is torch.uint8 and ids.max() > 200


@pytest.mark.parametrize(
    ("source", "description"),
    [
        ("example_inputs = torch.ones(2, 3)", "2x3 float32"),
        ("example_inputs = (torch.ones(2, 3),)", "2x3 float32"),
        ("example_inputs = {'x': torch.ones(2, 3)}", "x=2x3 float32"),
        ("def example_inputs(): return torch.ones(2, 3)", "2x3 float32"),
    ],
)
def test_inputs_of_the_file(write, source, description):
    write(source)
    target = load("model.py")
    assert target.inputs.describe() == description
    assert target.notes == ()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("example_inputs = 3", "'example_inputs' of 'model.py': inputs: expected a tensor, a tuple"),
        ("def example_inputs(): raise OSError('no data')", "cannot make 'example_inputs()': model.py:11: OSError"),
        ("example_inputs = {'y': torch.ones(1)}", "the inputs y=1 float32 do not fit `Net.forward(x)`"),
    ],
)
def test_inputs_of_the_file_that_are_wrong(write, source, message):
    write(source)
    assert message in fails("model.py")


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize(
    ("model", "description", "flag"),
    [
        ("nn.Linear(7, 2)", "1x7 float32", "1x7"),
        ("nn.Sequential(nn.Conv1d(3, 4, 5), nn.ReLU())", "1x3x128 float32", "1x3x128"),
        ("nn.Conv2d(3, 4, 3)", "1x3x224x224 float32", "1x3x224x224"),
        ("nn.Conv2d(1, 4, 3)", "1x1x28x28 float32", "1x1x28x28"),
        ("nn.Sequential(nn.Conv2d(3, 1, 1), nn.Flatten(), nn.Linear(32 * 32, 2))", "1x3x32x32 float32", "1x3x32x32"),
        ("nn.Conv3d(3, 4, 3)", "1x3x16x112x112 float32", "1x3x16x112x112"),
        ("nn.ConvTranspose2d(3, 4, 3)", "1x3x8x8 float32", "1x3x8x8"),
        ("nn.Embedding(9, 2)", "1x128 int64", "1x128:int64:0..9"),
        ("nn.utils.weight_norm(nn.Linear(7, 2))", "1x7 float32", "1x7"),
    ],
)
def test_guesses_from_the_first_layer(write, model, description, flag):
    write(f"model = {model}")
    target = load("model.py")
    assert target.inputs.describe() == description
    assert len(target.notes) == 1
    assert "guessed" in target.notes[0]
    assert target.notes[0].endswith(f"change it by `--input {flag}`")
    assert load("model.py", inputs=[flag]).inputs.describe() == description


def test_a_guess_leaves_the_module_as_it_is(write):
    write("model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))")
    target = load("model.py", train=True)
    assert target.inputs.batch_size == 2
    assert target.module[1].num_batches_tracked == 0


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("class Net(nn.Module):\n    def forward(self, x): return x", "cannot be guessed for `Net.forward(x)`: define"),
        (TWO, "give `fxopt run model.py:Net --input ids=SHAPE --input scale=SHAPE`"),
        ("model = nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 2))", "cannot be guessed for `Sequential.forward(input"),
        (
            "model = nn.Sequential(nn.Conv2d(3, 1, 1), nn.Flatten(), nn.Linear(5, 2))",
            "1x3x8x8 were tried, the last gave RuntimeError: mat1 and mat2",
        ),
    ],
)
def test_what_cannot_be_guessed_is_asked_for(write, source, message):
    write(source)
    assert message in fails("model.py")

"""Which module a target means, and what is said where it means none."""

from __future__ import annotations

import copy
import pickle
import random
import sys

import numpy as np
import pytest
import torch

from fxopt.errors import LoadError, PassError
from fxopt.target import load


def fails(target: str, **options) -> str:
    with pytest.raises(LoadError) as raised:
        load(target, **options)
    return str(raised.value)


@pytest.mark.parametrize(
    ("source", "target", "width"),
    [
        ("", "model.py", 4),
        ("", "model.py:Net", 4),
        ("model = Net(5)", "model.py", 5),
        ("model = Net(5)\ndef get_model(): return Net(6)", "model.py", 5),
        ("model = Net(5)\nbig = Net(9)", "model.py:big", 9),
        ("def get_model(): return Net(6)", "model.py", 6),
        ("def build_model(width=7): return Net(width)", "model.py", 7),
        ("def create_model(*args, **kwargs): return Net(8)", "model.py", 8),
        ("def other(): return Net(10)", "model.py:other", 10),
        ("class zoo:\n    small = Net(2)", "model.py:zoo.small", 2),
        ("class Block(nn.Module):\n    def __init__(self, n): ...\n    def forward(self, x): ...", "model.py", 4),
        ("class Base(nn.Module): ...", "model.py", 4),
        ("Alias = Net", "model.py", 4),
    ],
)
def test_what_a_target_means(write, source, target, width):
    write(source)
    loaded = load(target)
    assert loaded.module.fc.out_features == width
    assert loaded.name == target
    assert not loaded.module.training


def test_training_mode_is_kept_on_request(write):
    write("model = Net().train()")
    assert load("model.py", train=True).module.training


@pytest.mark.parametrize("target", ["package.nets", "package.nets:Net", "package/nets.py", "./package/nets.py:Net"])
def test_modules_and_files_in_folders(write, target):
    write("", "package/nets.py")
    assert load(target).module.fc.out_features == 4


def test_factory_of_an_installed_package():
    assert load("torch.nn:Identity", inputs=["2x3"]).module(torch.ones(1)) == 1


@pytest.mark.parametrize(
    ("source", "lines"),
    [
        (
            "class Other(Net): ...",
            ["more than one model", "class 'Net': `fxopt run model.py:Net`", "'Other': `fxopt run model.py:Other`"],
        ),
        ("def get_model(): ...\ndef build_model(): ...", ["'build_model': `fxopt run model.py:build_model`"]),
        ("del Net\ndef get_model(width, depth): ...", ["needs width, depth; add `def get_model(): return get_model("]),
        ("net = Net(); del Net", ["does not say which", "variable 'net': `fxopt run model.py:net`"]),
        ("del Net", ["'model.py' has no model: expected a variable `model`, a function `get_model`"]),
    ],
)
def test_ambiguous_or_missing_lists_the_candidates_and_commands(write, source, lines):
    write(source)
    message = fails("model.py")
    for line in lines:
        assert line in message


def test_a_fresh_class_beside_a_finished_variable_is_said(write):
    write("net = Net(5)")
    assert load("model.py", inputs=["1x3"]).notes == (
        "took class 'Net' with fresh weights; for variable 'net': `fxopt run model.py:net`",
    )


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        ("", "modle.py", "there is no file 'modle.py'; did you mean 'model.py'?"),
        ("", "nowhere/model.py", "there is no file 'nowhere/model.py': there is no directory 'nowhere'"),
        ("", "./", "'./' is a directory: expected a Python file that defines a model, such as 'model.py'"),
        ("", "no_such_package.module", "there is no module 'no_such_package'"),
        ("", "no-such-package", "there is no file 'no-such-package', and it is not the name of a module either"),
        ("", "model.py:", "cannot read the target 'model.py:': expected model.py, model.py:Name"),
        ("", "model.py:Nett", "'model.py' has no 'Nett'; it has:\n  class 'Net': `fxopt run model.py:Net`"),
        ("x = 3", "model.py:x", "'model.py:x' is a int: expected an nn.Module"),
        ("def f(): return 3", "model.py:f", "'model.py:f()' returned a int: expected an nn.Module"),
        ("def f(a): ...", "model.py:f", "'model.py:f' needs a; add `def get_model(): return f(a=...)`"),
        ("def f(:", "model.py", "cannot load 'model.py': model.py:11: "),
        ("def f(:", "model.py", ": `def f(:`"),
        ("1 / 0", "model.py", "cannot load 'model.py': model.py:11: ZeroDivisionError: division by zero"),
        ("def get_model():\n    return [][1]", "model.py", "cannot make 'get_model()': model.py:12: IndexError: list"),
        ("import no_such_thing", "model.py", "model.py:11: ModuleNotFoundError: No module named 'no_such_thing'; inst"),
        ("from . import sibling", "model.py", "a file of a package is loaded by its dotted name"),
        ("raise SystemExit(3)", "model.py", "put what should only run as a script under `if __name__ == '__main__':`"),
        ("evaluate = 3", "model.py", "'evaluate' of 'model.py' is a int: expected evaluate(module)"),
        ("calibration_data = 3", "model.py", "'calibration_data' of 'model.py' is a int"),
    ],
)
def test_what_is_wrong_is_said(write, source, target, message):
    write(source)
    assert message in fails(target)


@pytest.mark.parametrize(
    ("file", "line"), [("numpy.py", "from numpy import own"), ("numpy/own.py", "import numpy.own")]
)
def test_a_file_that_an_imported_module_of_its_name_hides_is_named(write, tmp_path, file, line):
    write("", file, header="")
    write(line)
    hidden = tmp_path / file.partition("/")[0]
    assert f"'{hidden}' is not what is imported: another module has that name, so rename it" in fails("model.py")


def test_a_file_of_a_package_may_import_that_package_from_above(write):
    write("", "net_parts/model.py")
    write("from net_parts.model import Net\nmodel = Net()", "net_tools/model.py", header="")
    assert load("net_tools/model.py", inputs=["1x3"]).module.fc.out_features == 4


@pytest.mark.parametrize(
    ("target", "below", "lies"),
    [
        ("src/lying_there/main.py", ".", "src"),
        ("lying_there.main", ".", "src"),
        ("lying_there/main.py", "src", None),
        ("main.py", "src/lying_there", "src"),
    ],
)
def test_a_package_that_is_not_on_the_path_is_pointed_at(write, monkeypatch, tmp_path, target, below, lies):
    write("", "src/lying_there/__init__.py", header="")
    write("", "src/lying_there/net.py")
    write("from lying_there.net import Net\nmodel = Net()", "src/lying_there/main.py", header="")
    monkeypatch.chdir(tmp_path / below)
    if lies is None:
        assert load(target, inputs=["1x3"]).module
    else:
        assert f"'lying_there' lies in '{tmp_path / lies}': install its project by `pip install -e`" in fails(target)


def test_a_forward_may_import_what_lies_beside_its_file(write, monkeypatch, tmp_path):
    write("SCALE = 2.0", "beside_the_net.py")
    write("Net.forward = lambda self, x: self.fc(x) * __import__('beside_the_net').SCALE")
    monkeypatch.chdir(tmp_path.parent)
    module = load(str(tmp_path / "model.py"), inputs=["1x3"]).module
    assert torch.equal(module(torch.ones(1, 3)), 2 * module.fc(torch.ones(1, 3)))


def test_weights_in_place_of_a_model_are_said(write, tmp_path):
    (tmp_path / "net.pt").write_bytes(b"")
    assert "weights are given beside it, by `fxopt run model.py --weights net.pt`" in fails("net.pt")


def test_the_directory_is_the_first_to_import_from_while_code_of_the_file_runs_and_then_the_last(write, tmp_path):
    write("def width(): return 6", "sizes_of_net.py")
    write(
        """
        from sizes_of_net import width
        def get_model():
            import sys
            assert sys.argv == sys.argv[:1]
            return Net(width())
        def evaluate(module):
            import more_sizes
            return {"size": more_sizes.size, "width": torch.tensor(module.fc.out_features)}
        """
    )
    write("size = 3", "more_sizes.py")
    before, arguments = list(sys.path), sys.argv
    target = load("model.py")
    assert target.module.fc.out_features == 6
    assert target.evaluate is not None
    assert target.evaluate(target.module) == {"size": 3.0, "width": 6.0}
    assert sys.path == [*before, str(tmp_path)]
    assert sys.argv is arguments


def test_where_the_file_lets_python_look_stays_importable_while_its_code_runs(write, tmp_path):
    write(
        """
        import sys
        from pathlib import Path
        sys.path.insert(0, str(Path(__file__).parent / "parts"))
        class Net(nn.Module):
            def forward(self, x):
                from scale_of_parts import scale
                return scale * x
        example_inputs = torch.ones(2)
        def evaluate(module):
            from scale_of_parts import scale
            return {"scale": scale}
        """
    )
    write("scale = 3", "parts/scale_of_parts.py")
    before = list(sys.path)
    target = load("model.py")
    assert target.module(torch.ones(2)).tolist() == [3.0, 3.0]
    assert target.evaluate is not None
    assert target.evaluate(target.module) == {"scale": 3.0}
    assert sys.path == [*before, str(tmp_path), str(tmp_path / "parts")]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return 3", "'evaluate' of 'model.py' returned a int: expected a dict of floats"),
        ("return {'a': 'b'}", "gave 'a' as a str: expected a float"),
        ("return module.nothing", "'evaluate(module)' failed: model.py:11: AttributeError"),
    ],
)
def test_an_evaluate_that_fails(write, body, message):
    write(f"def evaluate(module): {body}")
    target = load("model.py")
    with pytest.raises(LoadError) as raised:
        target.evaluate(target.module)
    assert message in str(raised.value)


@pytest.mark.parametrize("data", ["[1, 2]", "lambda: (i for i in (1, 2))"])
def test_calibration_data_can_be_read_again(write, data):
    write(f"calibration_data = {data}")
    found = load("model.py").calibration_data
    assert list(found) == list(found) == [1, 2]


def test_calibration_data_that_is_one_batch(write):
    write("calibration_data = {'x': 3}")
    with pytest.raises(PassError, match="calibration_data: the data is one dict; give an iterable"):
        list(load("model.py").calibration_data)


def test_calibration_data_that_fails_halfway(write):
    write("def calibration_data():\n    yield 1\n    raise OSError('gone')")
    with pytest.raises(LoadError, match=r"'calibration_data' failed: model.py:13: OSError: gone"):
        list(load("model.py").calibration_data)


def test_the_module_can_be_copied_and_pickled(write):
    write("")
    module = load("model.py").module
    assert torch.equal(copy.deepcopy(module).fc.weight, module.fc.weight)
    assert torch.equal(pickle.loads(pickle.dumps(module)).fc.weight, module.fc.weight)


def test_two_files_of_one_name_do_not_mix(write):
    write("", "a/model.py")
    write("class Net(Net):\n    two = True", "b/model.py")
    first, second = load("a/model.py").module, load("b/model.py").module
    assert type(pickle.loads(pickle.dumps(first))) is type(first)
    assert type(pickle.loads(pickle.dumps(second))) is type(second)


def test_random_states_are_as_before(write):
    write("import random, numpy\ntorch.manual_seed(1); random.seed(1); numpy.random.seed(1)")
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    load("model.py")
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before[1:]


def test_an_exported_module_keeps_its_mode(write):
    write("model = torch.export.export(Net().eval(), (torch.ones(1, 3),)).module()")
    loaded = load("model.py", inputs=["1x3"])
    assert loaded.notes[0].startswith("the module stays in the mode that it is in: ")


@pytest.mark.parametrize("train", [False, True])
def test_lazy_parameters_get_their_shapes_from_the_inputs(write, train):
    write("model = nn.Sequential(nn.LazyLinear(4), nn.LazyBatchNorm1d())")
    target = load("model.py", inputs=["2x5"], train=train)
    assert target.module[0].weight.shape == (4, 5)
    assert target.module.training is train
    assert target.module[1].num_batches_tracked == 0
    assert target.notes[0].startswith("lazy parameters got the shapes that the inputs ask for: 0.weight, 0.bias, 1.")


def test_lazy_parameters_of_a_model_that_raises_stay_as_they_are(write):
    write("class Fails(Net):\n    def forward(self, x): 1 / 0\nmodel = nn.Sequential(Fails(), nn.LazyLinear(4))")
    assert load("model.py", inputs=["2x5"]).notes == ()


def test_models_of_torchvision_load_beside_a_torch_for_which_it_was_not_built() -> None:
    target = load("torchvision.models:squeezenet1_1", inputs=["1x3x64x64"])
    assert type(target.module).__name__ == "SqueezeNet"

"""Whether an engine gives what the module gives that it was built for."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from fxopt.capture.independent import independent_copy
from fxopt.capture.state import random_state_kept, state_kept
from fxopt.engines.contract import Run
from fxopt.engines.gpu import rounding_of_torch
from fxopt.engines.memory import hand_back
from fxopt.engines.once import once
from fxopt.engines.saturation import SATURATES
from fxopt.errors import EngineError
from fxopt.inputs import Inputs
from fxopt.relative_error import apart_by_rounding, relative_error

if TYPE_CHECKING:
    from fxopt.engines.executable import Executable


def checked(executable: Executable, run: Run, inputs: Inputs) -> float:
    """The largest error of outputs that `run` gives, after making sure that each is one that the engine may make.

    Raises:
        EngineError: where one is larger.
        GuardError: where the module does not hold for such inputs.
    """
    engine = executable.engine
    with torch.no_grad():
        expected = once(executable.module, [executable.module], inputs)
        hand_back()
        found = once(run, executable.holds, inputs)
    if expected[1] != found[1]:
        raise EngineError(f"engine '{engine.name}' gives {found[1]} in place of {expected[1]}; please report it")
    place = next((tensor.device for tensor in inputs.tensors), torch.device("cpu"))
    rounding = max(rounding_of_torch(place), executable.rounding if engine.integers else 0.0)
    worst = 0.0
    for index, (want, got) in enumerate(zip(expected[0], found[0], strict=True)):
        if isinstance(want, (float, complex)) and isinstance(got, (float, complex)):  # what `item()` made of a tensor
            want, got = torch.tensor(want), torch.tensor(got)
        if not isinstance(want, torch.Tensor):
            if type(want) is not type(got) or want != got:
                raise EngineError(f"engine '{engine.name}' gives {got!r} in place of {want!r} as output {index}")
            continue
        if got.shape != want.shape or got.dtype is not want.dtype:
            raise EngineError(
                f"engine '{engine.name}' gives {tuple(got.shape)} {got.dtype} in place of {tuple(want.shape)} "
                f"{want.dtype} as output {index}; please report it"
            )
        error = relative_error(want, got)
        allowed = max(rounding, *(engine.tolerance(dtype) for dtype in {want.dtype, *executable.dtypes}))
        if not error <= allowed:
            reference = _in_float64(executable.module, inputs, index)
            allowed = max(allowed, 0.0 if reference is None else apart_by_rounding(reference, want))
        if not error <= allowed:
            raise EngineError(
                f"engine '{engine.name}': output {index} differs from that of the module by {error:.1e} (allowed "
                f"{allowed:.0e}), so it is not used; {_why_other(executable, inputs)}"
            )
        worst = max(worst, error)
    return worst


def _in_float64(module: nn.Module, inputs: Inputs, index: int) -> torch.Tensor | None:
    """An output of the module; None where it has no float64 form."""
    try:
        wide = independent_copy(module).double()
        with torch.no_grad():
            reference: torch.Tensor = once(wide, [wide], inputs.double())[0][index]
            return reference
    except Exception:  # whatever a user's forward raises in it
        return None


def _why_other(executable: Executable, inputs: Inputs) -> str:
    """What may make the outputs of an engine others than those of the module."""
    if SATURATES in executable.reasons:
        return SATURATES.reason
    given = inputs.map(lambda tensor: tensor.detach().clone())
    with torch.no_grad(), random_state_kept(), state_kept(executable.module):
        before = torch.get_rng_state()
        executable.module(*given.args, **given.kwargs)
        if not torch.equal(torch.get_rng_state(), before):
            return "it draws random numbers, and only engines that call torch for these draw the same"
    return "use another engine, and please report it"

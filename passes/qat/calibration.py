"""Takes the ranges of activations from data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from fxopt.batches import ADVICE, run_batches, unaffected
from fxopt.capture.state import modes_kept
from fxopt.contract import Skip
from fxopt.errors import PassError
from fxopt.modules import FakeQuantize, State


def calibrate(module: nn.Module, data: Iterable[Any]) -> tuple[str, ...]:
    """Run `module` on `data` and let its fake quantisers take their ranges from what they see.

    Ranges start anew. The module runs in evaluation mode and unquantised while it is observed, and quantises
    afterwards; its own mode is as before. Where anything goes wrong the ranges are as before too.

    Args:
        module: a module that the pass `qat` has been through.
        data: batches of inputs, each a tensor, a tuple of positional or a dict of keyword arguments.

    Returns:
        The names of the quantisers that found no range, `why_not_whole` says why; they pass their input on unquantised.

    Raises:
        PassError: if there is nothing to calibrate, no data, or data that the module can't take.
    """
    quantizers = {name: child for name, child in module.named_modules() if isinstance(child, FakeQuantize)}
    if not quantizers:
        raise PassError("calibrate: the module has no fake quantisers; put them in with the pass 'qat' first")
    frozen = [name for name, quantizer in quantizers.items() if quantizer.state is State.FROZEN]
    if frozen:
        raise PassError(f"calibrate: {frozen[0]!r} is frozen, its range is final; calibrate before 'quantize-freeze'")
    before = {name: (_copied(quantizer), quantizer.state) for name, quantizer in quantizers.items()}
    try:
        for quantizer in quantizers.values():
            quantizer.reset()
            quantizer.state = State.OBSERVE
            quantizer.calibrating = True
        with torch.no_grad(), modes_kept(module):
            module.eval()
            with unaffected(module):
                count = run_batches("calibrate", data, lambda inputs: inputs.call(module))
                seen = {name: (_copied(quantizer), quantizer.unbounded) for name, quantizer in quantizers.items()}
        if count == 0:
            raise PassError(f"calibrate: the data is empty; {ADVICE}")
        for name, quantizer in quantizers.items():
            values, quantizer.unbounded = seen[name]
            quantizer.load_state_dict(values)
            quantizer.settle()
    except BaseException:
        for name, (values, state) in before.items():
            quantizers[name].load_state_dict(values)
            quantizers[name].state = state
        raise
    finally:
        for quantizer in quantizers.values():
            quantizer.calibrating = False
    return tuple(name for name, quantizer in quantizers.items() if not quantizer.ready)


def _copied(quantizer: FakeQuantize) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in quantizer.state_dict().items()}


def why_not_whole(module: nn.Module) -> Iterator[Skip]:
    """The quantisers of a calibrated module whose range lacks what they were given, and why."""
    for name, child in module.named_modules():
        if not isinstance(child, FakeQuantize) or (child.ready and not child.unbounded):
            continue
        reason = "no calibration batch reached it: it does not quantise until one does"
        if child.unbounded:
            then = "its range leaves them out" if child.ready else "it does not quantise"
            reason = f"NaN or Inf reached it in calibration, which no range holds: {then}"
        yield Skip(name, reason)

"""All engines by name."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from fxopt import spec
from fxopt.engines.contract import Engine
from fxopt.engines.cublas import Cublas
from fxopt.engines.cudagraph import CudaGraph
from fxopt.engines.cudnn import CuDNN
from fxopt.engines.eager import Eager
from fxopt.engines.inductor import Inductor
from fxopt.engines.onednn import OneDNN
from fxopt.engines.onnxruntime import OnnxRuntime
from fxopt.engines.openvino import OpenVINO
from fxopt.engines.sparse import Sparse
from fxopt.errors import EngineError

_KINDS: tuple[type[Engine], ...] = (Eager, OneDNN, Inductor, OnnxRuntime, OpenVINO, Sparse, CuDNN, Cublas, CudaGraph)
ENGINES: Mapping[str, type[Engine]] = MappingProxyType({kind.name: kind for kind in _KINDS})
"""Engines by the name that `fxopt.lower` and `--engine` take."""


def written(text: str) -> tuple[str, dict[str, Any]]:
    """What `openvino{precision=bf16}` means: the name of an engine, and options.

    Raises:
        EngineError: for a name that is not there.
        SpecError: for an option that is not there, or a value that does not fit.
    """
    name = text.partition("{")[0].strip()
    if name not in ENGINES:
        close = difflib.get_close_matches(name, ENGINES, n=1)
        meant = f"did you mean '{close[0]}'? " if close else ""
        raise EngineError(
            f"unknown engine '{name}'; {meant}there are {', '.join(ENGINES)}; `fxopt run --engine auto`, and "
            "`fxopt.optimize(..., engine='auto')`, choose the fastest"
        )
    return (name, {}) if text == name else spec.read_options(text, ENGINES, "engine")


def find(text: str, options: Mapping[str, Any]) -> Engine:
    """An engine by name, with its options set: those in braces behind the name, and `options`.

    Raises:
        EngineError: for a name or an option that is not there, or an engine that cannot run here.
        SpecError: see `written`.
    """
    name, given = written(text)
    kind = ENGINES[name]
    known = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    for option in options:
        if option not in known:
            there = f"its options are {', '.join(known)}" if known else "it has no options"
            raise EngineError(f"engine '{name}' has no option '{option}'; {there}")
        if option in given:
            raise EngineError(f"engine '{name}': option '{option}' is given twice, in '{text}' too")
    engine = kind(**given, **options)
    reason = engine.unavailable()
    if reason is not None:
        raise EngineError(f"engine '{name}' cannot run here: {reason}")
    return engine

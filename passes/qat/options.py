"""What every pass that quantises can be told."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import ClassVar, Literal, cast

from fxopt.contract import Pass
from fxopt.errors import PassError, SpecError
from fxopt.graph import GraphModule
from passes.qat.place import layer_names
from passes.qat.scheme import Scheme
from passes.qat.targets import TARGETS, Target


@dataclass(frozen=True)
class Quantization(Pass):
    """The options that `qat` and `ptq` share."""

    quantizes: ClassVar[bool] = True

    bits: int = field(default=8, metadata={"help": "width of weights and inputs: 2 to 8, or 16"})
    weights: str = field(default="", metadata={"help": "int8, int4, …: of weights, where another than bits"})
    activations: str = field(
        default="", metadata={"help": "of inputs, where another than unsigned bits: uint8, int8 (around 0), …, none"}
    )
    per_channel: bool = field(default=True, metadata={"help": "a scale for each output channel of a weight"})
    observer: Literal["minmax", "ema", "histogram", "mse", "percentile"] = field(
        default="minmax",
        metadata={
            "help": "range of inputs: all that was seen (minmax), a moving average (ema), or from a histogram of the "
            "calibration data the least divergence (histogram), the least error (mse), all but 0.01 % (percentile)"
        },
    )
    target: Literal["auto", "generic", "onnxruntime", "openvino", "inductor"] = field(
        default="auto",
        metadata={"help": "the runtime whose integer kernels shall fuse; auto is the engine asked for, or generic"},
    )
    first_last: Literal["quantize", "keep"] = field(
        default="quantize", metadata={"help": "keep leaves the first and the last layers floats"}
    )
    include: str = field(default="*", metadata={"help": "glob over the layer's qualified name"})
    exclude: str = field(default="", metadata={"help": "glob over the layer's qualified name; wins over include"})

    def __post_init__(self) -> None:
        _ = self.scheme
        self._one_of("target", ("auto", *TARGETS))
        self._one_of("first_last", ("quantize", "keep"))

    def aimed_at(self, engine: str) -> Pass:
        """With that engine as the target, where it is one and none is given."""
        if self.target != "auto" or engine not in TARGETS:
            return self
        return replace(self, target=cast(Target, engine))

    @property
    def runtime(self) -> Target:
        """The target to place quantisers for."""
        return "generic" if self.target == "auto" else self.target

    @property
    def scheme(self) -> Scheme:
        """What the options say of quantisers."""
        return Scheme.of(
            self.name,
            bits=self.bits,
            weights=self.weights,
            activations=self.activations,
            per_channel=self.per_channel,
            observer=self.observer,
        )

    def check_names(self, module: GraphModule) -> None:
        """Refuse names that no layer has.

        Raises:
            PassError: with names that there are.
        """
        names = layer_names(module)
        if self.include == "*" or any(map(self.is_named, names)):
            return
        wanted = f"include={self.include!r}" + (f" without exclude={self.exclude!r}" if self.exclude else "")
        layers = [name for name, _ in module.named_modules() if name in names]  # calls of functions say less
        near = get_close_matches(self.include, layers or names, 5, 0.0)
        listed = f"the nearest names are {', '.join(map(repr, near))}" if near else "there are none"
        raise PassError(f"{self.name}: {wanted} matches no layer; {listed}")

    def is_named(self, name: str) -> bool:
        """Whether a qualified name is among those asked for."""
        return fnmatchcase(name, self.include) and not fnmatchcase(name, self.exclude)

    def _one_of(self, option: str, known: tuple[object, ...]) -> None:
        value = getattr(self, option)
        if value not in known:
            raise SpecError(f"{self.name}: {option!r} is one of {', '.join(map(str, known))}, not {value!r}")

"""layout: what stands around convolutions goes into them, and all of them run in channels_last."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

from fxopt.contract import Change, Pass, Promise, Skip, fixed_point
from fxopt.graph import Region
from passes.layout.branches import Branches, find_branches, merge_branches
from passes.layout.channels_last import run_channels_last
from passes.layout.pads import fold_pad
from passes.layout.scales import Scale, find_scale, fold_scale


@dataclass(frozen=True)
class Layout(Pass):
    """Folds pads, scales, shifts and parallel branches into convolutions and linear layers, and orders memory for them.

        conv(pad(x))                             =>  conv'(x)       with more padding
        scale * layer(x) + shift                 =>  layer'(x)      W' = scale W     b' = scale b + shift
        bn(conv3x3(x)) + bn(conv1x1(x)) + bn(x)  =>  conv3x3'(x)    W' = the sum of the kernels, zeros around

    In training the first alone is done. The weights of 2-d convolutions are stored in channels_last, inputs are
    converted once, where they enter, and what leaves has the layout that it had.

    It pays on CPUs and on GPUs with tensor cores, where convolutions are dense; grouped ones may be slower in
    channels_last. A batch norm behind a single convolution is left to `fuse`.

    Sources: Ding et al. 2021 (RepVGG); torch.channels_last.
    """

    name: ClassVar[str] = "layout"
    promise: ClassVar[Promise] = Promise.CLOSE
    after: ClassVar[tuple[str, ...]] = ("clean",)
    for_speed: ClassVar[bool] = True

    channels_last: bool = field(default=True, metadata={"help": "run 2-d convolutions in channels_last"})
    pads: bool = field(default=True, metadata={"help": "fold pads into the convolution behind them"})
    scales: bool = field(default=True, metadata={"help": "fold scales and shifts into the layer beside them"})
    branches: bool = field(default=True, metadata={"help": "merge parallel convolutions whose sum is taken"})

    def run(self, region: Region) -> Iterator[Change | Skip]:
        """Branches before scales, while each still has its own kernel; memory last."""
        if region.mode is False and not region.module.training and self._folds(region):
            # A merged layer computes otherwise than the training graph expects, and no flag leads back.
            region.take_both_modes()
            yield Change("runs in both modes from now on, with its layers folded", region.path or "evaluation graph")
        if self.pads:
            yield from fixed_point(fold_pad, region)
        if self.branches:
            yield from fixed_point(merge_branches, region, backwards=True)  # the whole sum before its parts
        if self.scales:
            yield from fixed_point(fold_scale, region)
        if self.channels_last:
            yield from run_channels_last(region)

    def _folds(self, region: Region) -> bool:
        for node in region.graph.nodes:
            found = (find_branches(node, region) if self.branches else None,
                     find_scale(node, region) if self.scales else None)  # fmt: skip
            if any(isinstance(one, (Branches, Scale)) for one in found):
                return True
        return False

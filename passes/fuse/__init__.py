"""fuse: fewer and larger calls, with the same outputs but for rounding."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import ClassVar

import torch.fx as fx

from fxopt.contract import Change, Pass, Promise, Skip, fixed_point
from fxopt.graph import Affine, Norm, Region, is_norm, read_affine, read_norm, source_of
from passes.fuse.fold import fold_before, fold_behind
from passes.fuse.tail import fuse_tail
from passes.fuse.train import join


@dataclass(frozen=True)
class Fuse(Pass):
    """Folds batch norms into the layers around them, and fuses the activations behind these.

        bn(W x + b)       =>  W' x + b'     W' = W s        b' = (b - mean) s + beta     s = gamma / sqrt(var + eps)
        W bn(x) + b       =>  W' x + b'     W' = W s        b' = b + W (beta - mean s)
        act(W x + b + y)  =>  one module that computes all of it

    Layers are Conv1d to 3d, their transposed forms and Linear, called as modules or as functions. In training
    mode nothing is folded: layer and batch norm become one module that runs both, ready for quantisation.

    Sources: Jacob et al. 2018, section 3.2; torch.nn.utils.fusion.
    """

    name: ClassVar[str] = "fuse"
    promise: ClassVar[Promise] = Promise.CLOSE
    after: ClassVar[tuple[str, ...]] = ("clean", "merge", "attention", "layout")
    for_speed: ClassVar[bool] = True

    include: str = field(default="*", metadata={"help": "glob over the layer's qualified name"})
    exclude: str = field(default="", metadata={"help": "glob over the layer's qualified name; wins over include"})
    activations: bool = field(default=True, metadata={"help": "fuse the activation behind a layer"})
    adds: bool = field(default=True, metadata={"help": "fuse an addition between a layer and its activation"})

    def run(self, region: Region) -> Iterator[Change | Skip]:
        """Batch norms first, from the inputs to the outputs; then activations, the other way round."""
        if region.mode not in (None, region.module.training):
            return  # the graph of the other mode calls the same layers
        if region.mode is False and not region.module.training and self._folds(region):
            # A folded layer computes otherwise than the training graph expects, and no flag leads back.
            region.take_both_modes()
            yield Change("runs in both modes from now on, with batch norms folded", region.path or "evaluation graph")
        yield from fixed_point(self._norm, region)
        if not self.activations:
            return
        # Of two layers that meet in an addition the later one takes it: it need not move past the other.
        for node in reversed(list(region.graph.nodes)):
            affine = None if region.is_erased(node) else self._layer(node, region)
            if isinstance(affine, Affine):
                outcome = fuse_tail(affine, region, self.adds)
                if outcome is not None:
                    yield outcome

    def _folds(self, region: Region) -> bool:
        """Whether some batch norm has a layer to go into."""
        for node in region.graph.nodes:
            norm = read_norm(node, region) if is_norm(node, region) else None
            around = [norm.input, *node.users] if isinstance(norm, Norm) else []
            if any(isinstance(self._layer(other, region), Affine) for other in around):
                return True
        return False

    def _norm(self, node: fx.Node, region: Region) -> Change | Skip | None:
        if not is_norm(node, region):
            return None
        source = node.args[0] if node.args else node.kwargs.get("input")
        behind = self._layer(source, region) if isinstance(source, fx.Node) else None
        users = (self._layer(user, region) for user in node.users)
        before = next((user for user in users if user is not None), None)
        if isinstance(behind, Affine) and not behind.is_bare:
            behind = None
        if isinstance(before, Affine) and before.input is not node:
            before = None
        found = [layer for layer in (behind, before) if isinstance(layer, Affine)]
        if not found:
            stays = behind or before
            return None if stays is None else _because(node, region, stays)
        if region.training:
            return join(behind, node, region) if isinstance(behind, Affine) else None
        norm = read_norm(node, region)
        if isinstance(norm, Skip):
            return norm
        refused: Skip | None = None
        for layer in found:
            fold = fold_behind(layer, norm, region) if layer is behind else fold_before(norm, layer, region)
            if isinstance(fold, Change):
                return fold
            refused = refused or fold
        return refused

    def _layer(self, node: fx.Node, region: Region) -> Affine | Skip | None:
        affine = read_affine(node, region)
        if affine is None:
            return None
        name = region.qualified(node)
        wanted = fnmatchcase(name, self.include) and not fnmatchcase(name, self.exclude)
        return affine if wanted else None


def _because(node: fx.Node, region: Region, layer: Affine | Skip) -> Skip:
    reason = f"'{layer.where}' stays as it is: {layer.reason}" if isinstance(layer, Skip) else ""
    return Skip(region.qualified(node), reason, source_of(node))

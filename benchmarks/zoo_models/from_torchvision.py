"""All of torchvision's models, from plain constructors with random weights.

Where torchvision's compiled operators are missing, the two that its detectors call in eager get plain torch
implementations here. They are for running these models, not for using them.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch

from fxopt.inputs import Inputs
from fxopt.torchvision_operators import declare_missing
from zoo_models.specimen import Built, Specimen

_SIZES = {
    "inception_v3": 128,
    "googlenet": 96,
    "alexnet": 128,
    "vit_h_14": 56,
    "maxvit_t": 224,
    "squeezenet1_0": 96,
    "squeezenet1_1": 96,
    # Large enough that no stage is as small as one window of attention.
    "swin_v2_t": 256,
    "swin_v2_s": 256,
    "swin_v2_b": 256,
}
_SIZED_AT_BUILD = ("vit_",)
# So many candidates as in use take minutes without compiled operators.
_SMALL_DETECTORS: dict[str, dict[str, Any]] = {
    "rcnn": {"min_size": 96, "max_size": 192, "rpn_pre_nms_top_n_test": 60, "rpn_post_nms_top_n_test": 20},
    "retinanet": {"min_size": 96, "max_size": 192, "topk_candidates": 20},
    "fcos": {"min_size": 96, "max_size": 192, "topk_candidates": 20},
    "ssd": {"topk_candidates": 10},
}


def specimens() -> Iterator[Specimen]:
    """Classification, segmentation, video, optical flow and detection."""
    _import()
    import torchvision

    for name in torchvision.models.list_models():
        kind = _kind(torchvision.models.get_model_builder(name).__module__)
        yield Specimen(name, "torchvision", kind, functools.partial(_build, name, kind))


def _kind(module: str) -> str:
    for kind in ("segmentation", "video", "optical_flow", "detection", "quantization"):
        if f".{kind}" in module:
            return kind
    return "classification"


def _build(name: str, kind: str) -> Built:
    import torchvision

    torch.manual_seed(0)
    options: dict[str, Any] = {"weights": None}
    if kind in ("segmentation", "detection"):
        options["weights_backbone"] = None
    if name in ("googlenet", "inception_v3"):
        options["init_weights"] = False
    if name.startswith(_SIZED_AT_BUILD):
        options["image_size"] = _SIZES.get(name, 64)
    for part, smaller in _SMALL_DETECTORS.items() if kind == "detection" else ():
        options |= smaller if part in name else {}
    module = torchvision.models.get_model(name, **options).eval()
    make = _inputs(name, kind)
    size = _SIZES.get(name.removeprefix("quantized_"), 64)
    few = 1 if name.startswith("mvit") else 2
    # A network's strides divide the other size too.
    other = size + 32 if size < 256 else size - 32
    return module, {"example": make(few, size), "batch": make(few + 1, size), "size": make(few, other)}


def _inputs(name: str, kind: str) -> Callable[[int, int], Inputs]:
    def images(batch: int, size: int) -> Inputs:
        return Inputs((torch.randn(batch, 3, size, size + 32 * (size < 128 and not name.startswith("vit_"))),))

    def clips(batch: int, size: int) -> Inputs:
        length = 16 if name.startswith("mvit") else (14 if name == "s3d" else 4)
        side = 224 if length > 4 else max(size, 64)
        return Inputs((torch.randn(batch, 3, length, side, side),))

    def pairs(batch: int, size: int) -> Inputs:
        shape = (batch, 3, size + 64, size + 96)
        return Inputs((torch.randn(shape), torch.randn(shape)))

    def lists(batch: int, size: int) -> Inputs:
        return Inputs(([torch.rand(3, size + 32, size + 16 * index) for index in range(batch)],))

    return {"video": clips, "optical_flow": pairs, "detection": lists}.get(kind, images)


def _import() -> None:
    if not declare_missing():
        return
    import torchvision

    library = torch.library.Library("torchvision", "IMPL")
    library.impl("nms", _nms, "CPU")
    roi_align = sys.modules["torchvision.ops.roi_align"]
    library.impl("roi_align", roi_align._roi_align.__wrapped__, "CompositeImplicitAutograd")
    _kept.append(library)
    torchvision.extension._has_ops = lambda: True
    roi_align._has_ops = lambda: True  # type: ignore[attr-defined]


_kept: list[torch.library.Library] = []


def _nms(boxes: torch.Tensor, scores: torch.Tensor, iou_threshold: float) -> torch.Tensor:
    """Non-maximum suppression as torchvision's CPU kernel does it."""
    order = scores.argsort(descending=True, stable=True)
    sorted_boxes = boxes[order]
    areas = (sorted_boxes[:, 2] - sorted_boxes[:, 0]) * (sorted_boxes[:, 3] - sorted_boxes[:, 1])
    suppressed = torch.zeros(len(order), dtype=torch.bool)
    kept = []
    for index in range(len(order)):
        if suppressed[index]:
            continue
        kept.append(index)
        corner = torch.maximum(sorted_boxes[index, :2], sorted_boxes[index + 1 :, :2])
        opposite = torch.minimum(sorted_boxes[index, 2:], sorted_boxes[index + 1 :, 2:])
        overlap = (opposite - corner).clamp(min=0).prod(dim=1)
        share = overlap / (areas[index] + areas[index + 1 :] - overlap)
        suppressed[index + 1 :] |= share > iou_threshold
    return order[torch.tensor(kept, dtype=torch.long)]

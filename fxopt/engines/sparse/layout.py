"""Values with features first, in chunks of samples: the layout that sparse products are fast in.

(…, features) with n samples becomes (chunks, features, samples a chunk); a chunk has at most 64 samples, so that what
one row of a sparse matrix reads stays in the cache. The last chunk may be padded with zeros.
"""

from __future__ import annotations

import torch

CHUNK = 64


def to_features_first(x: torch.Tensor) -> torch.Tensor:
    """(…, features) -> (chunks, features, samples)."""
    flat = x.reshape(-1, x.shape[-1])
    samples, features = flat.shape
    chunks = max(-(-samples // CHUNK), 1)
    width = max(-(-samples // chunks), 1)
    if chunks * width != samples:
        flat = torch.nn.functional.pad(flat, (0, 0, 0, chunks * width - samples))
    return flat.view(chunks, width, features).transpose(1, 2).contiguous()


def to_features_last(y: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The inverse; `like` is a value with the same samples, by whose leading dimensions they are arranged."""
    lead = like.shape[:-1]
    samples = lead.numel()
    flat = y.transpose(1, 2).reshape(-1, y.shape[1])
    return flat[:samples].reshape(*lead, y.shape[1])


def of_both(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """A value with the samples that the sum of two has."""
    if one.shape[:-1] == other.shape[:-1]:
        return one
    return one.new_empty(1).expand(*torch.broadcast_shapes(one.shape[:-1], other.shape[:-1]), 1)


def broadcast(y: torch.Tensor, own: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """`y`, features first with the samples of `own`, with those of `like`."""
    if own.shape[:-1] == like.shape[:-1]:
        return y
    return to_features_first(to_features_last(y, own).expand(*like.shape[:-1], -1))

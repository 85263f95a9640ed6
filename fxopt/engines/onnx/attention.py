"""Attention in an ONNX model: its keys are transposed by one operator."""

from __future__ import annotations

from typing import Any

_Entries = tuple[int | str, ...]
"""A shape: numbers, and names of axes whose sizes are not known."""


def transpose_keys(model: Any) -> None:
    """Put one Transpose where torch's exporter swaps the last two axes of keys by shapes that each call computes.

    The exporter does not ask how many axes keys have: it makes them a batch of matrices, transposes these, and puts
    them back. Of its nine operators for each attention one is left, which runtimes fuse with the product behind it.

    Args:
        model: of `onnx_ir`; changed in place.
    """
    for node in list(model.graph):
        if node.op_type == "Transpose" and list(node.attributes.get_ints("perm", [])) == [0, 2, 1]:
            _replace(model.graph, node)


def _replace(graph: Any, transpose: Any) -> None:
    import onnx_ir as ir

    before = transpose.inputs[0].producer()
    readers = list(transpose.outputs[0].consumers())
    if before is None or len(readers) != 1 or {before.op_type, readers[0].op_type} != {"Reshape"}:
        return
    keys, after = before.inputs[0], readers[0]
    if keys.shape is None or len(keys.shape) < 3 or after.outputs[0].is_graph_output():
        return
    *first, second_last, last = _sizes(keys)
    flat, back = (_entries(reshape.inputs[1], keys) for reshape in (before, after))
    if flat is None or flat[1:] != (second_last, last) or not _leads_to(back, (*first, last, second_last)):
        return
    axes = [*range(len(first)), len(first) + 1, len(first)]
    found = ir.node("Transpose", [keys], {"perm": axes})
    graph.insert_before(after, found)
    found.outputs[0].type = keys.type
    found.outputs[0].shape = ir.Shape([keys.shape[axis] for axis in axes])
    after.outputs[0].replace_all_uses_with(found.outputs[0])


def _leads_to(shape: _Entries | None, sizes: _Entries) -> bool:
    """Whether reshaping as many values to a shape gives these sizes: its one -1 is what the others leave."""
    if shape is None or len(shape) != len(sizes):
        return False
    return all(entry in (size, -1) for entry, size in zip(shape, sizes, strict=True))


def _sizes(value: Any) -> _Entries:
    """The shape of a value."""
    return tuple(size if isinstance(size, int) else f"axis {axis}" for axis, size in enumerate(value.shape))


def _entries(shape: Any, of: Any) -> _Entries | None:
    """The shape that an input of a Reshape says, where it is made of numbers and sizes of one value alone."""
    if shape.const_value is not None:
        return tuple(shape.const_value.numpy().flatten().tolist())
    node = shape.producer()
    if node is None or node.op_type not in ("Shape", "Concat", "Slice"):
        return None
    if node.op_type == "Shape":
        whole = node.inputs[0] is of and node.attributes.get_int("start", 0) == 0 and "end" not in node.attributes
        return _sizes(of) if whole else None
    parts = [_entries(each, of) for each in node.inputs]
    if node.op_type == "Concat":
        return None if None in parts else tuple(entry for part in parts if part is not None for entry in part)
    match parts:
        case [tuple(sliced), (int(start),), (int(end),)]:
            return sliced[start:end]
    return None

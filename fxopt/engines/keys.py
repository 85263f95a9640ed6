"""Keys of attention in an ONNX model, transposed as one operator."""

from __future__ import annotations

from typing import Any

_Entries = tuple[int | str, ...]


def transpose_keys(model: Any) -> None:
    """Put one Transpose where torch's exporter swaps the last two axes of keys by shapes that each call computes.

    It does not ask how many axes they have: keys are made a batch of matrices, which are transposed and put back. Eight
    operators and a copy for each attention are gone, and runtimes recognise what is left.

    Args:
        model: of `onnx_ir`; changed in place.
    """
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    for node in list(model.graph):
        if node.op_type == "Transpose" and list(node.attributes.get_ints("perm", [])) == [0, 2, 1]:
            _replace(model.graph, node)
    RemoveUnusedNodesPass()(model)


def _replace(graph: Any, transpose: Any) -> None:
    import onnx_ir

    before = transpose.inputs[0].producer()
    readers = list(transpose.outputs[0].consumers())
    if before is None or len(readers) != 1 or {before.op_type, readers[0].op_type} != {"Reshape"}:
        return
    keys, after = before.inputs[0], readers[0]
    if keys.shape is None or len(keys.shape) < 3:
        return
    *first, second_last, last = _sizes(keys)
    flat, back = (_entries(reshape.inputs[1], keys) for reshape in (before, after))
    if flat is None or not _same(flat[1:], (second_last, last)) or not _same(back, (*first, last, second_last)):
        return
    axes = [*range(len(first)), len(first) + 1, len(first)]
    found = onnx_ir.node("Transpose", [keys], {"perm": axes})
    graph.insert_before(after, found)
    found.outputs[0].type = keys.type
    found.outputs[0].shape = onnx_ir.Shape([keys.shape[axis] for axis in axes])
    after.outputs[0].replace_all_uses_with(found.outputs[0])


def _same(shape: _Entries | None, wanted: _Entries) -> bool:
    """Whether a shape is this one; -1 is what the others leave."""
    return (
        shape is not None
        and len(shape) == len(wanted)
        and all(a in (b, -1) for a, b in zip(shape, wanted, strict=True))
    )


def _sizes(value: Any) -> _Entries:
    """Of each axis, or its name where it is not known."""
    return tuple(size if isinstance(size, int) else f"axis {axis}" for axis, size in enumerate(value.shape))


def _entries(shape: Any, of: Any) -> _Entries | None:
    """What a computed shape is made of, where these are numbers and sizes of a value."""
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

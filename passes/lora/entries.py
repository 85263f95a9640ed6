"""The tensors of one layer in a file of PEFT, and the keys under which they stand."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from fxopt.errors import ArtifactError
from passes.lora.adapter import Adapter, Beside, LowRank, WeightAdapter
from passes.lora.fold import slot_of
from passes.lora.forms import Conv, ConvTranspose, Experts, Form
from passes.lora.init import padded
from passes.lora.settings import Settings
from passes.lora.slices import columns_of, mask_of

_PREFIX = "base_model.model."
_BASE = "base_layer"
_ROLES = {
    "lora_A.weight": "a",
    "lora_B.weight": "b",
    "lora_B.bias": "bias",
    "lora_embedding_A": "embedding_a",
    "lora_embedding_B": "embedding_b",
    "lora_magnitude_vector": "magnitude",
}
_KEY = re.compile(r"(?:(.*)\.)?(lora_(?:A\.weight|B\.weight|B\.bias|embedding_A|embedding_B|magnitude_vector))")


@dataclass(frozen=True)
class Entry:
    """An adapter of one layer as PEFT has it.

    Attributes:
        name: of the layer.
        a, b: as PEFT has them: (r, in ...) and (out, r ...); of an embedding (r, rows) and (width, r).
        scale: s.
        magnitude, bias: of DoRA and `lora_bias`, or None.
        embedding: whether the keys are those of an embedding.
        transposed: whether the weight is (in, out), `fan_in_fan_out`.
        in_attention: whether it is the output projection of an attention module.
        parameter: name of the parameter where PEFT has no adapter for the module but for the parameter, else "".
        depth: how many other adapters of parameters of the same module are around it.
        experts: how many matrices the parameter holds.
        columns: the rows of each column of B that may differ from zero; () where all may. PEFT has nothing like it.
    """

    name: str
    a: torch.Tensor
    b: torch.Tensor
    scale: float
    magnitude: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    embedding: bool = False
    transposed: bool = False
    in_attention: bool = False
    parameter: str = ""
    depth: int = 0
    experts: int = 1
    columns: Sequence[Sequence[int]] = ()

    @property
    def label(self) -> str:
        """What patterns call it: PEFT has one rank and one alpha for the two projections of an attention module."""
        return self.parameter or (self.name.removesuffix(".out_proj") if self.in_attention else self.name)

    @property
    def path(self) -> str:
        """Where it stands in a file: at a module, inside of the adapters that are around it."""
        path = self.name
        if self.in_attention:
            path = f"{path.removesuffix('out_proj')}base_layer.out_proj"
        elif self.parameter:
            path = self.parameter.rpartition(".")[0]
        return ".".join([path, *[_BASE] * self.depth]).removeprefix(".")

    @property
    def rank(self) -> int:
        """The r of the configuration."""
        return int(self.a.shape[0]) // self.experts


def to_entry(module: nn.Module, adapter: Adapter, name: str) -> Entry:
    """What PEFT calls the parts of an adapter."""
    low, form = adapter[name], adapter.form
    a, b = low.A.detach(), low.left.detach()
    if low.start_a is not None and low.start_b is not None:
        # W = W_left + s B_0 A_0, so the update of the original weight is s (B A - B_0 A_0).
        a, b = torch.cat([a, -low.start_a]), torch.cat([b, low.start_b], 1)
    if form.groups > 1 and form.is_foldable(a) and not isinstance(form, ConvTranspose):
        a = _block_diagonal(a, form.groups)
    magnitude = None if low.magnitude is None else low.magnitude.detach()
    if magnitude is not None and isinstance(form, Conv):
        magnitude = magnitude.reshape(1, -1, *[1] * (len(form.shape) - 2))
    owner, leaf = slot_of(module, adapter)
    b = b / adapter.steps
    known = isinstance(owner, (nn.Linear, nn.Embedding, nn.modules.conv._ConvNd)) or type(owner).__name__ == "Conv1D"
    whole = isinstance(adapter, WeightAdapter) and not adapter.inner and isinstance(owner, nn.Linear)
    by_module = (known and leaf == "weight" and not whole) or leaf == "in_proj_weight"
    if not by_module and form.kind == "matmul":
        a, b = b.T, a.T
    entry = Entry(adapter.name, a, b, low.scale, magnitude, None if low.bias is None else low.bias.detach())
    if isinstance(owner, nn.Embedding) and by_module and form.layout == "rows":
        entry = replace(entry, a=b.T, b=a.T, embedding=True)
    return replace(
        entry,
        transposed=form.kind == "matmul" and by_module,
        in_attention=adapter.steps > 1,
        parameter="" if by_module else adapter.slot,
        experts=form.shape[0] if isinstance(form, Experts) else 1,
        columns=() if low.mask is None else columns_of(low.mask),
    )


def alike(entries: Sequence[Entry]) -> list[Entry]:
    """The same, the two of an attention module with one rank and one scale: zeros and B make up for the difference."""
    by_label: dict[str, list[Entry]] = {}
    for entry in entries:
        by_label.setdefault(entry.label, []).append(entry)
    found = []
    for together in by_label.values():
        rank, scale = max(entry.rank for entry in together), max((entry.scale for entry in together), key=abs)
        for entry in together:
            if (entry.rank, entry.scale) != (rank, scale):
                a, b = padded(entry.a, 0, rank), padded(entry.b, 1, rank) * (entry.scale / scale)
                entry = replace(entry, a=a, b=b, scale=scale)
            found.append(entry)
    return found


def write_entries(entries: Sequence[Entry]) -> dict[str, torch.Tensor]:
    """The tensors of a file by their keys."""
    tensors = {}
    for entry in entries:
        names = ("lora_embedding_A", "lora_embedding_B") if entry.embedding else ("lora_A.weight", "lora_B.weight")
        parts = {names[0]: entry.a, names[1]: entry.b, "lora_B.bias": entry.bias}
        for key, tensor in {**parts, "lora_magnitude_vector": entry.magnitude}.items():
            if tensor is not None:
                tensors[_PREFIX + f"{entry.path}.{key}".removeprefix(".")] = tensor.clone().contiguous()
    return tensors


def write_beside(root: nn.Module, beside: Beside, entries: Sequence[Entry]) -> dict[str, torch.Tensor]:
    """What is saved with the adapters, by its keys: of a layer that has one, PEFT's adapter is around its tensors."""
    state = root.state_dict()
    within = [path for path, child in root.named_modules() if isinstance(child, Adapter)]
    names = {key: key for path in beside.modules for key in state if key.startswith(f"{path}.")}
    adapted = {entry.path for entry in entries}
    for name in beside.tensors:
        path, _, leaf = name.rpartition(".")
        names[name] = f"{path}.{_BASE}.{leaf}" if path in adapted else name
    kept = {key: name for key, name in names.items() if not any(key.startswith(f"{path}.") for path in within)}
    return {_PREFIX + name: state[key].detach().clone().contiguous() for key, name in kept.items()}


def nested(module: nn.Module, entries: Sequence[Entry]) -> list[Entry]:
    """The same with their depths: PEFT puts the adapter of the last parameter of a module around the others."""
    by_path: dict[str, list[Entry]] = {}
    for entry in entries:
        by_path.setdefault(entry.path, []).append(entry)
    found = []
    for path, together in by_path.items():
        order = _parameters_at(module, path.replace(f"{_BASE}.", ""))
        together.sort(key=lambda entry: order.index(entry.parameter) if entry.parameter in order else -1)
        found += [replace(entry, depth=depth) for depth, entry in enumerate(reversed(together))]
    return found


def read_entries(
    tensors: Mapping[str, torch.Tensor], settings: Settings, module: nn.Module | None = None
) -> tuple[dict[str, Entry], dict[str, torch.Tensor]]:
    """The adapters of a file by the path in it, and what is left: the modules that were saved whole.

    Args:
        tensors: of the file.
        settings: of the file.
        module: captured; it tells the adapters of several parameters of one module apart, by their order there. Without
            it that of the configuration is taken for it.

    Raises:
        ArtifactError: a key without the prefix of PEFT, or a layer with one factor only.
    """
    parts: dict[str, dict[str, torch.Tensor]] = {}
    rest = {}
    for key, tensor in tensors.items():
        if not key.startswith(_PREFIX):
            raise ArtifactError(f"the key '{key}' does not begin with '{_PREFIX}', as all keys of an adapter do")
        name = key.removeprefix(_PREFIX)
        found = _KEY.fullmatch(name)
        if found:
            parts.setdefault(found[1] or "", {})[_ROLES[found[2]]] = tensor
        elif ".original_module." not in name:  # with `bias` PEFT writes those of modules that are saved whole thrice
            rest[name.replace(".modules_to_save.", ".")] = tensor
    return {path: _entry(path, roles, settings, module) for path, roles in parts.items()}, rest


def _entry(path: str, roles: Mapping[str, torch.Tensor], settings: Settings, module: nn.Module | None) -> Entry:
    embedding = "embedding_a" in roles or "embedding_b" in roles
    wanted = ("embedding_a", "embedding_b") if embedding else ("a", "b")
    missing = [role for role in wanted if role not in roles]
    if missing:
        key = next(key for key, role in _ROLES.items() if role == missing[0])
        raise ArtifactError(f"the file has no '{_PREFIX}{path}.{key}', without which its adapter would be none")
    a, b = (roles[role] for role in wanted)
    projects = path.endswith(f"{_BASE}.out_proj")
    parts = path.split(".")
    depth = len(parts) - max((i for i, part in enumerate(parts, 1) if part != _BASE), default=0)
    owner = ".".join(part for part in parts if part != _BASE)
    known = settings.parameters_at(owner) if module is None else _parameters_at(module, owner)
    adapted = [name for name in known if settings.is_parameter(name)]
    parameter = adapted[-1 - depth] if depth < len(adapted) and not projects else ""
    name = parameter.removesuffix(".weight") or owner
    label = parameter or (owner.removesuffix(".out_proj") if projects else owner)
    rank = settings.rank_of(label)
    experts = max(a.shape[0] // rank, 1) if parameter else 1
    if a.shape[0] != rank * experts:
        raise ArtifactError(f"'{parameter or owner}' has an A of rank {a.shape[0]}, its configuration says {rank}")
    scale = settings.alpha_of(label) / (rank**0.5 if settings.rslora else rank)
    magnitude, bias = roles.get("magnitude"), roles.get("bias")
    if settings.dora and magnitude is None:
        raise ArtifactError(f"the file has no '{_PREFIX}{path}.lora_magnitude_vector', which 'use_dora' needs")
    columns = settings.columns.get(path, ())
    return Entry(name, a, b, scale, magnitude, bias, embedding, False, projects, parameter, depth, experts, columns)


def _parameters_at(module: nn.Module, path: str) -> list[str]:
    """The names of the parameters of the module at a path itself, in order."""
    try:
        owner = module.get_submodule(path)
    except AttributeError:
        return []
    return [f"{path}.{leaf}" if path else leaf for leaf in owner._parameters]


def from_entry(entry: Entry, form: Form, low: LowRank, settings: Settings) -> None:
    """Give an adapter of a layer the values of a file.

    Raises:
        ArtifactError: they have other shapes than the layer takes.
    """
    a, b = entry.a, entry.b * 2 if entry.in_attention else entry.b
    if entry.embedding or (entry.parameter and form.kind == "matmul"):
        a, b = b.T, a.T
    if not form.is_foldable(a):
        a = _grouped(a, form)
    _check(entry, a, b, form)
    like = low.A

    def held(value: torch.Tensor) -> nn.Parameter:
        return nn.Parameter(value.to(like).contiguous().clone(), requires_grad=like.requires_grad)

    low.A, low.B = held(a), held(b)
    low.mask = mask_of(entry.columns, low.B.detach()) if entry.columns else None
    low.start_a = low.start_b = None
    low.rank, low.scale, low.rslora, low.dropout = entry.rank, entry.scale, settings.rslora, settings.dropout
    low.alpha = entry.scale * (entry.rank**0.5 if settings.rslora else entry.rank)
    low.magnitude = None if entry.magnitude is None else held(entry.magnitude.flatten())
    low.bias = None if entry.bias is None else held(entry.bias)


def _check(entry: Entry, a: torch.Tensor, b: torch.Tensor, form: Form) -> None:
    wanted_a, wanted_b = form.shapes(1)
    groups = form.groups
    experts = form.shape[0] if isinstance(form, Experts) else 1
    dense = (wanted_a[1] * groups, *wanted_a[2:])
    fits_a = tuple(a.shape[1:]) in (tuple(wanted_a[1:]), dense)
    fits_b = b.dim() == len(wanted_b) and b.shape[0] == wanted_b[0] and b.shape[1] * groups == a.shape[0]
    if not fits_a or not fits_b or entry.experts != experts:
        raise ArtifactError(
            f"'{entry.name}' has factors of shapes {tuple(entry.a.shape)} and {tuple(entry.b.shape)}, which don't fit "
            f"its weight of shape {form.shape}"
        )


def _block_diagonal(a: torch.Tensor, groups: int) -> torch.Tensor:
    """(g r, in / g, k ...) -> (g r, in, k ...), in which each group sees its own inputs."""
    full = a.new_zeros(groups, len(a) // groups, groups, *a.shape[1:])
    for group, rows in enumerate(a.chunk(groups)):
        full[group, :, group] = rows
    return full.flatten(2, 3).flatten(0, 1)


def _grouped(a: torch.Tensor, form: Form) -> torch.Tensor:
    """The other way round where nothing is lost; as it is elsewhere."""
    groups, inputs = form.groups, form.shape[1]
    if a.dim() != len(form.shape) or a.shape[0] % groups or a.shape[1] != inputs * groups:
        return a
    parts = a.reshape(groups, -1, groups, inputs, *a.shape[2:])
    own = torch.cat([parts[group, :, group] for group in range(groups)])
    return own if torch.equal(_block_diagonal(own, groups), a) else a

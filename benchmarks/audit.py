"""What `audit` finds in a corpus of single faults, and in stock models, where it should find nothing that is untrue.

python benchmarks/audit.py        (pip install .[bench] brings the peers)

writes benchmarks/results/audit.md. A peer has found a fault where it says something of the faulty module that it does
not say of the corrected twin; what it says of a twin is counted beside. On stock models the text of the line that a
finding names is its evidence.
"""

from __future__ import annotations

import contextlib
import functools
import io
import linecache
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from fxopt.findings import Finding, Severity, Subject  # noqa: E402
from fxopt.inputs import Inputs  # noqa: E402
from fxopt.torchvision_operators import declare_missing  # noqa: E402
from passes.audit import Audit  # noqa: E402
from tests.audit_corpus.reading import FOLDER, Case, cases  # noqa: E402

Build = Callable[[], tuple[nn.Module, Inputs]]


def of(build: Callable[[], nn.Module], *shape: int, copies: int = 1) -> Build:
    """A module, and random inputs of that shape."""
    return lambda: (build().eval(), Inputs(tuple(torch.randn(*shape) for _ in range(copies))))


def from_torch() -> Iterator[tuple[str, Build]]:
    """Modules of torch.nn."""
    yield "LSTM", of(lambda: nn.LSTM(8, 8), 5, 2, 8)
    yield "GRU", of(lambda: nn.GRU(8, 8), 5, 2, 8)
    yield "RNN", of(lambda: nn.RNN(8, 8), 5, 2, 8)
    yield "MultiheadAttention", of(lambda: nn.MultiheadAttention(8, 2), 5, 2, 8, copies=3)
    yield "TransformerEncoderLayer", of(lambda: nn.TransformerEncoderLayer(8, 2), 5, 2, 8)
    yield "TransformerDecoderLayer", of(lambda: nn.TransformerDecoderLayer(8, 2), 5, 2, 8, copies=2)
    yield "Transformer", of(lambda: nn.Transformer(8, 2, 1, 1, 16), 5, 2, 8, copies=2)
    for kind in (nn.ReLU, nn.GELU, nn.SiLU, nn.Mish, nn.ELU, nn.SELU, nn.Tanh, nn.Sigmoid, nn.Hardswish, nn.PReLU):
        yield kind.__name__, of(kind, 2, 8)
    yield "Linear", of(lambda: nn.Linear(8, 8), 2, 8)
    yield "LayerNorm", of(lambda: nn.LayerNorm(8), 2, 8)
    yield "RMSNorm", of(lambda: nn.RMSNorm(8), 2, 8)
    yield "GroupNorm", of(lambda: nn.GroupNorm(2, 8), 2, 8, 4, 4)
    yield "BatchNorm1d", of(lambda: nn.BatchNorm1d(8), 4, 8)
    yield "BatchNorm2d", of(lambda: nn.BatchNorm2d(8), 2, 8, 4, 4)
    yield "InstanceNorm2d", of(lambda: nn.InstanceNorm2d(8), 2, 8, 4, 4)
    yield "Conv1d", of(lambda: nn.Conv1d(8, 8, 3), 2, 8, 9)
    yield "Conv2d", of(lambda: nn.Conv2d(8, 8, 3), 2, 8, 9, 9)
    yield "ConvTranspose2d", of(lambda: nn.ConvTranspose2d(8, 8, 3), 2, 8, 9, 9)
    yield "Bilinear", of(lambda: nn.Bilinear(8, 8, 8), 2, 8, copies=2)
    yield "MaxPool2d", of(lambda: nn.MaxPool2d(2), 2, 8, 4, 4)
    yield "Dropout", of(nn.Dropout, 2, 8)


def from_torchvision() -> Iterator[tuple[str, Build]]:
    """Models of torchvision."""
    declare_missing()
    import torchvision

    names = """resnet18 resnet50 wide_resnet50_2 resnext50_32x4d vgg11 vgg11_bn squeezenet1_1 mobilenet_v2
    mobilenet_v3_small shufflenet_v2_x0_5 mnasnet0_5 regnet_y_400mf regnet_x_400mf efficientnet_b0 convnext_tiny
    alexnet densenet121 swin_t"""
    for name in names.split():
        yield name, of(functools.partial(torchvision.models.get_model, name, weights=None), 2, 3, 64, 64)
    yield "vit_b_16", of(lambda: torchvision.models.vit_b_16(), 1, 3, 224, 224)


def from_transformers() -> Iterator[tuple[str, Build]]:
    """Models of transformers, with small configs."""
    declare_missing()
    import transformers

    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    for name in "Bert Roberta Electra DistilBert Llama Mistral Qwen2 Gemma GPTNeoX".split():
        config = getattr(transformers, f"{name}Config")
        model = getattr(transformers, f"{name}Model")
        options = dict(small, vocab_size=100, pad_token_id=0)
        if name == "DistilBert":
            options = {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64, "vocab_size": 100}
        if name in ("Llama", "Mistral", "Qwen2", "Gemma"):
            options |= {"num_key_value_heads": 2, "head_dim": 16}
        yield name, functools.partial(_small, config, model, options)


def _small(config: Any, model: Any, options: dict[str, int]) -> tuple[nn.Module, Inputs]:
    return model(config(**options)).eval(), Inputs((torch.randint(1, 100, (2, 9)),))


def from_timm() -> Iterator[tuple[str, Build]]:
    """Models of timm."""
    import timm

    for name in "resnet18d mobilenetv3_small_050 ghostnet_050 repvgg_a0 convnext_atto levit_128s mixer_s32_224".split():
        size = 224 if name in ("levit_128s", "mixer_s32_224") else 64
        yield name, of(functools.partial(timm.create_model, name, pretrained=False), 2, 3, size, size)


Says = Callable[[Case], set[str]]


def by_fxopt(case: Case) -> set[str]:
    """Rules and lines."""
    return {f"{f.rule}:{f.place.line if f.place else 0}" for f in Audit().inspect(case.subject()).findings}


def by_export(case: Case) -> set[str]:
    """The error of the export."""
    subject = case.subject()
    assert subject.module is not None and subject.inputs is not None
    try:
        torch.export.export(subject.module.eval(), subject.inputs.args, strict=False)
    except Exception as error:
        return {type(error).__name__}
    return set()


def by_torch_audit(case: Case) -> set[str]:
    """Rules and entities, of its static look and of one step."""
    import torch_audit

    subject = case.subject()
    assert subject.module is not None and subject.inputs is not None
    batch = subject.inputs.args[0]
    found = list(torch_audit.audit(subject.module, batch=batch, suppress_internal_errors=True).findings)
    with contextlib.suppress(Exception):
        outputs = [t for t in torch.utils._pytree.tree_leaves(subject.module.train()(batch)) if t.requires_grad]
        sum((t * torch.randn_like(t)).sum() for t in outputs).backward()
        kinds = {"phase": "backward", "batch": batch, "suppress_internal_errors": True}
        found += torch_audit.audit(subject.module, **kinds).findings
    return {f"{f.rule_id}:{f.entity}" for f in found}


def by_torchtest2(case: Case) -> set[str]:
    """Checks that fail or warn."""
    import torchtest2

    subject = case.subject()
    assert subject.module is not None and subject.inputs is not None
    report = torchtest2.check_model(subject.module, subject.inputs.args[0])
    return {check.name for check in (*report.failures, *report.warnings)}


@functools.cache
def _torchfix() -> dict[str, set[str]]:
    """All that TorchFix says of the corpus, by place."""
    command = [sys.executable, "-m", "torchfix", "--select=ALL", str(FOLDER)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    said: dict[str, set[str]] = {}
    for line in done.stdout.splitlines():
        path, *rest = line.split(":")
        if len(rest) > 1 and rest[0].isdigit():
            said.setdefault(f"{Path(path).name}:{rest[0]}", set()).add(line)
    return said


def by_torchfix(case: Case) -> set[str]:
    """What it says of the line."""
    return _torchfix().get(f"{case.path.name}:{case.line}", set())


PEERS: dict[str, tuple[str, Says]] = {
    "fxopt audit": ("", by_fxopt),
    "torch.export": ("torch", by_export),
    "torch-audit": ("torch-audit", by_torch_audit),
    "torchtest2": ("torchtest2", by_torchtest2),
    "TorchFix": ("torchfix", by_torchfix),
}


def corpus() -> Iterator[str]:
    """A row a tool: faults that it tells from their corrected twins, and twins of which it says something."""
    yield "| tool | version | faults found | at the right line, by the right rule | twins with a finding | seconds |"
    yield "|---|---|---|---|---|---|"
    everything = {(case.rule, case.name): case for case in cases()}
    for tool, (package, says) in PEERS.items():
        try:
            version = metadata.version(package) if package else "this one"
        except metadata.PackageNotFoundError:
            yield f"| {tool} | not installed | | | | |"
            continue
        began, found, right, twins, faults = time.perf_counter(), 0, 0, 0, 0
        for (rule, name), case in everything.items():
            if case.line is None:
                continue
            said, of_twin = _quietly(says, case), _quietly(says, everything[rule, f"{name}Fixed"])
            faults += 1
            found += bool(said - of_twin)
            right += f"{rule}:{case.line}" in said
            twins += bool(of_twin)
        exact = (
            f"{right} of {faults}" if not package else "names none" if tool != "TorchFix" else f"{found} of {faults}"
        )
        seconds = time.perf_counter() - began
        yield f"| {tool} | {version} | {found} of {faults} | {exact} | {twins} of {faults} | {seconds:.0f} |"
        print(tool, found, right, twins, f"{seconds:.0f} s", flush=True)


def _quietly(says: Says, case: Case) -> set[str]:
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        try:
            return says(case)
        except Exception as error:
            return {f"failed: {type(error).__name__}"}


def stock() -> Iterator[str]:
    """A row a model, and how many have no finding worse than a note."""
    rows, clean = [], 0
    for source in (from_torch, from_transformers, from_torchvision, from_timm):
        for name, build in source():
            torch.manual_seed(0)
            module, inputs = build()
            began = time.perf_counter()
            result = Audit().inspect(Subject(name, module, inputs))
            seconds = time.perf_counter() - began
            bad = [finding for finding in result.findings if finding.severity is not Severity.NOTE]
            clean += not bad
            said = "; ".join(map(_evidence, bad)) or "nothing"
            short = "; ".join(note.split(": ", 1)[-1][:80] for note in result.notes)
            notes = len(result.findings) - len(bad)
            row = [source.__name__.removeprefix("from_"), name, f"{seconds:.1f}", said, str(notes), short]
            rows.append("| " + " | ".join(cell.replace("|", "/").replace("\n", " ") for cell in row) + " |")
            print(rows[-1], flush=True)
    yield f"{clean} of {len(rows)} without an error or a warning.\n"
    yield "| library | model | seconds | errors and warnings, with the line they name | notes | not looked at |"
    yield "|---|---|---|---|---|---|"
    yield from rows


def _evidence(finding: Finding) -> str:
    place = finding.place
    if place is None:
        return f"{finding.rule}: {finding.message}"
    where = "/".join(Path(place.path).parts[-3:])
    return (
        f"{finding.rule} {where}:{place.line} `{linecache.getline(place.path, place.line).strip()}`: {finding.message}"
    )


def speed() -> Iterator[str]:
    """Warm, in one process, whole inspections."""
    import torchvision
    import transformers

    models = {
        "resnet50, 1x3x224x224": (torchvision.models.resnet50(), torch.randn(1, 3, 224, 224)),
        "bert-base, 1x128": (transformers.BertModel(transformers.BertConfig()), torch.randint(1, 1000, (1, 128))),
    }
    yield "| model | median seconds of 5 | least | most |\n|---|---|---|---|"
    for name, (module, given) in models.items():
        subject, times = Subject(name, module.eval(), Inputs((given,))), []
        for _ in range(6):
            began = time.perf_counter()
            Audit().inspect(subject)
            times.append(time.perf_counter() - began)
        warm = times[1:]
        yield f"| {name} | {statistics.median(warm):.2f} | {min(warm):.2f} | {max(warm):.2f} |"
        print(name, [f"{one:.2f}" for one in times], flush=True)


def main() -> None:
    """Make the tables."""
    torch.set_num_threads(2)
    declare_missing()
    lines = ["# audit", "", "Speed, warm, on two threads:", "", *speed()]
    lines += ["", "Single faults, each with a corrected twin:", "", *corpus()]
    lines += ["", "Stock models:", "", *stock()]
    (ROOT / "benchmarks" / "results" / "audit.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""What `audit` finds in a corpus of single faults, and in stock models, where it should find nothing that is untrue.

python benchmarks/audit.py [SECONDS]

writes benchmarks/results/audit.md; stops taking new models after SECONDS
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from fxopt.findings import Severity, Subject  # noqa: E402
from fxopt.inputs import Inputs  # noqa: E402
from fxopt.torchvision_operators import declare_missing  # noqa: E402
from passes.audit import Audit  # noqa: E402
from tests.audit_corpus.reading import cases  # noqa: E402

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


def corpus() -> str:
    """Look at every module of the corpus."""
    found = wrong = faults = twins = 0
    for case in cases():
        result = Audit().inspect(case.subject())
        places = {(f.rule, f.place.line) for f in result.findings if f.place is not None}
        faults += case.line is not None
        twins += case.line is None
        found += (case.rule, case.line) in places
        wrong += case.line is None and bool(result.findings)
    twin = f"{wrong} of {twins} corrected twins with a finding"
    return f"Corpus: {found} of {faults} faults found by the right rule at the right line; {twin}."


def main() -> None:
    """Make the table."""
    limit = time.monotonic() + float(sys.argv[1] if len(sys.argv) > 1 else "1e9")
    torch.set_num_threads(2)
    first = corpus() if len(sys.argv) < 3 else sys.argv[2]
    rows, clean = [], 0
    for source in (from_torch, from_transformers, from_torchvision, from_timm):
        for name, build in source():
            if time.monotonic() > limit:
                break
            torch.manual_seed(0)
            try:
                module, inputs = build()
            except Exception as error:
                print(name, "can't be built:", error)
                continue
            began = time.perf_counter()
            result = Audit().inspect(Subject(name, module, inputs))
            seconds = time.perf_counter() - began
            bad = [finding for finding in result.findings if finding.severity is not Severity.NOTE]
            clean += not bad
            said = "; ".join(f"{f.rule} {f.place}: {f.message}".replace(str(ROOT), "") for f in bad) or "nothing"
            short = [note.split(": ", 1)[-1][:80] for note in result.notes]
            row = [source.__name__.removeprefix("from_"), name, f"{seconds:.1f}", said, "; ".join(short)]
            rows.append("| " + " | ".join(cell.replace("|", "/") for cell in row) + " |")
            print(rows[-1], flush=True)
    head = "| library | model | seconds | errors and warnings | not looked at |\n|---|---|---|---|---|"
    total = f"Stock models: {clean} of {len(rows)} without an error or a warning."
    text = f"# audit\n\n{first}\n\n{total}\n\n{head}\n" + "\n".join(rows) + "\n"
    (ROOT / "benchmarks" / "results" / "audit.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()

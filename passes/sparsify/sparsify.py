"""The pass `sparsify`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import ClassVar, get_args

from fxopt.contract import Change, Pass, Promise, Skip
from fxopt.errors import PassError, SpecError
from fxopt.graph import GraphModule, Program, Region
from fxopt.inputs import Inputs
from passes.sparsify.choose import choose, words
from passes.sparsify.insert import Insertion
from passes.sparsify.mask import Masked, masked_weights
from passes.sparsify.pattern import Pattern
from passes.sparsify.plan import TRAINED, Criterion, Plan, Schedule, Scope
from passes.sparsify.wanda import see_inputs


@dataclass(frozen=True)
class Sparsify(Pass):
    """Holds a share of the weights at zero by masks, at once or along a schedule of training.

        W x + b   =>   (M W) x + b        M in {0, 1}, the shape of W

    Weights are those of Linear, Conv1d to 3d and their transposed forms, Embedding, LSTM, GRU, RNN and
    MultiheadAttention, inside opaque parts too, and the parameters that functions multiply with. Masks are buffers
    `weight_mask.mask`; masked weights have no gradient, and are zero themselves. Train with a `SparsityScheduler`;
    `sparsify-bake` leaves the zeros and takes the masks away.

    Sources: Zhu & Gupta 2017 (magnitude, cubic); Sanh et al. 2020 (movement); Sun et al. 2023 (wanda); Molchanov
    et al. 2019 (taylor); Liu et al. 2017 (bn-scale); Mishra et al. 2021 (2:4).
    """

    name: ClassVar[str] = "sparsify"
    promise: ClassVar[Promise] = Promise.CHANGES
    after: ClassVar[tuple[str, ...]] = ("clean",)

    amount: float | None = field(
        default=None, metadata={"help": "share of the weights that is zero in the end; 0.8, or what n:m says"}
    )
    granularity: str = field(
        default="element", metadata={"help": "removed as one: element, 2:4 or any n:m, block4x1 or any, row, column"}
    )
    scope: Scope = field(default="layer", metadata={"help": "where weights compete: each layer for itself, or global"})
    criterion: Criterion = field(default="magnitude", metadata={"help": "what makes a weight worth keeping"})
    schedule: Schedule = field(default="one-shot", metadata={"help": "how the amount grows while it trains"})
    begin: int = field(default=0, metadata={"help": "optimizer steps before the first removal"})
    steps: int = field(default=1000, metadata={"help": "optimizer steps from there to the full amount"})
    every: int = field(default=10, metadata={"help": "optimizer steps between two removals"})
    seed: int = field(default=0, metadata={"help": "of the criterion random"})
    targets: tuple[str, ...] = field(default=("*",), metadata={"help": "globs over the layer's qualified name"})
    exclude: tuple[str, ...] = field(default=(), metadata={"help": "the same; wins over targets"})

    def __post_init__(self) -> None:
        for name, kind in (("scope", Scope), ("criterion", Criterion), ("schedule", Schedule)):
            value = getattr(self, name)
            if value not in get_args(kind):
                raise SpecError(f"sparsify: '{name}' is {', '.join(get_args(kind))}, not {value!r}")
        for name, least in (("begin", 0), ("steps", 1), ("every", 1), ("seed", 0)):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < least:
                raise SpecError(f"sparsify: '{name}' is a whole number from {least}, not {getattr(self, name)!r}")
        for text in (*self.targets, *self.exclude):
            if not text:
                raise SpecError("sparsify: a target is an empty text; it would match nothing")
        self._check_together(Pattern.parse(self.granularity))

    def _check_together(self, pattern: Pattern) -> None:
        given = self.amount
        if given is not None and not 0 < given < 1:
            raise SpecError(f"sparsify: 'amount' is a share between 0 and 1, not {given!r}; 0.8 removes 80 %")
        if pattern.kind == "n:m":
            exact = 1 - pattern.first / pattern.second
            if given is not None and abs(given - exact) > 1e-6:
                raise SpecError(
                    f"sparsify: '{pattern}' removes {exact:.4g} of the weights, amount={given} asks for another share; "
                    "leave one of them out"
                )
            if self.scope == "global":
                raise SpecError(f"sparsify: '{pattern}' removes the same share of each layer; leave out scope=global")
        if self.criterion == "bn-scale" and pattern.kind != "row":
            raise SpecError("sparsify: criterion 'bn-scale' says what an output is worth; it needs granularity=row")
        if self.criterion in TRAINED and self.schedule == "one-shot":
            raise SpecError(
                f"sparsify: criterion '{self.criterion}' adds up gradients, so nothing is known before training; take "
                "schedule=cubic or linear"
            )

    @property
    def plan(self) -> Plan:
        """The options in the form that masks keep."""
        pattern = Pattern.parse(self.granularity)
        exact = 1 - pattern.first / pattern.second if pattern.kind == "n:m" else 0.8
        amount = exact if self.amount is None else self.amount
        rest = (self.scope, self.criterion, self.schedule, self.begin, self.steps, self.every, self.seed)
        return Plan(amount, pattern, *rest)

    def run(self, region: Region) -> Iterator[Change | Skip]:
        """Put a mask on each weight that is meant; it keeps everything until `finish`."""
        plan = self.plan
        yield from Insertion(region, plan, self._is_meant, words(plan.pattern, plan)).run()

    def finish(self, module: GraphModule, calibration: Iterable[Inputs]) -> Iterator[Change | Skip]:
        """Choose the first zeros and write them into the weights.

        Raises:
            PassError: targets that no layer has, or criterion wanda without data.
        """
        every = masked_weights(module)
        if not any(self._is_meant(each.name) for each in every) and self.targets != ("*",):
            raise PassError(f"sparsify: no weight is called {', '.join(map(repr, self.targets))}{_some(module)}")
        plan = self.plan
        fresh = [each for each in every if not each.mask.ready]
        if not fresh:
            return
        reached = see_inputs(module, fresh, calibration) if plan.criterion == "wanda" else {each.mask for each in fresh}
        choose(fresh, plan, plan.amount_at(0))
        program = Program(module)
        for each in fresh:
            # A new tensor: the one that is there may be shared with the original.
            program.replace_parameter(each.weight, each.weight.detach().masked_fill(~each.mask.mask, 0))
            why = "" if each.mask in reached else ", by magnitude, since no calibration batch reached it"
            yield Change(f"{each.mask.sparsity:.1%} zeros{why}", each.name)
        yield Change(_in_all(every, module), "in all")

    def _is_meant(self, name: str) -> bool:
        return any(fnmatchcase(name, glob) for glob in self.targets) and not any(
            fnmatchcase(name, glob) for glob in self.exclude
        )


def _in_all(found: list[Masked], module: GraphModule) -> str:
    masked = sum(each.mask.mask.numel() for each in found)
    zeros = masked - sum(int(each.mask.mask.count_nonzero()) for each in found)
    parameters = sum(parameter.numel() for parameter in module.parameters())
    return f"{zeros:,} zeros: {zeros / masked:.1%} of the masked weights, {zeros / parameters:.1%} of all parameters"


def _some(module: GraphModule) -> str:
    names = [name.removesuffix(".weight") for name, p in module.named_parameters() if p.dim() > 1][:5]
    return f"; there are {', '.join(map(repr, names))}" if names else "; there are none with two dimensions"

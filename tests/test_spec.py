"""Text -> passes -> text, and what is said of text that is wrong."""

from __future__ import annotations

import enum
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxopt import spec
from fxopt.contract import Change, Pass, Promise, Skip
from fxopt.errors import PassError, SpecError

if TYPE_CHECKING:
    from fxopt.graph import Region


class Corner(enum.Enum):
    TOP = "top"
    LEFT = 1


@dataclass(frozen=True)
class Plain(Pass):
    """Does nothing at all."""

    name: ClassVar[str] = "fuse"
    promise: ClassVar[Promise] = Promise.EXACT

    def run(self, region: Region) -> Iterator[Change | Skip]:
        return iter(())


@dataclass(frozen=True)
class Many(Plain):
    """Takes an option of every type.

    And has a second paragraph.
    """

    name: ClassVar[str] = "qat"
    promise: ClassVar[Promise] = Promise.CHANGES
    after: ClassVar[tuple[str, ...]] = ("fuse",)
    bits: int = field(default=8, metadata={"help": "of an integer"})
    per_channel: bool = True
    scale: float = 1.0
    targets: tuple[str, ...] = ()
    label: str = "x"
    limit: int | None = None
    dtype: Literal["int8", "int4"] = "int8"
    corner: Corner = Corner.TOP
    size: tuple[int, float] = (1, 1.0)
    ranks: Mapping[str, int] = field(default_factory=dict)
    either: str | bool | int | float | None = None
    nested: tuple[tuple[str, ...], ...] = ()
    one_or_many: str | tuple[str, ...] = ""


@dataclass(frozen=True)
class Needy(Plain):
    """Must be told a rank, and is strict about it."""

    name: ClassVar[str] = "lora"
    rank: int

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise SpecError(f"a rank is at least 1, not {self.rank}")


KNOWN = {pass_class.name: pass_class for pass_class in (Plain, Many, Needy)}


def one(text: str) -> Any:
    (parsed,) = spec.parse(text, KNOWN)
    return parsed


def test_a_pipeline_in_order():
    assert spec.parse("fuse,qat{bits=4},fuse", KNOWN) == (Plain(), Many(bits=4), Plain())


def test_blanks_and_line_breaks_do_not_matter():
    assert spec.parse(" fuse ,\n qat { bits = 4 , per-channel = FALSE } ", KNOWN) == (
        Plain(),
        Many(bits=4, per_channel=False),
    )


def test_no_text_is_no_pass():
    assert spec.parse("  ", KNOWN) == ()
    assert spec.render(()) == ""


@pytest.mark.parametrize(
    ("text", "option", "value"),
    [
        ("bits=-3", "bits", -3),
        ("scale=1e-3", "scale", 1e-3),
        ("scale=2", "scale", 2.0),
        ("targets=*.attn.*", "targets", ("*.attn.*",)),
        ("targets=[q,v]", "targets", ("q", "v")),
        ("targets=[]", "targets", ()),
        (r"targets=[.*\.(q|v)_proj,layer[0-9].{1,2}]", "targets", (r".*\.(q|v)_proj", "layer[0-9].{1,2}")),
        ("targets=[\"a,b\", 'c]']", "targets", ("a,b", "c]")),
        ("label=true", "label", "true"),
        ("label=a=b", "label", "a=b"),
        ('label="say \\"hi\\" \\\\ \\n"', "label", 'say "hi" \\ \n'),
        (r'label="\d+\.q"', "label", r"\d+\.q"),
        ("limit=none", "limit", None),
        ("limit=12", "limit", 12),
        ("dtype=int4", "dtype", "int4"),
        ("corner=LEFT", "corner", Corner.LEFT),
        ("size=[2,0.5]", "size", (2, 0.5)),
        ("ranks={layer1.*=4,'a=b'=8}", "ranks", {"layer1.*": 4, "a=b": 8}),
        ("either=3", "either", 3),
        ('either="3"', "either", "3"),
        ("either=word", "either", "word"),
        ("nested=[[a,b],[c]]", "nested", (("a", "b"), ("c",))),
        ("one_or_many=a", "one_or_many", "a"),
        ("one_or_many=[a]", "one_or_many", ("a",)),
    ],
)
def test_values_take_the_type_of_their_field(text, option, value):
    parsed = getattr(one(f"qat{{{text}}}"), option)
    assert parsed == value
    assert type(parsed) is type(value)


@pytest.mark.parametrize(
    ("text", "message", "carets"),
    [
        ("fuze", "unknown pass 'fuze'; did you mean 'fuse'? `fxopt passes` lists them all", (0, 4)),
        ("qat,fuse-convbn", "unknown pass 'fuse-convbn'; did you mean 'fuse'?", (4, 15)),
        ("xyz", "unknown pass 'xyz'; there are 'fuse', 'qat', 'lora'", (0, 3)),
        ("fuse,", "expected the name of a pass, found the end at column 6", (5, 6)),
        (",fuse", "expected the name of a pass, found ',' at column 1", (0, 1)),
        ("fuse qat", "expected ',' after 'fuse', found 'q' at column 6", (5, 6)),
        ("qat{bit=4}", "pass 'qat' has no option 'bit'; did you mean 'bits'?", (4, 7)),
        ("qat{zzz=4}", "pass 'qat' has no option 'zzz'; its options are 'bits', 'per_channel'", (4, 7)),
        ("fuse{a=1}", "pass 'fuse' has no option 'a', nor any other", (5, 6)),
        ("qat{bits=four}", "option 'bits' of pass 'qat' is int, not four", (9, 13)),
        ("qat{bits=9223372036854775808}", "option 'bits' of pass 'qat' is int of 64 bits, not 92", (9, 28)),
        ('qat{bits="4"}', "option 'bits' of pass 'qat' is int, not \"4\"", (9, 12)),
        ("qat{bits=4.5}", "option 'bits' of pass 'qat' is int, not 4.5", (9, 12)),
        ("qat{bits=[4]}", "option 'bits' of pass 'qat' is int, not [4]", (9, 12)),
        ("qat{per_channel=1}", "option 'per_channel' of pass 'qat' is true|false, not 1", (16, 17)),
        ("qat{limit=x}", "option 'limit' of pass 'qat' is int or none, not x", (10, 11)),
        ("qat{dtype=int5}", "is int8|int4, not int5; did you mean 'int", (10, 14)),
        ("qat{corner=middle}", "is top|LEFT, not middle", (11, 17)),
        ("qat{size=[1]}", "is a list of 2: [int,number], not [1]", (9, 12)),
        ("qat{ranks={a=x}}", "option 'ranks' of pass 'qat' is int, not x", (13, 14)),
        ("qat{ranks=3}", "is {text=int,...}, not 3", (10, 11)),
        ("qat{bits=1,bits=2}", "option 'bits' of pass 'qat' is given twice", (11, 15)),
        ("qat{bits}", "expected 'bits=value'", (4, 8)),
        ("qat{bits=}", "expected a value", (9, 10)),
        ("qat{bits=1", "expected ',' or '}', found the end", (10, 11)),
        ("qat{targets=[a", "expected ',' or ']', found the end", (14, 15)),
        ("qat{label='a}", "this ' is not closed", (10, 11)),
        ("qat{label=a(b}", "expected ')'; or put the word in quotes", (14, 15)),
        ("lora", "pass 'lora' needs 'rank': lora{rank=...}", (0, 4)),
        ("fuse,lora{rank=0}", "a rank is at least 1, not 0", (5, 17)),
    ],
)
def test_an_error_points_at_its_column(text, message, carets):
    with pytest.raises(SpecError) as raised:
        spec.parse(text, KNOWN)
    said, shown, pointed = str(raised.value).split("\n")
    assert message in said
    assert shown == f"  {text}"
    assert (len(pointed) - len(pointed.lstrip()) - 2, len(pointed) - 2) == carets


texts = st.text(max_size=12) | st.sampled_from(
    ["true", "none", "12", "1e3", "nan", "", "*.attn.*", "a{1,2}", "[x]", "'"]
)
numbers = st.floats(allow_nan=False)
integers = st.integers(1 - 2**63, 2**63 - 1)
manies = st.builds(
    Many,
    bits=integers,
    per_channel=st.booleans(),
    scale=numbers,
    targets=st.lists(texts).map(tuple),
    label=texts,
    limit=st.none() | integers,
    dtype=st.sampled_from(["int8", "int4"]),
    corner=st.sampled_from(Corner),
    size=st.tuples(integers, numbers),
    ranks=st.dictionaries(texts, integers, max_size=3),
    either=texts | st.none() | st.booleans() | integers | numbers,
    nested=st.lists(st.lists(texts, max_size=3).map(tuple), max_size=3).map(tuple),
    one_or_many=texts | st.lists(texts, max_size=3).map(tuple),
)


@given(st.lists(manies | st.just(Plain()) | st.builds(Needy, rank=st.integers(1, 2**63 - 1)), max_size=3).map(tuple))
def test_text_reads_back_as_the_same_passes(passes):
    text = spec.render(passes)
    again = spec.parse(text, KNOWN)
    assert again == passes
    assert [repr(item) for item in again] == [repr(item) for item in passes]
    assert spec.render(again) == text


@given(st.text())
def test_any_text_is_read_or_refused(text):
    try:
        spec.parse(text, KNOWN)
    except SpecError as error:
        assert str(error).count("\n") == 2


def test_render_leaves_out_defaults():
    assert spec.render([Many(), Many(bits=4, targets=("q", "v"), label="true")]) == (
        'qat,qat{bits=4,targets=[q,v],label="true"}'
    )


def test_a_value_that_no_text_can_say_is_refused():
    with pytest.raises(PassError, match=r"pass 'qat', option 'label': the option value .* cannot be written in a spec"):
        spec.render([Many(label=object())])  # type: ignore[arg-type]


def test_describe():
    described = spec.describe(Many)
    assert (described.name, described.summary, described.promise) == (
        "qat",
        "Takes an option of every type.",
        "changes",
    )
    assert described.after == ("fuse",)
    options = {option.name: option for option in described.options}
    assert options["bits"] == spec.Option("bits", "int", "8", "of an integer")
    assert {name: option.type for name, option in options.items()} == {
        "bits": "int",
        "per_channel": "true|false",
        "scale": "number",
        "targets": "list of text",
        "label": "text",
        "limit": "int or none",
        "dtype": "int8|int4",
        "corner": "top|LEFT",
        "size": "[int,number]",
        "ranks": "{text=int,...}",
        "either": "text or true|false or int or number or none",
        "nested": "list of list of text",
        "one_or_many": "text or list of text",
    }
    (rank,) = spec.describe(Needy).options
    assert rank.default is None


def test_not_a_number_is_written_as_one():
    assert math.isnan(one(spec.render([Many(scale=math.nan)])).scale)

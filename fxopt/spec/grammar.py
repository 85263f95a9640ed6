"""Text -> syntax tree, each part with its columns.

    pipeline = pass { "," pass }
    pass     = name [ table ]
    table    = "{" [ key "=" value { "," key "=" value } ] "}"
    value    = list | table | quoted | bare
    list     = "[" [ value { "," value } ] "]"

A bare word ends at the comma or bracket that closes what it stands in, so globs and regular expressions
rarely need quotes: brackets inside a word count as part of it while they pair up. A quoted word is always
text; within it a backslash keeps quotes and backslashes, and `\\n`, `\\r`, `\\t` are what they mostly are.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NoReturn

from fxopt.errors import SpecError

_NAME = re.compile(r"[A-Za-z_][\w.-]*")
_ESCAPES = {"n": "\n", "r": "\r", "t": "\t", "\\": "\\", '"': '"', "'": "'"}
_PAIRS = {"(": ")", "[": "]", "{": "}"}


@dataclass(frozen=True)
class Span:
    """A stretch of the text, from `start` up to `end`."""

    text: str
    start: int
    end: int

    def error(self, message: str) -> SpecError:
        """An error with the text below it and carets under this stretch."""
        line = re.sub(r"\s", " ", self.text)
        carets = "^" * max(self.end - self.start, 1)
        return SpecError(f"{message}\n  {line}\n  {' ' * self.start}{carets}")


@dataclass(frozen=True)
class Word:
    """Text, a number, a boolean or none: which of them the type of the option says."""

    value: str
    quoted: bool
    span: Span


@dataclass(frozen=True)
class Items:
    """`[a,b]`."""

    values: tuple[Value, ...]
    span: Span


@dataclass(frozen=True)
class Table:
    """`{a=1,b=2}`."""

    entries: tuple[tuple[Word, Value], ...]
    span: Span


Value = Word | Items | Table


@dataclass(frozen=True)
class Call:
    """A pass and its options."""

    name: Word
    options: Table
    span: Span


def read(text: str) -> tuple[Call, ...]:
    """Read a pipeline; text without any pass is an empty one.

    Raises:
        SpecError: with the column, where the text does not follow the grammar.
    """
    return _Reader(text).pipeline()


class _Reader:
    def __init__(self, text: str):
        self.text = text
        self.at = 0

    def pipeline(self) -> tuple[Call, ...]:
        calls: list[Call] = []
        if not self.text.strip():
            return ()
        while True:
            calls.append(self.call())
            if not self.peek():
                return tuple(calls)
            self.expect(",", f"after '{calls[-1].name.value}'")

    def call(self) -> Call:
        self.peek()
        start = self.at
        found = _NAME.match(self.text, start)
        if found is None:
            self.fail("expected the name of a pass")
        self.at = found.end()
        name = Word(found.group(), False, self.span(start))
        options = self.table() if self.peek() == "{" else Table((), self.span(self.at))
        return Call(name, options, self.span(start))

    def table(self) -> Table:
        start = self.at
        self.expect("{", "")
        entries: list[tuple[Word, Value]] = []
        while self.peek() != "}":
            if entries:
                self.expect(",", "or '}'")
            entries.append(self.entry())
        self.at += 1
        return Table(tuple(entries), self.span(start))

    def entry(self) -> tuple[Word, Value]:
        key = self.word("=,}")
        if self.peek() != "=":
            raise key.span.error(f"expected '{key.value}=value'" if key.value else "expected 'name=value'")
        self.at += 1
        return key, self.value(",}")

    def items(self) -> Items:
        start = self.at
        self.expect("[", "")
        values: list[Value] = []
        while self.peek() != "]":
            if values:
                self.expect(",", "or ']'")
            values.append(self.value(",]"))
        self.at += 1
        return Items(tuple(values), self.span(start))

    def value(self, ends: str) -> Value:
        following = self.peek()
        if following == "[":
            return self.items()
        if following == "{":
            return self.table()
        word = self.word(ends)
        if not word.value and not word.quoted:
            self.fail('expected a value; an empty text is written ""')
        return word

    def word(self, ends: str) -> Word:
        following = self.peek()
        if following in ("'", '"'):
            return self.quotation(following)
        start = self.at
        open_brackets: list[str] = []
        while self.at < len(self.text):
            char = self.text[self.at]
            if not open_brackets and char in ends:
                break
            if char in _PAIRS:
                open_brackets.append(_PAIRS[char])
            elif open_brackets and char == open_brackets[-1]:
                open_brackets.pop()
            self.at += 1
        if open_brackets:
            self.fail(f"expected '{open_brackets[-1]}'; or put the word in quotes")
        value = self.text[start : self.at].rstrip()
        return Word(value, False, Span(self.text, start, start + len(value)))

    def quotation(self, quote: str) -> Word:
        start = self.at
        self.at += 1
        chars: list[str] = []
        while self.at < len(self.text):
            char = self.text[self.at]
            self.at += 1
            if char == quote:
                return Word("".join(chars), True, self.span(start))
            escape = _ESCAPES.get(self.text[self.at : self.at + 1]) if char == "\\" else None
            if escape is not None:
                self.at += 1
            chars.append(escape if escape is not None else char)
        raise Span(self.text, start, start + 1).error(f"this {quote} is not closed")

    def peek(self) -> str:
        """The next character that is not blank, where the reader then stands; "" at the end."""
        while self.at < len(self.text) and self.text[self.at].isspace():
            self.at += 1
        return self.text[self.at : self.at + 1]

    def expect(self, char: str, where: str) -> None:
        if self.peek() != char:
            self.fail(f"expected '{char}' {where}".rstrip())
        self.at += 1

    def span(self, start: int) -> Span:
        return Span(self.text, start, self.at)

    def fail(self, expected: str) -> NoReturn:
        following = self.text[self.at : self.at + 1]
        found = f"'{following}'" if following else "the end"
        raise Span(self.text, self.at, self.at + 1).error(f"{expected}, found {found} at column {self.at + 1}")


def quote(text: str) -> str:
    """`text` as a word that reads back as this very text, in quotes where it needs them."""
    if re.fullmatch(r"[\w.*?|/:@%+\\^$-]+", text, re.ASCII) and not looks_otherwise(text):
        return text
    for char, escape in (("\\", "\\\\"), ('"', '\\"'), ("\n", "\\n"), ("\r", "\\r"), ("\t", "\\t")):
        text = text.replace(char, escape)
    return f'"{text}"'


def looks_otherwise(text: str) -> bool:
    """Whether a bare `text` might be read as a number, a boolean or none."""
    if text.lower() in ("true", "false", "none"):
        return True
    try:
        float(text)
    except ValueError:
        return False
    return True

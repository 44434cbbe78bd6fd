"""Pipelines as text: ``normalize{fold_constants=false},fuse-vertical{max_nodes=40}``.

Grammar (blanks may stand between any two tokens)::

    pipeline = [ pass { "," pass } ]
    pass     = name [ "{" [ option { "," option } ] "}" ]
    option   = key "=" value            key alone means key=true
    value    = scalar | "[" [ scalar { "," scalar } ] "]"
    scalar   = bare word | "double-quoted string, with JSON's escapes"

A bare word is read as the option's declared type wants it: ``true``/``false``, an integer, a
number, ``none``, or text. Hyphens and underscores are the same in keys.
"""

from __future__ import annotations

import dataclasses
import json
import re
import types
import typing
from typing import Any, NoReturn

from . import registry
from .base import Pass
from .pipeline_print import RESERVED
from .suggest import did_you_mean

_TOKEN = re.compile(
    r'\s*(?:(?P<string>"(?:[^"\\]|\\.)*")|(?P<word>[^\s,{}\[\]="]+)|(?P<mark>[,{}\[\]=]))'
)
_NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")


class PipelineError(ValueError):
    """The text is not a pipeline. The message shows the text with a caret below the fault."""

    def __init__(self, text: str, position: int, message: str) -> None:
        self.position = position
        self.reason = message
        start = text.rfind("\n", 0, position) + 1
        line = text[start:].split("\n", 1)[0]
        caret = " " * (position - start) + "^"
        super().__init__(f"{message}\n  {line}\n  {caret}")


@dataclasses.dataclass(frozen=True)
class _Token:
    kind: str  # "string", "word", one of the marks, or "end"
    text: str
    position: int


def _tokens(text: str) -> list[_Token]:
    tokens, at = [], 0
    while text[at:].strip():
        match = _TOKEN.match(text, at)
        if match is None:
            position = at + len(text[at:]) - len(text[at:].lstrip())
            raise PipelineError(text, position, "unterminated string")
        kind = match.lastgroup or ""
        body = match[kind]
        tokens.append(_Token(body if kind == "mark" else kind, body, match.start(kind)))
        at = match.end()
    return [*tokens, _Token("end", "", len(text.rstrip()))]


class _Parser:
    def __init__(self, text: str) -> None:
        self.text, self.tokens, self.at = text, _tokens(text), 0

    def fail(self, token: _Token, message: str) -> NoReturn:
        raise PipelineError(self.text, token.position, message)

    def peek(self) -> _Token:
        return self.tokens[self.at]

    def next(self) -> _Token:
        self.at += 1
        return self.tokens[self.at - 1]

    def accept(self, mark: str) -> bool:
        if self.peek().kind != mark:
            return False
        self.at += 1
        return True

    def unexpected(self, wanted: str) -> NoReturn:
        token = self.peek()
        found = "the end" if token.kind == "end" else repr(token.text)
        self.fail(token, f"expected {wanted}, found {found}")

    def pipeline(self) -> list[Pass]:
        passes: list[Pass] = []
        if self.peek().kind == "end":
            return passes
        self.add_pass(passes)
        while self.accept(","):
            self.add_pass(passes)
        if self.peek().kind != "end":
            self.unexpected("',' or the end")
        return passes

    def add_pass(self, passes: list[Pass]) -> None:
        token = self.peek()
        item = self.one_pass()
        for early in passes:
            if item.name in early.follows:
                reason = f"pass {early.name} has to see what {item.name} makes"
                self.fail(token, f"{reason}: put {early.name} behind it")
        passes.append(item)

    def one_pass(self) -> Pass:
        token = self.peek()
        if token.kind != "word":
            self.unexpected("the name of a pass")
        self.next()
        if not _NAME.fullmatch(token.text):
            self.fail(token, f"{token.text!r} is no pass name: lower case words joined by hyphens")
        try:
            cls = registry.lookup(token.text)
        except (registry.UnknownPass, registry.BrokenPass) as error:
            self.fail(token, str(error))
        options: dict[str, Any] = {}
        if self.accept("{") and not self.accept("}"):
            self.option(token.text, cls, options)
            while self.accept(","):
                self.option(token.text, cls, options)
            if not self.accept("}"):
                self.unexpected("',' or '}'")
        try:
            return cls(**options)
        except (TypeError, ValueError) as error:
            self.fail(token, f"pass {token.text}: {error}")

    def option(self, pass_name: str, cls: type[Pass], options: dict[str, Any]) -> None:
        token = self.peek()
        if token.kind != "word":
            self.unexpected(f"an option of {pass_name}")
        self.next()
        key = token.text.replace("-", "_")
        hints = _option_types(cls)
        if key not in hints:
            near = did_you_mean(key, hints)
            near = near if near.endswith("?") else ""
            known = f"its options: {', '.join(sorted(hints))}" if hints else "it has none"
            self.fail(token, f"pass {pass_name} has no option {key!r}{near} ({known})")
        if key in options:
            self.fail(token, f"option {key!r} of {pass_name} is given twice")
        if not self.accept("="):
            if not _takes(hints[key], True):
                self.unexpected(f"'=' and a value for {key}, which is {_type_text(hints[key])}")
            options[key] = True
            return
        first = self.peek()
        value = self.value()
        try:
            options[key] = _convert(value, hints[key])
        except ValueError:
            shown = self.text[first.position : self.tokens[self.at - 1].position]
            shown += self.tokens[self.at - 1].text
            wanted = _type_text(hints[key])
            self.fail(first, f"option {key!r} of {pass_name} is {wanted}, not {shown}")

    def value(self) -> _Token | list[_Token]:
        if not self.accept("["):
            return self.scalar()
        items: list[_Token] = []
        if self.accept("]"):
            return items
        items.append(self.scalar())
        while self.accept(","):
            items.append(self.scalar())
        if not self.accept("]"):
            self.unexpected("',' or ']'")
        return items

    def scalar(self) -> _Token:
        if self.peek().kind not in ("word", "string"):
            self.unexpected("a value")
        return self.next()


def _option_types(cls: type[Pass]) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls) if f.init}


def _convert(value: _Token | list[_Token], hint: Any) -> Any:
    """A token as a value of type ``hint``. Raises ValueError where it is none."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        for option in sorted(args, key=lambda t: t is str):  # text last: anything is text
            try:
                return _convert(value, option)
            except ValueError:
                continue
        raise ValueError
    if origin is tuple:
        items = value if isinstance(value, list) else [value]
        return tuple(_convert(item, args[0]) for item in items)
    if origin is typing.Literal:
        word = _text(value)
        if word not in args:
            raise ValueError
        return word
    if isinstance(value, list):
        raise ValueError
    if hint is str:
        return _text(value)
    if value.kind == "string":
        raise ValueError
    if hint is bool or hint is type(None):
        words = {"true": True, "false": False} if hint is bool else {"none": None}
        if value.text not in words:
            raise ValueError
        return words[value.text]
    if hint in (int, float):
        number = hint(value.text)
        if number != number:  # nan is neither more nor less than anything
            raise ValueError
        return number
    raise ValueError


def _text(value: _Token | list[_Token]) -> str:
    if isinstance(value, list):
        raise ValueError
    if value.kind == "string":
        return json.loads(value.text)
    if value.text in RESERVED:
        raise ValueError
    return value.text


def _takes(hint: Any, value: bool) -> bool:
    return hint is bool or any(_takes(option, value) for option in typing.get_args(hint))


def _type_text(hint: Any) -> str:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_type_text(option) for option in args)
    if origin is tuple:
        return f"a list of {_type_text(args[0]).split(' ', 1)[-1]}s"
    if origin is typing.Literal:
        return "one of " + ", ".join(map(str, args))
    names = {bool: "true or false", int: "an integer", float: "a number", str: "a text"}
    return names.get(hint, "none" if hint is type(None) else str(hint))


def parse_pipeline(text: str) -> tuple[Pass, ...]:
    """The passes that ``text`` names, with their options set.

    Raises:
        PipelineError: malformed text, an unknown pass or option, a value of a wrong type, or passes
            in an order that cannot be; the message says what was expected and points at the place.
    """
    return tuple(_Parser(text).pipeline())

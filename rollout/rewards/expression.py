r"""Algebraic expressions as diagrams carry them: `4y-10`, `7\sqrt{2}`, `\frac{1}{2}x+5`, `y^{2}`."""

from __future__ import annotations

import re

_NUMBER = re.compile(r"[0-9]+(?:\.[0-9]+)?", re.ASCII)
_OPERATORS = ("+", "-", "*", "/")
_MAX_NUMBER_CHARS = 32


def read_expression(tokens: list[str], at: int) -> tuple[str | None, int]:
    """Reads the longest expression that begins at token `at`; returns its canonical text and its end.

    expression := [-] term ((+ | - | * | /) [-] term)*; term := factor factor*, no number after the first;
    factor := (number | variable | \\sqrt{number} | \\frac{atom}{atom}) [^ number]. Canonical text has no
    spaces, no `*`, no superfluous zeros. (None, at) if no expression begins there. Linear in what it reads.
    """
    sign, begin = _sign(tokens, at)
    text, end = _term(tokens, begin)
    if text is None:
        return None, at
    parts = [sign, text]
    while end < len(tokens) and tokens[end] in _OPERATORS:
        sign, begin = _sign(tokens, end + 1)
        text, after = _term(tokens, begin)
        if text is None:
            break
        parts += ["" if tokens[end] == "*" else tokens[end], sign, text]
        end = after
    return "".join(parts), end


def _sign(tokens: list[str], at: int) -> tuple[str, int]:
    return ("-", at + 1) if tokens[at : at + 1] == ["-"] else ("", at)


def _term(tokens: list[str], at: int) -> tuple[str | None, int]:
    factors: list[str] = []
    while True:
        # "21 1" is no product: a number after another factor is the next thing on the page.
        factor, end = _factor(tokens, at, allow_number=not factors)
        if factor is None:
            return ("".join(factors) if factors else None), at
        factors.append(factor)
        at = end


def _factor(tokens: list[str], at: int, allow_number: bool) -> tuple[str | None, int]:
    token = tokens[at] if at < len(tokens) else ""
    base: str | None = None
    end = at + 1
    if token in ("\\sqrt", "sqrt"):
        inner, end = _argument(tokens, at + 1)
        base = None if inner is None else f"\\sqrt{{{inner}}}"
    elif token == "\\frac":
        top, middle = _argument(tokens, at + 1)
        bottom, end = _argument(tokens, middle)
        base = None if top is None or bottom is None else f"\\frac{{{top}}}{{{bottom}}}"
    elif allow_number or not _NUMBER.fullmatch(token):
        base = _atom(tokens, at)
    if base is None:
        return None, at
    if tokens[end : end + 1] == ["^"]:
        power, after = _argument(tokens, end + 1)
        if power is not None:
            return f"{base}^{{{power}}}", after
    return base, end


def _argument(tokens: list[str], at: int) -> tuple[str | None, int]:
    """An atom, bare or in braces or brackets."""
    opening = tokens[at] if at < len(tokens) else ""
    if opening in ("{", "("):
        atom = _atom(tokens, at + 1)
        closed = tokens[at + 2 : at + 3] == ["}" if opening == "{" else ")"]
        return (atom, at + 3) if closed else (None, at)
    return _atom(tokens, at), at + 1


def _atom(tokens: list[str], at: int) -> str | None:
    """A number or a variable in canonical form."""
    token = tokens[at] if at < len(tokens) else ""
    if _NUMBER.fullmatch(token) and len(token) <= _MAX_NUMBER_CHARS:
        whole, _, fraction = token.partition(".")
        whole, fraction = whole.lstrip("0") or "0", fraction.rstrip("0")
        return f"{whole}.{fraction}" if fraction else whole
    following = tokens[at + 1] if at + 1 < len(tokens) else ""
    if token == "a" and len(following) > 1 and following.isalpha() and following not in ("and", "or"):
        return None  # the article: "AB is a side"
    return token if len(token) == 1 and token.isascii() and token.islower() else None

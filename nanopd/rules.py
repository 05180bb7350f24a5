"""Which values the fields of a user's dataclass may have: a rule in each field's metadata, checked by one function.

The words of the rules stand in error messages and, with the meanings of the fields, in the tables of docs/.
Knows none of the dataclasses.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from enum import Enum
from typing import Any

from nanopd.errors import FieldError


@dataclass(frozen=True, slots=True)
class Rule:
    """Which values are allowed, and that in words for error messages and documentation."""

    allows: Callable[[Any], bool]
    text: str

    def check(self, name: str, value: Any, error: type[FieldError]) -> None:
        """Raise `error` for the field `name` if its `value` is not allowed."""
        if not self.allows(value):
            raise error(name, value, self.text)


def ruled(default: Any, rule: Rule, meaning: str) -> Any:
    """A field of a dataclass with its rule and its meaning; `default` is dataclasses.MISSING where there is none."""
    return field(default=default, metadata={"rule": rule, "meaning": meaning})


def check(record: Any, error: type[FieldError]) -> None:
    """Raise `error` for the first field of the dataclass `record` that has a rule which does not allow its value."""
    for f in fields(record):
        if f.metadata:
            f.metadata["rule"].check(f.name, getattr(record, f.name), error)


def optional(rule: Rule) -> Rule:
    return Rule(lambda value: value is None or rule.allows(value), f"{rule.text}, or null")


def integer(least: int, most: float = math.inf) -> Rule:
    def allows(value: object) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most

    return Rule(allows, "an integer " + (f">= {least}" if most == math.inf else f"from {least} to {most}"))


def number(least: float, most: float = math.inf) -> Rule:
    """A finite number; both limits are allowed values."""
    limits = f">= {least}" if most == math.inf else f"from {least} to {most}"
    return Rule(lambda value: _is_finite(value) and least <= value <= most, f"a finite number {limits}")


def positive(most: float = math.inf) -> Rule:
    limits = "> 0" + (f" and <= {most}" if most < math.inf else "")
    return Rule(lambda value: _is_finite(value) and 0 < value <= most, f"a finite number {limits}")


def _is_finite(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def one_of(*values: object) -> Rule:
    """One of some values; a member of an enumeration stands for its value."""
    plain = [value.value if isinstance(value, Enum) else value for value in values]
    return Rule(lambda value: value in plain, ", ".join(map(str, plain)))


def text(what: str) -> Rule:
    return Rule(lambda value: isinstance(value, str) and value != "", what)


def list_of(rule: Rule, least: int = 0, most: float = math.inf) -> Rule:
    """A list, as the tuple that the dataclass has made of it, whose elements `rule` allows."""
    size = (f" of at least {least}" if least else "") + (f" of at most {most:,}" if most < math.inf else "")
    return Rule(
        lambda values: isinstance(values, tuple) and least <= len(values) <= most and all(map(rule.allows, values)),
        f"a list{size}, each {rule.text}",
    )


BOOLEAN = Rule(lambda value: isinstance(value, bool), "true or false")
SEED = integer(0, 2**64 - 1)

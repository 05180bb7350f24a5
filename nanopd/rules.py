"""Which values the fields of a user's dataclass may have: a rule in each field's metadata, checked by one function.

The texts of the rules are those of the error messages and, with the meanings, those of the tables in docs/.
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
    allows: Callable[[Any], bool]
    text: str  # what is allowed


def ruled(default: Any, rule: Rule, meaning: str) -> Any:
    """A field of a dataclass; `default` may be dataclasses.MISSING."""
    return field(default=default, metadata={"rule": rule, "meaning": meaning})


def check(record: Any, error: type[FieldError]) -> None:
    """Raise `error` for the first field of the dataclass `record` whose rule does not allow its value."""
    for f in fields(record):
        rule, value = f.metadata["rule"], getattr(record, f.name)
        if not rule.allows(value):
            raise error(f.name, value, rule.text)


def optional(rule: Rule) -> Rule:
    return Rule(lambda value: value is None or rule.allows(value), f"{rule.text}, or null")


def integer(least: int, most: float = math.inf) -> Rule:
    def allows(value: object) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most

    return Rule(allows, "an integer " + (f">= {least}" if most == math.inf else f"from {least} to {most}"))


def number(least: float, most: float = math.inf) -> Rule:
    """Finite, and neither limit is left out."""
    limits = f">= {least}" if most == math.inf else f"from {least} to {most}"
    return Rule(lambda value: _is_finite(value) and least <= value <= most, f"a finite number {limits}")


def positive(most: float = math.inf) -> Rule:
    limits = "> 0" + (f" and <= {most}" if most < math.inf else "")
    return Rule(lambda value: _is_finite(value) and 0 < value <= most, f"a finite number {limits}")


def _is_finite(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def one_of(*values: object) -> Rule:
    """Of an enumeration the values."""
    plain = [value.value if isinstance(value, Enum) else value for value in values]
    return Rule(lambda value: value in plain, ", ".join(map(str, plain)))


def text(what: str) -> Rule:
    return Rule(lambda value: isinstance(value, str) and value != "", what)


def list_of(rule: Rule, least: int = 0, most: float = math.inf) -> Rule:
    """Of values that the dataclass has made a tuple."""
    size = (f" of at least {least}" if least else "") + (f" of at most {most:,}" if most < math.inf else "")
    return Rule(
        lambda values: isinstance(values, tuple) and least <= len(values) <= most and all(map(rule.allows, values)),
        f"a list{size}, each {rule.text}",
    )


TRUE_OR_FALSE = Rule(lambda value: isinstance(value, bool), "true or false")
SEED = integer(0, 2**64 - 1)

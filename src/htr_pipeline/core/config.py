"""Settings as checked dataclasses: a wrong key or value is an error that says what is allowed.

One dataclass per concern sits beside the code that uses it; Kedro builds it from the parameter block of the same name
before any node runs.
"""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Callable
from typing import Any, dataclass_transform


class UserError(ValueError):
    """Input or configuration that the user can put right; the message says how. Shown without a traceback."""


def setting(
    default: Any,
    *,
    minimum: float | None = None,
    maximum: float | None = None,
    choices: tuple[Any, ...] | None = None,
) -> Any:
    """Declares a field of a config class together with the values that it may take.

    Args:
        default: value when the key is absent.
        minimum: smallest value allowed.
        maximum: largest value allowed.
        choices: the only values allowed.
    """
    metadata = {"minimum": minimum, "maximum": maximum, "choices": choices}
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(setting, dataclasses.field))
def config(section: str) -> Callable[[type], type]:
    """Makes a frozen dataclass for one block of parameters whose constructor rejects unknown keys and wrong values.

    Args:
        section: name of the parameter block, so that errors name the key as the user wrote it.

    Raises:
        UserError: by the constructor: names the key, the value and what is allowed.
    """

    def decorate(cls: type) -> type:
        cls = dataclasses.dataclass(frozen=True, kw_only=True)(cls)
        hints = typing.get_type_hints(cls)
        fields = {field.name: field for field in dataclasses.fields(cls)}
        dataclass_init = vars(cls)["__init__"]

        def checked_init(self: Any, **values: Any) -> None:
            problems = [_unknown_key(section, key, value, fields) for key, value in values.items() if key not in fields]
            for key, value in values.items():
                expected = _mismatch(value, hints[key], fields[key].metadata) if key in fields else None
                if expected:
                    problems.append(f"{section}.{key} = {value!r}: expected {expected}.")
            if problems:
                raise UserError("\n".join(problems))
            dataclass_init(self, **values)

        setattr(cls, "__init__", checked_init)  # noqa: B010  mypy knows no other way
        return cls

    return decorate


def _unknown_key(section: str, key: str, value: Any, fields: dict[str, dataclasses.Field]) -> str:
    close = difflib.get_close_matches(key, fields, n=1)
    hint = f" Did you mean {section}.{close[0]}?" if close else ""
    return f"{section}.{key} = {value!r}: there is no such setting.{hint} Allowed: {', '.join(sorted(fields))}."


def _mismatch(value: Any, hint: Any, metadata: typing.Mapping[str, Any]) -> str | None:
    """Words for what was expected, or None where the value fits."""
    low, high, choices = metadata.get("minimum"), metadata.get("maximum"), metadata.get("choices")
    allowed = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    kinds = [typing.get_origin(kind) or kind for kind in allowed]
    expected = " or ".join(
        {
            int: "a whole number",
            float: "a number",
            bool: "true or false",
            str: "text",
            dict: "a mapping",
            list: "a list",
            types.NoneType: "null",
        }.get(k, str(k))
        for k in kinds
    )
    if choices is not None:
        expected = "one of " + ", ".join("null" if c is None else repr(c) for c in choices)
    elif low is not None and high is not None:
        expected += f" from {low} to {high}"
    elif low is not None or high is not None:
        expected += f" of at least {low}" if low is not None else f" of at most {high}"
    if value is None:
        return None if types.NoneType in kinds else expected
    if isinstance(value, bool):
        fits = bool in kinds
    elif isinstance(value, int):
        fits = int in kinds or float in kinds
    else:
        fits = isinstance(value, tuple(kinds))
    if isinstance(value, float) and not math.isfinite(value):
        fits, expected = False, expected.replace("a number", "a finite number")
    if fits and isinstance(value, int | float) and not isinstance(value, bool):
        fits = (low is None or value >= low) and (high is None or value <= high)
    if fits and choices is not None:
        fits = value in choices
    if str in kinds and choices is None and isinstance(value, int | float) and not isinstance(value, bool):
        expected += f', got a number. Put it into quotes: "{value}"; a file or folder of that name is ./{value}'
    return None if fits else expected

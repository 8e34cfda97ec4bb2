"""The methods by name. A new one is a file here and one line in `METHODS`."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from vqcompress.errors import did_you_mean
from vqcompress.methods.base import Layout, Method, PackedTensors, layout_bits
from vqcompress.methods.fp8.method import FP8
from vqcompress.methods.int8.method import INT8
from vqcompress.methods.keep import Keep
from vqcompress.methods.vq.method import VQ

__all__ = ["METHODS", "Layout", "Method", "PackedTensors", "explain", "from_description", "layout_bits", "make"]

METHODS: dict[str, type[Method]] = {method.name: method for method in (Keep, INT8, FP8, VQ)}


def make(name: str, knobs: dict[str, Any]) -> Method:
    """The method called `name` with these knobs, the others at their defaults.

    Raises ValueError, in one line, for an unknown method or knob (with the nearest known name) or a value out of range.
    """
    method = _named(name)
    for knob in knobs:
        if knob not in method.model_fields:
            raise ValueError(f"{name} has no knob '{knob}'.{did_you_mean(knob, method.model_fields)}")
    try:
        return method(**knobs)
    except ValidationError as error:
        raise ValueError(explain(name, knobs, error)) from None


def from_description(description: dict[str, Any]) -> Method:
    """The method that `Method.describe` described. Raises ValueError for another version or a broken description."""
    knobs = dict(description)
    if missing := {"method", "version"} - knobs.keys():
        raise ValueError(f"the description of a method lacks {' and '.join(sorted(missing))}: {description}")
    name, version = str(knobs.pop("method")), knobs.pop("version")
    # Before the knobs: those of another version may well have other names.
    if version != _named(name).version:
        raise ValueError(
            f"{name} is stored in version {version}, but this vqcompress reads version {_named(name).version}: "
            "install a vqcompress that reads it, or quantize the model again"
        )
    return make(name, knobs)


def _named(name: str) -> type[Method]:
    if name not in METHODS:
        raise ValueError(f"no method '{name}'.{did_you_mean(name, METHODS)}")
    return METHODS[name]


def explain(name: str, knobs: dict[str, Any], error: ValidationError) -> str:
    """What pydantic found wrong with a group of knobs, as: name, knob, value, what is wrong."""
    return "; ".join(dict.fromkeys(_line(name, knobs, detail) for detail in error.errors()))


def _line(name: str, knobs: dict[str, Any], detail: Any) -> str:
    message = detail["msg"].removeprefix("Value error, ")
    if not detail["loc"]:
        # A rule about several knobs together has no place of its own.
        return f"{' '.join([name, *(f'{knob}={value}' for knob, value in knobs.items())])}: {message}"
    # Of a knob that may be of several types pydantic adds which it tried.
    knob = ".".join(str(part) for part in detail["loc"] if part in knobs or isinstance(part, int))
    return f"{name}: {knob}={detail['input']!r} is not valid: {message}"

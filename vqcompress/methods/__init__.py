"""The methods by name. To add one, add a folder here and its class to `METHODS`."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from vqcompress.errors import did_you_mean, explain_value
from vqcompress.methods.base import Layout, Method, PackedTensors, layout_bits
from vqcompress.methods.fp8.method import FP8
from vqcompress.methods.int8.method import INT8
from vqcompress.methods.keep import Keep
from vqcompress.methods.vq.codebook import Codebook
from vqcompress.methods.vq.trellis import Trellis

__all__ = ["METHODS", "Layout", "Method", "PackedTensors", "from_description", "layout_bits", "make"]

METHODS: dict[str, type[Method]] = {method.name: method for method in (Keep, INT8, FP8, Codebook)}
# The methods that recipes call `vq`, by their option `codebook`.
CODEBOOKS: dict[str, type[Method]] = {"learned": Codebook, "trellis": Trellis}


def make(name: str, options: dict[str, Any]) -> Method:
    """The method called `name` with these options, the others at their defaults.

    Raises ValueError, in one line, for an unknown method or option (with the nearest known name) or a value out of
    range.
    """
    method = _class_of(name, options)
    for option in options:
        if option not in method.model_fields:
            kind = f"{name} with codebook {options.get('codebook', 'learned')}" if name == "vq" else name
            raise ValueError(f"{kind} has no option '{option}'.{did_you_mean(option, method.model_fields)}")
    try:
        return method(**options)
    except ValidationError as error:
        # A line for each option, once.
        raise ValueError("; ".join(dict.fromkeys(_line(name, options, detail) for detail in error.errors()))) from None


def from_description(description: dict[str, Any]) -> Method:
    """The method that `Method.describe` described. KeyError or ValueError if it is broken or of another version."""
    options = dict(description)
    name, version = str(options.pop("method")), options.pop("version")
    # Checked before the options: another version may have other ones.
    if version != (known := _class_of(name, options).version):
        raise ValueError(f"{name} is stored in version {version}, but this vqcompress reads version {known}")
    return make(name, options)


def _class_of(name: str, options: dict[str, Any]) -> type[Method]:
    if name not in METHODS:
        raise ValueError(f"no method '{name}'.{did_you_mean(name, METHODS)}")
    if name != "vq":
        return METHODS[name]
    codebook = options.get("codebook", "learned")
    if not isinstance(codebook, str) or codebook not in CODEBOOKS:
        hint = did_you_mean(str(codebook), CODEBOOKS)
        raise ValueError(f"vq: codebook={codebook!r} is not valid: it is {' or '.join(CODEBOOKS)}.{hint}")
    return CODEBOOKS[codebook]


def _line(name: str, options: dict[str, Any], detail: Any) -> str:
    """An error of pydantic's about options in one line: the method, the option, its value, the reason."""
    if not detail["loc"]:
        # A rule about several options together belongs to none of them.
        given = " ".join([name, *(f"{option}={value}" for option, value in options.items())])
        return explain_value(given, detail["msg"])
    # For an option of several types pydantic also lists the types that it tried.
    option = ".".join(str(key) for key in detail["loc"] if key in options or isinstance(key, int))
    return explain_value(f"{name}: {option}={detail['input']!r}", detail["msg"])

"""The method `keep` leaves a weight as it is; in an artifact it keeps its own name, type and bytes."""

from __future__ import annotations

from typing import ClassVar

from vqcompress.methods.base import Method


class Keep(Method):
    """A weight that is not compressed, so nothing is encoded or decoded."""

    name: ClassVar[str] = "keep"
    dense: ClassVar[bool] = True

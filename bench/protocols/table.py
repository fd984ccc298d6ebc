"""`PROTOCOLS`: which generator of steps carries out which settings."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import msgspec

from errata.bench.protocols.base import Step
from errata.bench.protocols.lifelong import run_lifelong
from errata.bench.protocols.sequential import run_sequential
from errata.bench.protocols.settings import LifelongSettings, SequentialSettings, SingleSettings
from errata.bench.protocols.single import run_single

__all__ = ["PROTOCOLS"]

PROTOCOLS: Mapping[type[msgspec.Struct], Callable[..., Iterator[Step]]] = {
    SingleSettings: run_single,
    SequentialSettings: run_sequential,
    LifelongSettings: run_lifelong,
}
"""The fields of the settings are keyword arguments of the generator."""

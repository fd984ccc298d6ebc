"""The version of errata. No torch."""

__version__ = "0.1.0"

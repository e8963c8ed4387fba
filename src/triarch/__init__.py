"""Triarch: one machine, any virtualization architecture."""

__version__ = "0.1.0"

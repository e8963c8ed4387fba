"""Triarch measured beside its peers on this host: `python -m bench`."""

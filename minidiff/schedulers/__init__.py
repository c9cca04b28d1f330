"""Schedulers: from a noisy picture and a prediction to a less noisy one, one file per solver."""

from minidiff.compat.paths import names_at

__getattr__ = names_at(__name__)

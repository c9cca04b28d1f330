"""Pipelines: from a prompt, an image or nothing to pictures, and what they are made of."""

from minidiff.compat.paths import names_at

__getattr__ = names_at(__name__)

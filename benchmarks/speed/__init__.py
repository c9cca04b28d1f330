"""How fast minidiff is, against diffusers in the same run: ``python -m benchmarks.speed``."""

"""The exceptions minidiff raises on bad input: all ``ValueError``, which code written for diffusers catches."""


class ConfigError(ValueError):
    """A configuration field is unknown, missing, or has a value that minidiff does not implement."""


class CheckpointError(ValueError):
    """A checkpoint's files or tensors are not what the model needs; the message names the file and the keys."""


class CheckpointNotFoundError(CheckpointError, OSError):
    """A folder, file or Hub repository that was asked for is not there (an ``OSError``, as in diffusers)."""

"""``minidiff.utils.logging``: the reference's switches for what a library says, on Python's own ``logging``.

minidiff logs to the logger "minidiff" and leaves it as it is; these functions are for programs that call them.
"""

import logging
from functools import partial
from logging import CRITICAL, DEBUG, ERROR, FATAL, INFO, NOTSET, WARN, WARNING

__all__ = ["CRITICAL", "DEBUG", "ERROR", "FATAL", "INFO", "NOTSET", "WARN", "WARNING"]

_library = logging.getLogger("minidiff")
get_verbosity = _library.getEffectiveLevel


def get_logger(name: str | None = None) -> logging.Logger:
    """Return the logger of a module, minidiff's own by default."""
    return logging.getLogger(name or "minidiff")


def set_verbosity(verbosity: int) -> None:
    """Show minidiff's messages from this level on, on standard error."""
    _library.setLevel(verbosity)
    if not _library.hasHandlers():  # nor has the root logger: then Python shows warnings, but nothing below
        _library.addHandler(logging.StreamHandler())


set_verbosity_debug = partial(set_verbosity, DEBUG)
set_verbosity_info = partial(set_verbosity, INFO)
set_verbosity_warning = partial(set_verbosity, WARNING)
set_verbosity_error = partial(set_verbosity, ERROR)


def enable_propagation() -> None:
    """Hand minidiff's messages to the handlers of the root logger too, as at first."""
    _library.propagate = True


def disable_propagation() -> None:
    """Keep minidiff's messages from the handlers of the root logger."""
    _library.propagate = False


def enable_progress_bar() -> None:
    """Show a progress bar for downloads; that of a pipeline's steps is ``set_progress_bar_config``'s."""
    from huggingface_hub.utils import enable_progress_bars  # brings the Hub client, as below

    enable_progress_bars()


def disable_progress_bar() -> None:
    """Show no progress bar for downloads."""
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()

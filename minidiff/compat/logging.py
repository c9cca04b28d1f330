"""``minidiff.utils.logging``: the reference's switches for what a library says, on Python's own ``logging``.

minidiff logs to the logger "minidiff" and leaves it as it is; these functions are for programs that call them.
"""

import logging
from logging import CRITICAL, DEBUG, ERROR, FATAL, INFO, NOTSET, WARN, WARNING

__all__ = ["CRITICAL", "DEBUG", "ERROR", "FATAL", "INFO", "NOTSET", "WARN", "WARNING"]

_library = logging.getLogger("minidiff")
_handler = logging.StreamHandler()


def get_logger(name: str | None = None) -> logging.Logger:
    """Return the logger of a module, minidiff's own by default."""
    return logging.getLogger(name or "minidiff")


def get_verbosity() -> int:
    """Return the level from which on minidiff's messages are shown."""
    return _library.getEffectiveLevel()


def set_verbosity(verbosity: int) -> None:
    """Show minidiff's messages from this level on, on standard error."""
    _library.setLevel(verbosity)
    if not _library.hasHandlers():  # nor has the root logger: then Python shows warnings, but nothing below
        enable_default_handler()


def set_verbosity_debug() -> None:
    """Show everything."""
    set_verbosity(DEBUG)


def set_verbosity_info() -> None:
    """Show what may be of interest, and warnings and errors."""
    set_verbosity(INFO)


def set_verbosity_warning() -> None:
    """Show warnings and errors."""
    set_verbosity(WARNING)


def set_verbosity_error() -> None:
    """Show errors only."""
    set_verbosity(ERROR)


def enable_default_handler() -> None:
    """Write minidiff's messages to standard error."""
    add_handler(_handler)


def disable_default_handler() -> None:
    """Leave minidiff's messages to other handlers."""
    remove_handler(_handler)


def add_handler(handler: logging.Handler) -> None:
    """Hand minidiff's messages to a handler."""
    _library.addHandler(handler)


def remove_handler(handler: logging.Handler) -> None:
    """Hand minidiff's messages to a handler no longer."""
    _library.removeHandler(handler)


def enable_propagation() -> None:
    """Hand minidiff's messages to the handlers of the root logger too, as at first."""
    _library.propagate = True


def disable_propagation() -> None:
    """Keep minidiff's messages from the handlers of the root logger."""
    _library.propagate = False


def enable_explicit_format() -> None:
    """Write level, file, line and time before each message."""
    for handler in _library.handlers:
        handler.setFormatter(logging.Formatter("[%(levelname)s|%(filename)s:%(lineno)s] %(asctime)s >> %(message)s"))


def reset_format() -> None:
    """Write messages as they are."""
    for handler in _library.handlers:
        handler.setFormatter(None)


def is_progress_bar_enabled() -> bool:
    """Say whether downloads show a progress bar."""
    from huggingface_hub.utils import are_progress_bars_disabled  # brings the Hub client, as below

    return not are_progress_bars_disabled()


def enable_progress_bar() -> None:
    """Show a progress bar for downloads; that of a pipeline's steps is ``set_progress_bar_config``'s."""
    from huggingface_hub.utils import enable_progress_bars

    enable_progress_bars()


def disable_progress_bar() -> None:
    """Show no progress bar for downloads."""
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()

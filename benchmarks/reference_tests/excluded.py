"""Which of the reference's tests are about something outside minidiff's scope, and why."""

import re

EXCLUDED: list[tuple[str, str, str]] = []  # (pattern of the file, pattern of Class::test, the reason)


def reason(file: str, name: str) -> str | None:
    """Return why a test does not concern minidiff, None if it does."""
    return next((why for files, names, why in EXCLUDED if re.search(files, file) and re.search(names, name)), None)

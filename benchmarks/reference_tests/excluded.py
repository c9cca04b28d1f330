"""Which of the reference's tests are about something outside minidiff's scope, and why."""

import re

EXCLUDED: list[tuple[str, str, str]] = [  # (pattern of the file, pattern of Class::test, the reason)
    ("others/test_utils", "test_deprecate_testing_utils_module", "a module for the reference's own tests"),
    ("others/test_utils", "test_mps_suppresses_cpu_generator_info_log", "the wording of a hint in the log"),
]


def reason(file: str, name: str) -> str | None:
    """Return why a test does not concern minidiff, None if it does."""
    return next((why for files, names, why in EXCLUDED if re.search(files, file) and re.search(names, name)), None)

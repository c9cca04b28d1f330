"""The code of the reference's documentation, run with minidiff's classes in place of its own; see ``__main__``."""

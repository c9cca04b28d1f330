"""The reference's own tests, run with minidiff's classes in place of its own; see ``__main__``."""

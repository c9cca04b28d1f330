"""Names and paths that programs written for the reference use and that have no natural place in minidiff."""

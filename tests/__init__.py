"""The tests; a package, so that benchmarks import what they share."""

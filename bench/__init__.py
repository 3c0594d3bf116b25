"""Benchmarks: ``python -m bench CASE`` measures, ``python -m bench claims`` and ``tables`` report what was measured."""

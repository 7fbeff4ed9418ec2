"""Benchmarks of speed and memory; see docs/benchmarks.md. Not part of the installed package."""

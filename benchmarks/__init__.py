"""Measurements that docs/benchmarks.md records; each is run from the project's folder: python -m benchmarks.NAME."""

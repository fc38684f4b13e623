"""The measurements recorded in docs/benchmarks.md. Run each from the project's folder: python -m benchmarks.NAME."""

"""How fast and how exact the operations are beside torch's: ``python -m benchmarks``."""

"""Lowering to other runtimes, and running there. Their packages are imported when a function needs them."""

"""Passes from graph to graph, one a file. ``lazy_compile.compiler`` states the order in which they run."""

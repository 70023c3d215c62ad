"""Passes from graph to graph, one a file. ``lazy_compile.pass_pipelines`` states the order in which they run."""

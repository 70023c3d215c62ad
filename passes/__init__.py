"""Passes from graph to graph, one a file. ``lazy_compile.pipelines`` states the order in which they run."""

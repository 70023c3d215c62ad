"""A lazy model at run time: captured graphs, trajectories, caches, decisions, statistics. Imports everything below."""

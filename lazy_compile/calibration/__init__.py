"""Training the gates of a lazy model. Imports planning and runtime."""

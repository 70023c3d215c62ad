"""Bridges to other packages; each is imported on demand."""

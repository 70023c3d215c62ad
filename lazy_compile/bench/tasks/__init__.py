"""Trained models that every measurement can be repeated on. Imports the root leaves."""

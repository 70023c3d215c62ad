"""What a graph says about itself: residual branches, their kinds, the rows of a batch, the time input.

Edits nothing. Imports ir.
"""

"""From an nn.Module and one call to a Program. Imports ir."""

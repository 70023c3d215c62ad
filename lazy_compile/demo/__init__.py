"""Small, real models that are trained on the spot, so that every claim can be checked without a download."""

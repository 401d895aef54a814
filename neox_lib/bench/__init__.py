"""How fast and how large: our candidates against baselines in turns, and a model at full size.

Imports any room above it; only the command line imports it.
"""

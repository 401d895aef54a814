"""Weights in fewer bytes: what an int8 row means, and the layer that multiplies by it.

Imports nothing of the library; checkpoints and everything below them may import it.
"""

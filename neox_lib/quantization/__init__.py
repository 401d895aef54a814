"""Weights in fewer bits: what an int8 row means, and the layer that multiplies by it.

May import the pieces above it, and imports none yet; every room below may import it.
"""

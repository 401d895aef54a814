"""Weights in fewer bits: what an int8 row and an int4 group mean, and the layers that multiply by them.

May import the pieces above it, and imports none yet; every room below may import it.
"""

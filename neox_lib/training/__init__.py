"""The loop that made the shipped model, and the state from which it goes on.

May import evaluation and every room above it; the command line imports it.
"""

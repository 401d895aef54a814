"""The loop that trained the shipped model, with resuming.

May import evaluation and every room above it; the command line imports it.
"""

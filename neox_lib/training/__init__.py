"""The loop that made the shipped model, and its state to go on from.

Imports evaluation and what is above it; the course and the command line may import it.
"""

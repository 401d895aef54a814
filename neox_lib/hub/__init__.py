"""Models of the Hugging Face Hub by name: which files they have, fetched, and kept in the Hub's cache.

Imports checkpoints; loading and everything below it may import it.
"""

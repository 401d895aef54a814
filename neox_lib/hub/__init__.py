"""Models on the Hugging Face Hub: looked up by name, fetched, and kept in the Hub's cache.

May import checkpoints and every room above it; loading and every room below may import it.
"""

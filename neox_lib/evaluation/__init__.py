"""How likely a model finds a given text, and what rounding its weights costs.

Imports loading and what is above it; training, the course and everything below may import it.
"""

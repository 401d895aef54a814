"""How likely a model finds a given text, and what rounding its weights costs.

May import loading and every room above it; training and every room below may import it.
"""

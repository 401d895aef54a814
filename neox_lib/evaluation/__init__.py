"""How likely a model finds a given text.

May import loading and every room above it; training and every room below may import it.
"""

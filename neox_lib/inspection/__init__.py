"""What a model does while it reads: attention weights, and the tokens that could come next.

May import the model and every room above it; the playground and every room below may import it.
"""

"""A look into a model while it reads: attention weights, and the tokens that could come next.

Imports the model; the playground, the course and everything below may import it.
"""

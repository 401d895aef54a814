"""What a model does while it reads: attention weights, the logit lens, what each part adds, heads, patches.

May import the model and every room above it; the playground and every room below may import it.
"""

"""How good a model is: likelihoods of given texts, and the tasks of lm-evaluation-harness.

May import loading and every room above it; training and every room below may import it.
"""

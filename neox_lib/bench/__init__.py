"""Measuring speed and size: our model against baselines, and a model of 20B's shapes on this machine.

May import loading and every room above it; notebooks and the command line import it.
"""

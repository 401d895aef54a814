"""Speed and size, measured: candidates against baselines in turns, and a model of 20B's shapes on this machine.

May import loading and every room above it; notebooks and the command line import it.
"""

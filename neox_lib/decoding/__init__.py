"""Layers for a CPU that give each token at the speed of memory.

Imports quantization and checkpoints; loading and everything below it may import it.
"""

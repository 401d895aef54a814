"""Compiled loops that decode at the speed of memory, on a CPU.

May import quantization and what stands above it; every room below may import it.
"""

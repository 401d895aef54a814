"""CPU layers that decode at the speed of memory.

May import quantization and what stands above it; every room below may import it.
"""

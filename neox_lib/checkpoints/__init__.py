"""Weight files: opened without trusting them, built into a model, converted, and written whole or not at all.

May import the model, quantization and what stands above them; every room below may import it.
"""

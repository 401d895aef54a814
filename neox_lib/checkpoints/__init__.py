"""Files of weights: opened without trusting them, built into a model, converted, written whole or not at all.

Imports the model and quantization; everything from `decoding` down may import it.
"""

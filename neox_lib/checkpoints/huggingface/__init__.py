"""The layout of `transformers`: config.json, safetensors or .bin files, and its names for our parameters.

May be imported where `checkpoints` may; `transformers` itself is never imported.
"""

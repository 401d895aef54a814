"""The layout of `transformers`: one `config.json`, safetensors or .bin files, and their names for our parameters.

Imported like the rest of `checkpoints`.
"""

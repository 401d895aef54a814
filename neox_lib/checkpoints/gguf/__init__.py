"""GGUF, the one file with a model and its tokenizer that llama.cpp, Ollama and LM Studio run.

May be imported where `checkpoints` may. PyPI's `gguf` writes it, and we read it ourselves: that package believes any
size that a file states.
"""

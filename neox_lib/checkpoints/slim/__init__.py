"""The slim layout, in which GPT-NeoX-20B was released: a file for each layer and tensor-parallel rank.

Imported like the rest of `checkpoints`; notebook 05 builds `partition` and `reader`.
"""

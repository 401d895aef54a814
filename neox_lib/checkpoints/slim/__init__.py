"""The slim layout, in which GPT-NeoX-20B was released: one file per layer and tensor-parallel rank.

May be imported where `checkpoints` may; notebook 05 builds `partition` and `reader`.
"""

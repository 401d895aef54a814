"""LoRA adapters as PEFT writes them, merged into their base model while it is read.

May be imported where `checkpoints` may; `peft` itself is never imported.
"""

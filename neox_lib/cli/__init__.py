"""What can be typed after `python -m neox_lib`: one module per command.

May import any room; only `__main__` imports it. A command imports what it needs when it runs, so `--help` is quick.
"""

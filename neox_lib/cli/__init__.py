"""What can be typed after `python -m neox_lib`: a module for each verb.

Imports any room; only `__main__` imports it. A verb imports what it needs when it runs, so that `--help` is quick.
"""

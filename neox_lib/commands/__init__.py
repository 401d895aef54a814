"""What can be typed after `python -m neox_lib`: a module a command, none of them slow to import."""

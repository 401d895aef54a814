"""The exercises: the properties that each asks for, and the check that names the first one that fails.

One module per notebook; only notebooks, the course and the classroom import them.
"""

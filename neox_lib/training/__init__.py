"""Training: `plan` has the settings, `loop` is taught, `run` adds files, samples and resuming.

May import evaluation and every room above it; the course and the command line import it.
"""

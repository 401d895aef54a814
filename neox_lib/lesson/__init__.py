"""What the lessons use: figures, checks, and the learner's own copy of the notebooks."""

"""What carries the notebooks: exercises and their checks, figures, predictions, promotion, slides, the site.

Imports any room above it; only the classroom and the command line import it. Learners change notebooks, never this.
"""

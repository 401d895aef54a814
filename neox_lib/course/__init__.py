"""What the notebooks need: exercises and their checks, figures, predictions, promotion, slides, the site.

May import every room above it; notebooks, the classroom and the command line import it.
"""

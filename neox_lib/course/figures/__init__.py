"""The notebooks' figures, a module for each notebook, all drawn with `plots`.

Only notebooks and the course import them.
"""

"""The notebooks' figures: one module per notebook, all drawn with `plots`.

Only notebooks and the course import them; `train` imports them for its loss curves.
"""

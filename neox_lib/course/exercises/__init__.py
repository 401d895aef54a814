"""What each exercise asks for, and the check that names the property which a wrong try lacks.

One module per notebook; only notebooks, the course and the classroom import them.
"""

"""What each exercise asks for, and the check that says which property a wrong try lacks.

A module for each notebook; only notebooks and the classroom import them.
"""

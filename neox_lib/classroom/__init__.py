"""What a teacher needs: the student edition, the class report, the doctor.

Imports the course and what is above it; only the command line imports it.
"""

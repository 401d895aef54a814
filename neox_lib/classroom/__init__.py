"""What a teacher needs: the student edition, the class report, and the doctor that looks at a machine.

May import the course and every room above it; only the command line imports it.
"""

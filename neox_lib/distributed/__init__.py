"""One model on several devices: what each rank holds, and how the processes meet and end together.

Imports loading and what is above it; the course, bench and the command line may import it.
"""

"""One model on several devices: what each rank holds, and how the processes start, communicate and end together.

May import loading and every room above it; every room below may import it.
"""

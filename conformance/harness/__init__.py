"""What `conformance/run` is made of: cases, abilities, expectations, the box a case works in, and the workers.

Nothing in here or in the cases knows a runtime but by its command line, its files and what the kernel shows.
"""

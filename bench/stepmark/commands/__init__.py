"""What the commands do, by subject: each function takes parsed arguments and returns the exit status.

Nothing heavy is imported before it is needed: `stepmark list` has to be instant.
"""

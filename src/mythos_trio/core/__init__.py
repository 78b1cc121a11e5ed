"""The rules: values in, values out.

Nothing in this package waits, reads a clock, draws a random number, opens a file or a socket, or
logs. The time and the random ids that a rule needs are handed in. ``nox -s lint`` checks it.
"""

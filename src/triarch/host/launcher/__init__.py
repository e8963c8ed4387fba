"""The fork server that starts containers, and the daemon's end of it.

A start needs a process of its own for its mount namespace. Forking one from a small process that is already warm costs
a millisecond; starting Python costs twenty, and forking the daemon would copy its threads' locks.
"""

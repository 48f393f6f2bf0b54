"""Settings of every command: frozen models, and the order in which the places they are given in override each other.

A module a command; `resolve` reads files and command lines.
"""

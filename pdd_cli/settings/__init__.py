"""The settings of every command as frozen models, one module for each command.

`resolve` merges the command line, `--set`, configuration files and defaults.
"""

"""One file for each command: resolves settings, makes one call, shows the result."""

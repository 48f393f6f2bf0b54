"""One file a command: settings, one call, and what is shown of the result."""

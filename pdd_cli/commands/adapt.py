def adapt() -> None:
    """."""

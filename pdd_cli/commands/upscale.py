def upscale() -> None:
    """."""

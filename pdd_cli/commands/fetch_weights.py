def fetch_weights() -> None:
    """."""

"""Which architectures of spandrel can be loaded, upscaled, adapted and exported: the table in docs/weights.md."""

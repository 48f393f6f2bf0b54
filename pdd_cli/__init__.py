"""pdd: adapt a super-resolution model to one real image domain, upscale with it, score it."""

__version__ = "0.1.0"

"""fastsd: an inference runtime for latent diffusion."""

__version__ = "0.1.0"

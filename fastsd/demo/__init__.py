"""The bundled demo checkpoint: a small latent diffusion model of coloured shapes, and how it was trained."""

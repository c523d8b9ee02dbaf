"""Stages that make the atelier's own world: pool, tokenizers, VAE, CLIP, judge, UNet."""

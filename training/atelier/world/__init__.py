"""The stages of the second world's base models, in their order: pool, vae, judge_a, judge_b, clip, unet."""

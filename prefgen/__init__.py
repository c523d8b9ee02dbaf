"""PrefGen's engine: an ordinary torch library that runs without ComfyUI."""

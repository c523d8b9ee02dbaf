"""Methods side by side on a real base: painted by stock diffusers, scored by published judges."""

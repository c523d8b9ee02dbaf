"""PrefGen's training stages: one script a stage, each run as `python -m training.<stage>`."""

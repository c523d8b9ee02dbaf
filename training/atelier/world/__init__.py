"""The stages of the second world's base models. `training/runs/world.sh` has their order."""

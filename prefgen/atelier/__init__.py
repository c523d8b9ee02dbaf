"""The embedded picture world: renderer, attributes, users, small models and their weights."""

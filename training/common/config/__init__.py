"""Typed configurations: what a YAML file may say, the stages' command line, and the plan of a run before it starts."""

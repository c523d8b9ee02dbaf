"""Typed configurations: what a YAML file may say and the stages' command line."""

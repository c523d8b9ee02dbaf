"""Preference data sets on disk: their schema, how they are written, checked and described."""

"""Preference VQA: questions about a user's history, made from any data set of the common schema."""

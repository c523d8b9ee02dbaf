"""Simulated users at any number: what they like and dislike, and the pictures they judged."""

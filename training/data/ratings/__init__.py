"""People's own ratings, whatever they lie in, as a set of the common schema."""

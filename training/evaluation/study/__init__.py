"""A study with human judges: blinded side-by-side choices in a static page, and what the answers say."""

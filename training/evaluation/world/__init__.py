"""The second edition's rows side by side: what docs/evidence/second_edition.md fixed before anything was trained."""

"""Real users from Pick-a-Pic: published choices between two pictures, cleaned into histories."""

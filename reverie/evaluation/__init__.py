"""Is it good? Feature spaces, and distances between what was generated and what is real."""

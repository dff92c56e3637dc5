"""How the shipped weights are made, from real clips to files. Not installed; run from the repository's root."""

"""How files are written so that they are complete or absent, and how what is left of broken ones is read."""

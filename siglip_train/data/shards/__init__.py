"""Where samples lie in tars and how one is read by its number."""

"""`siglip-data recipes`: how to get public data sets."""

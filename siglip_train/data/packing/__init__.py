"""Packing: a source becomes a list of records, the list is cut into shards, and every shard is written by itself."""

"""Statistics of shards: a tally for each shard, merged, summed up as JSON, as tables and as a page."""

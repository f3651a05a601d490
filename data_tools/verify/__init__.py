"""Look at every sample of every shard, and say what training would stumble over."""

"""Filtering: look at every sample, decide over all of them, then copy the shards without those that go."""

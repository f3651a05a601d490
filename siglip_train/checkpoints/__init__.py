"""Checkpoints of a run: how they are written, read, chosen to resume from, and what another run takes over."""

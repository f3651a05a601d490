"""Offline tools on shards."""

# its first act is to put the working folder last among the places where modules are looked for
import siglip_train  # noqa: F401

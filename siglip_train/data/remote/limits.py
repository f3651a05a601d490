"""Limits on the memory and disk that samples and shards may take: a small file can claim gigabytes."""

from dataclasses import dataclass

_MIB = 1 << 20

# assumption: hardly a photograph on the web has more, and half a megabyte of PNG can claim any number
MAX_PIXELS = 50_000_000
# what little unpacks to may be much more: a tar of short texts is padded with zeros
_ALWAYS_UNPACKED = 64 * _MIB
# a caption, or a sample's json, which takes thirty times as much when it is read; real ones have kilobytes
MAX_TEXT_BYTES = 16 * _MIB
# of an index of shards: a million shards take 300 MB
MAX_INDEX_BYTES = 512 * _MIB


class OversizedError(Exception):
    """A packed shard unpacks to more than the limits allow; the message says so."""


@dataclass(frozen=True)
class Limits:
    """assumption: all defaults are far above what real shards need, and keep a bomb from filling memory or disk.

    unpack_ratio: bytes that a packed shard may unpack to, for each of its own, beyond the first 64 MiB; shards of JPEGs
    have 1.0, uncompressed synthetic images 50, gzip's most is 1032. unpack_gib: and in all. member_mib: of a
    member; a BMP of 50 million pixels has 200.
    """

    unpack_ratio: float = 200.0
    unpack_gib: float = 64.0
    member_mib: float = 256.0

    @property
    def member_bytes(self) -> int:
        """`member_mib` in bytes."""
        return int(self.member_mib * _MIB)

    def unpacked(self, size: int) -> int:
        """Bytes that a packed shard of this size may unpack to."""
        return int(min(max(self.unpack_ratio * size, _ALWAYS_UNPACKED), self.unpack_gib * 1024 * _MIB))

    def refusal(self, size: int) -> str:
        """The message of `OversizedError` about a packed shard of this size."""
        most = f"{self.unpacked(size) / _MIB:.6g} MiB"
        return (
            f"its {size / _MIB:.3g} MiB unpack to more than {most}, as what is made to fill disks does: if you know"
            f" better, unpack it yourself, or in training raise data.max_unpack_ratio ({self.unpack_ratio:g}) or"
            f" data.max_unpack_gib ({self.unpack_gib:g})"
        )


USUAL_LIMITS = Limits()

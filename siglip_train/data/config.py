"""What a user says about training data, and what follows from it alone: members, fields and the cache."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from siglip_train.data.order import Order
from siglip_train.data.remote.cache import ShardCache
from siglip_train.data.remote.limits import MAX_PIXELS, Limits
from siglip_train.data.remote.retry import USUAL, RetryPolicy
from siglip_train.data.sentences import SentenceConfig
from siglip_train.data.shards.fields import CaptionChoice, Field
from siglip_train.data.shards.reader import Wanted
from siglip_train.data.shards.select import Selection
from siglip_train.data.watchdog import STALL_SECONDS
from siglip_train.data.workers import Workers, worker_count
from siglip_train.errors import UserError

# left and right in the languages of make-tiny, in German in every form
_SIDES = """
left right
links linke linken linker linkes linkem rechts rechte rechten rechter rechtes rechtem
izquierda izquierdo derecha derecho
слева левый левая справа правый правая
左 右
يسار اليسار يمين اليمين
बाईं बाएँ बायाँ दाईं दाएँ दायाँ
"""


@dataclass
class SourceConfig:
    """One set of samples, in shards or in a folder.

    shards: path, folder, brace list, glob, URL, `pipe:` command, several joined by `::`, or a list of these.
    folder: in place of shards, images in a folder for each class or with captions beside them, or a table of paths and
    captions or labels (.csv, .tsv, .jsonl, .parquet); rank 0 packs them into `data.cache_dir`, anew when they change.
    weight: share of the mixture, relative to the other sources; 0 = not before a stage gives it some. image: member
    extensions in order of preference. text: member (`txt`), field (`json:names.de`, `json:captions.*` = any of them),
    or a mapping of such to probabilities, or null: no captions, so that beside sources with captions its samples take
    part in objectives on images alone. label: member (`cls`) or field
    (`json:class`) with a class index, for such objectives. regions: field with a list of `{box, text, score}`, box =
    [left, top, right, bottom] as shares of width and height (`json:regions`; `json:objects` as `siglip-data pack`
    writes those of COCO), for such objectives. language: counted in the log, a name (`en`) or a field
    (`json:lang`).
    select: which samples, by key.
    """

    shards: Any = None
    folder: str | None = None
    weight: float = 1.0
    image: str = "jpg;jpeg;png;webp;bmp"
    text: Any = "txt"
    label: str | None = None
    regions: str | None = None
    language: str | None = None
    select: Selection = field(default_factory=Selection)

    def __post_init__(self) -> None:
        """Samples must lie somewhere."""
        if self.shards is None and self.folder is None:
            raise ValueError("no samples: give shards='/data/web/*.tar', or folder=/data/images")


@dataclass
class RegionConfig:
    """Which regions of an image a decoder is trained on, and what becomes of them where the image is cropped.

    min_score: of the detector that found them. min_visible: share of a region's area that a crop must leave of it.
    side_words: a text that has one of them is not true of the mirrored image: whole words, or parts of the text in
    writing without spaces. side_texts: what becomes of it there: its region is dropped, or, with no_mirror, no image is
    mirrored that has such a region.
    """

    min_score: float = 0.3
    min_visible: float = 0.5
    side_words: list[str] = field(default_factory=_SIDES.split)
    side_texts: Literal["drop", "no_mirror"] = "drop"

    def __post_init__(self) -> None:
        """Check ranges."""
        if not 0 <= self.min_visible <= 1:
            raise ValueError(f"min_visible is a share in 0..1, got {self.min_visible}")


@dataclass
class StageConfig:
    """Other weights from a sample count on.

    from_sample: the stage begins with the first global batch that starts at or after so many samples. weights: by
    source; one that is not named gives nothing.
    """

    from_sample: int
    weights: dict[str, float]


@dataclass
class ViewsConfig:
    """Augmented views for self-distillation and masked prediction; values are DINO's and SILC's (assumption).

    local: local views of an image, beside one global view. local_patches: their side, in patches. global_scale,
    local_scale: the share of the image's area that a view shows, from and to. mirrored, jittered, grey, blurred: the
    share of views that are. jitter: how much brightness, contrast, saturation and hue change. masked: share of the
    global view's patches that the student does not see (SigLIP 2, section 2.3).
    """

    local: int = 8
    local_patches: int = 6
    global_scale: tuple[float, float] = (0.4, 1.0)
    local_scale: tuple[float, float] = (0.05, 0.4)
    mirrored: float = 0.5
    jittered: float = 0.8
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.2, 0.1)
    grey: float = 0.2
    blurred: float = 0.5
    masked: float = 0.5

    def __post_init__(self) -> None:
        """Check ranges."""
        if self.local < 0 or self.local_patches < 1:
            raise ValueError("local must not be negative and local_patches at least 1")
        for name in ("global_scale", "local_scale"):
            low, high = getattr(self, name)
            if not 0 < low <= high <= 1:
                raise ValueError(f"{name} is {low}, {high}: give shares of the area, 0 < from <= to <= 1")
        for name in ("mirrored", "jittered", "grey", "blurred", "masked"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}: give a share in 0..1")
        if min(self.jitter) < 0 or self.jitter[3] > 0.5:
            raise ValueError(
                f"jitter is {self.jitter}: give what is not negative, and of the hue at most 0.5"
            )


@dataclass
class DataConfig:
    """What to train on and how to read it.

    source_defaults: what every source has that does not say it itself, `{text: null, label: cls}`.
    stages: other weights from given sample counts on. order: shuffled or sequential epochs of each source, or
    resampled: shards drawn with replacement, without epochs, for sources too large to be seen once.
    workers: processes of a rank that read and decode, 0 = the training process itself; auto = the cores that a rank
    has, at most 12. The samples and their order do not depend on it.
    shuffle_window: samples are permuted within runs of permuted shards that hold at least so many.
    resize: filter by which images are brought to the model's size. flip: mirror every second image. min_crop_area:
    below 1, a random crop of at least this share of the area is taken in place of the whole image.
    reduced_jpeg: decode a JPEG much larger than needed at 1/2, 1/4 or 1/8; faster, the same but for fine detail.
    max_bad_share: the largest share of unusable samples, before training and of those read, which is looked at from 200
    samples on; 0 = none at all.
    max_image_pixels: larger images count as bad, before they take memory: 50 million pixels take 150 MB, those of
    a PNG with transparency 800 (assumption). max_member_mib: larger members of a tar count as bad. max_unpack_ratio,
    max_unpack_gib: a packed shard may unpack to 64 MiB and max_unpack_ratio times its size, and to max_unpack_gib at
    most; one that holds more counts as bad if it is local, as unavailable if it is remote.
    cache_dir: for downloads, unpacked shards, indexes and packed folders.
    prefetch: pieces of up to 256 samples that each worker holds ready, in shared memory.
    stall_seconds: workers that give nothing for so long, or die, are replaced; not watched with workers=0, where this
    process itself reads.
    cache_limit_gib: of copies of remote and packed shards on a machine, the least recently used go first; null = no
    bound. fetch_timeout_seconds: a download that gives nothing for so long is tried again.
    fetch_attempts: downloads that are tried for a shard. max_failed_shards: share of a source's shards
    that may be unavailable at once (one, if it has several and the share is above 0), or not be counted at the start.
    sentences: how captions and regions are written for a decoder. regions: which of them.
    embedding_dir: a folder that all ranks see: what a locked image tower makes of every image is computed once, kept
    there, and read in place of the images; null = no.
    views: augmented views of the images, for objectives that need them.
    """

    sources: dict[str, SourceConfig] = field(default_factory=dict)
    stages: list[StageConfig] = field(default_factory=list)
    source_defaults: dict[str, Any] = field(default_factory=dict)
    workers: Workers = "auto"
    shuffle_window: int = 16384
    order: Order = "shuffled"
    resize: Literal["bilinear", "bicubic"] = "bilinear"
    flip: bool = False
    min_crop_area: float = 1.0
    reduced_jpeg: bool = True
    max_bad_share: float = 0.01
    max_image_pixels: int = MAX_PIXELS
    max_member_mib: float = Limits.member_mib
    max_unpack_ratio: float = Limits.unpack_ratio
    max_unpack_gib: float = Limits.unpack_gib
    cache_dir: str | None = None
    prefetch: int = 4
    stall_seconds: float = STALL_SECONDS
    cache_limit_gib: float | None = None
    fetch_timeout_seconds: float = USUAL.timeout_seconds
    fetch_attempts: int = USUAL.attempts
    max_failed_shards: float = 0.05
    sentences: SentenceConfig = field(default_factory=SentenceConfig)
    regions: RegionConfig = field(default_factory=RegionConfig)
    embedding_dir: str | None = None
    views: ViewsConfig = field(default_factory=ViewsConfig)

    def __post_init__(self) -> None:
        """Check ranges."""
        if self.worker_count < 0 or self.prefetch < 1 or not 0 <= self.max_bad_share <= 1:
            raise ValueError("workers must not be negative, prefetch at least 1 and max_bad_share in 0..1")
        if not self.stall_seconds > 0:
            raise ValueError(f"stall_seconds must be above 0, got {self.stall_seconds}")
        if self.fetch_attempts < 1 or not 0 <= self.max_failed_shards <= 1:
            raise ValueError("fetch_attempts must be at least 1 and max_failed_shards in 0..1")
        if min(self.fetch_timeout_seconds, 1 if self.cache_limit_gib is None else self.cache_limit_gib) <= 0:
            raise ValueError("fetch_timeout_seconds and cache_limit_gib must be above 0")
        if min(self.max_image_pixels, self.max_member_mib, self.max_unpack_ratio, self.max_unpack_gib) <= 0:
            raise ValueError(
                "max_image_pixels, max_member_mib, max_unpack_ratio and max_unpack_gib must be above 0"
            )
        if self.embedding_dir is not None and (self.flip or self.min_crop_area < 1):
            raise ValueError(
                "embedding_dir keeps what the tower makes of whole images, so they cannot be cropped or mirrored: set"
                " data.flip=false data.min_crop_area=1.0, or data.embedding_dir=null"
            )

    @property
    def worker_count(self) -> int:
        """Loader processes of this rank."""
        return worker_count(self.workers)


def wanted_of(source: SourceConfig, more: Iterable[str] = ()) -> Wanted:
    """The members that samples of a source need, and those that are read where they are there; more: of these."""
    choice = None if source.text is None else CaptionChoice(source.text)
    label = None if source.label is None else Field.parse(source.label)
    texts = choice.members if choice else None
    others = [field.member for field in (label, language_field(source)) if field]
    others += [member for member in more if member not in ("image", *others, *(texts or ()))]
    return Wanted(extensions(source.image), texts, tuple(others), source.select)


def cache_of(config: DataConfig) -> ShardCache:
    """The cache that the config names."""
    return ShardCache.at(
        config.cache_dir,
        config.cache_limit_gib,
        RetryPolicy(config.fetch_timeout_seconds, config.fetch_attempts),
        Limits(config.max_unpack_ratio, config.max_unpack_gib, config.max_member_mib),
    )


def extensions(image: str) -> tuple[str, ...]:
    """`jpg;png` to its extensions. Raises `UserError` where there is none."""
    found = tuple(part.strip().lower().lstrip(".") for part in image.split(";") if part.strip())
    if not found:
        raise UserError(f'image is {image!r}, but must name member extensions, such as "jpg;png"')
    return found


def language_field(source: SourceConfig) -> Field | None:
    """The field that names the language of a sample; None where the source has one name or none."""
    is_field = source.language is not None and source.language.startswith("json:")
    return Field.parse(source.language or "") if is_field else None

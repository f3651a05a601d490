"""From a `Tally` to plain numbers: what `--json` writes, and tables and page show."""

from typing import Any

from data_tools.stats.counters import Distinct, Distribution, Frequent
from data_tools.stats.measure import Measures
from data_tools.stats.tally import Tally

Summary = dict[str, Any]

_QUANTILES = {"p5": 0.05, "median": 0.5, "p95": 0.95, "p99": 0.99}
_LISTED = 50


def summarise(tally: Tally, measures: Measures) -> Summary:
    """All numbers, ready for JSON. Deterministic except `decoding`."""
    return {
        "shards": {"read": tally.shards, "bytes": tally.shard_bytes},
        "samples": tally.samples,
        "pictures": _images(tally),
        "captions": _captions(tally, measures),
        "objects": {
            "per_picture": _distribution(tally.objects_per_image),
            "labels": _frequent(tally.labels),
        },
        "decoding": _decoding(tally),
        "bad": {
            "causes": dict(sorted(tally.bad.causes.items())),
            "are_all_named": len(tally.bad.named) == tally.bad.causes.total(),
            "named": [bad._asdict() for bad in tally.bad.named],
        },
    }


def _images(tally: Tally) -> Summary:
    return {
        "number": tally.image_bytes.count,
        "formats": dict(tally.formats.most_common()),
        "bytes": _distribution(tally.image_bytes),
        "width": _distribution(tally.widths),
        "height": _distribution(tally.heights),
        "megapixels": _distribution(tally.megapixels),
        "aspect": _distribution(tally.aspects),
        "duplicates": _duplicates(tally.images),
    }


def _captions(tally: Tally, measures: Measures) -> Summary:
    number = tally.characters.count
    summary = {
        "fields": [field.text for field in measures.text],
        "number": number,
        "per_picture": _distribution(tally.captions_per_image),
        "characters": _distribution(tally.characters),
        "languages": {name: _language(tally, name) for name in _languages(tally)},
        "duplicates": _duplicates(tally.captions),
        "most_frequent": _frequent(tally.frequent_captions),
        "words": _frequent(tally.words),
    }
    if measures.tokenizer is not None:
        summary["tokens"] = _distribution(tally.tokens)
        summary["context_length"] = measures.context_length
        summary["over_context_length"] = tally.over_length
        summary["over_context_length_share"] = tally.over_length / number if number else 0.0
    return summary


def _languages(tally: Tally) -> list[str]:
    return sorted(tally.languages, key=lambda name: (-tally.languages[name], name))


def _language(tally: Tally, name: str) -> Summary:
    number = tally.languages[name]
    summary = {"captions": number, "mean_characters": tally.language_characters[name] / number}
    if tally.tokens.count:
        summary["mean_tokens"] = tally.language_tokens[name] / number
    return summary


def _decoding(tally: Tally) -> Summary:
    seconds = tally.decode_seconds
    rates = {
        "pictures_per_second_and_core": tally.decoded,
        "megabytes_per_second_and_core": tally.decoded_bytes / 1e6,
        "megapixels_per_second_and_core": tally.decoded_megapixels,
    }
    return {
        "pictures": tally.decoded,
        **{name: amount / seconds if seconds else 0.0 for name, amount in rates.items()},
    }


def _distribution(numbers: Distribution) -> Summary:
    if not numbers.count:
        return {"count": 0}
    return {
        "count": numbers.count,
        "total": numbers.total,
        "mean": numbers.mean,
        "min": numbers.low,
        **{name: numbers.quantile(share) for name, share in _QUANTILES.items()},
        "max": numbers.high,
    }


def _duplicates(items: Distinct) -> Summary:
    # of one hash in 2^level, see Distinct
    return {
        "repeated": items.repeated << items.level,
        "share": items.repeated_share,
        "most_alike": items.most_alike,
        "is_estimate": items.level > 0,
    }


def _frequent(texts: Frequent) -> Summary:
    return {"top": [list(pair) for pair in texts.top(_LISTED)], "is_exact": texts.dropped == 0}

"""Kinds of values, and options, that several commands take."""

import argparse
import os

from siglip_train.data.remote.limits import MAX_PIXELS


def positive(text: str) -> int:
    """An integer from 1 on, for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not positive")
    return value


def share(text: str) -> float:
    """A number from 0 to 1, for argparse."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{value} is no share: 0 <= share <= 1")
    return value


def folder_name(text: str) -> str:
    """A name for a folder in another one, for argparse."""
    if text in ("", ".", "..") or text[0] == "." or "/" in text:
        raise argparse.ArgumentTypeError(f"{text!r} is no name of a folder")
    return text


def add_cache_dir(parser: argparse.ArgumentParser) -> None:
    """Add `--cache-dir`, which `cache_folder` turns into the folder."""
    parser.add_argument(
        "--cache-dir", metavar="FOLDER", help="for downloads and unpacked shards, as in data.cache_dir"
    )


def add_max_pixels(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """Add `--max-pixels`."""
    parser.add_argument(
        "--max-pixels",
        type=positive,
        default=MAX_PIXELS,
        metavar="N",
        help="width x height; an image with more counts as bad, as in data.max_image_pixels (%(default)s)",
    )


def add_workers(parser: argparse.ArgumentParser) -> None:
    """Add `--workers`."""
    parser.add_argument(
        "--workers",
        type=positive,
        default=len(os.sched_getaffinity(0)),
        help="processes; the result does not depend on it (%(default)s)",
    )

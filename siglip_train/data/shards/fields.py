"""The fields of a sample: members and places in its json member, which one is its caption, and what is unreadable."""

import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from siglip_train.data.remote.limits import MAX_TEXT_BYTES
from siglip_train.data.shards.reader import RawSample
from siglip_train.errors import SampleError, UserError

_JSON = "json:"


class Field(NamedTuple):
    """A place in a sample: a whole member (`txt`), or a dotted path in the json member (`json:names.de`)."""

    member: str
    path: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str) -> "Field":
        """Read `txt`, `json:field` or `json:field.sub.*`."""
        if not text.startswith(_JSON):
            return cls(text.lower().lstrip("."))
        path = tuple(text[len(_JSON) :].split("."))
        if not all(path):
            raise UserError(
                f'{text!r} names no json field; write for example "json:caption" or "json:names.*"'
            )
        # a trailing star is what a list or mapping means anyway
        return cls("json", path[:-1] if path[-1] == "*" else path)

    @property
    def text(self) -> str:
        """As the user wrote it."""
        return _JSON + ".".join(self.path) if self.path else self.member

    def values(self, sample: RawSample) -> Iterator[tuple[str, Any]]:
        """All (mapping key or "", value) here, lists and mappings opened; none where it is absent.

        Raises `SampleError`.
        """
        if self.member not in sample.members:
            return iter(())
        if not self.path:
            return iter([("", read_text(sample.members[self.member]))])
        try:
            return iter(list(_leaves(_json(sample.members["json"]), self.path, "")))
        except RecursionError as error:
            raise SampleError("broken json", f"{self.text} is nested too deeply") from error

    def texts(self, sample: RawSample) -> list[tuple[str, str]]:
        """All (mapping key or "", non-empty text) here. Raises `SampleError`."""
        return [
            (key, _encodable(value))
            for key, value in self.values(sample)
            # zeros are what a file system gives for text that was never written
            if isinstance(value, str) and value.replace("\0", "").strip()
        ]

    def node(self, sample: RawSample) -> Any:
        """What stands here in the json member, lists and mappings as they are; None where it is absent.

        Raises `SampleError`.
        """
        node: Any = _json(sample.members["json"]) if self.path and "json" in sample.members else None
        for name in self.path:
            node = node.get(name) if isinstance(node, dict) else None
        return node

    def empty_list(self, sample: RawSample) -> bool:
        """Whether a list without values stands here, which `values` cannot tell from nothing."""
        return self.node(sample) == []

    def first(self, sample: RawSample) -> Any:
        """The first value here, None where it is absent. Raises `SampleError`."""
        return next((value for _, value in self.values(sample)), None)


def _leaves(node: Any, path: tuple[str, ...], key: str) -> Iterator[tuple[str, Any]]:
    if path and path[0] != "*":
        if isinstance(node, dict) and path[0] in node:
            yield from _leaves(node[path[0]], path[1:], key)
    elif isinstance(node, dict):
        for name, value in node.items():
            yield from _leaves(value, path[1:], name)
    elif isinstance(node, list):
        for value in node:
            yield from _leaves(value, path[1:], key)
    elif not path:
        yield key, node


def _check_length(data: bytes, what: str) -> None:
    if len(data) > MAX_TEXT_BYTES:
        raise SampleError(f"{what} too long", f"{len(data)} bytes, limit {MAX_TEXT_BYTES}")


def read_text(data: bytes) -> str:
    """What a text member holds, without space around it. Raises `SampleError`."""
    _check_length(data, "text")
    try:
        # -sig: what Windows writes begins with a byte order mark
        return data.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise SampleError("not utf-8", str(error)) from error


def _encodable(text: str) -> str:
    """With "?" for half a surrogate pair: json can spell one, and no tokenizer takes it."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")


def read_json(data: bytes) -> Any:
    """What a json member holds. Raises `SampleError`."""
    _check_length(data, "json")
    try:
        return json.loads(data)
    except UnicodeDecodeError as error:
        raise SampleError("not utf-8", f"json: {error}") from error
    except (ValueError, RecursionError) as error:
        raise SampleError("broken json", str(error)) from error


# a sample's json is asked for its caption, its language and its label
_json = functools.lru_cache(1)(read_json)


def read_facts(members: Mapping[str, bytes]) -> dict[str, Any]:
    """The json member, {} where there is none. Raises `SampleError` unless it is one object."""
    if "json" not in members:
        return {}
    facts = read_json(members["json"])
    if not isinstance(facts, dict):
        raise SampleError("broken json", f"not an object but a {type(facts).__name__}")
    return facts


class CaptionChoice:
    """Draws the caption of a training sample.

    spec: one field (`txt`, `json:caption`), or fields with the probabilities to take them. A field that holds a
    list or mapping gives one of its texts, each as likely. Where the field drawn is missing, empty or broken, the
    others are drawn in its place.
    """

    def __init__(self, spec: str | Mapping[str, float]) -> None:
        choices = {spec: 1.0} if isinstance(spec, str) else dict(spec)
        if not choices or min(choices.values()) < 0 or sum(choices.values()) <= 0:
            raise UserError(f"text is {spec!r}, but must be a field or a mapping of fields to probabilities")
        self.fields = [Field.parse(name) for name in choices]
        self.probabilities = np.array(list(choices.values()), dtype=np.float64)

    @property
    def members(self) -> tuple[str, ...]:
        """The members that can hold a caption."""
        return tuple(dict.fromkeys(field.member for field in self.fields))

    def draw(self, sample: RawSample, rng: np.random.Generator) -> str:
        """One caption. Raises `SampleError` where no field has one."""
        left, weights = list(self.fields), self.probabilities
        failure = None
        while left and weights.sum() > 0:
            place = int(rng.choice(len(left), p=weights / weights.sum())) if len(left) > 1 else 0
            try:
                texts = left[place].texts(sample)
            except SampleError as error:
                failure, texts = failure or error, []
            if texts:
                return texts[int(rng.integers(len(texts))) if len(texts) > 1 else 0][1]
            left.pop(place)
            weights = np.delete(weights, place)
        raise failure or no_caption(self.fields, sample)


def no_caption(fields: Sequence[Field], sample: RawSample) -> SampleError:
    """The fault of a sample whose fields can be read and hold no text: they are empty, or hold something else."""
    for field in fields:
        value = next((value for _, value in field.values(sample) if not isinstance(value, str | None)), None)
        if value is not None:
            return SampleError(
                "caption is no text", f"{field.text} is {value!r:.60}; is this the field of captions?"
            )
    return SampleError("empty caption", f"no text in {', '.join(field.text for field in fields)}")

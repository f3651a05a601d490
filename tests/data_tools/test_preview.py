"""`siglip-data preview`: the page shows samples of the shards, and nothing in a sample is taken for HTML."""

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from data_tools.cli import main
from tests.data_tools.conftest import Sample
from tests.data_tools.test_verify import named, picture_kind, without, write_tar


class Elements(HTMLParser):
    """Every start tag of a page with its attributes, and all text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)

    def images(self, kind: str) -> list[Image.Image]:
        sources = [attributes["src"] for tag, attributes in self.tags if tag == "img"]
        start = f"data:image/{kind};base64,"
        return [
            Image.open(io.BytesIO(base64.b64decode(source.removeprefix(start))))
            for source in sources
            if source.startswith(start)
        ]


def preview(shards: Path, page: Path, *options: str) -> str:
    main(["preview", str(shards), str(page), "--cache-dir", str(page.parent / "cache"), *options])
    return page.read_text(encoding="utf-8")


def test_the_page_shows_samples_of_the_shards(
    tiny_dir: Path, splits: dict[str, list[Sample]], tmp_path: Path
) -> None:
    page = preview(
        tiny_dir / "train", tmp_path / "new" / "p.html", "--samples", "20", "--text", "json:captions.*"
    )
    elements = Elements(page)
    by_key = {sample.key: sample for sample in splits["train"]}
    keys = re.findall(r'<p class="place">(\S+) ·', page)
    assert len(set(keys)) == 20
    sizes = []
    for key in keys:
        sample = by_key[key]
        with Image.open(io.BytesIO(sample.members[picture_kind(sample.members)])) as picture:
            sizes.append(picture.size)
        for language, caption in sample.facts["captions"].items():
            assert caption in elements.text
            assert ("span", {"dir": "auto", "lang": language}) in elements.tags
    assert [picture.size for picture in elements.images("jpeg")] == sizes
    assert [mask.size for mask in elements.images("png")] == sizes
    assert elements.count("rect") == sum(len(by_key[key].facts["objects"]) for key in keys)
    assert not re.search(r"""(src|href)=["']?(http|/)""", page), "it needs nothing beside it"


def test_a_mask_is_clear_where_nothing_is(splits: dict[str, list[Sample]], tmp_path: Path) -> None:
    sample = splits["train"][0]
    page = preview(write_tar(tmp_path / "0.tar", named([sample])), tmp_path / "p.html")
    overlay = Elements(page).images("png")[0].convert("RGBA")
    with Image.open(io.BytesIO(sample.members["mask.png"])) as mask:
        assert [alpha > 0 for alpha in overlay.getchannel("A").tobytes()] == [
            number > 0 for number in mask.tobytes()
        ]


def test_the_seed_decides(tiny_dir: Path, tmp_path: Path) -> None:
    pages = [
        preview(tiny_dir / "train", tmp_path / "p.html", "--samples", "5", "--seed", seed) for seed in "001"
    ]
    assert pages[0] == pages[1] != pages[2]


def test_text_is_escaped_and_damage_is_shown(splits: dict[str, list[Sample]], tmp_path: Path) -> None:
    first, second, third = splits["train"][:3]
    evil = '<script>alert("1")</script>'
    facts = first.facts
    facts["language"] = f'"{evil}'
    facts["objects"][0]["label"] = evil
    samples = [
        Sample(f"{evil.replace('/', '')}", {**first.members, "txt": evil.encode(), "json": json.dumps(facts).encode()}),
        Sample(second.key, {**second.members, picture_kind(second.members): b"\x89PNG junk", "json": b"{"}),
        Sample(third.key, without(third.members, picture_kind(third.members))),
    ]  # fmt: skip
    page = preview(write_tar(tmp_path / "<b>.tar", named(samples)), tmp_path / "p.html")
    elements = Elements(page)
    assert elements.count("script") == 0
    assert elements.count("b") == 2, "the languages, not the shard"
    assert elements.text.count(evil) == 3, "caption, language and label, as text"
    assert "broken image" in elements.text
    assert "broken json" in elements.text
    assert "no image" in elements.text
    assert len(elements.images("jpeg")) == 1


def test_a_shard_that_cannot_be_read_is_named_and_left_out(
    splits: dict[str, list[Sample]], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "in").mkdir()
    write_tar(tmp_path / "in" / "1.tar", named(splits["validation"][:3]))
    (tmp_path / "in" / "0.tar").write_bytes(b"junk" * 300)
    page = preview(tmp_path / "in", tmp_path / "p.html")
    assert len(re.findall('class="place"', page)) == 3
    said = capsys.readouterr().out
    assert f"left out: cannot read shard {tmp_path}/in/0.tar: it is no tar file" in said
    assert "3 samples" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere/*.tar", "{tmp}/p.html"], "nowhere"),
        (["{tmp}/junk.tar", "{tmp}/p.html"], "cannot read shard"),
        (["{data}", "{tmp}"], "is a folder"),
        (["{data}", "{tmp}/p.html", "--seed", "-1"], "--seed"),
    ],
)
def test_mistakes(
    arguments: list[str], message: str, tiny_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "junk.tar").write_bytes(b"junk" * 1000)
    filled = [argument.format(data=tiny_dir / "validation", tmp=tmp_path) for argument in arguments]
    with pytest.raises(SystemExit) as leaving:
        main(["preview", *filled])
    assert leaving.value.code == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("*.html"))

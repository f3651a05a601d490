"""Sentences of captions, boxes and texts, and the regions of a sample that they are made of."""

import io
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from PIL import Image

from siglip_train.data.batch_pieces import RankShare
from siglip_train.data.choices import Choices
from siglip_train.data.config import DataConfig, RegionConfig, SourceConfig
from siglip_train.data.image_transform import ImageTransform, View
from siglip_train.data.inputs.base import Input, InputSetup, RunInputs
from siglip_train.data.inputs.captions import CaptionInput, CaptionSentenceInput, TextPresenceInput
from siglip_train.data.inputs.images import ImageInput
from siglip_train.data.inputs.regions import Region, RegionInput, names_a_side, read_regions, seen_through
from siglip_train.data.pipeline import build_loader
from siglip_train.data.sentences import SentenceConfig, SentenceForm
from siglip_train.data.shards.fields import Field
from siglip_train.data.shards.reader import RawSample
from siglip_train.data.tokenizer import Tokenizer, load_tokenizer
from siglip_train.errors import SampleError, UserError

FORM = SentenceConfig(context_length=40, region_tokens=12)
REGIONS = Field.parse("json:regions")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Of a few words, with digits as pieces of their own, as make-tiny's."""
    path = tmp_path_factory.mktemp("words") / "words.model"
    digits = "0123456789:"
    with path.open("wb") as sink:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["red circle left of a blue square", "cap aref gcap"] * 20),
            model_writer=sink, vocab_size=330, model_type="bpe", byte_fallback=True, pad_id=0, eos_id=1, unk_id=2,
            bos_id=-1, normalization_rule_name="identity", minloglevel=2, hard_vocab_limit=False,
            user_defined_symbols=[*(f"▁{digit}" for digit in digits), *digits],
        )  # fmt: skip
    return load_tokenizer(path, context_length=16)


def sample_of(regions: object, size: tuple[int, int] = (40, 20)) -> RawSample:
    picture = io.BytesIO()
    Image.new("RGB", size).save(picture, "PNG")
    content = json.dumps({} if regions is None else {"regions": regions}).encode()
    return RawSample("0.tar", "0", {"image": picture.getvalue(), "json": content}, (0, 0))


def test_a_box_is_four_numbers_as_text_in_an_order_and_comes_back(tokenizer: Tokenizer) -> None:
    box = (0.1, 0.25, 0.502, 1.0)
    for order, said in (("yxyx", "125 50 500 251"), ("xyxy", "50 125 251 500")):
        form = SentenceForm(SentenceConfig(context_length=40, region_tokens=12, box_order=order), tokenizer)
        assert len(form.box(box)) <= 12
        assert tokenizer.decode(form.box(box)) == said
        assert form.box_of(form.box(box)) == pytest.approx(box)
        assert (
            form.box_of(form.box(box)[:-1] if order == "xyxy" else form.box(box)[:2]) is None
            or order == "xyxy"
        )
    assert SentenceForm(FORM, tokenizer).box_of(tokenizer.encode("red circle")) is None
    assert SentenceForm(FORM, tokenizer).box_of([]) is None


def test_sentences_begin_with_the_prompt_of_their_task(tokenizer: Tokenizer) -> None:
    form, box = SentenceForm(FORM, tokenizer), (0.0, 0.0, 0.5, 1.0)
    sentences = [
        form.caption("Red Circle"),
        form.expression("red circle", box),
        form.grounded(box, "red circle"),
    ]
    assert [tokenizer.decode(each.ids) for each in sentences] == [
        "cap: red circle", "aref: red circle : 0 0 500 250", "gcap: 0 0 500 250 : red circle",
    ]  # fmt: skip
    for sentence, prompt in zip(
        sentences,
        [form.prompt("cap"), form.prompt("arf", "red circle"), form.prompt("gcap", box)],
        strict=True,
    ):
        assert sentence.ids[: len(prompt)] == prompt
        assert sentence.ids[-1] == tokenizer.eos_id
    rows = form.rows([sentences[0], None])
    assert rows.tokens.shape == (2, 40)
    assert rows.counted[0].nonzero().flatten().tolist() == [
        *range(sentences[0].prefix, len(sentences[0].ids))
    ]
    assert not rows.counted[1].any()
    long = form.expression("circle " * 30, box)
    assert len(long.ids) <= 40
    assert form.box_of(long.ids[-1 - len(form.box(box)) :]) == box


def test_what_may_follow_of_a_box_leads_to_all_boxes_with_an_area_and_to_no_other(
    tokenizer: Tokenizer,
) -> None:
    form = SentenceForm(SentenceConfig(context_length=40, region_tokens=12, box_bins=12), tokenizer)
    rng = np.random.default_rng(0)
    for _ in range(300):
        written: list[int] = []
        while (token := int(rng.choice(form.box_continuations(written)))) != tokenizer.eos_id:
            written.append(token)
        left, top, right, bottom = form.box_of(written)
        assert left < right
        assert top < bottom
    for box in ((0, 0, 1 / 12, 1), (11 / 12, 10 / 12, 1, 11 / 12)):
        written = form.box(box)
        for place, token in enumerate([*written, tokenizer.eos_id]):
            assert token in form.box_continuations(written[:place])


def test_a_context_without_room_for_a_box_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(
        UserError, match=r"context_length: a text of 12 tokens and a box, which takes 12 .* it is 20"
    ):
        SentenceForm(SentenceConfig(context_length=20, region_tokens=12), tokenizer)


@pytest.mark.parametrize(
    ("regions", "cause"),
    [
        ([{"box": [0.1, 0.1, 1.4, 0.5], "text": "a"}], "bad box"),
        ([{"box": [0.5, 0.1, 0.4, 0.5], "text": "a"}], "bad box"),
        ([{"box": [0.5, 0.1, 0.5, 0.5], "text": "a"}], "bad box"),
        ([{"box": [math.nan, 0.1, 0.5, 0.5], "text": "a"}], "bad box"),
        ([{"box": [0.1, 0.5, 0.4], "text": "a"}], "bad box"),
        ([{"box": [10, 10, 120, 60], "text": "a"}], "box in pixels"),
        ([{"box": [0.1, 0.1, 0.5, 0.5]}], "region without text"),
        ({"box": [0.1, 0.1, 0.5, 0.5]}, "regions are no list"),
    ],
)
def test_regions_that_cannot_be_are_bad_samples(regions: object, cause: str) -> None:
    with pytest.raises(SampleError) as raised:
        read_regions(REGIONS, sample_of(regions))
    assert raised.value.cause == cause


def test_a_sample_may_have_no_regions_and_those_of_coco_are_read_too() -> None:
    assert read_regions(REGIONS, sample_of(None)) == []
    assert read_regions(REGIONS, sample_of([])) == []
    said = [{"label": "dog", "box": [0, 0, 0.5, 1]}, {"label": "dogs", "box": [0, 0, 1, 1], "crowd": True}]
    assert read_regions(REGIONS, sample_of(said)) == [Region((0.0, 0.0, 0.5, 1.0), "dog", 1.0)]


def test_boxes_follow_crop_and_mirror() -> None:
    region = Region((0.2, 0.2, 0.6, 0.6), "red circle left of it", 1.0)
    whole = View((0, 0, 1, 1), False)
    assert seen_through(region, whole, 0.5, ["left"]) == region
    half = seen_through(region, View((0.3, 0.0, 1.0, 1.0), False), 0.5, [])
    assert half.box == pytest.approx((0, 0.2, 3 / 7, 0.6))
    assert seen_through(region, View((0.41, 0.0, 1.0, 1.0), False), 0.5, []) is None, "less than half is left"
    mirrored = seen_through(region, View((0, 0, 0.8, 1), True), 0.5, [])
    assert mirrored.box == pytest.approx((0.25, 0.2, 0.75, 0.6))
    assert seen_through(region, View((0, 0, 1, 1), True), 0.5, ["left", "right"]) is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("the circle to the LEFT of it", True),
        ("what is left.", True),
        ("leftover pizza", False),
        ("ein Kreis, rechts von einem Stern", True),
        ("die linke Katze", True),
        ("круг слева от звезды", True),
        ("星の左の円", True),
        ("圆形在右边", True),
        ("دائرة إلى يسار نجمة", True),
        ("तारे के बाईं ओर वृत्त", True),
        ("red circle", False),
        ("赤い円", False),
    ],
)
def test_sides_are_known_in_several_languages(text: str, *, expected: bool) -> None:
    assert names_a_side(text, RegionConfig().side_words) is expected


class _Shards:
    def __init__(self, samples: list[RawSample]) -> None:
        self.samples, self.shards = samples, self

    def __len__(self) -> int:
        return len(self.samples)

    def locate(self, place: int) -> tuple[int, int]:
        return 0, place

    def read(self, shard: int, number: int) -> RawSample:
        return self.samples[number]


def region_input(tokenizer: Tokenizer, samples: list[RawSample], **transform: object) -> RegionInput:
    run = RunInputs((RegionInput,), ImageTransform(32, 16, **transform), tokenizer)
    source = SourceConfig(shards="x", regions="json:regions")
    return RegionInput(InputSetup("mine", source, _Shards(samples), run, DataConfig(sentences=FORM)))


def test_two_regions_are_drawn_above_the_score_and_the_image_is_cut_and_mirrored_as_they_are(
    tokenizer: Tokenizer,
) -> None:
    size = (64, 32)
    found = [
        {"box": [0.25, 0.25, 0.75, 0.75], "text": "a", "score": 0.9},
        {"box": [0, 0, 1, 1], "text": "b", "score": 0.2},
    ]
    sample = sample_of(found, size)
    # white where the region is, black elsewhere
    pixels = np.zeros((32, 64, 3), np.uint8)
    pixels[8:24, 16:48] = 255
    encoded = io.BytesIO()
    Image.fromarray(pixels).save(encoded, "PNG")
    sample = sample._replace(members={**sample.members, "image": encoded.getvalue()})
    made = region_input(tokenizer, [sample], flip=True, min_crop_area=0.5)
    seen = 0
    for seed in range(12):
        choices = Choices(np.random.default_rng(seed))
        first, second = made.make(sample, choices)
        patches = made.transform.for_training(sample.members["image"], choices)
        if first is None:
            continue
        seen += 1
        assert tokenizer.decode(first.ids).startswith("aref: a :")
        assert tokenizer.decode(second.ids).endswith(": a")
        begin = len(first.ids) - first.ids[::-1].index(made.form.separator[-1])
        box = made.form.box_of(first.ids[begin:-1])
        shown = patches.reshape(2, 2, 16, 16, 3).transpose(0, 2, 1, 3, 4).reshape(32, 32, 3)[..., 0] > 127
        rows, columns = shown.any(1).nonzero()[0], shown.any(0).nonzero()[0]
        edges = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
        assert np.abs(np.array(box) * 32 - edges).max() <= 1.6
    assert seen > 5
    rows = made.collate([(first, second), (None, None)], None)
    assert rows["arf"].counted.any(dim=1).tolist() == [True, False]


def test_an_image_of_which_a_region_names_a_side_may_stay_as_it_is(tokenizer: Tokenizer) -> None:
    size = (64, 32)
    sided = sample_of([{"box": [0, 0, 0.5, 1], "text": "circle, left of it"}], size)
    plain = sample_of([{"box": [0, 0, 0.5, 1], "text": "circle"}], size)
    weak = sample_of([{"box": [0, 0, 0.5, 1], "text": "left", "score": 0.1}], size)
    for side_texts, sample, mirrored, dropped in (
        ("drop", sided, True, True),
        ("no_mirror", sided, False, False),
        ("no_mirror", plain, True, False),
        ("no_mirror", weak, True, True),
    ):
        made = region_input(tokenizer, [sample], flip=True)
        made.options = replace(made.options, side_texts=side_texts)
        views, rows = [], []
        for seed in range(12):
            choices = Choices(np.random.default_rng(seed))
            made.decide(sample, choices)
            # as the image's own input asks
            views.append(made.transform.view(size, choices).is_mirrored)
            rows.append(made.make(sample, choices)[0])
        assert any(views) is mirrored, side_texts
        assert any(row is None for row in rows) is dropped, side_texts


def test_a_key_that_no_sample_has_is_told_before_training(tokenizer: Tokenizer) -> None:
    with pytest.raises(
        UserError, match=r"data.sources.mine.regions: none of the first 2 samples has json:regions"
    ):
        region_input(tokenizer, [sample_of(None), sample_of(None)])
    region_input(tokenizer, [sample_of(None), sample_of([])])
    with pytest.raises(UserError, match=r"data.sources.mine.regions is null"):
        RegionInput.members("mine", SourceConfig(shards="x"))


def test_samples_of_a_source_without_texts_have_none_beside_others(
    tokenizer: Tokenizer, tiny_data: Path, tmp_path: Path
) -> None:
    shards = f"{tiny_data}/validation/*.tar"
    sources = {
        "said": SourceConfig(shards=shards, text="json:captions.en", regions="json:regions"),
        "unsaid": SourceConfig(shards=shards, text=None, weight=0.5),
    }
    config = DataConfig(sources, sentences=FORM, workers=0, cache_dir=str(tmp_path))
    kinds = (CaptionInput, TextPresenceInput, CaptionSentenceInput, RegionInput, ImageInput)

    def first_batch(config: DataConfig, kinds: tuple[type[Input], ...]) -> dict:
        inputs = RunInputs(kinds, ImageTransform(32, 16), tokenizer)
        return next(iter(build_loader(config, inputs=inputs, share=RankShare(12), seed=0))).parts

    parts = first_batch(config, kinds)
    said = parts["has_text"]
    assert said.sum() == 8, "as the weights say"
    assert (parts["caption_sentences"].sentences.counted.any(1) == said).all()
    assert (parts["regions"]["arf"].counted.any(1) == said).all()
    assert not (parts["texts"][~said] != parts["texts"][~said][0]).any()
    assert len(parts["images"].patches) == 12
    # where all have texts, none is told
    assert "has_text" not in first_batch(replace(config, sources={"said": sources["said"]}), kinds)
    # an objective that does not ask whether there is a text gets no empty one
    with pytest.raises(
        UserError, match=r"data\.sources\.unsaid\.text is null, and an objective needs captions"
    ):
        first_batch(config, (CaptionInput, ImageInput))

"""Image-text retrieval in both directions, with several captions an image, language by language."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from siglip_train.data.folders import benchmark_folder
from siglip_train.data.shards.select import Selection, as_selection
from siglip_train.errors import UserError
from siglip_train.evals.base import Encoder, Evaluation, ImageSet
from siglip_train.evals.bootstrap import Share, check_resamples, confidence_intervals
from siglip_train.evals.loader import Caption, EvaluationSource, check_found
from siglip_train.evals.ranking import best_ranks, recall_at
from siglip_train.evals.retrieval_details import Texts, found_images, found_texts, similarity
from siglip_train.report.thumbnail import spread

_CUT_OFFS = (1, 5, 10)


def retrieval_ranks(images: Tensor, texts: Tensor, owners: Tensor) -> dict[str, Tensor]:
    """Give the 0-based rank of what each query looks for, in both directions.

    image_retrieval: `[m]`, a text finds its image. text_retrieval: `[n]`, an image finds any of its texts.
    images `[n, E]`, texts `[m, E]`, owners `[m]`: the image of each text.
    """
    every_image = torch.arange(len(images), device=owners.device)
    return {
        "image_retrieval": best_ranks(texts, images, owners, every_image),
        "text_retrieval": best_ranks(images, texts, every_image, owners),
    }


def retrieval_metrics(directions: dict[str, Tensor]) -> dict[str, float]:
    """Give recall@1/5/10, mean and median rank of both directions, under CLIP_benchmark's names.

    directions: as `retrieval_ranks` gives them. The ranks given count from 1.
    """
    metrics: dict[str, float] = {}
    for direction, ranks in directions.items():
        metrics |= {f"{direction}_recall@{count}": recall_at(ranks, count) for count in _CUT_OFFS}
        metrics[f"{direction}_mean_rank"] = ranks.double().mean().item() + 1
        # the mean of the middle two rounded down, as open_clip does
        metrics[f"{direction}_median_rank"] = float(ranks.double().quantile(0.5).floor().item() + 1)
    return metrics


@dataclass(kw_only=True)
class Retrieval:
    """Retrieval recall on captioned shards; each language on its own, then averaged, as XM3600 is.

    shards: shards, or a folder in CLIP_benchmark's layout, whose `txt` holds a caption a line.
    text: member or `json:field` holding one caption, a list, or a mapping of language to captions
    (`json:*.caption` for the annotations of XM3600 as they come).
    languages: those to measure; None = all there are. language: of captions that do not say, for the results.
    bootstrap: resamples for confidence intervals, 0 = none: images are drawn, together with all their captions.
    gallery: queries kept for the report.
    Metrics carry the average over languages and, where there are several, `<language>/<metric>`.
    """

    task: ClassVar[str] = "zeroshot_retrieval"

    shards: str | list[str]
    text: str = "txt"
    image: str = EvaluationSource.image
    languages: list[str] | None = None
    max_samples: int | None = None
    select: Selection | dict[str, Any] = field(default_factory=Selection)
    language: str = "en"
    bootstrap: int = 0
    gallery: int = 12

    def __post_init__(self) -> None:
        """Check ranges and what makes up the source."""
        check_resamples(self.bootstrap)
        self._source = EvaluationSource(
            shards=self.shards,
            image=self.image,
            text=self.text,
            max_samples=self.max_samples,
            select=as_selection(self.select),
        )

    def check(self) -> None:
        """Find the shards."""
        check_found(self._source)

    def run(self, encoder: Encoder) -> Evaluation:
        """Embed images and captions, rank both ways. All ranks."""
        images = encoder.encode_images(self._source)
        languages = self._embed_captions(images, encoder)
        # on every rank alike: 5k x 25k scores take a GPU milliseconds, less than sharing them out would
        device = encoder.world.device
        ranks = {
            language: retrieval_ranks(
                images.embeddings[texts.images].to(device),
                texts.embeddings.to(device),
                texts.owners.to(device),
            )
            for language, texts in languages.items()
        }
        by_language = {language: retrieval_metrics(directions) for language, directions in ranks.items()}
        metrics = _averaged(by_language)
        if self.bootstrap:
            metrics |= _intervals(len(images.keys), languages, ranks, self.bootstrap)
        details = self._details(images, languages, by_language) if encoder.world.is_main else {}
        return Evaluation(metrics, details)

    def _embed_captions(self, images: ImageSet, encoder: Encoder) -> dict[str, Texts]:
        folder = benchmark_folder(self.shards)
        is_by_line = folder is not None and folder.type == "retrieval" and self.text == "txt"
        entries = [
            (caption.language, caption.text, image)
            for image, captions in enumerate(images.captions)
            for caption in (_by_line(captions) if is_by_line else captions)
        ]
        found = sorted({language for language, _, _ in entries})
        missing = [language for language in self.languages or [] if language not in found]
        if missing:
            raise UserError(
                f"no caption in {', '.join(missing)} in {self.shards} ({self.text}); "
                f"languages there: {', '.join(language or 'not named' for language in found)}"
            )
        wanted = self.languages or found
        entries = [entry for entry in entries if entry[0] in wanted]
        embeddings = encoder.encode_texts([text for _, text, _ in entries])
        return {language: _texts_of(language, entries, embeddings) for language in wanted}

    def _details(
        self, images: ImageSet, languages: dict[str, Texts], by_language: dict[str, dict[str, float]]
    ) -> dict[str, Any]:
        details: dict[str, Any] = {
            "counts": images.counts,
            "languages": by_language,
            "similarity": similarity(images, list(languages.values())),
            "image_retrieval": [],
            "text_retrieval": [],
        }
        for place, (language, texts) in enumerate(languages.items()):
            # each language takes other positions, so that the gallery shows as many images as it can
            captions, shown = (
                spread(length, self.gallery)[place :: len(languages)]
                for length in (len(texts.words), len(texts.images))
            )
            details["image_retrieval"] += found_images(images, language, texts, captions)
            details["text_retrieval"] += found_texts(images, language, texts, shown)
        return details


def _by_line(captions: list[Caption]) -> list[Caption]:
    return [
        Caption(caption.language, line)
        for caption in captions
        for line in caption.text.splitlines()
        if line.strip()
    ]


def _intervals(
    images: int, languages: dict[str, Texts], ranks: dict[str, dict[str, Tensor]], resamples: int
) -> dict[str, float]:
    """Resample images; each takes its captions of every language along, so that languages go up and down together."""
    shares = {}
    for direction in next(iter(ranks.values())):
        owners = {
            language: texts.images[texts.owners] if direction == "image_retrieval" else texts.images
            for language, texts in languages.items()
        }
        trials = torch.stack([rows.bincount(minlength=images) for rows in owners.values()], dim=1)  # [n, K]
        used = trials.any(dim=1)
        for count in _CUT_OFFS:
            hits = torch.stack(
                [
                    rows[(ranks[language][direction] < count).cpu()].bincount(minlength=images)
                    for language, rows in owners.items()
                ],
                dim=1,
            )
            shares[f"{direction}_recall@{count}"] = Share(hits[used], trials[used])
    return confidence_intervals(shares, resamples)


def _averaged(by_language: dict[str, dict[str, float]]) -> dict[str, float]:
    metrics = {
        name: sum(values[name] for values in by_language.values()) / len(by_language)
        for name in next(iter(by_language.values()))
    }
    if len(by_language) > 1:
        metrics |= {
            f"{language or 'unnamed'}/{name}": value
            for language, values in by_language.items()
            for name, value in values.items()
            if "recall" in name
        }
    return metrics


def _texts_of(language: str, entries: list[tuple[str, str, int]], embeddings: Tensor) -> Texts:
    rows = [row for row, entry in enumerate(entries) if entry[0] == language]
    images, owners = torch.tensor([entries[row][2] for row in rows]).unique(return_inverse=True)
    return Texts([entries[row][1] for row in rows], embeddings[rows], owners, images)

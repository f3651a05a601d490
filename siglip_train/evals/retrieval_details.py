"""What a retrieval found, in images and words, for the report."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from siglip_train.evals.base import ImageSet
from siglip_train.evals.ranking import top
from siglip_train.report.thumbnail import thumbnail


class Texts(NamedTuple):
    """Captions of one language. images: `[n]` those that have one; owners: `[m]` positions in `images`."""

    words: list[str]
    embeddings: Tensor
    owners: Tensor
    images: Tensor


def similarity(images: ImageSet, languages: list[Texts], count: int = 24) -> dict[str, Any]:
    """Give the cosines of the first images (columns) and a caption of each (rows), languages in turn."""
    columns = sorted({image for texts in languages for image in texts.images[:count].tolist()})[:count]
    words, rows = [], []
    for turn, column in enumerate(columns):
        own = [
            (texts, row)
            for texts in languages
            for row in (texts.images[texts.owners] == column).nonzero().flatten()
        ]
        texts, row = own[turn % len(own)]
        words.append(texts.words[row])
        rows.append(texts.embeddings[row])
    values = torch.stack(rows) @ images.embeddings[columns].T  # [texts, images]
    return {
        "pictures": [thumbnail(images.original(image), 48) for image in columns],
        "captions": words,
        "values": [[round(value, 3) for value in row] for row in values.tolist()],
    }


def found_images(images: ImageSet, language: str, texts: Texts, rows: list[int]) -> list[dict[str, Any]]:
    """Give the first images of each caption in `rows`."""
    scores, places = top(texts.embeddings[rows], images.embeddings[texts.images], 5)
    return [
        {
            "query": texts.words[row],
            "language": language,
            "results": [
                {
                    "picture": thumbnail(images.original(int(texts.images[place]))),
                    "score": round(score, 3),
                    "correct": place == int(texts.owners[row]),
                }
                for score, place in zip(found_scores, found, strict=True)
            ],
        }
        for row, found_scores, found in zip(rows, scores.tolist(), places.tolist(), strict=True)
    ]


def found_texts(images: ImageSet, language: str, texts: Texts, rows: list[int]) -> list[dict[str, Any]]:
    """Give the first captions of each image in `rows`, places in `texts.images`."""
    scores, places = top(images.embeddings[texts.images[rows]], texts.embeddings, 5)
    return [
        {
            "picture": thumbnail(images.original(int(texts.images[row]))),
            "language": language,
            "results": [
                {
                    "text": texts.words[place],
                    "score": round(score, 3),
                    "correct": int(texts.owners[place]) == row,
                }
                for score, place in zip(found_scores, found, strict=True)
            ],
        }
        for row, found_scores, found in zip(rows, scores.tolist(), places.tolist(), strict=True)
    ]

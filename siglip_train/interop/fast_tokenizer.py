"""A tokenizer with its text rules as one `tokenizer.json`, so that other libraries give the very tokens we train on.

Case, punctuation, end and padding go into the file itself: its reader needs no class of its own for SigLIP.
"""

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as FastTokenizer

from siglip_train.data.tokenizer import JsonEncoder, TextRules, Tokenizer
from siglip_train.errors import UserError
from siglip_train.interop.native import RULES_KEY

_SPACE = "\u2581"
_UNIGRAM, _BPE, _CHARACTERS = 1, 2, 4
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4
# string.punctuation, as a class of characters
_PUNCTUATION = r"[!-/:-@\[-`{-~]"


def write_fast_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json`, which transformers' AutoTokenizer opens.

    Raises `UserError` for a sentencepiece model of a kind the tokenizers library cannot express.
    """
    fast = _converted(tokenizer)
    rules = [*_rule_normalizers(tokenizer.rules), *([fast.normalizer] if fast.normalizer else [])]
    if rules:
        fast.normalizer = normalizers.Sequence(rules)
    end, pad = (fast.id_to_token(index) for index in (tokenizer.eos_id, tokenizer.pad_id))
    fast.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in {end, pad}])
    fast.post_processor = processors.TemplateProcessing(
        single=f"$A {end}", special_tokens=[(end, tokenizer.eos_id)]
    )
    length = tokenizer.context_length
    fast.enable_truncation(length)
    fast.enable_padding(length=length, pad_id=tokenizer.pad_id, pad_token=pad)
    fast.save(str(folder / "tokenizer.json"))
    content = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": length,
        # transformers' processors take these for their own, so that texts come out as long as the model wants them,
        # which reads the last position; the multiple holds even where somebody asks for padding to the longest text
        "max_length": length,
        "padding": "max_length",
        "truncation": True,
        "pad_to_multiple_of": length,
        "padding_side": "right",
        "truncation_side": "right",
        "eos_token": end,
        "pad_token": pad,
        # a mask would make the model ignore padding, which SigLIP attends to
        "model_input_names": ["input_ids"],
        "clean_up_tokenization_spaces": False,
        # a caption that spells a special token holds letters
        "split_special_tokens": True,
        RULES_KEY: asdict(tokenizer.rules),
    }
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _rule_normalizers(rules: TextRules) -> list[Any]:
    # the library lower-cases letter by letter, so the one letter that looks at its neighbours goes first
    lower = [normalizers.Replace(Regex(r"(?<=\p{L})\u03a3(?!\p{L})"), "\u03c2"), normalizers.Lowercase()]
    steps: list[Any] = lower if rules.lowercase else []
    if rules.strip_punctuation:
        steps += [
            normalizers.Replace(Regex(_PUNCTUATION), ""),
            normalizers.Replace(Regex(r"\s+"), " "),
            normalizers.Strip(),
        ]
    return steps


def _converted(tokenizer: Tokenizer) -> FastTokenizer:
    encoder, name = tokenizer.encoder, tokenizer.name
    if isinstance(encoder, JsonEncoder):
        return FastTokenizer.from_str(encoder.tokenizer.to_str())
    try:
        from sentencepiece import sentencepiece_model_pb2
    except ImportError as error:
        raise UserError(f"to convert the sentencepiece model {name}, install protobuf") from error
    proto = sentencepiece_model_pb2.ModelProto.FromString(  # type: ignore[attr-defined]
        encoder.pieces.serialized_model_proto()
    )
    if proto.trainer_spec.treat_whitespace_as_suffix:
        raise UserError(f"tokenizer {name} writes spaces behind words, which tokenizer.json cannot express")
    fast = FastTokenizer(_model(proto, name))
    fast.normalizer = normalizers.Sequence(_spec_normalizers(proto.normalizer_spec))
    fast.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    control = [piece.piece for piece in proto.pieces if piece.type in (_CONTROL, _UNKNOWN)]
    fast.add_special_tokens([AddedToken(piece, special=True, normalized=False) for piece in control])
    own = sorted((p.piece for p in proto.pieces if p.type == _USER_DEFINED), key=len, reverse=True)
    if own:
        # not as added tokens: those take the space before them along
        fast.pre_tokenizer = pre_tokenizers.Split(Regex("|".join(map(re.escape, own))), "isolated")
    return fast


def _model(proto: Any, name: str) -> models.Model:
    kind, fallback = proto.trainer_spec.model_type, proto.trainer_spec.byte_fallback
    if kind == _UNIGRAM:
        pieces = [(piece.piece, piece.score) for piece in proto.pieces]
        return models.Unigram(pieces, unk_id=proto.trainer_spec.unk_id, byte_fallback=fallback)
    if kind not in (_BPE, _CHARACTERS):
        raise UserError(f"tokenizer {name} splits into words, which tokenizer.json cannot express")
    vocabulary = {piece.piece: index for index, piece in enumerate(proto.pieces)}
    return models.BPE(
        vocab=vocabulary,
        merges=_merges(proto) if kind == _BPE else [],
        unk_token=proto.trainer_spec.unk_piece,
        fuse_unk=True,
        byte_fallback=fallback,
        # symbols of the user's own have no merges; everything else in the vocabulary is reached by merging
        ignore_merges=True,
    )


def _merges(proto: Any) -> list[tuple[str, str]]:
    """Every way to put a piece together from two others, best piece first: sentencepiece stores pieces only."""
    scores = {piece.piece: piece.score for piece in proto.pieces if piece.type == _NORMAL}
    merges = []
    for piece in sorted(scores, key=lambda piece: -scores[piece]):
        halves = ((piece[:i], piece[i:]) for i in range(1, len(piece)))
        merges += [(left, right) for left, right in halves if left in scores and right in scores]
    return merges


def _spec_normalizers(spec: Any) -> list[Any]:
    steps: list[Any] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [
            normalizers.Replace(Regex("^ +| +$"), ""),
            normalizers.Replace(Regex(" {2,}"), " "),
        ]
    steps.append(normalizers.Replace(" ", _SPACE))
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(_SPACE))
    return steps

"""The entry point of conversion: any model that can be read, to a folder of ours, HuggingFace, open_clip or ONNX."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from siglip_train.data.prompts import read_class_names
from siglip_train.errors import UserError, exit_on_user_error
from siglip_train.interop.conversion import PARTS, TARGETS, WEIGHTS, Conversion, Request, convert
from siglip_train.interop.files import shortened

_EPILOG = """The source is recognised by what is in it: a run, a checkpoint of any ZeRO stage and number of ranks, an
export, a HuggingFace folder, an open_clip folder, or an .npz of big_vision. Both sides embed the same images and
texts before the folder gets its name."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, as for every other mistake."""
        raise UserError(f"{message}; siglip-convert --help shows the form")


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = _Parser(prog="siglip-convert", description="Convert a SigLIP model.", epilog=_EPILOG)
    parser.add_argument("source", type=Path, metavar="SRC", help="the model: a folder or a file")
    parser.add_argument("destination", type=Path, metavar="DST", help="a folder that does not exist yet")
    parser.add_argument("--to", required=True, choices=TARGETS, help="what to write")
    parser.add_argument(
        "--part",
        choices=PARTS,
        default="model",
        help="vision: that tower alone; classifier: with a classification head of the run on it (both hf)",
    )
    parser.add_argument(
        "--weights", choices=WEIGHTS, default="trained",
        help="of the vision tower: ema = the moving average that taught it, where a run has one",
    )  # fmt: skip
    parser.add_argument("--objective", metavar="NAME", help="which head, where a run has several")
    parser.add_argument("--classnames", metavar="FILE", help="of the classifier, one a line in label order")
    parser.add_argument("--tokenizer", metavar="PATH", help="instead of the model's own; none leaves it out")
    parser.add_argument("--image-size", type=int, metavar="N", help="resample the positions to N x N pixels")
    parser.add_argument(
        "--patch-size", type=int, metavar="N", help="resample the stem to patches of N x N pixels"
    )
    parser.add_argument(
        "--pictures", type=Path, metavar="PATH", help="compare on these instead of drawn images"
    )
    return parser


@exit_on_user_error
def main(arguments: Sequence[str] | None = None) -> None:
    """`siglip-convert SRC DST --to {native,hf,open_clip,onnx}`."""
    parsed = build_parser().parse_args(arguments)
    request = Request(
        target=parsed.to,
        part=parsed.part,
        tokenizer=parsed.tokenizer,
        image_size=parsed.image_size,
        patch_size=parsed.patch_size,
        pictures=parsed.pictures,
        objective=parsed.objective,
        weights=parsed.weights,
        class_names=read_class_names(parsed.classnames) if parsed.classnames else None,
    )
    conversion = convert(parsed.source.expanduser(), parsed.destination.expanduser(), request)
    print("\n".join(summary(conversion)))  # noqa: T201
    print(f"written to {parsed.destination}")  # noqa: T201


def summary(conversion: Conversion) -> list[str]:
    """What was done, a line a thing."""
    lines = [
        f"{conversion.source_format} model, {conversion.parameters / 1e6:.1f} M parameters: {conversion.weights}"
    ]
    if conversion.tower == "ema":
        lines.append("the vision tower is the teacher's moving average, all else as it was trained")
    for names, said in ((conversion.left_out, "left out"), (conversion.made_up, "made up")):
        if names:
            lines.append(f"{len(names)} tensors {said} ({shortened(names)})")
    if any(name.startswith("decoder.") for name in conversion.left_out):
        lines.append(f"the decoder has no form in {conversion.target}: it is left out; --to native keeps it")
    if conversion.tokenizer is None and conversion.part == "model":
        lines.append("no tokenizer: give one with --tokenizer PATH")
    whose = conversion.peer
    if whose is None and conversion.target != "native":
        lines.append("the library that opens this folder is not installed, so it was not asked")
    found = ", ".join(
        f"{key.replace('_', ' ')} {value:.1e}" for key, value in conversion.largest_difference.items()
    )
    if found:
        tokens = "; tokens equal" if conversion.tokenizer else ""
        texts = f" and {conversion.texts} texts" if conversion.texts else ""
        lines.append(
            f"largest difference to {whose or 'what was read back'}, {conversion.pictures} images{texts}: "
            f"{found}{tokens}"
        )
    return lines


if __name__ == "__main__":
    main()

"""The same model on the same images in the peers' evaluation code, or exported to them: equal to the last sample.

Peers are imported in the tests, because the ranks import this module too, and they take seconds.
"""

import io
import json
import subprocess
import sys
import tarfile
import types
from pathlib import Path

import pytest
import sentencepiece
import torch
from PIL import Image

from siglip_train.distributed.setup import World
from siglip_train.evals.base import Encoder, flat_metrics, run_all
from siglip_train.evals.loader import EvaluationSource
from siglip_train.evals.retrieval import Retrieval
from siglip_train.evals.zero_shot import ZeroShotClassification
from siglip_train.interop.clip_benchmark import load_clip, register
from siglip_train.interop.conversion import Request, convert
from siglip_train.interop.load import load_model
from siglip_train.interop.native import Description, write_export
from siglip_train.models.siglip import Siglip, SiglipConfig
from siglip_train.models.text import TextConfig
from siglip_train.models.vision import VisionConfig
from tests.data.shard_files import write_tar
from tests.forks import run_program
from tests.ranks import run_ranks

DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"
TEMPLATES = ["a photo of a {c}.", "the {c}", "{c}"]
# of each set, to keep the test short
SAMPLES = 60

pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason="the sets of ../shared/data are not here")


def members(path: Path) -> dict[str, dict[str, bytes]]:
    """Key -> extension -> content, of the first samples."""
    found: dict[str, dict[str, bytes]] = {}
    with tarfile.open(path) as tar:
        for member in tar:
            key, extension = member.name.split(".", 1)
            if key not in found and len(found) == SAMPLES:
                break
            file = tar.extractfile(member)
            assert file is not None
            found.setdefault(key, {})[extension] = file.read()
    return found


def benchmark_set(root: Path, samples: dict[str, dict[str, bytes]], texts: dict[str, str]) -> str:
    """Write a set in CLIP_benchmark's layout, in three shards of unlike size."""
    rows = [[(f"{key}.{name}", data) for name, data in parts.items()] for key, parts in samples.items()]
    for shard, part in enumerate((rows[:10], rows[10:45], rows[45:])):
        write_tar(root / "test" / f"{shard}.tar", [member for row in part for member in row])
    (root / "test" / "nshards.txt").write_text("3")
    for name, text in texts.items():
        (root / name).write_text(text)
    return str(root)


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Clothing and CIFAR to classify, COCO photographs to retrieve by five captions."""
    folder = tmp_path_factory.mktemp("sets")
    written = {}
    for name, shard in (("clothing", "train-00001.tar"), ("cifar_train", "shard-00000.tar.gz")):
        texts = {
            "classnames.txt": (DATA / name / "classnames.txt").read_text(),
            "zeroshot_classification_templates.txt": "\n".join(TEMPLATES),
        }
        samples = {
            key: {e: parts[e] for e in ("jpg", "txt", "cls")}
            for key, parts in members(DATA / name / shard).items()
        }
        written[name] = benchmark_set(folder / name, samples, texts)
    captions = members(DATA / "captions_coco" / "open-00000.tar")
    samples = {
        key: {"jpg": parts["jpg"], "txt": "\n".join(json.loads(parts["json"])["captions"]).encode()}
        for key, parts in captions.items()
    }
    written["coco"] = benchmark_set(folder / "coco", samples, {"dataset_type.txt": "retrieval"})
    return written


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An untrained model whose weights are large enough to tell images and words apart."""
    folder = tmp_path_factory.mktemp("model")
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the quick brown fox jumps over a lazy dog.", "vexing wizards"] * 20),
        model_writer=out, model_type="char", vocab_size=48, pad_id=0, eos_id=1, unk_id=2, bos_id=-1,
        hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    (folder / "tokenizer.model").write_bytes(out.getvalue())
    torch.manual_seed(0)
    size = {"width": 32, "depth": 1, "mlp_dim": 64, "heads": 2}
    vision = VisionConfig(image_size=32, patch_size=8, **size)
    model = Siglip(SiglipConfig(vision, TextConfig(context_length=24, vocab_size=48, **size)))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.4)
    write_export(
        folder / "export", model.state_dict(), Description(model.config, tokenizer=folder / "tokenizer.model")
    )
    return str(folder / "export")


def encoder_of(export: str, rank: int = 0, world_size: int = 1) -> Encoder:
    loaded = load_model(export)
    return Encoder(
        model=loaded.model,
        tokenizer=loaded.tokenize,
        transform=loaded.transform,
        world=World(rank=rank, world_size=world_size, local_rank=rank, device=torch.device("cpu")),
        batch_size=32,
    )


def ours_on_rank(rank: int, world_size: int, export: str, sets: dict[str, str]) -> dict[str, float]:
    """Give every metric of our evaluation, of the sets' folders alone."""
    encoder = encoder_of(export, rank, world_size)
    tasks = {name: ZeroShotClassification(shards=sets[name]) for name in ("clothing", "cifar_train")}
    return flat_metrics(run_all({**tasks, "coco": Retrieval(shards=sets["coco"])}, encoder))


def one_of_several(world_size: int, export: str, sets: dict[str, str]) -> dict[str, float]:
    return ours_on_rank(torch.distributed.get_rank(), world_size, export, sets)


@pytest.fixture(scope="module")
def ours(export: str, sets: dict[str, str]) -> dict[str, float]:
    return ours_on_rank(0, 1, export, sets)


@pytest.mark.dist
def test_two_ranks_measure_what_one_does(export: str, sets: dict[str, str], ours: dict[str, float]) -> None:
    for rank in run_ranks(2, one_of_several, 2, export, sets):
        assert rank == ours


def batches(folder: str, transform, second: str, size: int = 32):
    """Read a set with webdataset as CLIP_benchmark does: (images `[B, 3, H, W]`, list of the second member)."""
    import webdataset

    pattern = f"{folder}/test/{{0..2}}.tar"
    samples = list(webdataset.WebDataset(pattern, shardshuffle=False).decode("pil").to_tuple("jpg", second))
    for first in range(0, len(samples), size):
        part = samples[first : first + size]
        yield torch.stack([transform(picture) for picture, _ in part]), [other for _, other in part]


@pytest.fixture(autouse=True)
def _one_number_from_an_array_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give the peers what they were written for: since NumPy 2.4, float() takes no array of one number."""
    original = torch.Tensor.numpy
    monkeypatch.setattr(
        torch.Tensor,
        "numpy",
        lambda tensor, **_: original(tensor.squeeze() if tensor.numel() == 1 else tensor),
    )


def class_names(folder: str) -> list[str]:
    return (Path(folder) / "classnames.txt").read_text().splitlines()


@pytest.mark.parametrize("name", ["clothing", "cifar_train"])
def test_accuracy_equals_open_clips(
    export: str, sets: dict[str, str], ours: dict[str, float], name: str
) -> None:
    from open_clip import build_zero_shot_classifier
    from open_clip_train import zero_shot as open_clip_zero_shot

    model, transform, tokenizer = load_clip(pretrained=export)
    classifier = build_zero_shot_classifier(
        model,
        tokenizer=tokenizer,
        classnames=class_names(sets[name]),
        templates=[lambda c, template=template: template.format(c=c) for template in TEMPLATES],
        device="cpu",
    )
    loader = ((images, torch.tensor(labels)) for images, labels in batches(sets[name], transform, "cls"))
    arguments = types.SimpleNamespace(device="cpu", precision="fp32", batch_size=32)
    top1, top5 = open_clip_zero_shot.run(model, classifier, loader, arguments)
    assert (ours[f"{name}/acc1"], ours[f"{name}/acc5"]) == (top1, top5)
    assert ours[f"{name}/n"] == SAMPLES
    assert 0.01 < top1 < top5 < 1, "a model that says the same of everything would prove nothing"


def test_retrieval_equals_open_clips(export: str, sets: dict[str, str]) -> None:
    """open_clip has one text an image: the first caption."""
    from open_clip_train.train import get_clip_metrics

    model, transform, tokenizer = load_clip(pretrained=export)
    images, texts = [], []
    for pictures, captions in batches(sets["coco"], transform, "txt"):
        features = model(image=pictures, text=tokenizer([each.splitlines()[0] for each in captions]))
        images.append(features["image_features"])
        texts.append(features["text_features"])
    with torch.no_grad():
        expected = get_clip_metrics(torch.cat(images), torch.cat(texts), features["logit_scale"])
    task = Retrieval(shards=str(DATA / "captions_coco" / "*.tar"), max_samples=SAMPLES)
    metrics, _ = task.run(encoder_of(export))
    for theirs, direction in (("image_to_text", "text_retrieval"), ("text_to_image", "image_retrieval")):
        for k in (1, 5, 10):
            assert metrics[f"{direction}_recall@{k}"] == expected[f"{theirs}_R@{k}"]
        for rank in ("mean_rank", "median_rank"):
            assert metrics[f"{direction}_{rank}"] == pytest.approx(expected[f"{theirs}_{rank}"], abs=1e-9)


def test_clip_benchmark_knows_our_models_once_registered(
    export: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("clip_benchmark", reason="CLIP_benchmark is not installed")
    from clip_benchmark import cli, models

    register()
    register()
    assert models.MODEL_TYPES.count("siglip_train") == 1
    model, transform, tokenizer = models.load_clip("siglip_train", "", export, cache_dir=None, device="cpu")
    picture, ours = Image.new("RGB", (40, 30), (9, 99, 199)), load_model(export)
    with torch.inference_mode():
        found = model.encode_image(transform(picture)[None], normalize=True)
        torch.testing.assert_close(found, ours.model.encode_image(ours.preprocess(picture)))
    assert torch.equal(tokenizer("a dog"), ours.tokenize(["a dog"]))
    monkeypatch.setattr("sys.argv", ["clip_benchmark", "eval", "--model_type", "siglip_train"])
    assert cli.get_parser_args()[1].model_type == "siglip_train"


class Loader(list):
    """What CLIP_benchmark asks of a DataLoader."""

    dataset = None


def test_metrics_equal_clip_benchmarks(export: str, sets: dict[str, str], ours: dict[str, float]):
    pytest.importorskip("clip_benchmark", reason="CLIP_benchmark is not installed")
    from clip_benchmark.metrics import zeroshot_classification, zeroshot_retrieval

    model, transform, tokenizer = load_clip(pretrained=export)
    compared = 0
    for name in ("clothing", "cifar_train"):
        names = class_names(sets[name])
        loader = Loader(
            (images, torch.tensor(labels)) for images, labels in batches(sets[name], transform, "cls")
        )
        loader.dataset = types.SimpleNamespace(classes=names)
        found = zeroshot_classification.evaluate(model, loader, tokenizer, names, TEMPLATES, "cpu", amp=False)
        for metric, value in found.items():
            assert ours[f"{name}/{metric}"] == pytest.approx(value, abs=1e-9), (name, metric)
            compared += 1
    loader = [
        (images, [text.splitlines() for text in texts])
        for images, texts in batches(sets["coco"], transform, "txt")
    ]
    found = zeroshot_retrieval.evaluate(model, loader, tokenizer, "cpu", amp=False, recall_k_list=[1, 5, 10])
    for metric, value in found.items():
        # averaged in fp32 there, where one of 300 captions is 3e-3
        assert ours[f"coco/{metric}"] == pytest.approx(value, abs=1e-6), metric
        compared += 1
    assert compared == 12


# what a user of the three libraries would write, without a line of ours
ELSEWHERE = """
import json, sys
from pathlib import Path
import numpy as np, onnxruntime, open_clip, torch, transformers
from PIL import Image

folder, (pictures, labels, prompts) = Path(sys.argv[1]), json.load(sys.stdin)
pictures = [Image.open(path).convert("RGB") for path in pictures]
texts = [text for each in prompts for text in each]
found = {}
with torch.inference_mode():
    model, processor = (getattr(transformers, c).from_pretrained(folder / "hf") for c in ("AutoModel", "AutoProcessor"))
    inputs = processor(text=texts, images=pictures, padding="max_length", truncation=True, return_tensors="pt")
    output = model(**inputs)
    found["hf"] = output.image_embeds, output.text_embeds
    name = f"local-dir:{folder}/open_clip"
    model, _, preprocess = open_clip.create_model_and_transforms(name)
    images = model.eval().encode_image(torch.stack([preprocess(picture) for picture in pictures]), normalize=True)
    found["open_clip"] = images, model.encode_text(open_clip.get_tokenizer(name)(texts), normalize=True)
settings = json.loads((folder / "onnx/onnx_config.json").read_text())
size, length = settings["image"]["size"], settings["text"]["context_length"]
pixels = [np.asarray(picture.resize((size, size), Image.Resampling.BILINEAR)) for picture in pictures]
pixels = (np.stack(pixels).transpose(0, 3, 1, 2).astype("f4") / 255 - 0.5) / 0.5
tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "onnx")
tokens = tokenizer(texts, padding="max_length", truncation=True, max_length=length, return_tensors="np")["input_ids"]
found["onnx"] = [
    torch.from_numpy(onnxruntime.InferenceSession(folder / "onnx" / name).run(None, {key: value})[0])
    for name, key, value in (("vision.onnx", "pixels", pixels), ("text.onnx", "tokens", tokens.astype("i8")))
]
assert not [name for name in sys.modules if name.startswith("siglip_train")]
answers = {}
for peer, (images, texts) in found.items():
    classes = torch.nn.functional.normalize(texts.unflatten(0, (len(prompts), -1)).mean(dim=1), dim=1)
    right = (images @ classes.T).argmax(dim=1) == torch.tensor(labels)
    table = [sum(hit for hit, own in zip(right.tolist(), labels) if own == label) for label in range(len(prompts))]
    answers[peer] = {"images": images.tolist(), "texts": texts.tolist(), "right": table}
json.dump(answers, sys.stdout)
"""


def trained_run(run_dir: Path, export: str, shards: str) -> str:
    """A run that has learned a little of the images it saw, so that its zero-shot table is not one of chance."""
    sizes = [
        f"model.{tower}.{size}" for tower in ("vision", "text") for size in ("width=32", "depth=1", "heads=2")
    ]
    arguments = [
        "experiment=cifar", "device=cpu", f"run_dir={run_dir}", f"tokenizer={export}/tokenizer.model", *sizes,
        "model.text.vocab_size=48", "model.text.context_length=40", f"data.sources.cifar.shards={shards}",
        "~data.sources.cifar.select", "data.flip=false", "data.min_crop_area=1.0", "data.workers=0",
        "evaluation.tasks=null", "global_batch_size=20", "total_samples=1200", "optim.lr=3e-3",
        "optim.warmup_samples=100",
    ]  # fmt: skip
    result = run_program("siglip_train.train", arguments)
    assert result.returncode == 0, result.stderr
    return str(run_dir)


@pytest.mark.slow
def test_a_runs_exports_have_the_same_zero_shot_table_in_a_process_without_us(
    export: str, sets: dict[str, str], tmp_path: Path
) -> None:
    for package in ("transformers", "onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    run = trained_run(tmp_path / "run", export, f"{sets['cifar_train']}/test")
    for form in ("hf", "open_clip", "onnx"):
        convert(Path(run), tmp_path / form, Request(form))
    pictures, labels = [], []
    for shard in range(3):
        with tarfile.open(Path(sets["cifar_train"]) / "test" / f"{shard}.tar") as tar:
            tar.extractall(tmp_path, filter="data")
            keys = [name.removesuffix(".jpg") for name in tar.getnames() if name.endswith(".jpg")]
        pictures += [f"{tmp_path}/{key}.jpg" for key in keys]
        labels += [int((tmp_path / f"{key}.cls").read_text()) for key in keys]
    prompts = [[text.format(c=name) for text in TEMPLATES] for name in class_names(sets["cifar_train"])]
    result = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, str(tmp_path)], cwd=run, timeout=300, check=False,
        input=json.dumps([pictures, labels, prompts]), capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    encoder = encoder_of(run)
    evaluation = ZeroShotClassification(shards=sets["cifar_train"]).run(encoder)
    ours = dict.fromkeys(class_names(sets["cifar_train"]), 0)
    ours |= {row["name"]: round(row["recall"] * row["images"]) for row in evaluation.details["classes"]}
    assert len(set(ours.values())) > 2, "a table that says the same of all classes would prove nothing"
    images = encoder.encode_images(EvaluationSource(sets["cifar_train"])).embeddings
    texts = encoder.encode_texts([text for each in prompts for text in each])
    for peer, theirs in json.loads(result.stdout).items():
        assert theirs["right"] == list(ours.values()), peer
        # measured 1.8e-7 and 3.3e-7; the images have the model's size, as the libraries' resizing differs
        torch.testing.assert_close(torch.tensor(theirs["images"]), images, rtol=0, atol=2e-6)
        torch.testing.assert_close(torch.tensor(theirs["texts"]), texts, rtol=0, atol=2e-6)

"""Where public data sets come from, and the commands that make shards of them: what `siglip-data recipes` prints.

Each was tried against a stand-in of its store with files of the same form (tests/data_tools/test_recipes.py).
"""

from typing import NamedTuple


class Recipe(NamedTuple):
    """One data set.

    size: samples, and on disk. licence: in a few words, and who says so. commands: for a shell, one after another.
    reads: commands that train on it or evaluate with it. note: what one should know before.
    """

    name: str
    title: str
    size: str
    licence: str
    commands: tuple[str, ...]
    reads: tuple[str, ...]
    note: str = ""


_IMG2DATASET = (
    "--output_format webdataset --image_size 256 --resize_mode keep_ratio --resize_only_if_bigger True"
    " --processes_count 16 --thread_count 64"
)
_TOKENIZER = "tokenizer=PATH/tokenizer.model"
_TRAIN = f"siglip-train experiment=siglip2_b16_sigmoid {_TOKENIZER} "
# long addresses would not fit into a line
_HUB = "hf://datasets/"
_LINK_ROT = (
    "The list has addresses of the web, of which some have gone: what img2dataset counts as failed is missing. A shard"
    " of which nothing came is empty, which `verify` reports."
)

RECIPES = (
    Recipe(
        "cc3m",
        "Conceptual Captions 3M: images of the web with cleaned alt texts",
        "3.3 million addresses, 2.9 million images in 2021; some 60 GB at 256 px (estimated)",
        "list: free for any use with acknowledgement of Google; images: of their owners",
        (
            "# Train_GCC-training.tsv is from https://ai.google.com/research/ConceptualCaptions/download",
            "(printf 'caption\\turl\\n'; cat Train_GCC-training.tsv) > cc3m.tsv",
            "img2dataset --url_list cc3m.tsv --input_format tsv --url_col url --caption_col caption"
            f" --output_folder data/cc3m {_IMG2DATASET}",
            "siglip-data verify data/cc3m --index data/cc3m/index.json",
        ),
        (f"{_TRAIN}data.sources.cc3m.shards=data/cc3m",),
        f"{_LINK_ROT} Already fetched, at 512 px: `data.sources.cc3m.shards='hf://datasets/pixparse/cc3m-wds/cc3m-train-*.tar'`.",
    ),
    Recipe(
        "cc12m",
        "Conceptual 12M: images of the web with alt texts",
        "12.4 million addresses; some 250 GB at 256 px (estimated)",
        "list: free for any use with acknowledgement of Google; images: of their owners",
        (
            "wget https://storage.googleapis.com/conceptual_12m/cc12m.tsv -O urls.tsv",
            "(printf 'url\\tcaption\\n'; cat urls.tsv) > cc12m.tsv",
            "img2dataset --url_list cc12m.tsv --input_format tsv --url_col url --caption_col caption"
            f" --output_folder data/cc12m {_IMG2DATASET}",
            "siglip-data verify data/cc12m --index data/cc12m/index.json",
        ),
        (f"{_TRAIN}data.sources.cc12m.shards=data/cc12m",),
        f"{_LINK_ROT} Already fetched, at 512 px: `data.sources.cc12m.shards='hf://datasets/pixparse/cc12m-wds/cc12m-train-*.tar'`.",
    ),
    Recipe(
        "datacomp",
        "DataComp, the pool `small`: images of Common Crawl with alt texts, unfiltered",
        "12.8 million addresses (medium 128 million, large 1.28 billion); some 300 GB at 256 px (estimated)",
        "list: CC BY 4.0; images: of their owners",
        (
            "hf download --repo-type dataset mlfoundations/datacomp_small --include '*.parquet'"
            " --local-dir data/datacomp_urls",
            "img2dataset --url_list data/datacomp_urls --input_format parquet --url_col url --caption_col text"
            f" --save_additional_columns '[\"uid\"]' --output_folder data/datacomp {_IMG2DATASET}",
            "siglip-data verify data/datacomp --index data/datacomp/index.json",
            "# of the pool, what is neither tiny nor narrow nor captioned by a word, once",
            "siglip-data filter data/datacomp data/datacomp_kept --min-side 64 --max-aspect 3 --min-words 2"
            " --dedup-images",
        ),
        (f"{_TRAIN}data.sources.datacomp.shards=data/datacomp_kept",),
        f"{_LINK_ROT} DataComp's own downloader also blurs faces by the boxes of the list; this command does not.",
    ),
    Recipe(
        "coco",
        "COCO 2017: photographs with five captions, boxes and masks each",
        "118,287 to train, 5,000 to validate; 20 GB",
        "annotations: CC BY 4.0; images: Flickr's terms, each its own licence",
        (
            "wget -P coco http://images.cocodataset.org/annotations/annotations_trainval2017.zip",
            "wget -P coco http://images.cocodataset.org/zips/train2017.zip",
            "wget -P coco http://images.cocodataset.org/zips/val2017.zip",
            "unzip -q -d coco 'coco/*.zip'",
            "siglip-data pack coco/annotations/captions_train2017.json data/coco --split train"
            " --image-root coco/train2017 --coco-instances coco/annotations/instances_train2017.json --resize 384",
            "siglip-data pack coco/annotations/captions_val2017.json data/coco_val --split test"
            " --image-root coco/val2017 --coco-instances coco/annotations/instances_val2017.json",
        ),
        (
            f"{_TRAIN}data.sources.coco.shards=data/coco/train data.sources.coco.text=json\\:captions",
            "siglip-eval checkpoint=PATH evaluation=coco_retrieval tasks.coco.shards=data/coco_val",
        ),
        "Published retrieval numbers are of another 5,000 images (`recipes coco_karpathy`).",
    ),
    Recipe(
        "coco_karpathy",
        "COCO, the 5,000 test images of the Karpathy split: what papers measure retrieval on",
        "5,000 images, 25,010 captions; 0.8 GB",
        "as coco",
        (
            "hf download --repo-type dataset clip-benchmark/wds_mscoco_captions --include 'test/*' '*.txt'"
            " --local-dir data/coco_karpathy",
        ),
        (
            "siglip-eval checkpoint=PATH evaluation=benchmark tasks.classification=null"
            " tasks.retrieval.shards=data/coco_karpathy",
        ),
        "All sets of the hub's `clip-benchmark` (wds_flickr30k, wds_cars, wds_imagenet1k, …) are read as they come.",
    ),
    Recipe(
        "imagenet",
        "ImageNet 2012, from the hub: photographs of 1,000 classes",
        "1,281,167 to train, 50,000 to validate; 155 GB",
        "research and education, after agreeing to terms",
        (
            "# first agree to the terms of ILSVRC/imagenet-1k on the hub, and `hf auth login`",
            f"siglip-data pack '{_HUB}ILSVRC/imagenet-1k/data/train-*.parquet' data/imagenet --split train"
            " --resize 384",
            f"siglip-data pack '{_HUB}ILSVRC/imagenet-1k/data/validation-*.parquet' data/imagenet_val --split test",
        ),
        (
            "siglip-eval checkpoint=PATH evaluation=imagenet_zero_shot tasks.imagenet.shards=data/imagenet_val",
            "siglip-eval checkpoint=PATH evaluation=probes tasks.probes.train=data/imagenet/train"
            " tasks.probes.test=data/imagenet_val/test",
        ),
    ),
    Recipe(
        "imagenet_folders",
        "ImageNet 2012, from image-net.org: the training set as tars of classes",
        "as imagenet",
        "as imagenet, agreed to at image-net.org",
        (
            "mkdir -p imagenet/train && tar xf ILSVRC2012_img_train.tar -C imagenet/train",
            "cd imagenet/train",
            "for id in *.tar; do mkdir ${id%.tar} && tar xf $id -C ${id%.tar} && rm $id; done",
            "cd ../..",
            "siglip-data pack imagenet/train data/imagenet --split train --resize 384",
        ),
        (
            "siglip-eval checkpoint=PATH evaluation=probes tasks.probes.train=data/imagenet/train"
            " tasks.probes.test=imagenet/val",
        ),
        "Folders of classes, named by WordNet ids, are numbered in sorted order, as everyone numbers them; evaluation"
        " reads them as they are.",
    ),
    Recipe(
        "cifar10",
        "CIFAR-10: photographs of ten classes, 32 x 32",
        "50,000 to train, 10,000 to test; 0.2 GB",
        "none stated",
        (
            "siglip-data pack 'hf://datasets/uoft-cs/cifar10/plain_text/train-*.parquet' data/cifar10 --split train"
            " --caption-template 'a photo of a {}' 'a photo of the {}' 'a low resolution photo of the {}' '{}'",
            "siglip-data pack 'hf://datasets/uoft-cs/cifar10/plain_text/test-*.parquet' data/cifar10_test --split test"
            " --caption-template 'a photo of a {}'",
            "siglip-data tokenizer data/cifar10/train data/cifar.model --vocab-size 400",
        ),
        (
            "siglip-train experiment=cifar",
            "siglip-eval checkpoint=outputs/cifar evaluation=benchmark tasks.retrieval=null"
            " tasks.classification.shards=data/cifar10_test",
        ),
        "Other labelled sets of the hub are packed alike: names of classes stand in their Parquet files.",
    ),
    Recipe(
        "food101",
        "Food-101: photographs of 101 dishes, an example of fine-tuning data on the hub",
        "75,750 to train, 25,250 to validate; 5 GB",
        "images: of their owners (Foodspotting); research use",
        (
            f"siglip-data pack '{_HUB}ethz/food101/data/train-*.parquet' data/food101 --split train --resize 384",
            f"siglip-data pack '{_HUB}ethz/food101/data/validation-*.parquet' data/food101_val --split test",
        ),
        (
            "siglip-eval checkpoint=PATH evaluation=probes tasks.probes.train=data/food101/train"
            " tasks.probes.test=data/food101_val/test",
        ),
    ),
    Recipe(
        "clothing",
        "clothing-dataset-small: photographs of ten kinds of clothes",
        "3,068 to train, 372 to test; 0.1 GB",
        "CC0",
        (
            "git clone --depth 1 https://github.com/alexeygrigorev/clothing-dataset-small",
            "siglip-data pack clothing-dataset-small/train data/clothing --split train --resize 160",
        ),
        ("siglip-train experiment=clothing_full", "siglip-train experiment=clothing_lora"),
    ),
    Recipe(
        "emoji",
        "Drawn emoji with their names in twelve languages",
        "7,644 samples of 3,822 drawings, 64 x 64; 30 MB, of 310 MB of packages",
        "Noto Emoji: Apache-2.0, Twemoji: CC BY 4.0, names of CLDR: Unicode-3.0",
        (
            "npm install --no-save --ignore-scripts --prefix data/npm emoji-datasource-google@16.0.0"
            " emoji-datasource-twitter@16.0.0 cldr-annotations-full@48.2.0 cldr-annotations-derived-full@48.2.0",
            "siglip-data emoji-table data/npm/node_modules data/emoji.jsonl",
            "siglip-data pack data/emoji.jsonl data/emoji --split train --key-column key",
            "siglip-data tokenizer data/emoji/train data/emoji.model --text txt 'json:names.*' --vocab-size 4096",
        ),
        ("siglip-train experiment=emoji", "siglip-train experiment=emoji data=emoji_90_10"),
    ),
    Recipe(
        "xm3600",
        "Crossmodal-3600: photographs with captions in 36 languages",
        "3,600 images, 261,375 captions; 3.5 GB",
        "captions: CC BY 4.0; images: CC BY 2.0 (Open Images)",
        (
            "mkdir -p xm3600/images",
            "wget -P xm3600 https://google.github.io/crossmodal-3600/web-data/captions.zip"
            " https://open-images-dataset.s3.amazonaws.com/crossmodal-3600/images.tgz",
            "unzip -q -d xm3600 xm3600/captions.zip && tar xzf xm3600/images.tgz -C xm3600/images",
            "siglip-data pack xm3600/captions.jsonl data/xm3600 --split test --image-root xm3600/images"
            " --image-column image/key --key-column image/key --caption-column '*.caption' --resize 512",
        ),
        ("siglip-eval checkpoint=PATH evaluation=xm3600 tasks.xm3600.shards=data/xm3600",),
    ),
)


def as_markdown() -> str:
    """The table of all recipes, and each with its commands: a section of data_tools/README.md."""
    rows = ["| recipe | what | size | licence |", "|---|---|---|---|"]
    rows += [f"| `{each.name}` | {each.title} | {each.size} | {each.licence} |" for each in RECIPES]
    return "\n".join(rows) + "\n\n" + "\n".join(map(_section, RECIPES))


def as_text(recipe: Recipe) -> str:
    """One recipe for a terminal, which can be pasted into a shell as it is."""
    facts = [recipe.title, f"size: {recipe.size}", f"licence: {recipe.licence}", *_sentences(recipe)]
    return "\n".join([*(f"# {fact}" for fact in facts), *recipe.commands, "# read by:",
                      *(f"#   {command}" for command in recipe.reads)]) + "\n"  # fmt: skip


def _sentences(recipe: Recipe) -> list[str]:
    return [recipe.note] if recipe.note else []


def _section(recipe: Recipe) -> str:
    commands = "\n".join([*recipe.commands, *recipe.reads])
    note = f"{recipe.note}\n\n" if recipe.note else ""
    return f"**{recipe.name}.** {recipe.title}.\n\n{note}```\n{commands}\n```\n"

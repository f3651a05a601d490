"""Folders by strangers, hostile or merely of another kind: read as they are meant, or refused in a line."""

import contextlib
import copy
import json
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from siglip_train.errors import UserError
from siglip_train.files.atomic import write_text
from siglip_train.interop.files import read_shapes, read_tensors
from siglip_train.interop.load import load_model, read_description
from siglip_train.interop.native import Description, write_export
from siglip_train.models.siglip import Siglip
from siglip_train.report import write_report
from siglip_train.run_dir import _refuse_links
from tests.models.small import small_config


@pytest.fixture
def export(tmp_path: Path, sentencepiece_model: Path) -> Path:
    config = small_config()
    config.text.vocab_size = 40
    folder = tmp_path / "export"
    write_export(folder, Siglip(config).state_dict(), Description(config, tokenizer=sentencepiece_model))
    return folder


def changed(export: Path, *path: str, to: Any) -> None:
    file = export / "config.json"
    content = json.loads(file.read_text())
    node = content
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = to
    file.write_text(json.dumps(content))


@pytest.mark.parametrize(
    "name", ["../outside.model", "/etc/passwd", "a/../../outside.model", "..", "", "a\0b"]
)
def test_a_tokenizer_outside_of_its_folder_is_refused(export: Path, name: str) -> None:
    (export.parent / "outside.model").write_bytes(b"")
    changed(export, "tokenizer", "file", to=name)
    with pytest.raises(UserError, match="no file beside it"):
        load_model(export)


@pytest.mark.parametrize("name", ["../model.safetensors", "/model.safetensors", "", ".."])
def test_weights_outside_of_their_folder_are_refused(export: Path, name: str) -> None:
    (export / "model.safetensors").rename(export.parent / "model.safetensors")
    (export / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(UserError, match="no file beside it"):
        load_model(export)


@pytest.mark.parametrize("prefixes", ["module.", "_orig_mod.", "module._orig_mod."])
def test_what_wraps_a_module_is_no_part_of_its_names(export: Path, prefixes: str, caplog) -> None:
    file = export / "model.safetensors"
    tensors, shapes = load_file(file), read_shapes(file)
    save_file({prefixes + name: tensor for name, tensor in tensors.items()}, file)
    with caplog.at_level("INFO", logger="siglip_train"):
        assert read_tensors(file).keys() == tensors.keys()
    assert "of a module that was wrapped" in caplog.text
    assert read_shapes(file) == shapes
    load_model(export)


def test_a_folder_of_the_hubs_cache_is_read_at_its_snapshot(export: Path, tmp_path: Path) -> None:
    root = tmp_path / "models--owner--name"
    for name in ("abc", "def"):
        shutil.copytree(export, root / "snapshots" / name)
        if name == "abc":
            load_model(root)
    with pytest.raises(UserError, match=r"2 snapshots; give one: .*abc, def"):
        load_model(root)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text("def")
    shutil.rmtree(root / "snapshots" / "abc")
    (root / "snapshots" / "abc").mkdir()
    load_model(root)
    # a name that leads elsewhere is none of the snapshots
    (root / "refs" / "main").write_text("../../export")
    with pytest.raises(UserError, match="2 snapshots"):
        load_model(root)


def test_adapters_of_peft_are_said_to_be_such(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="merge_and_unload"):
        load_model(tmp_path)


HOSTILE = [
    None,
    True,
    -1,
    0,
    1 << 62,
    1.5,
    float("nan"),
    "",
    "x" * 100_000,
    "../../x",
    [],
    {},
    [[]],
    {"_target_": "os.system"},
]


def _paths(node: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    if not isinstance(node, dict):
        return [path]
    return [path, *(inner for key, value in node.items() for inner in _paths(value, (*path, key)))]


@pytest.mark.slow
def test_no_value_of_a_config_is_more_than_a_line(export: Path) -> None:
    """Every key with every hostile value: it is refused in a line, or the model opens."""
    file = export / "config.json"
    content = json.loads(file.read_text())
    for path in _paths(content)[1:]:
        for value in HOSTILE:
            edited = copy.deepcopy(content)
            node = edited
            for key in path[:-1]:
                node = node[key]
            node[path[-1]] = value
            file.write_text(json.dumps(edited))
            for read in (read_description, load_model):
                try:
                    read(export)
                except UserError:
                    pass
                except Exception as error:
                    raise AssertionError(
                        f"{path} = {str(value)[:50]!r}: {type(error).__name__}: {error}"
                    ) from error


@pytest.mark.parametrize(
    "content", [b"", b"\xff", b"[" * 200_000, b"null", b'{"a": ' * 100_000, b"9" * 10_000, b"\0" * 100]
)
@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "model.safetensors.index.json", "tokenizer.model"]
)
def test_damage_is_a_line(export: Path, name: str, content: bytes) -> None:
    if name.endswith(".index.json"):
        (export / "model.safetensors").unlink()
    (export / name).write_bytes(content)
    with pytest.raises(UserError):
        load_model(export)


def test_a_model_that_claims_to_be_huge_takes_no_memory(export: Path) -> None:
    changed(export, "model", "vision", "depth", to=1 << 40)
    with pytest.raises(UserError):
        load_model(export)
    changed(export, "model", "vision", "depth", to=1)
    changed(export, "model", "text", "vocab_size", to=1 << 40)
    with pytest.raises(UserError):
        load_model(export)


@pytest.mark.parametrize(
    "evaluation",
    [
        {"metrics": {"acc1": "<script>"}}, {"metrics": [1]}, {"details": 3}, {"details": {"mistakes": [{}]}},
        {"details": {"mistakes": [{"picture": "https://evil/x", "predicted": "<b>", "label": 1, "key": "<i>"}]}},
        {"details": {"similarity": {"values": [["x"]], "pictures": [], "captions": []}}}, {"step": "<u>"},
        {"details": {"groups": [{"name": "<b>", "acc1": "x", "images": {}}]}}, {"metrics": {"a": 1e400}},
    ],
)  # fmt: skip
def test_a_strangers_results_make_a_line_or_a_page_that_fetches_and_runs_nothing(
    tmp_path: Path, evaluation: Any
) -> None:
    (tmp_path / "evaluations").mkdir()
    (tmp_path / "evaluations" / "task.json").write_text(json.dumps(evaluation))
    rows = [
        {"step": 1, "train/loss": "<script>"},
        {"step": "x", "data/seen": "x", "time": True},
        {"step": 2, "data/b": None},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match="hold what no run writes"):
        write_report(tmp_path)
    # the results alone: a page without theirs, or the same line
    (tmp_path / "metrics.jsonl").unlink()
    with contextlib.suppress(UserError):
        write_report(tmp_path)
    page = (tmp_path / "report.html").read_text() if (tmp_path / "report.html").exists() else ""
    for part in ("<script", "<b>", "<i>", "<u>", "https://evil"):
        assert part not in page


def test_links_in_a_strangers_run_lead_no_writing_elsewhere(tmp_path: Path) -> None:
    victim, run = tmp_path / "victim", tmp_path / "run"
    victim.write_text("mine")
    run.mkdir()
    (run / f".config.yaml.{threading.get_native_id()}").symlink_to(victim)
    (run / "config.yaml").symlink_to(victim)
    write_text(run / "config.yaml", "theirs")
    assert victim.read_text() == "mine"
    assert (run / "config.yaml").read_text() == "theirs"
    (run / "log.txt").symlink_to(victim)
    with pytest.raises(UserError, match=r"log\.txt is a link"):
        _refuse_links(run)

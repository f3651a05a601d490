"""Secrets in URLs and commands, one planted in each place: all that a run writes, and says, is searched for them."""

import base64
import http.server
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.faults.runs import losses
from tests.forks import run_program_by_rank

SIGNATURE, PASSWORD, TOKEN, VARIABLE, GONE, EVALUATION = (
    f"Pl4nted{name}0123456789abcdef" for name in ("Sign", "Pass", "Token", "Variable", "Gone", "Eval")
)
SECRETS = (SIGNATURE, PASSWORD, TOKEN, VARIABLE, GONE, EVALUATION)
HEADERS = {
    "password": "Basic " + base64.b64encode(f"me:{PASSWORD}".encode()).decode(),
    "token": f"Bearer {TOKEN}",
}


class Served(NamedTuple):
    """A server that wants each secret in its place; opened: how often it was given."""

    url: str
    opened: Counter[str]


@pytest.fixture
def served(tiny_data: Path) -> Iterator[Served]:
    shards = sorted((tiny_data / "train").glob("*.tar"))
    opened: Counter[str] = Counter()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            place, _, query = self.path.strip("/").partition("?")
            kind, _, name = place.partition("/")
            wanted = {"signed": f"X-Amz-Signature={SIGNATURE}", "evaluation": f"sig={EVALUATION}"}.get(
                kind, ""
            )
            is_given = wanted in query and self.headers.get("Authorization", "") == HEADERS.get(kind, "")
            if not is_given or name not in ("0.tar", "1.tar"):
                self.send_error(403)
                return
            opened[kind] += 1
            data = shards[int(name[0])].read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield Served(f"127.0.0.1:{server.server_address[1]}", opened)
    server.shutdown()
    server.server_close()


def _use_temporary(folder: Path, _rank: int) -> None:
    # evaluations take the usual cache
    tempfile.tempdir = str(folder)


def _overrides(host: str, shard: Path) -> list[str]:
    """A source for each way to give a secret; one of its shards is not there."""
    signed = [f"http://{host}/signed/0.tar?X-Amz-Signature={SIGNATURE}&X-Amz-Date=1"]
    signed += [f"http://{host}/signed/gone.tar?X-Amz-Signature={GONE}"]
    sources = {
        "tiny": signed,
        "password": [f"http://me:{PASSWORD}@{host}/password/1.tar"],
        "token": [f"pipe:curl -sf -H 'Authorization: Bearer {TOKEN}' http://{host}/token/0.tar"],
        "variable": [f"pipe:API_SECRET={VARIABLE} cat {shard}", f"pipe:get --password {GONE} gone.tar"],
    }
    lists = {name: ", ".join(f'"{shard}"' for shard in shards) for name, shards in sources.items()}
    task = "evaluation.tasks.pictures"
    return [
        *(f"data.sources.{name}.shards=[{shards}]" for name, shards in lists.items()),
        *(f"data.sources.{name}.language=json:language" for name in sources if name != "tiny"),
        "data.max_failed_shards=0.5",
        "data.fetch_attempts=1",
        f"{task}._target_=siglip_train.evals.retrieval.Retrieval",
        f'{task}.shards="http://{host}/evaluation/0.tar?sig={EVALUATION}"',
        f"{task}.text=txt",
        "log.tensorboard=true",
        "log.wandb=offline",
    ]


def _leaks(texts: dict[str, bytes]) -> list[str]:
    forms = {secret: (secret.encode(), base64.b64encode(f"me:{secret}".encode())) for secret in SECRETS}
    return [
        f"{secret} in {where}"
        for where, text in texts.items()
        for secret, written in forms.items()
        if any(form in text for form in written)
    ]


def _written(*folders: Path) -> dict[str, bytes]:
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    return {str(path): path.read_bytes() for path in files}


def test_no_secret_is_written_or_said(
    go_on: Callable, served: Served, tiny_data: Path, tmp_path: Path, record_fault
) -> None:
    run, cache, temporary = tmp_path / "run", tmp_path / "cache", tmp_path / "tmp"
    temporary.mkdir()
    shard = next((tiny_data / "train").glob("*.tar"))
    arguments = [*_overrides(served.url, shard), f"run_dir={run}", f"data.cache_dir={cache}"]
    prepare = partial(_use_temporary, temporary)
    said: dict[str, bytes] = {}
    for part, ranks in (("stop_after_steps=4", 2), ("stop_after_steps=6", 1)):
        for rank, result in enumerate(go_on([*arguments, part], ranks=ranks, prepare=prepare)):
            assert result.returncode == 0, result.stderr
            said[f"{part} of rank {rank}"] = (result.stdout + result.stderr).encode()
    assert set(losses(run)) == set(range(1, 7))
    # with the secrets that were planted, as the server gives nothing without them
    assert set(served.opened) == {"signed", "password", "token", "evaluation"}

    # what the run read with a secret, evaluation cannot read again from its config: it says so in a line
    (evaluated,) = run_program_by_rank(
        "siglip_train.evaluate", [f"checkpoint={run}", "device=cpu"], ranks=1, prepare=prepare
    )
    assert evaluated.returncode == 2
    assert (
        evaluated.stderr.strip()
        .splitlines()[-1]
        .startswith(
            f"error: evaluation.tasks.pictures.shards in {run}/config.yaml held a secret, which runs do not keep"
        )
    )
    # on its own command line it reads with one, and says nothing of it either
    overrides = [each.replace("evaluation.tasks", "tasks") for each in arguments if ".tasks." in each]
    (evaluated,) = run_program_by_rank(
        "siglip_train.evaluate", [f"checkpoint={run}", "device=cpu", *overrides], ranks=1, prepare=prepare
    )
    assert evaluated.returncode == 0, evaluated.stderr
    said["siglip-eval"] = (evaluated.stdout + evaluated.stderr).encode()

    # a fatal error
    wrong = [each.replace(SIGNATURE, GONE) for each in arguments]
    (result,) = go_on([*wrong, "stop_after_steps=8"], ranks=1, prepare=prepare)
    assert result.returncode == 2
    said["error"] = result.stderr.encode()

    files = _written(run, cache, temporary)
    kinds = (
        "config.yaml",
        "environment.json",
        "log.txt",
        "report.html",
        "state.json",
        "events.",
        ".wandb",
        "failed/",
    )
    for kind in kinds:
        assert any(kind in name for name in files), f"no {kind} to search"
    assert _leaks({**files, **said}) == []
    record_fault(
        f"secrets in {len(SECRETS)} places",
        ranks=2,
        happened=f"in none of {len(files)} files",
        lost=0,
        repeated=0,
    )

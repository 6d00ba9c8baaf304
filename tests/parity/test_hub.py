"""Hub ids: what is asked of the hub, what is not, and what is said when it does not answer. The hub is a server of this machine."""

import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import hf_checkpoints as hf
import pytest
from safetensors.torch import load_file, save_file

import intermodal
from intermodal.errors import CheckpointError

COMMIT = "0123456789abcdef0123456789abcdef01234567"
NAME = "someone/tiny"


@dataclass
class Hub:
    """A repository `someone/tiny` on a server, and what was fetched from it."""

    folder: Path
    cache: Path
    address: str = ""
    fetched: list[str] = field(default_factory=list)

    def run(self, code: str, *, offline: bool = False) -> str:
        """What Python code prints in a process of its own, for which this is the hub: its address is read at import."""
        settings = {"HF_ENDPOINT": self.address, "HF_HOME": str(self.cache), "HF_HUB_OFFLINE": "1" if offline else "0"}
        settings |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", f"import intermodal\n{code}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, env={**os.environ, **settings})
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def embedding(self, **how) -> list[float]:
        return json.loads(self.run(f"print(intermodal.load({NAME!r}).embed_texts(['a cat'])[0].tolist())", **how))


class Handler(http.server.BaseHTTPRequestHandler):
    hub: Hub

    def do_HEAD(self):
        self.answer(with_content=False)

    def do_GET(self):
        self.answer(with_content=True)

    def answer(self, with_content: bool):
        path = urlsplit(self.path).path
        files = {str(file.relative_to(self.hub.folder)): file for file in self.hub.folder.rglob("*") if file.is_file()}
        name = path.removeprefix(f"/{NAME}/resolve/{COMMIT}/")
        if path == f"/api/models/{NAME}/revision/main":
            siblings = [{"rfilename": file} for file in files]
            self.send(json.dumps({"id": NAME, "sha": COMMIT, "siblings": siblings}).encode(), with_content)
        elif path == f"/api/models/{NAME}/tree/{COMMIT}":
            tree = [{"type": "file", "path": name, "size": file.stat().st_size, "oid": name} for name, file in files.items()]
            self.send(json.dumps(tree).encode(), with_content)
        elif name in files:
            if with_content:
                self.hub.fetched.append(name)
            self.send(files[name].read_bytes(), with_content, {"ETag": f'"{name}"', "X-Repo-Commit": COMMIT})
        else:
            self.send_error(404)

    def send(self, content: bytes, with_content: bool, headers: dict[str, str] | None = None):
        self.send_response(200)
        for key, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if with_content:
            self.wfile.write(content)

    def log_message(self, *words):
        pass


@pytest.fixture
def hub(whole, tmp_path):
    """The SigLIP directory of `whole`, with weights in further forms beside it, none of which is read where there is a better one."""
    made = Hub(hf.copy(whole("siglip")[0], tmp_path / "repository"), tmp_path / "cache")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("Answer", (Handler,), {"hub": made}))
    made.address = f"http://127.0.0.1:{server.server_address[1]}"
    for name in ("pytorch_model.bin", "flax_model.msgpack", "tf_model.h5", "open_clip_model.safetensors", "README.md"):
        (made.folder / name).write_bytes(b"another form")
    for name in ("onnx/config.json", "onnx/model.safetensors"):
        (made.folder / "onnx").mkdir(exist_ok=True)
        (made.folder / name).write_bytes(b"another form")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield made
    server.shutdown()
    server.server_close()


def settings_of(hub: Hub) -> set[str]:
    """The files of the repository's top folder that are no weights and no other project's."""
    return {file.name for file in hub.folder.iterdir() if file.suffix in (".json", ".model", ".txt", ".jinja")}


def test_one_form_of_the_weights_is_downloaded_and_then_read_without_a_network(hub, whole):
    want = pytest.approx(intermodal.load(whole("siglip")[0]).embed_texts(["a cat"])[0].tolist(), abs=1e-5)
    assert hub.embedding() == want
    assert sorted(hub.fetched) == sorted({*settings_of(hub), "model.safetensors"})
    hub.fetched.clear()
    assert hub.embedding() == want
    assert hub.embedding(offline=True) == want
    assert hub.fetched == []


def test_of_a_sharded_model_the_index_and_its_shards_are_downloaded(hub, whole):
    (hub.folder / "model.safetensors").unlink()
    whole("siglip")[1].save_pretrained(hub.folder, max_shard_size="20KB")
    shards = {file.name for file in hub.folder.glob("model-*.safetensors")}
    assert len(shards) > 1
    (hub.folder / "model-00099-of-00099.safetensors").write_bytes(b"of an older save")
    assert len(hub.embedding()) == 30
    assert sorted(hub.fetched) == sorted({*settings_of(hub), *shards})


def test_a_pickle_is_downloaded_where_there_is_nothing_better(hub):
    import torch

    torch.save(load_file(hub.folder / "model.safetensors"), hub.folder / "pytorch_model.bin")
    (hub.folder / "model.safetensors").unlink()
    assert len(hub.embedding()) == 30
    assert sorted(hub.fetched) == sorted({*settings_of(hub), "pytorch_model.bin"})


def test_of_open_clips_layout_its_own_weights_are_downloaded(hub, whole):
    """Beside weights of transformers' that no config of theirs goes with."""
    tiny = intermodal.load(whole("clip")[0])
    shutil.rmtree(hub.folder)
    intermodal.save(tiny, hub.folder, layout="open_clip")
    save_file({}, hub.folder / "model.safetensors")
    (hub.folder / "open_clip_pytorch_model.bin").write_bytes(b"another form")
    assert hub.embedding() == pytest.approx(tiny.embed_texts(["a cat"])[0].tolist(), abs=1e-5)
    assert sorted(hub.fetched) == sorted({*settings_of(hub), "open_clip_model.safetensors"})


def test_a_recipes_tokenizer_may_be_a_hub_id_and_nothing_else_of_it_is_downloaded(hub, whole):
    code = f"""
import json
from intermodal.models.text import TextConfig
from intermodal.train.contrastive import build_model
from intermodal.train.recipe import ModelConfig
model = build_model(ModelConfig(tokenizer={NAME!r}, text=TextConfig(192, 1, 3, 768, context=16)), list)
print(json.dumps(model.processor.texts.ids(["a cat", "Two dogs!"])))
"""
    want = intermodal.load(whole("siglip")[0]).processor.texts.ids(["a cat", "Two dogs!"])
    assert json.loads(hub.run(code)) == want
    assert sorted(hub.fetched) == sorted(settings_of(hub) & {"tokenizer.json", "tokenizer_config.json", "spiece.model"})
    assert json.loads(hub.run(code, offline=True)) == want


def test_what_the_hub_does_not_have_is_said_and_names_that_cannot_be_ids(hub):
    said = "try:\n    intermodal.load({!r})\nexcept intermodal.errors.CheckpointError as error:\n    print(error)"
    code = f"import intermodal.errors\n{said.format('someone/other')}"
    for how in ({}, {"offline": True}):
        assert hub.run(code, **how).startswith("cannot download someone/other from the hub, and no such directory exists")
    (hub.folder / "model.safetensors").unlink()
    for name in ("pytorch_model.bin", "open_clip_model.safetensors"):
        (hub.folder / name).unlink()
    assert "holds no weights" in hub.run(f"import intermodal.errors\n{said.format(NAME)}")
    for name in ("siglip-tiny", "./someone/tiny", "a/b/c"):
        with pytest.raises(CheckpointError, match="neither a directory nor a hub id"):
            intermodal.load(name)

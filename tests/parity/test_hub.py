"""Hub ids: what is asked of the hub, what is not, and what is said when it does not answer. The hub is a server of this machine."""

import base64
import hashlib
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote, urlsplit

import hf_checkpoints as hf
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

import intermodal
from intermodal.errors import CheckpointError

NAME, DATA = "someone/tiny", "someone/pictures"
REQUEST = re.compile(r"(?:/api/models|/api/datasets|/datasets)?/(someone/\w+)/(revision|tree|resolve)/(refs/pr/\d+|[^/]+)/?(.*)")


def commit_of(name: str, revision: str) -> str:
    return hashlib.sha1(f"{name}@{revision}".encode()).hexdigest()


@dataclass
class Hub:
    """A model `someone/tiny` on a server, what else is there, and what was fetched from it."""

    folder: Path
    cache: Path
    address: str = ""
    fetched: list[str] = field(default_factory=list)
    more: dict[tuple[str, str], Path] = field(default_factory=dict)
    """Folders of other repositories, and of other revisions of it, by name and revision."""

    def found(self, name: str, revision: str) -> tuple[str, Path] | None:
        """The commit and the folder of a revision that is asked for by its name or its commit."""
        there = {(NAME, "main"): self.folder, **self.more}
        return next(
            ((commit_of(*at), folder) for at, folder in there.items() if at[0] == name and revision in (at[1], commit_of(*at))),
            None,
        )

    def run(self, code: str, *, offline: bool = False) -> str:
        """What Python code prints in a process of its own, for which this is the hub: its address is read at import."""
        settings = {"HF_ENDPOINT": self.address, "HF_HOME": str(self.cache), "HF_HUB_OFFLINE": "1" if offline else "0"}
        settings |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", f"import intermodal\n{code}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, env={**os.environ, **settings})
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def embedding(self, name: str = NAME, **how) -> list[float]:
        return json.loads(self.run(f"print(intermodal.load({name!r}).embed_texts(['a cat'])[0].tolist())", **how))

    def refusal(self, call: str, **how) -> str:
        """What is said of a call that cannot be done."""
        return self.run(
            f"import intermodal.errors\ntry:\n    {call}\nexcept intermodal.errors.IntermodalError as error:\n    print(error)",
            **how,
        )


class Handler(http.server.BaseHTTPRequestHandler):
    hub: Hub

    def do_HEAD(self):
        self.answer(with_content=False)

    def do_GET(self):
        self.answer(with_content=True)

    def answer(self, with_content: bool):
        request = REQUEST.fullmatch(unquote(urlsplit(self.path).path))
        name, what, revision, file = request.groups() if request else ("", "", "", "")
        found = self.hub.found(name, revision)
        if found is None:
            known = name == NAME or any(name == other for other, _ in self.hub.more)
            self.send(b"", with_content, {"X-Error-Code": "RevisionNotFound" if known else "RepoNotFound"}, 404)
            return
        commit, folder = found
        files = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
        if what == "revision":
            siblings = [{"rfilename": file} for file in files]
            self.send(json.dumps({"id": name, "sha": commit, "siblings": siblings}).encode(), with_content)
        elif what == "tree" and not file:
            tree = [{"type": "file", "path": name, "size": path.stat().st_size, "oid": name} for name, path in files.items()]
            self.send(json.dumps(tree).encode(), with_content)
        elif file in files:
            if with_content:
                self.hub.fetched.append(file)
            self.send(files[file].read_bytes(), with_content, {"ETag": f'"{commit}{file}"', "X-Repo-Commit": commit})
        else:
            self.send(b"", with_content, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}, 404)

    def send(self, content: bytes, with_content: bool, headers: dict[str, str] | None = None, status: int = 200):
        self.send_response(status)
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
    for how in ({}, {"offline": True}):
        said = hub.refusal("intermodal.load('someone/other')", **how)
        assert said.startswith("cannot download someone/other from the hub, and no such directory exists")
    (hub.folder / "model.safetensors").unlink()
    for name in ("pytorch_model.bin", "open_clip_model.safetensors"):
        (hub.folder / name).unlink()
    assert "holds no weights" in hub.refusal(f"intermodal.load({NAME!r})")
    for name in ("siglip-tiny", "./someone/tiny", "a/b/c", "someone/tiny@", "hf-hub:tiny"):
        with pytest.raises(CheckpointError, match="neither a directory nor a hub id"):
            intermodal.load(name)


@pytest.fixture
def older(hub):
    """An earlier revision of the model, by the tag `v1`: its weights are others."""
    folder = hf.copy(hub.folder, hub.cache.parent / "older")
    state = load_file(folder / "model.safetensors")
    state["text_model.embeddings.token_embedding.weight"] = (
        state["text_model.embeddings.token_embedding.weight"].flip(0).contiguous()
    )
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    hub.more[NAME, "v1"] = hub.more[NAME, "refs/pr/7"] = folder
    return folder


@pytest.mark.parametrize("name", [f"{NAME}@v1", f"hf-hub:{NAME}@refs/pr/7"])
def test_a_hub_id_may_name_a_revision(hub, older, whole, name):
    want = intermodal.load(older).embed_texts(["a cat"])[0].tolist()
    assert want != pytest.approx(intermodal.load(whole("siglip")[0]).embed_texts(["a cat"])[0].tolist(), abs=1e-2)
    for how in ({}, {"offline": True}):
        assert hub.embedding(name, **how) == pytest.approx(want, abs=1e-5)


def test_a_tokenizers_revision_is_its_own_and_one_that_is_not_there_is_told(hub, older):
    (older / "tokenizer_config.json").write_text("{}")
    folder = hub.run(f"from intermodal.weights.hub import tokenizer_folder\nprint(tokenizer_folder('{NAME}@v1'))")
    assert (Path(folder) / "tokenizer_config.json").read_text() == "{}"
    for call in (
        f"intermodal.load('{NAME}@v9')",
        f"from intermodal.weights.hub import tokenizer_folder; tokenizer_folder('{NAME}@v9')",
    ):
        assert hub.refusal(call).startswith(f"{NAME} has no revision 'v9' on the hub")


def test_a_data_set_has_configurations_splits_and_revisions(hub):
    folder = hub.cache.parent / "pictures"
    folder.mkdir()
    Image.new("RGB", (40, 40)).save(folder / "x.png")
    picture = base64.b64encode((folder / "x.png").read_bytes()).decode()
    card = ["---", "configs:"]
    for config in ("a", "b"):
        card += [f"- config_name: {config}", "  data_files:"]
        for split in ("train", "test"):
            (folder / f"{config}-{split}.jsonl").write_text(json.dumps({"image": picture, "caption": f"{config} {split}"}) + "\n")
            card += [f"  - split: {split}", f"    path: {config}-{split}.jsonl"]
    (folder / "README.md").write_text("\n".join([*card, "---", ""]))
    hub.more[DATA, "main"] = hub.more[DATA, "v1"] = folder
    code = """
from intermodal.data.readers import SourceError, open_source
for rest in {}:
    try:
        print(open_source("hf:someone/pictures" + rest).next().texts[0])
    except SourceError as error:
        print(str(error).replace("\\n", " "))
"""
    rests = ["@v1:a:train", ":b:test", "", "@v9:a:train", ":a:train:more", ":c:train"]
    first, second, unnamed, gone, more, unknown = hub.run(code.format(rests)).splitlines()
    assert (first, second) == ("a train", "b test")
    assert unnamed.startswith("cannot stream someone/pictures: Config name is missing")
    assert unnamed.endswith("of several configurations name one: hf:NAME:CONFIG:SPLIT")
    assert "'v9' doesn't exist" in gone
    assert "write hf:NAME, hf:NAME:SPLIT or hf:NAME:CONFIG:SPLIT" in more
    assert "'c' not found" in unknown

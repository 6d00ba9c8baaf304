"""Zero-shot and retrieval against the definitions written out, embed with resume, search."""

import io
import json
import os
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from intermodal.errors import IntermodalError
from intermodal.evaluate.embed import embed_source, search
from intermodal.evaluate.retrieval import ranks, recall
from intermodal.evaluate.run import evaluate_source
from intermodal.evaluate.zeroshot import ClassNames, accuracy, class_embeddings, nearest_classes

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from loss_ranks import PeakBytes


def unit(*shape, seed=0):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def clip_benchmark_recall(scores, positive_pairs, k):
    """CLIP_benchmark's recall, from its definition: of each query's positives, is any among the k highest scores."""
    top = torch.topk(scores, k, dim=1).indices
    hits = positive_pairs.gather(1, top).any(1)
    return hits.float().mean().item()


@pytest.mark.parametrize("tile", [3, 7, 100])
def test_recall_equals_the_definition(tile):
    image, text = unit(20, 8), unit(60, 8, seed=1)
    owner = torch.randint(0, 20, (60,), generator=torch.Generator().manual_seed(2))
    owner[:20] = torch.arange(20)
    pairs = owner[None] == torch.arange(20)[:, None]
    scores = image @ text.T
    to_text = ranks(image, text, [torch.nonzero(row).squeeze(1).tolist() for row in pairs], tile=tile)
    to_image = ranks(text, image, [[o] for o in owner.tolist()], tile=tile)
    whole = recall(image, text, [torch.nonzero(row).squeeze(1).tolist() for row in pairs])
    for k in (1, 5, 10):
        assert (to_text < k).float().mean().item() == pytest.approx(clip_benchmark_recall(scores, pairs, k))
        assert (to_image < k).float().mean().item() == pytest.approx(clip_benchmark_recall(scores.T, pairs.T, k))
        assert whole[f"image_to_text_recall@{k}"] == pytest.approx(clip_benchmark_recall(scores, pairs, k))


def test_equal_scores_are_not_all_hits():
    """A collapsed model gives every item the same score; it must not look perfect."""
    same = torch.ones(50, 4) / 2
    found = recall(same, same, [[i] for i in range(50)])
    assert found["image_to_text_recall@1"] == pytest.approx(1 / 50)


def test_ranks_refuse_what_cannot_be_scored():
    with pytest.raises(ValueError, match="query 1"):
        ranks(unit(2, 4), unit(3, 4), [[0], []])
    with pytest.raises(ValueError, match="query 0"):
        ranks(unit(1, 4), unit(3, 4), [[3]])


def test_zero_shot_equals_the_definition():
    table = {}

    def embed(texts):
        for text in texts:
            table.setdefault(text, unit(1, 8, seed=len(table))[0] * 3)
        return torch.stack([table[text] for text in texts])

    names, templates = ["cat", "dog", "bus"], ["a {}", "one {} here"]
    classes = class_embeddings(embed, names, templates)
    for row, name in enumerate(names):
        mean = torch.stack([F.normalize(table[t.format(name)], dim=0) for t in templates]).mean(0)
        torch.testing.assert_close(classes[row], F.normalize(mean, dim=0))
    image = unit(30, 8, seed=9)
    labels = torch.randint(0, 3, (30,), generator=torch.Generator().manual_seed(4))
    found = accuracy(image, classes, labels.tolist(), at=(1, 2))
    top = (image @ classes.T).argsort(1, descending=True)
    assert found["top-1"] == pytest.approx((top[:, 0] == labels).float().mean().item())
    assert found["top-2"] == pytest.approx((top[:, :2] == labels[:, None]).any(1).float().mean().item())


class Stub:
    """An encoder whose vector is a picture's mean colour or a text's word."""

    class config:
        embed_width = 3

        class vision:
            image_size = 8

    def __init__(self, trained=0.0):
        self.calls, self.trained = 0, trained

    def state_dict(self):
        return {"weight": torch.full((3,), self.trained)}

    def embed_images(self, images):
        self.calls += len(images)
        return F.normalize(torch.stack([torch.from_numpy(np.array(i)).float().mean((0, 1)) for i in images]), dim=-1)

    def embed_texts(self, texts):
        colours = {"red": (1.0, 0, 0), "green": (0, 1.0, 0), "blue": (0, 0, 1.0)}
        return torch.tensor([colours[t] for t in texts])


def colour_folder(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name, colour in (("r", (250, 5, 5)), ("g", (5, 250, 5)), ("b", (5, 5, 250))):
        Image.new("RGB", (10, 10), colour).save(folder / f"{name}.png")
    (folder / "broken.png").write_bytes(b"no picture")
    return folder


@pytest.mark.parametrize("ending", [".parquet", ".npy"])
def test_embed_writes_all_and_names_the_rejects(tmp_path, ending):
    folder, out = colour_folder(tmp_path), tmp_path / f"out{ending}"
    assert embed_source(Stub(), str(folder), out, batch=2) == (3, 0, 1)
    rows = np.load(out) if ending == ".npy" else np.stack(pq.read_table(out)["embedding"].to_pylist())
    assert rows.shape == (3, 3)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, rtol=1e-6)
    assert "cannot read" in (tmp_path / f"out{ending}.rejects.jsonl").read_text()


def test_embed_goes_on_where_it_stopped(tmp_path, monkeypatch):
    """Stopped after two of four: the parts are found by another process, and refused to a model that was trained on since."""
    from intermodal.evaluate import embed as module

    monkeypatch.setattr(module, "PART", 1)
    folder, out = colour_folder(tmp_path), tmp_path / "out.parquet"
    stub, plain = Stub(), module._write_part

    def stopping(file, *rest):
        plain(file, *rest)
        if file.name.startswith("0000000001"):
            raise KeyboardInterrupt

    monkeypatch.setattr(module, "_write_part", stopping)
    with pytest.raises(KeyboardInterrupt):
        embed_source(stub, str(folder), out)
    monkeypatch.setattr(module, "_write_part", plain)
    with pytest.raises(IntermodalError, match="parts of another job"):
        embed_source(Stub(trained=1.0), str(folder), out)
    again = Stub()
    made, found, rejected = embed_source(again, str(folder), out)
    assert (made, found, rejected) == (again.calls, stub.calls, 1)
    assert made + found == 3
    assert made in (1, 2)
    whole = tmp_path / "whole.parquet"
    embed_source(Stub(), str(folder), whole)
    assert pq.read_table(out).equals(pq.read_table(whole))


def test_search_ranks_by_the_sentence(tmp_path):
    folder = colour_folder(tmp_path)
    for word, name in (("red", "r.png"), ("blue", "b.png")):
        assert search(Stub(), str(folder), word, 2)[0][0][0].endswith(name)
    embed_source(Stub(), str(folder), tmp_path / "e.parquet")
    embed_source(Stub(), str(folder), tmp_path / "e.npy")
    for ending in ("parquet", "npy"):
        assert search(Stub(), str(tmp_path / f"e.{ending}"), "green", 1)[0][0][0].endswith("g.png")
    (tmp_path / "e.npy.keys.json").unlink()
    with pytest.raises(IntermodalError, match=r"no e\.npy\.keys\.json beside"):
        search(Stub(), str(tmp_path / "e.npy"), "green", 1)
    wide = Stub()
    wide.config = SimpleNamespace(embed_width=5)
    with pytest.raises(IntermodalError, match="vectors of 3 numbers"):
        search(wide, str(tmp_path / "e.parquet"), "green", 1)


def test_vectors_that_are_damaged_or_foreign_are_told(tmp_path):
    folder = str(colour_folder(tmp_path))
    embed_source(Stub(), folder, tmp_path / "e.parquet")
    embed_source(Stub(), folder, tmp_path / "e.npy")
    whole = pq.read_table(tmp_path / "e.parquet")
    for name in ("e.parquet", "e.npy"):
        (tmp_path / f"cut-{name}").write_bytes((tmp_path / name).read_bytes()[:-20])
    for kept in (tmp_path / "e.npy.keys.json", tmp_path / "e.npy.model.json"):
        kept.with_name(f"cut-{kept.name}").write_text(kept.read_text())
        kept.with_name(f"few-{kept.name}").write_text(kept.read_text())
    np.save(tmp_path / "few-e.npy", np.load(tmp_path / "e.npy")[:1])
    pq.write_table(whole.drop_columns(["key"]), tmp_path / "nameless.parquet")
    pq.write_table(whole.set_column(1, "embedding", pa.array([["a"]] * len(whole))), tmp_path / "words.parquet")
    for name, said in (
        ("cut-e.parquet", "cannot be read"), ("cut-e.npy", "cannot be read"), ("few-e.npy", "for 3 keys"), ("none.npy", "beside it"),
        ("nameless.parquet", "none called `key`"), ("words.parquet", "not a vector of numbers"), ("none.parquet", "no such file"),
    ):  # fmt: skip
        with pytest.raises(IntermodalError, match=said):
            search(Stub(), str(tmp_path / name), "green", 1)
    # another library's numbers of twice the bytes are the same vectors
    doubles = pa.array(np.load(tmp_path / "e.npy").astype(np.float64).tolist())
    pq.write_table(whole.set_column(1, "embedding", doubles), tmp_path / "doubles.parquet")
    assert search(Stub(), str(tmp_path / "doubles.parquet"), "green", 1)[0][0][0].endswith("g.png")


def test_each_class_has_its_accuracy_and_commonest_mistake():
    from intermodal.evaluate.zeroshot import per_class

    classes, names = torch.eye(3), ["cat", "dog", "bus"]
    image = torch.eye(3)[[0, 0, 1, 1, 1, 2]]
    rows = per_class(image, classes, [0, 0, 0, 1, 2, 2], names)
    assert list(rows) == ["bus", "cat", "dog"]
    assert rows["bus"] == {"samples": 2, "top-1": 0.5, "taken for": "dog"}
    assert rows["cat"] == {"samples": 3, "top-1": pytest.approx(2 / 3), "taken for": "dog"}
    assert rows["dog"] == {"samples": 1, "top-1": 1.0, "taken for": None}


class Named:
    """An encoder whose vectors are given: a picture's by its grey level, a text's by name."""

    def __init__(self, pictures, texts):
        self.pictures, self.texts, self.config = pictures, texts, SimpleNamespace(vision=SimpleNamespace(image_size=8))

    def embed_images(self, images):
        return torch.stack([self.pictures[image.convert("L").getpixel((0, 0))] for image in images])

    def embed_texts(self, texts):
        return torch.stack([self.texts[text] for text in texts])


def test_eval_scores_every_caption_as_clip_benchmark_does(tmp_path):
    """Five captions a picture, as in COCO; then a caption that two pictures share, which is right for both."""
    pictures, texts, lines = {}, {}, []
    for n in range(12):
        Image.new("L", (8, 8), n * 20).save(tmp_path / f"{n}.png")
        pictures[n * 20] = unit(8, seed=n)
        own = [f"caption {n}.{k}" for k in range(1 + n % 5)]
        texts |= {text: F.normalize(pictures[n * 20] + unit(8, seed=100 + len(texts) + i), dim=-1) for i, text in enumerate(own)}
        lines.append(json.dumps({"image": f"{n}.png", "captions": own}))
    (tmp_path / "t.jsonl").write_text("\n".join(lines) + "\n")
    found = evaluate_source(Named(pictures, texts), str(tmp_path / "t.jsonl"), "retrieval", progress=False)
    scores = torch.stack(list(pictures.values())) @ torch.stack(list(texts.values())).T
    pairs = torch.tensor([[text.startswith(f"caption {n}.") for text in texts] for n in range(12)])
    for k in (1, 5, 10):
        assert found[f"image_to_text_recall@{k}"] == pytest.approx(clip_benchmark_recall(scores, pairs, k))
        assert found[f"text_to_image_recall@{k}"] == pytest.approx(clip_benchmark_recall(scores.T, pairs.T, k))
    assert 0 < found["image_to_text_recall@1"] < 1

    shared = [{"image": "0.png", "caption": "caption 0.0"}, {"image": "5.png", "caption": "caption 0.0"}]
    (tmp_path / "s.jsonl").write_text("".join(json.dumps(one) + "\n" for one in shared))
    found = evaluate_source(Named(pictures, texts), str(tmp_path / "s.jsonl"), "retrieval", progress=False)
    assert found["image_to_text_recall@1"] == found["text_to_image_recall@1"] == 1.0


@pytest.mark.parametrize("tile", [3, 7, 100])
def test_nearest_classes_in_tiles_are_the_nearest(tile):
    image, classes = unit(20, 8), unit(33, 8, seed=1)
    for k in (1, 5, 40):
        want = (image @ classes.T).topk(min(k, 33), dim=1).indices
        assert torch.equal(nearest_classes(image, classes, k, tile=tile), want)


def test_scores_at_size_never_become_a_matrix():
    """16,384 pictures against as many texts would be 1,074 MB of scores; tiles keep both ways and zero-shot below a tenth of it."""
    image, text = unit(16_384, 4), unit(16_384, 4, seed=1)
    own = [[row] for row in range(16_384)]
    for work in (lambda: ranks(image, text, own, tile=1024), lambda: nearest_classes(image, text, 5, tile=1024)):
        with PeakBytes() as counter:
            work()
        assert counter.peak < 60e6


def test_mean_per_class_counts_each_class_once():
    found = accuracy(torch.eye(3)[[0, 0, 0, 1]], torch.eye(3), [0, 0, 0, 2])
    assert found["top-1"] == pytest.approx(3 / 4)
    assert found["mean per class"] == pytest.approx(1 / 2)  # of the two classes that occur


def test_a_template_needs_a_place_for_the_name():
    with pytest.raises(IntermodalError, match=r"'a \{x\}' has no \{\}"):
        class_embeddings(lambda texts: torch.zeros(len(texts), 2), ["cat"], ["a {x}"])


def test_a_file_that_begins_like_scenes_is_a_file(tmp_path, monkeypatch):
    from intermodal.data.scenes import Scenes
    from intermodal.evaluate.run import _held_out

    monkeypatch.chdir(tmp_path)
    (tmp_path / "scenes-000.jsonl").write_text('{"image": "a.png", "text": "a cat"}\n')
    assert len(_held_out("scenes-000.jsonl", 32)) == 1
    scenes = _held_out("scenes:core?forms=1", 32)
    assert isinstance(scenes, Scenes)
    assert (scenes.config.forms, scenes.config.split, scenes.config.side, len(scenes.pool)) == (1, "test", 32, 60)


class Colours(Stub):
    """Knows the colours by the words of any prompt, and how many pictures it was given at once."""

    most = 0

    def embed_images(self, images):
        self.most = max(self.most, len(images))
        return super().embed_images(images)

    def embed_texts(self, texts):
        return super().embed_texts([text.strip(".").split()[-1] for text in texts])


def class_folders(tmp_path, each=20, names=("blue", "green", "red")):
    """`each` pictures in a folder a colour, as ImageNet is laid out."""
    for name, colour in zip(names, ((5, 5, 250), (5, 250, 5), (250, 5, 5)), strict=True):
        (tmp_path / "val" / name).mkdir(parents=True)
        for number in range(each):
            Image.new("RGB", (9, 9), colour).save(tmp_path / "val" / name / f"{number:02d}.png")
    return str(tmp_path / "val")


def test_eval_takes_all_or_random_samples_and_all_classes(tmp_path):
    """The first 12 of a sorted folder are of one class: a cut takes others, and its classes are still those of the whole folder."""
    spec, model = class_folders(tmp_path), Colours()
    whole = evaluate_source(model, spec, "zeroshot", templates=["a {}"], progress=False)
    assert (whole["samples"], whole["of"], whole["classes"], whole["top-1"]) == (60, 60, 3, 1.0)
    assert model.most <= 16  # pictures at full size
    cut = [evaluate_source(Colours(), spec, "zeroshot", count=12, by_class=True, progress=False) for _ in range(2)]
    assert cut[0] == cut[1]
    assert (cut[0]["samples"], cut[0]["of"], cut[0]["classes"]) == (12, 60, 3)
    assert len(cut[0]["per class"]) == 3
    assert evaluate_source(Colours(), spec, "zeroshot", count=1, progress=False)["classes"] == 3


def test_eval_of_an_endless_source_is_bounded(monkeypatch):
    from intermodal.evaluate import run as module

    monkeypatch.setattr(module, "OF_ENDLESS", 5)
    words = {}
    model = Named({}, {})
    model.embed_images = lambda images: torch.ones(len(images), 2)
    model.embed_texts = lambda texts: torch.stack([unit(2, seed=words.setdefault(text, len(words))) for text in texts])
    found = evaluate_source(model, "signs", "zeroshot", progress=False)
    assert (found["samples"], found["of"]) == (5, None)


def shard(file, members):
    with tarfile.open(file, "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return str(file)


def png(colour):
    buffer = io.BytesIO()
    Image.new("RGB", (10, 10), colour).save(buffer, "PNG")
    return buffer.getvalue()


PAINTS = {"red": (250, 5, 5), "green": (5, 250, 5), "blue": (5, 5, 250)}


def sources_of(tmp_path, captioned):
    """The same three pictures as shard, table and parquet, with their colours as captions or bare."""
    pictures = {name: png(colour) for name, colour in PAINTS.items()}
    members = {}
    for name, data in pictures.items():
        members |= {f"{name}.png": data, **({f"{name}.txt": name.encode()} if captioned else {})}
    for name, data in pictures.items():
        (tmp_path / f"{name}.png").write_bytes(data)
    rows = [{"image": f"{name}.png", **({"text": name} if captioned else {})} for name in pictures]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = {"image": [{"bytes": data, "path": None} for data in pictures.values()]}
    pq.write_table(pa.table(columns | ({"text": list(pictures)} if captioned else {})), tmp_path / "t.parquet")
    return [shard(tmp_path / "t.tar", members), str(tmp_path / "t.jsonl"), str(tmp_path / "t.parquet")]


def test_classes_are_read_without_the_pictures(tmp_path):
    """Also of a shard, a table and parquet: one picture scored, three classes."""
    for spec in sources_of(tmp_path, captioned=True):
        found = evaluate_source(Colours(), spec, "zeroshot", count=1, progress=False)
        assert (found["samples"], found["of"], found["classes"], found["top-1"]) == (1, 3, 3, 1.0)


def test_classes_file_says_what_folders_are_called(tmp_path):
    spec, file = class_folders(tmp_path, each=2, names=("n01", "sea_green", "red")), tmp_path / "names.tsv"
    file.write_text("n01\tblue\nsea_green\tgreen\nred\n")
    found = evaluate_source(Colours(), spec, "zeroshot", classes=file, templates=["a {}"], by_class=True, progress=False)
    assert (found["classes"], found["top-1"], set(found["per class"])) == (3, 1.0, {"red", "green", "blue"})
    file.write_text("n01\tblue\nred\n")
    model = Colours()
    with pytest.raises(IntermodalError, match="1 of the source's captions are not among the classes, the first: 'sea green'"):
        evaluate_source(model, spec, "zeroshot", classes=file, progress=False)
    assert model.calls == 0  # told before the pictures are embedded


def test_classes_file_is_checked_line_by_line(tmp_path):
    file = tmp_path / "names.tsv"
    file.write_text("crane\ncrane\n\nn1\tcrane\nn2\tdog\n")
    known = ClassNames.read(file)
    assert known.names == ["crane", "dog"]
    assert known.numbers(["crane", "n1", "n2"]) == [0, 0, 1]
    for text, said in (("n1\t\n", ":1: .* only one side"), ("n1\ta\nn1\tb\n", ":2: 'n1' has another name"), ("\n", "no class")):
        file.write_text(text)
        with pytest.raises(IntermodalError, match=said):
            ClassNames.read(file)


def test_embed_needs_no_captions(tmp_path):
    for spec in sources_of(tmp_path, captioned=False):
        assert embed_source(Stub(), spec, tmp_path / "e.parquet") == (3, 0, 0)
        hits, rejects = search(Stub(), spec, "green", 1)
        assert hits[0][1] > 0.99
        assert not rejects


def test_embed_of_nothing_readable_is_an_error(tmp_path):
    """Also the second time, and nothing is left behind that a later call would take for its own."""
    spec = shard(tmp_path / "t.tar", {"a.txt": b"no picture", "b.png": b"neither"})
    for _ in range(2):
        with pytest.raises(
            IntermodalError, match=r"none of its 2 items can be embedded; the first reasons: .*no picture.*cannot read"
        ):
            embed_source(Stub(), spec, tmp_path / "e.parquet")
    assert [file.name for file in tmp_path.iterdir()] == ["t.tar"]


def test_a_shard_that_is_cut_short_is_told(tmp_path):
    """By eval, embed and search: counted among the rejects, and named."""
    file = Path(sources_of(tmp_path, captioned=True)[0])
    file.write_bytes(file.read_bytes()[: 512 * 8])  # two whole samples of a header and a block for each member
    scores = evaluate_source(Colours(), str(file), "retrieval", progress=False)
    assert (scores["samples"], scores["rejected"], scores["rejects"][0]["key"]) == (2, 1, str(file))
    assert embed_source(Stub(), str(file), tmp_path / "e.parquet") == (2, 0, 1)
    assert "cut short" in (tmp_path / "e.parquet.rejects.jsonl").read_text()
    _, rejects = search(Stub(), str(file), "red", 1)
    assert [reject.key for reject in rejects] == [str(file)]


def test_embed_refuses_parts_of_files_that_were_swapped(tmp_path, monkeypatch):
    from intermodal.evaluate import embed as module

    folder, out = colour_folder(tmp_path), tmp_path / "out.parquet"
    monkeypatch.setattr(module, "_join", lambda *rest: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        embed_source(Stub(), str(folder), out)
    os.utime(folder / "r.png", (1, 1))
    with pytest.raises(IntermodalError, match="another job: its files were others"):
        embed_source(Stub(), str(folder), out)


def test_a_device_that_is_not_there_is_told():
    with pytest.raises(IntermodalError, match="--device nonsense cannot be used here"):
        search("no model", "nowhere", "a cat", 1, device="nonsense")

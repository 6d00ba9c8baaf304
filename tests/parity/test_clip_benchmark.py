"""`intermodal eval` against CLIP_benchmark's own functions, on the same encoder, pictures and texts."""

import io
import json
import random
import tarfile
from types import SimpleNamespace

import hf_checkpoints as hf
import pytest
import torch

import intermodal
from intermodal.batch import Images
from intermodal.evaluate.run import evaluate_source
from intermodal.evaluate.templates import read_templates

pytest.importorskip("clip_benchmark", reason="CLIP_benchmark is not installed (make setup does it, without its dependencies)")
from clip_benchmark.metrics import zeroshot_classification, zeroshot_retrieval

BATCH = 11


class Rows(list):
    """Texts in the place of CLIP_benchmark's tensor of tokens."""

    def to(self, device):
        return self


class Peer:
    """One of our encoders behind the two methods that CLIP_benchmark calls."""

    def __init__(self, model):
        self.model = model

    def encode_image(self, pixels):
        return self.model.encode_images(Images(pixels))

    def encode_text(self, texts):
        return self.model.encode_texts(self.model.processor.texts(texts))


@pytest.fixture(params=["clip", "siglip"])
def encoder(request, whole):
    return intermodal.load(whole(request.param)[0]).eval()


def captions(count):
    """Different ones, of words that the tests' tokenizers know or spell."""
    rng = random.Random(3)
    made = {
        " ".join(rng.choices(("a", "cat", "dog", "red", "car", "two", "on", "the", "mat"), k=rng.randint(2, 6)))
        for _ in range(4 * count)
    }
    return sorted(made)[:count]


class Batches:
    """What CLIP_benchmark asks of a DataLoader: batches, and the classes of its data set."""

    def __init__(self, model, shown, wanted, classes=()):
        self.pixels, self.wanted, self.dataset = model.processor.images(shown).pixels, wanted, SimpleNamespace(classes=classes)

    def __iter__(self):
        for at in range(0, len(self.pixels), BATCH):
            yield self.pixels[at : at + BATCH], self.wanted[at : at + BATCH]


def written(folder, shown, wanted):
    lines = []
    for number, (picture, texts) in enumerate(zip(shown, wanted, strict=True)):
        picture.save(folder / f"{number}.png")
        lines.append(json.dumps({"image": f"{number}.png", "captions": texts}) + "\n")
    (folder / "set.jsonl").write_text("".join(lines))
    return str(folder / "set.jsonl")


def test_retrieval(encoder, tmp_path):
    """One to four captions a picture, as COCO has five."""
    shown = [picture.convert("RGB") for picture in hf.pictures(40)]
    texts = captions(100)
    wanted = [[texts.pop() for _ in range(1 + number % 4)] for number in range(40)]
    theirs = zeroshot_retrieval.evaluate(
        Peer(encoder), Batches(encoder, shown, wanted), Rows, "cpu", amp=False, recall_k_list=[1, 5, 10]
    )
    ours = evaluate_source(encoder, written(tmp_path, shown, wanted), "retrieval", progress=False)
    for k in (1, 5, 10):
        assert ours[f"text_to_image_recall@{k}"] == pytest.approx(theirs[f"image_retrieval_recall@{k}"], abs=1e-6)
        assert ours[f"image_to_text_recall@{k}"] == pytest.approx(theirs[f"text_retrieval_recall@{k}"], abs=1e-6)
    assert 0 < ours["image_to_text_recall@10"] < 1


def top_k(output, target, topk):
    """CLIP_benchmark's `accuracy`, whose last line NumPy 2.4 refuses (it makes a number of an array of one)."""
    hits = output.topk(max(topk), 1).indices == target[:, None]
    return [hits[:, :k].any(1).float().mean().item() for k in topk]


@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true")  # that is one of the cases
def test_zero_shot(encoder, tmp_path, monkeypatch):
    """Two templates a class, classes of unequal size, one without a picture."""
    monkeypatch.setattr(zeroshot_classification, "accuracy", top_k)
    names = [f"{colour} {thing}" for colour in ("red", "two") for thing in ("cat", "dog", "car", "mat")]
    shown = [picture.convert("RGB") for picture in hf.pictures(60, seed=4)]
    labels = torch.tensor([min(number % 11, 6) for number in range(60)])
    shelf = Batches(encoder, shown, labels, names)
    theirs = zeroshot_classification.evaluate(Peer(encoder), shelf, Rows, names, ["a {c}", "the {c} on the mat"], "cpu", amp=False)
    (tmp_path / "names.txt").write_text("\n".join(names) + "\n")
    spec = written(tmp_path, shown, [[names[label]] for label in labels])
    ours = evaluate_source(
        encoder, spec, "zeroshot", classes=tmp_path / "names.txt", templates=["a {}", "the {} on the mat"], progress=False
    )
    assert ours["top-1"] == pytest.approx(theirs["acc1"], abs=1e-6)
    assert ours["top-5"] == pytest.approx(theirs["acc5"], abs=1e-6)
    assert ours["mean per class"] == pytest.approx(theirs["mean_per_class_recall"], abs=1e-6)
    assert 0 < ours["top-5"] < 1


@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true")
def test_zero_shot_of_its_own_shards(encoder, tmp_path, monkeypatch):
    """`.cls` numbers beside pictures and files of class names and templates, as its `webdataset_builder` writes them."""
    monkeypatch.setattr(zeroshot_classification, "accuracy", top_k)
    names, templates = ["red cat", "two dogs", "a car", "the mat"], ["a {c}", "the {c} on the mat"]
    shown = [picture.convert("RGB") for picture in hf.pictures(30, seed=5)]
    labels = torch.tensor([number % 7 % 4 for number in range(30)])
    theirs = zeroshot_classification.evaluate(
        Peer(encoder), Batches(encoder, shown, labels, names), Rows, names, templates, "cpu", amp=False
    )
    (tmp_path / "classnames.txt").write_text("\n".join(names))
    (tmp_path / "zeroshot_classification_templates.txt").write_text("\n".join(templates))
    with tarfile.open(tmp_path / "0.tar", "w") as archive:
        for number, (picture, label) in enumerate(zip(shown, labels.tolist(), strict=True)):
            buffer = io.BytesIO()
            picture.save(buffer, "PNG")
            for ending, data in (("png", buffer.getvalue()), ("cls", str(label).encode())):
                member = tarfile.TarInfo(f"s{number:07d}.{ending}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    ours = evaluate_source(
        encoder,
        str(tmp_path / "0.tar"),
        "zeroshot",
        classes=tmp_path / "classnames.txt",
        templates=read_templates(tmp_path / "zeroshot_classification_templates.txt"),
        progress=False,
    )
    assert ours["top-1"] == pytest.approx(theirs["acc1"], abs=1e-6)
    assert ours["mean per class"] == pytest.approx(theirs["mean_per_class_recall"], abs=1e-6)
    assert 0 < ours["top-1"] < 1

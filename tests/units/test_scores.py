"""What `eval` is told: prompt templates, class names, settings of the one task and the other; and how it ranks equal scores."""

import json
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from test_evaluate import PAINTS, Colours, PeakBytes, png, shard, sources_of

from intermodal.data.readers import open_source
from intermodal.errors import IntermodalError
from intermodal.evaluate.retrieval import ranks, recall
from intermodal.evaluate.run import evaluate_source
from intermodal.evaluate.templates import OPENAI, read_templates

sys.path.insert(0, str(Path(__file__).parents[1] / "parity"))
from open_clip_package import open_clip_or_skip


@pytest.mark.parametrize("tile", [1, 2, 7])
def test_of_equal_scores_the_smaller_number_is_before(tile):
    """As a stable descending sort has it, for the best positive of several too."""
    same = torch.ones(4, 3)
    assert ranks(same, torch.ones(7, 3), [[0], [3], [6], [5, 2]], tile=tile).tolist() == [0, 3, 6, 2]


def test_equal_embeddings_rank_by_number_whatever_tile_they_are_in():
    """Copies of an item are no better than it is, and a model that says the same of everything finds what stands first."""
    texts = F.normalize(torch.randn(400, 64, generator=torch.Generator().manual_seed(0)), dim=-1)
    twice = recall(texts.repeat_interleave(2, 0), texts, [[number // 2] for number in range(800)])
    assert twice["text_to_image_recall@1"] == twice["image_to_text_recall@1"] == 1.0
    collapsed = texts[:1].expand(400, 64)
    for tile in (64, 100, 2048):
        assert ranks(collapsed, texts[1:2].expand(400, 64), [[number] for number in range(400)], tile=tile).tolist() == [
            *range(400)
        ]
    # of two equal captions of one picture the other is not a mistake
    assert ranks(texts, texts.repeat_interleave(2, 0), [[2 * n, 2 * n + 1] for n in range(400)]).tolist() == [0] * 400


def test_a_caption_of_half_the_pictures_costs_no_more_than_its_pairs():
    pictures, texts = torch.randn(6000, 4), torch.randn(3001, 4)
    own = [[0] if number < 3000 else [number - 2999] for number in range(6000)]
    with PeakBytes() as counter:
        recall(pictures, texts, own)
    assert counter.peak < 80e6


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_embeddings_that_are_not_finite_are_refused(wrong):
    good, bad = torch.ones(4, 3), torch.ones(4, 3)
    bad[2, 1] = wrong
    for queries, items, name in ((bad, good, "queries"), (good, bad, "items")):
        with pytest.raises(IntermodalError, match=f"1 of 4 {name} have embeddings that are not finite, the first is number 2"):
            ranks(queries, items, [[0]] * 4)


def test_openai_is_clips_eighty_prompts_word_for_word():
    assert len(OPENAI) == 80
    assert read_templates("openai") is OPENAI
    open_clip_or_skip()
    from open_clip.zero_shot_metadata import OPENAI_IMAGENET_TEMPLATES

    assert [template.replace("{}", "great {} shark") for template in OPENAI] == [
        made("great {} shark") for made in OPENAI_IMAGENET_TEMPLATES
    ]


def test_openai_is_the_list_of_clip_benchmark():
    package = pytest.importorskip("clip_benchmark", reason="CLIP_benchmark is not installed (make setup does it)")
    file = Path(package.__file__).parent / "datasets" / "en_zeroshot_classification_templates.json"
    assert list(OPENAI) == [line.replace("{c}", "{}") for line in json.loads(file.read_text())["imagenet1k"]]


def test_a_file_of_templates_is_read_and_checked(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("a {}\n\n  a photo of a {c}.\n", encoding="utf-8-sig")
    assert read_templates(file) == ["a {}", "a photo of a {}."]
    for text, said in (("a {}\na cat\n", r"'a cat' has no \{\}"), ("\n", "holds no template")):
        file.write_text(text)
        with pytest.raises(IntermodalError, match=said):
            read_templates(file)
    with pytest.raises(IntermodalError, match="no file of templates; give one with a template a line, or openai"):
        read_templates(tmp_path / "opnai")


def test_a_bad_template_is_told_before_the_pictures_are_embedded(tmp_path):
    model, spec = Colours(), sources_of(tmp_path, captioned=True)[0]
    with pytest.raises(IntermodalError, match=r"'a photo' has no \{\}"):
        evaluate_source(model, spec, "zeroshot", templates=["a photo"], progress=False)
    assert model.calls == 0


def test_retrieval_refuses_what_only_zero_shot_has(tmp_path):
    spec = sources_of(tmp_path, captioned=True)[0]
    for settings, said in (
        ({"templates": ["a {}"]}, "^templates: only zero-shot"),
        ({"classes": tmp_path / "names.txt", "by_class": True}, "^classes and by class: only zero-shot"),
    ):
        with pytest.raises(IntermodalError, match=said):
            evaluate_source(Colours(), spec, "retrieval", progress=False, **settings)


def numbered(tmp_path, **more):
    """A shard as CLIP_benchmark writes it: pictures and `.cls` numbers, from 0, of blue, green and red; then members of `more`."""
    members = {}
    for number, name in enumerate(sorted(PAINTS)):
        members |= {f"s{number}.png": png(PAINTS[name]), f"s{number}.cls": str(number).encode()}
    return shard(tmp_path / "w8.tar", members | {name.replace("_", "."): data for name, data in more.items()})


def test_a_class_number_is_a_line_of_the_classes(tmp_path):
    """The first line is 0, an empty one counts; also streamed, also beside names that folders have."""
    file, spec = tmp_path / "classnames.txt", numbered(tmp_path, a_png=png(PAINTS["red"]), a_cls=b"4\n")
    file.write_text("blue\ngreen\nn03\tred\n\nn05\tred\n")
    for source in (spec, f"pipe:cat {spec}"):
        found = evaluate_source(Colours(), source, "zeroshot", classes=file, templates=["a {}"], progress=False, by_class=True)
        assert (found["samples"], found["classes"], found["top-1"], found["rejected"]) == (4, 3, 1.0, 0)
        assert found["per class"]["red"]["samples"] == 2
    file.write_text("red\ngreen\nblue\n\nblue\n")  # in another order the numbers mean others
    assert evaluate_source(Colours(), spec, "zeroshot", classes=file, progress=False)["top-1"] == 0.25


def test_class_numbers_that_mean_none_are_rejects_and_captions_come_first(tmp_path):
    file = tmp_path / "classnames.txt"
    file.write_text("blue\ngreen\nred\n\n")
    bad = {"a_png": png(PAINTS["red"]), "a_cls": b"3", "b_png": png(PAINTS["red"]), "b_cls": b"-1"}
    spec = numbered(tmp_path, **bad, c_png=png(PAINTS["red"]), c_cls=b"x", d_png=png(PAINTS["red"]), d_cls=b"0", d_txt=b"red")
    for source in (spec, f"pipe:cat {spec}"):
        found = evaluate_source(Colours(), source, "zeroshot", classes=file, progress=False)
        assert (found["samples"], found["top-1"], found["rejected"]) == (4, 1.0, 3)
        reasons = [reject["reason"].partition("its .cls is ")[2] for reject in found["rejects"]]
        wanted = ["3, and line 3 of the 4 class names (the first is 0) names none", "-1, and line -1 of", "b'x' and no number"]
        assert all(reason.startswith(said) for reason, said in zip(reasons, wanted, strict=True))
    with pytest.raises(IntermodalError, match=r"none of 7|takes it as a line of --classes FILE"):
        evaluate_source(Colours(), numbered(tmp_path), "zeroshot", progress=False)
    assert open_source(spec, classes=["b", "g", "r"])[1].texts == ["g"]


def test_class_names_in_another_encoding_say_so(tmp_path):
    file = tmp_path / "names.txt"
    file.write_bytes("blue\nvert fonc\u00e9\n".encode("latin-1"))
    for read in (lambda: evaluate_source(Colours(), "none", "zeroshot", classes=file), lambda: read_templates(file)):
        with pytest.raises(IntermodalError, match=r"names\.txt:2: not UTF-8 \(byte 0xe9\); save it as UTF-8"):
            read()

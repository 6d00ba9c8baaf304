"""Stitched models of native resolution: transformers loads what we save, with equal logits; the parts keep their words."""

import json

import pytest
import torch
import transformers
from chat_files import byte_tokenizer
from test_qwen_vl import CASES, CLASSES, clips_of, theirs
from test_qwen_vl import made as made  # a fixture
from typer.testing import CliRunner

import intermodal
from intermodal.cli.app import app
from intermodal.errors import IntermodalError
from intermodal.inputs.image import ImageProcessor, NaflexProcessor
from intermodal.inputs.processor import PairProcessor
from intermodal.models.clip import CLIP, DualConfig, SigLIP, initialise
from intermodal.models.decoder import DecoderConfig
from intermodal.models.generative import LanguageModel
from intermodal.models.text import TextConfig
from intermodal.models.vit import VisionConfig
from intermodal.weights.stitch import CHATML
from intermodal.weights.stitch_native import stitch_native

SHAPE = dict(width=64, depth=2, heads=4, kv_heads=2, head_width=16, mlp_width=96, vocab_size=261, context=2000)


def decoder(folder, qk_norm=False, **more):
    torch.manual_seed(1)
    model = LanguageModel(DecoderConfig(**{**SHAPE, "qk_norm": qk_norm, **more}), "qwen3" if qk_norm else "llama")
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.2) if parameter.ndim > 1 else parameter.data.normal_(1, 0.1)
    intermodal.save(model, folder)
    byte_tokenizer(("<|im_start|>", "<|im_end|>")).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>", "chat_template": CHATML}))
    return intermodal.load(folder)


def siglip(naflex=False, **more):
    shape = {"image_size": 40, "patch_size": 8, "activation": "gelu_pytorch_tanh", "norm_eps": 1e-6, **more}
    vision = VisionConfig(48, 3, 4, 80, **shape)
    text = TextConfig(16, 1, 2, 32, vocab_size=40, context=8, eos_id=1)
    model = initialise(SigLIP(DualConfig(vision, text, 48, naflex=naflex)))
    for parameter in model.parameters():
        parameter.data += torch.randn_like(parameter) * 0.1
    model.processor = PairProcessor(NaflexProcessor(8, 64) if naflex else ImageProcessor((vision.image_size,) * 2), None, "siglip")
    return model


def parts(kind, made, tmp_path):
    """(tower's model, decoder, deepstack) for each shape."""
    torch.manual_seed(0)
    if kind.startswith("siglip"):
        return siglip("naflex" in kind), decoder(tmp_path, qk_norm=True), (0, 2)
    tower = intermodal.load(made(kind)[0])
    return tower, decoder(tmp_path, qk_norm=kind == "qwen3_vl"), None


@pytest.mark.parametrize("kind", ["siglip", "siglip naflex", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_transformers_loads_what_is_stitched(kind, made, tmp_path):
    vision, language, deepstack = parts(kind, made, tmp_path / "text")
    model = stitch_native(vision, language, deepstack=deepstack)
    folder = intermodal.save(model, tmp_path / "stitched")
    reference = CLASSES[model.family][1].from_pretrained(folder).eval()
    again = intermodal.load(folder)
    for case in ("no image", "three images of odd sizes", "image and video"):
        batch = again.processor(CASES[case])
        logits, _ = theirs(model.family, reference, batch, clips_of(CASES[case]))
        with torch.no_grad():
            torch.testing.assert_close(again(batch), logits, atol=1e-4, rtol=0)
            torch.testing.assert_close(again(batch), model(model.processor(CASES[case])), atol=1e-6, rtol=0)
    # words alone are said as before
    talk = [{"role": "user", "content": "How are you?"}, {"role": "assistant", "content": "Fine."}]
    words = language.config.vocab_size
    torch.testing.assert_close(again.logits(talk)[:, :words], language.logits(talk), atol=1e-5, rtol=0)
    pictures = transformers.models.qwen2_vl.image_processing_pil_qwen2_vl.Qwen2VLImageProcessorPil.from_pretrained(folder)
    image = CASES["one image"][0]["content"][0]["image"]
    mine = again.processor.planner.pixels([image], [again.processor.planner.plan(image, 1)])
    torch.testing.assert_close(mine, pictures(images=image, return_tensors="pt")["pixel_values"], atol=1e-6, rtol=0)


def test_a_siglip_towers_patches_and_positions_are_taken_over(tmp_path):
    """Only the rotation inside the blocks is new. The two kinds of towers lay a patch out differently; ours are Qwen's."""
    image = CASES["one image"][0]["content"][0]["image"].resize((40, 40))
    language = decoder(tmp_path, qk_norm=True)
    for source in (siglip(), siglip(naflex=True)):
        model = stitch_native(source, language, merge=1)
        planner = model.processor.planner
        plan = planner.plan(image, 1)
        visual = planner.visual([plan], planner.pixels([image], [plan]))
        assert visual.grids == ((1, 5, 5),)
        wanted = NaflexProcessor(8, 25)([image]) if source.config.naflex else ImageProcessor((40, 40))([image])
        expected, _ = source.vision.tokens(wanted)
        got = model.visual.patch_embed(visual.pixels) + model.visual.learned_positions(visual.grids)
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)
        assert torch.equal(model.visual.merger.norm.weight, source.vision.post_layernorm.weight)


def test_what_does_not_fit_is_refused(made, tmp_path):
    plain, third = decoder(tmp_path / "a"), decoder(tmp_path / "b", qk_norm=True)
    with pytest.raises(IntermodalError, match=r"Qwen3's norm.*connector=mlp"):
        stitch_native(siglip(), plain)
    second = intermodal.load(made("qwen2_vl")[0])
    with pytest.raises(IntermodalError, match="no norm on queries"):
        stitch_native(second, third)
    with pytest.raises(IntermodalError, match="has no place for it"):
        stitch_native(second, plain, deepstack=(0,))
    with pytest.raises(IntermodalError, match="rising order"):
        stitch_native(siglip(), third, deepstack=(2, 0))
    with pytest.raises(IntermodalError, match="eps 1e-05"):
        stitch_native(siglip(norm_eps=1e-5), third)
    clip = CLIP(DualConfig(VisionConfig(48, 2, 4, 80, image_size=40, patch_size=8), TextConfig(16, 1, 2, 32, vocab_size=40), 32))
    with pytest.raises(IntermodalError, match="does not fit a merger"):
        stitch_native(clip, third)


def test_the_verb(made, tmp_path):
    decoder(tmp_path / "text")
    arguments = [
        "stitch",
        "--vision",
        str(made("qwen2_vl")[0]),
        "--language",
        str(tmp_path / "text"),
        "--out",
        str(tmp_path / "out"),
    ]
    done = CliRunner().invoke(app, [*arguments, "--connector", "merger"])
    assert done.exit_code == 0, done.output
    assert "qwen2_vl of" in done.output
    for extra, message in (
        (["--connector", "qformer"], "unknown connector"),
        (["--deepstack", "1"], "goes with --connector merger"),
        (["--connector", "merger", "--deepstack", "a,b"], "numbers of blocks"),
    ):
        assert message in str(CliRunner().invoke(app, [*arguments, *extra]).exception)

"""`load(dir, image_size=...)`: positions resampled bicubic with antialias, the class row apart, and nothing else changed."""

import json

import hf_checkpoints as hf
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import intermodal
from intermodal.batch import Images

KEY = "vision_model.embeddings.position_embedding.weight"
SIZES = [("clip-quick-7", 50), ("clip-quick-7", 15), ("clip-gelu-14", 84), ("clip-gelu-14", 29), ("clip-legacy-eos", 97)]
SIGLIP_SIZES = [("siglip-tanh-14", 84), ("siglip-tanh-14", 29), ("siglip-gelu-7", 48)]


def resampled(table: torch.Tensor, before: int, after: int, prefix: int) -> torch.Tensor:
    """The table for another grid, channel by channel."""
    grid = table[prefix:].T.reshape(table.shape[1], 1, before, before)
    out = F.interpolate(grid, (after, after), mode="bicubic", align_corners=False, antialias=True)
    return torch.cat([table[:prefix], out.reshape(table.shape[1], after * after).T])


def expected(case: str, folder, model, size: int) -> torch.Tensor:
    vision = model.config.vision_config
    prefix = 1 if hf.family_of(case) == "clip" else 0
    table = load_file(folder / "model.safetensors")[KEY]
    return resampled(table, vision.image_size // vision.patch_size, size // vision.patch_size, prefix)


@pytest.mark.parametrize(("case", "size"), [*SIZES, *SIGLIP_SIZES])
def test_positions_are_resampled_and_nothing_else(case, size, checkpoint, tmp_path):
    folder, model = checkpoint(case)
    saved = load_file(intermodal.save(intermodal.load(folder, image_size=size), tmp_path) / "model.safetensors")
    before = load_file(folder / "model.safetensors")
    want = expected(case, folder, model, size)
    assert saved[KEY].shape == want.shape != before[KEY].shape
    assert hf.distance(saved[KEY], want) <= 1e-6
    assert saved.keys() == before.keys()
    assert all(torch.equal(saved[key], value) for key, value in before.items() if key != KEY)
    if hf.family_of(case) == "clip":
        assert torch.equal(saved[KEY][0], before[KEY][0])


@pytest.mark.parametrize(("case", "size"), [("clip-gelu-14", 29), ("siglip-tanh-14", 29)])
def test_antialias_matters_when_the_table_shrinks(case, size, checkpoint):
    """Guards the reference: without antialias, or bilinear, the numbers are far from those asked for."""
    folder, model = checkpoint(case)
    vision = model.config.vision_config
    prefix = 1 if hf.family_of(case) == "clip" else 0
    table = load_file(folder / "model.safetensors")[KEY]
    side = vision.image_size // vision.patch_size
    grid = table[prefix:].T.reshape(1, -1, side, side)
    want = expected(case, folder, model, size)[prefix:]
    for mode, antialias in (("bicubic", False), ("bilinear", True)):
        other = F.interpolate(grid, (size // vision.patch_size,) * 2, mode=mode, align_corners=False, antialias=antialias)
        assert hf.distance(other[0].flatten(1).T, want) > 1e-2


@pytest.mark.parametrize(("case", "size"), [*SIZES, *SIGLIP_SIZES])
def test_embeddings_at_the_new_size_equal_transformers_with_that_table(case, size, checkpoint, tmp_path):
    folder, model = checkpoint(case)
    config = json.loads(json.dumps(hf.CASES[case][1]))
    config["vision_config"]["image_size"] = size
    family = hf.family_of(case)
    larger = hf.MODELS[family](hf.CONFIGS[family](**config))
    state = {**model.state_dict(), KEY: expected(case, folder, model, size)}
    larger.load_state_dict({key: value for key, value in state.items() if not key.endswith("position_ids")}, strict=False)
    pixels = torch.empty(4, 3, size, size).normal_(generator=torch.Generator().manual_seed(0))
    ours = intermodal.load(folder, image_size=size)
    with torch.no_grad():
        want = larger.eval().get_image_features(pixels).pooler_output
        got = ours.encode_images(Images(pixels))
    assert ((got - want).norm(dim=-1) / want.norm(dim=-1)).max() <= hf.TOLERANCE
    saved = intermodal.save(ours, tmp_path)
    with torch.no_grad():
        again = hf.MODELS[family].from_pretrained(saved).eval().get_image_features(pixels).pooler_output
    assert ((again - want).norm(dim=-1) / want.norm(dim=-1)).max() <= hf.TOLERANCE


def test_clip_growing_by_interpolation_keeps_smooth_tables_smooth(tmp_path):
    """A table that is linear in row and column stays so away from the border: rows and columns are not swapped."""
    model = hf.build("clip-quick-7")
    width = model.config.vision_config.hidden_size
    row, column = torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij")
    with torch.no_grad():
        weight = model.vision_model.embeddings.position_embedding.weight
        weight[0] = 77.0
        weight[1:] = (row + 10 * column).reshape(16, 1).expand(16, width)
    model.save_pretrained(tmp_path / "model")
    table = load_file(
        intermodal.save(intermodal.load(tmp_path / "model", image_size=56), tmp_path / "saved") / "model.safetensors"
    )[KEY]
    assert torch.equal(table[0], torch.full((width,), 77.0))
    grid = table[1:, 0].reshape(8, 8)
    assert hf.distance(grid[4, 3] - grid[3, 3], torch.tensor(0.5)) < 0.05
    assert hf.distance(grid[3, 4] - grid[3, 3], torch.tensor(5.0)) < 0.5


@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_pictures_are_prepared_for_the_new_size(family, whole):
    folder, _, images, _ = whole(family)
    ours = intermodal.load(folder, image_size=43)
    square = {"height": 43, "width": 43}
    recipe = {"size": {"shortest_edge": 43}, "crop_size": square} if family == "clip" else {"size": square}
    pictures = hf.pictures(4, seed=3)
    want = type(images)(**recipe)(pictures, return_tensors="pt").pixel_values
    assert hf.distance(ours.processor.images(pictures).pixels, want) <= 1e-6
    assert ours.embed_images(pictures).shape == (4, ours.config.embed_width)


@pytest.mark.parametrize("case", ["clip-quick-7", "siglip-gelu-7"])
def test_the_models_own_size_changes_nothing(case, checkpoint, tmp_path):
    folder, model = checkpoint(case)
    same = intermodal.load(folder, image_size=model.config.vision_config.image_size)
    saved = load_file(intermodal.save(same, tmp_path) / "model.safetensors")
    before = load_file(folder / "model.safetensors")
    assert saved.keys() == before.keys()
    assert all(torch.equal(saved[key], value) for key, value in before.items())


@pytest.mark.parametrize("case", ["clip-quick-7", "siglip-gelu-7"])
def test_pixels_of_another_size_are_refused(case, checkpoint):
    model = intermodal.load(checkpoint(case)[0])
    side = model.config.vision.image_size
    for shape in ((1, 3, side + 7, side + 7), (1, 3, side, side + 1), (1, 1, side, side)):
        with pytest.raises(ValueError, match="shape"):
            model.encode_images(Images(torch.zeros(shape)))


def test_a_naflex_tower_refuses_an_image_size(checkpoint):
    with pytest.raises(intermodal.weights.load.CheckpointError, match="image_size"):
        intermodal.load(checkpoint("siglip2-gelu-7")[0], image_size=70)

"""`save(load(x))` is x, key for key and bit for bit, and transformers reads it with the same answers."""

import json

import hf_checkpoints as hf
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import intermodal
from intermodal.batch import Images, Texts


def tensors(folder) -> dict[str, torch.Tensor]:
    return {key: value for path in sorted(folder.glob("*.safetensors")) for key, value in load_file(path).items()}


def assert_same_tensors(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for key, value in a.items():
        assert value.dtype == b[key].dtype, key
        assert value.shape == b[key].shape, key
        assert (
            value.contiguous().view(torch.uint8).equal(b[key].contiguous().view(torch.uint8)) if value.ndim else value == b[key]
        ), key


def image_inputs(case: str) -> dict[str, torch.Tensor]:
    if hf.family_of(case) != "siglip2":
        return {"pixel_values": hf.random_pixels(case, 3)}
    patch = hf.CASES[case][1]["vision_config"]["patch_size"]
    values = torch.empty(3, 12, 3 * patch * patch).normal_(generator=torch.Generator().manual_seed(4))
    return {
        "pixel_values": values,
        "pixel_attention_mask": torch.ones(3, 12),
        "spatial_shapes": torch.tensor([[3, 4], [12, 1], [2, 6]]),
    }


def their_logits(folder, case: str, **options) -> torch.Tensor:
    """What transformers makes of a directory. Every key of it must be used, and none be missing."""
    model, info = hf.MODELS[hf.family_of(case)].from_pretrained(folder, output_loading_info=True, **options)
    assert not any(info.get(kind) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    return hf.reference(model.eval(), hf.random_texts(case, 4), **image_inputs(case)).logits_per_image


@pytest.mark.parametrize("case", hf.CASES)
def test_saved_tensors_are_the_loaded_ones(case, checkpoint, tmp_path):
    folder, _ = checkpoint(case)
    saved = intermodal.save(intermodal.load(folder), tmp_path)
    assert_same_tensors(tensors(saved), tensors(folder))


@pytest.mark.parametrize("case", hf.CASES)
def test_transformers_loads_what_was_saved_with_equal_logits(case, checkpoint, tmp_path):
    folder, _ = checkpoint(case)
    saved = intermodal.save(intermodal.load(folder), tmp_path)
    assert torch.equal(their_logits(saved, case), their_logits(folder, case))


@pytest.mark.parametrize("case", hf.CASES)
def test_saved_config_says_the_same_to_transformers(case, checkpoint, tmp_path):
    folder, _ = checkpoint(case)
    saved = intermodal.save(intermodal.load(folder), tmp_path)
    kind = hf.CONFIGS[hf.family_of(case)]
    before, after = (kind.from_pretrained(path).to_dict() for path in (folder, saved))
    for config in (before, after):
        config.pop("_name_or_path", None)
    assert after == before


def test_saved_config_keeps_what_the_library_does_not_model(checkpoint, tmp_path):
    folder = hf.copy(checkpoint("clip-quick-7")[0], tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config.update(my_note="kept", initializer_factor=0.5)
    config["vision_config"]["attention_dropout"] = 0.25
    (folder / "config.json").write_text(json.dumps(config))
    after = json.loads((intermodal.save(intermodal.load(folder), tmp_path / "saved") / "config.json").read_text())
    assert (after["my_note"], after["initializer_factor"], after["vision_config"]["attention_dropout"]) == ("kept", 0.5, 0.25)


@pytest.mark.parametrize("case", ["clip-quick-7", "siglip-gelu-7", "siglip2-gelu-7"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_checkpoints_round_trip_in_their_dtype(dtype, case, checkpoint, tmp_path):
    kind = getattr(torch, dtype)
    half = hf.build(case).to(kind)
    half.save_pretrained(tmp_path / "half")
    model = intermodal.load(tmp_path / "half", dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {kind}
    saved = intermodal.save(model, tmp_path / "saved")
    assert_same_tensors(tensors(saved), tensors(tmp_path / "half"))
    assert json.loads((saved / "config.json").read_text())["dtype"] == dtype
    again = hf.MODELS[hf.family_of(case)].from_pretrained(saved, dtype="auto")
    assert again.dtype == kind


@pytest.mark.parametrize("case", ["clip-quick-7", "siglip-gelu-7", "siglip2-gelu-7"])
def test_half_precision_checkpoints_load_in_float32_by_default(case, tmp_path):
    half = hf.build(case).to(torch.bfloat16)
    half.save_pretrained(tmp_path / "half")
    saved = intermodal.save(intermodal.load(tmp_path / "half"), tmp_path / "saved")
    assert_same_tensors(tensors(saved), {key: value.float() for key, value in tensors(tmp_path / "half").items()})


@pytest.mark.parametrize("case", ["clip-gelu-14", "siglip-tanh-14", "siglip2-tanh-16"])
def test_sharded_checkpoints_of_transformers_load(case, checkpoint, tmp_path):
    folder, model = checkpoint(case)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="50KB")
    assert len(list((tmp_path / "sharded").glob("model-*-of-*.safetensors"))) > 2
    assert not (tmp_path / "sharded" / "model.safetensors").exists()
    saved = intermodal.save(intermodal.load(tmp_path / "sharded"), tmp_path / "saved")
    assert_same_tensors(tensors(saved), tensors(folder))


@pytest.mark.parametrize("case", ["clip-gelu-14", "siglip-tanh-14", "siglip2-tanh-16"])
def test_our_shards_load_in_transformers(case, checkpoint, tmp_path):
    folder, _ = checkpoint(case)
    saved = intermodal.save(intermodal.load(folder), tmp_path, shard_bytes=40_000)
    shards = sorted(saved.glob("*.safetensors"))
    assert len(shards) > 2
    assert not (saved / "model.safetensors").exists()
    assert torch.equal(their_logits(saved, case), their_logits(folder, case))
    assert_same_tensors(tensors(saved), tensors(folder))
    index = json.loads((saved / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(value.numel() * value.element_size() for value in tensors(folder).values())
    for path in shards:
        with safe_open(path, "pt") as file:
            assert file.metadata() == {"format": "pt"}
            keys = list(file.keys())
            assert {index["weight_map"][key] for key in keys} == {path.name}
            sizes = [file.get_tensor(key).nbytes for key in keys]
        assert sum(sizes) <= 40_000 or len(sizes) == 1
    again = intermodal.save(intermodal.load(saved), tmp_path / "again")
    assert_same_tensors(tensors(again), tensors(folder))


@pytest.mark.parametrize("first", [5_000_000_000, 40_000])
@pytest.mark.parametrize("second", [5_000_000_000, 40_000, 70_000])
def test_saving_over_a_directory_replaces_its_weights(first, second, checkpoint, tmp_path):
    """Whatever number of shards was there before, what is read afterwards, here and in transformers, is what was saved last."""
    case = "clip-gelu-14"
    model = intermodal.load(checkpoint(case)[0])
    intermodal.save(model, tmp_path, shard_bytes=first)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    wanted = {key: value.clone() for key, value in model.state_dict().items()}
    intermodal.save(model, tmp_path, shard_bytes=second)
    read = intermodal.load(tmp_path).state_dict()
    assert all(torch.equal(read[key], value) for key, value in wanted.items())
    theirs = hf.CLIPModel.from_pretrained(tmp_path).visual_projection.weight
    assert torch.equal(theirs, wanted["visual_projection.weight"])


@pytest.mark.parametrize("family", hf.FAMILIES)
def test_whole_directory_round_trips_with_processor_and_tokenizer(family, whole, tmp_path):
    folder, model, images, tokenizer = whole(family)
    saved = intermodal.save(intermodal.load(folder), tmp_path)
    theirs = hf.MODELS[family].from_pretrained(saved).eval()
    pictures, texts = hf.pictures(4, seed=2), ["a photo of a cat", "birds", "CAFÉ"]
    again = (type(images).from_pretrained(saved), type(tokenizer).from_pretrained(saved))
    got = hf.end_to_end(family, theirs, *again, pictures, texts).logits_per_image
    assert torch.equal(got, hf.end_to_end(family, model, images, tokenizer, pictures, texts).logits_per_image)


@pytest.mark.parametrize("family", hf.FAMILIES)
def test_saving_into_the_directory_that_was_loaded_keeps_it(family, whole, tmp_path):
    folder = hf.copy(whole(family)[0], tmp_path / "model")
    before = tensors(folder)
    model = intermodal.load(folder)
    logits = model.logits(hf.pictures(2), ["a cat"])
    intermodal.save(model, folder)
    assert_same_tensors(tensors(folder), before)
    assert torch.equal(intermodal.load(folder).logits(hf.pictures(2), ["a cat"]), logits)


def test_changed_weights_are_saved_and_the_source_file_is_not(checkpoint, tmp_path):
    folder, _ = checkpoint("siglip-gelu-7")
    before = tensors(folder)
    model = intermodal.load(folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    saved = tensors(intermodal.save(model, tmp_path))
    assert all(torch.equal(saved[key], value + 1) for key, value in before.items())
    assert_same_tensors(tensors(folder), before)


@pytest.mark.parametrize("case", ["clip-quick-7", "siglip-gelu-7", "siglip2-gelu-7"])
def test_position_ids_of_old_files_are_accepted_and_not_written(case, checkpoint, tmp_path):
    folder = hf.copy(checkpoint(case)[0], tmp_path / "model")
    state = tensors(folder)
    old = {f"{side}_model.embeddings.position_ids": torch.arange(9)[None] for side in ("vision", "text")}
    save_file({**state, **old}, folder / "model.safetensors", metadata={"format": "pt"})
    assert_same_tensors(tensors(intermodal.save(intermodal.load(folder), tmp_path / "saved")), state)


@pytest.mark.parametrize("case", ["clip-quick-7", "siglip-gelu-7", "siglip2-gelu-7"])
def test_torch_pickles_load_to_the_same_weights(case, checkpoint, tmp_path):
    folder = hf.copy(checkpoint(case)[0], tmp_path / "model")
    state = tensors(folder)
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    assert_same_tensors(tensors(intermodal.save(intermodal.load(folder), tmp_path / "saved")), state)


@pytest.mark.parametrize("case", ["clip-quick-7", "siglip-gelu-7"])
def test_loaded_models_are_trainable_and_in_eval_mode(case, checkpoint):
    model = intermodal.load(checkpoint(case)[0])
    assert not model.training
    image = model.encode_images(Images(hf.random_pixels(case, 2)))
    text = model.encode_texts(Texts.pack(hf.random_texts(case, 2)))
    bias = 0 if model.logit_bias is None else model.logit_bias
    (
        (image @ model.encode_images(Images(hf.random_pixels(case, 2, seed=8))).T).sum() * model.logit_scale + text.sum() + bias
    ).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())

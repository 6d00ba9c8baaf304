"""The verbs that make one checkpoint from others: `convert`, `stitch`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from .options import Json, Out, say


def convert(
    source: Annotated[str, typer.Argument(help="A directory or hub id in any readable layout.")],
    target: Annotated[Path, typer.Argument(help="The directory to write.")],
    layout: Annotated[str, typer.Option(help="`hf` (transformers) or `open_clip`.")] = "hf",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    image_size: Annotated[int | None, typer.Option(min=1, help="Resample the positions for pictures of this side.")] = None,
    vq_decoder: Annotated[
        Path | None,
        typer.Option(
            help="Chameleon only: add the decoder that draws, of the authors' tokenizer folder (vqgan.yaml and vqgan.ckpt) or a VQ-VAE's."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Rewrite a checkpoint in another layout, type or image size, or with a decoder for its picture codes.

    Examples:

    `intermodal convert open_clip_dir hf_dir --layout hf`

    `intermodal convert chameleon-7b chameleon-7b-draws --vq-decoder tokenizer/ --dtype bfloat16`
    """
    from ..weights.load import load, save

    model = load(source, dtype=dtype, image_size=image_size)
    if vq_decoder is not None:
        _add_decoder(model, source, vq_decoder)
    save(model, target, layout=layout)
    count = sum(p.numel() for p in model.parameters())
    say(
        {"out": str(target), "model": type(model).__name__, "parameters": count, "layout": layout},
        as_json,
        f"{target}: {type(model).__name__}, {count:,} parameters, layout {layout}",
    )


def _add_decoder(model: Any, source: str, where: Path) -> None:
    """Give a Chameleon the decoder of the VQ-VAE at `where`, if it is the one whose encoder the model has.

    Raises:
        IntermodalError: the model is no Chameleon, there is no VQ-VAE, or it is another one.
    """
    from ..errors import IntermodalError
    from ..models.chameleon import Chameleon
    from ..models.vqvae import VQVAE
    from ..weights.chameleon import attach_decoder
    from ..weights.load import load
    from ..weights.vqgan import CKPT, YAML, read_authors

    if not isinstance(model, Chameleon):
        raise IntermodalError(
            f"{source} is a {type(model).__name__}: --vq-decoder goes with a Chameleon, whose words include picture codes"
        )
    folder = where.parent if where.name in (CKPT, YAML) else where
    vq = read_authors(folder) if (folder / YAML).exists() or (folder / CKPT).exists() else load(folder)
    if not isinstance(vq, VQVAE):
        raise IntermodalError(f"--vq-decoder {where} is a {type(vq).__name__}; a VQ-VAE is wanted")
    try:
        attach_decoder(model, vq)
    except IntermodalError as error:
        raise IntermodalError(f"--vq-decoder {where}: {error}") from error


def stitch(
    vision: Annotated[str, typer.Option(help="A CLIP, SigLIP or Qwen-VL model: its tower and image processor are taken.")],
    language: Annotated[str, typer.Option(help="A decoder's directory, hub id or GGUF file, with a chat template.")],
    out: Out = Path("stitched"),
    connector: Annotated[
        str,
        typer.Option(
            help="mlp: LLaVA's, fixed-size towers; resampler: Idefics2's, fixed-size SigLIP; merger: Qwen-VL's, native resolution."
        ),
    ] = "mlp",
    layer: Annotated[
        int | None, typer.Option(help="mlp: hidden state of the tower that is read; by default LLaVA's choice.")
    ] = None,
    anyres: Annotated[
        str | None, typer.Option(help="mlp: grids of tiles that pictures may be cut into, down x across: 1x2,2x1,2x2 (LLaVA-NeXT).")
    ] = None,
    onevision: Annotated[
        bool,
        typer.Option(
            "--onevision", help="mlp: LLaVA-OneVision, which reads clips too; with its own grids where --anyres has none."
        ),
    ] = False,
    latents: Annotated[int | None, typer.Option(min=1, help="resampler: tokens of a picture, 64 by default.")] = None,
    deepstack: Annotated[str | None, typer.Option(help="merger: blocks that also reach the decoder's first layers, 2,5,8.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of the projector's weights.")] = 0,
    as_json: Json = False,
) -> None:
    """Make a stitched model from a tower and a decoder, with a fresh connector between them, to be trained in stages.

    Examples:

    `intermodal stitch --vision openai/clip-vit-large-patch14-336 --language lmsys/vicuna-7b-v1.5 --out fresh-llava`

    `intermodal stitch --vision google/siglip2-base-patch16-384 --language Qwen/Qwen3-0.6B --anyres 1x2,2x1,2x2,1x3,3x1`

    `intermodal stitch --vision google/siglip-so400m-patch14-384 --language Qwen/Qwen2-0.5B-Instruct --onevision`

    `intermodal stitch --vision google/siglip-so400m-patch14-384 --language Qwen/Qwen3-0.6B --connector resampler --latents 64`

    `intermodal stitch --vision google/siglip2-base-patch16-naflex --language Qwen/Qwen3-0.6B --connector merger --deepstack 2,5,8`
    """
    from ..weights.load import save

    _check_connector(
        connector,
        mlp={"layer": layer, "anyres": anyres, "onevision": onevision or None},
        resampler={"latents": latents},
        merger={"deepstack": deepstack},
    )
    if connector == "mlp":
        model = _with_mlp(vision, language, dtype, layer=layer, anyres=_grids(anyres), onevision=onevision, seed=seed)
    elif connector == "resampler":
        model = _with_resampler(vision, language, dtype, latents=latents or 64, seed=seed)
    else:
        model = _with_merger(vision, language, dtype, deepstack=_blocks(deepstack), seed=seed)
    save(model, out)
    count = sum(p.numel() for p in model.parameters())
    say(
        {"out": str(out), "family": model.family, "parameters": count},
        as_json,
        f"{out}: {model.family} of {count:,} parameters; its connector knows nothing yet: train it with model.start={out}",
    )


def _check_connector(connector: str, **options: dict[str, Any]) -> None:
    """Refuse a connector that does not exist, and an option of another connector than the chosen one."""
    from ..errors import IntermodalError, nearest

    if connector not in options:
        raise IntermodalError(f"unknown connector {connector!r}: {', '.join(options)}{nearest(connector, options)}")
    for owner, values in options.items():
        given = [name for name, value in values.items() if value is not None]
        if given and owner != connector:
            raise IntermodalError(f"--{given[0]} goes with --connector {owner}")


def _grids(text: str | None) -> list[tuple[int, int]]:
    """`1x2,2x1` as (down, across) tiles."""
    from ..errors import IntermodalError

    if text is None:
        return []
    if not re.fullmatch(r"[1-9]\d*x[1-9]\d*(,[1-9]\d*x[1-9]\d*)*", text):
        raise IntermodalError(f"--anyres takes grids of tiles like 1x2,2x1,2x2, got {text!r}")
    sides = [grid.split("x") for grid in text.split(",")]
    return [(int(down), int(across)) for down, across in sides]


def _blocks(text: str | None) -> tuple[int, ...] | None:
    """`2,5,8` as numbers of blocks; None where nothing was said."""
    from ..errors import IntermodalError

    try:
        return tuple(int(block) for block in text.split(",") if block) if text is not None else None
    except ValueError:
        raise IntermodalError(f"--deepstack takes numbers of blocks with commas between, got {text!r}") from None


def _decoder(language: str, dtype: str) -> Any:
    from ..errors import IntermodalError
    from ..models.generative import LanguageModel
    from ..weights.load import load

    decoder = load(language, dtype=dtype)
    if not isinstance(decoder, LanguageModel):
        raise IntermodalError(f"{language} is a {type(decoder).__name__}; --language wants a text-only decoder")
    return decoder


def _with_mlp(vision: str, language: str, dtype: str, **settings: Any) -> Any:
    from ..weights.load import load_encoder
    from ..weights.stitch import stitch as join

    decoder = _decoder(language, dtype)
    return join(load_encoder(vision, dtype=dtype), decoder, **settings)


def _with_resampler(vision: str, language: str, dtype: str, **settings: Any) -> Any:
    from ..weights.load import load_encoder
    from ..weights.stitch_resampler import stitch_resampler

    decoder = _decoder(language, dtype)
    return stitch_resampler(load_encoder(vision, dtype=dtype), decoder, **settings)


def _with_merger(vision: str, language: str, dtype: str, **settings: Any) -> Any:
    from ..errors import IntermodalError
    from ..models.clip import DualEncoder
    from ..models.qwen2_vl import QwenVL
    from ..weights.load import load
    from ..weights.stitch_native import stitch_native

    decoder, eyes = _decoder(language, dtype), load(vision, dtype=dtype)
    if not isinstance(eyes, DualEncoder | QwenVL):
        raise IntermodalError(
            f"{vision} is a {type(eyes).__name__}: --connector merger takes the tower of a SigLIP or Qwen-VL model"
        )
    return stitch_native(eyes, decoder, **settings)

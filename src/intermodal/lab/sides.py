"""The two sides of a comparison: their recipes as they will be trained, what would go wrong with them, and what tells one comparison from
another."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..config import from_dict, override, to_dict
from ..errors import IntermodalError
from ..files import read_json, write_whole
from ..train.recipe import NativeConfig, Recipe, StagedRecipe, StitchConfig, VQRecipe, load_recipe

EYES = "eyes"
"""As `model.vision` or `model.vq`: trained first, from the comparison's recipe for it, within the run's time."""
RECIPES = Path(__file__).parents[3] / "recipes"
EYES_RECIPES = {"stitched": RECIPES / "compare_siglip.py", "native": RECIPES / "compare_vqvae.py"}
MEASURES = 2
"""Of what a run's result.json holds: raised when that changes, and runs of an older one are measured again, not trained again."""
SHOWN_CHANGES = 5
"""How many settings are named when a folder holds another comparison."""
NOT_THERE = "not there"


@dataclass(frozen=True)
class Settings:
    seconds: float = 300.0
    """Training time of a run: eyes and decoder together."""
    seeds: int = 3
    questions: int = 60
    """Of each kind, and as many captions."""
    signs: int = 40
    """Of each height."""
    heights: tuple[int, ...] = (8, 10, 12, 14, 17, 20)
    """Font sizes in pixels of the signs that are to be read."""
    read_out: tuple[int, int] = (800, 200)
    """Pictures that the linear read-out is fitted on, and tested on."""
    drawn: int = 48
    """Held-out captions that a model which draws is to draw."""
    judge_steps: int = 500
    steps: int | None = None
    """Train the eyes and every stage exactly this many steps instead of fitting them to `seconds`."""


@dataclass(frozen=True)
class Side:
    """One of the two that are compared: a recipe file with stages, and settings of it by dotted path (`stages.fuse.optim.lr=1e-3`)."""

    recipe: Path
    overrides: tuple[str, ...] = ()

    def load(self, tiny: bool) -> StagedRecipe:
        """Raises IntermodalError: the recipe has no stages of conversations. Raises SettingError: an override that does not fit."""
        made = load_recipe(self.recipe, tiny=tiny)
        if not isinstance(made, StagedRecipe):
            raise IntermodalError(
                f"{self.recipe} is a {type(made).__name__}; only recipes with stages can be compared by what they answer"
            )
        made = override(made, self.overrides)
        if not made.stages:
            raise IntermodalError(f"{self.recipe} has no stages: there is nothing to train")
        return made


@dataclass(frozen=True)
class Entry:
    """A side with its recipes read once: files may be edited while a comparison runs, and every seed trains the same."""

    name: str
    recipe: StagedRecipe
    eyes: Recipe | VQRecipe | None
    """Recipe of the tower or VQ-VAE that is trained first; None where the model has one."""
    option: str = "--set-first"
    """Of the command line, for settings of this side: what a message advises."""


def eyes_setting(model: StitchConfig | NativeConfig) -> tuple[str, str]:
    """(name of the setting that says where the eyes are, its value)."""
    return ("vq", model.vq) if isinstance(model, NativeConfig) else ("vision", model.vision)


def with_eyes_at(recipe: StagedRecipe, folder: Path) -> StagedRecipe:
    """The recipe, its eyes a model in a folder."""
    name, _ = eyes_setting(recipe.model)
    return replace(recipe, model=replace(recipe.model, **{name: str(folder)}))


def entries(sides: Sequence[Side], eyes: Mapping[str, Path | None], tiny: bool) -> list[Entry]:
    """Both sides with all their recipes read.

    Args:
        eyes: recipe files for the eyes of "stitched" and "native" sides; None takes the project's.

    Raises:
        IntermodalError: a recipe of the wrong kind, or one for eyes that neither side asks for.
        SettingError: an override that does not fit its recipe.
    """
    recipes = [side.load(tiny) for side in sides]
    names = [recipe.name.replace("/", "-") for recipe in recipes]  # of folders: a slash would put a run into another one
    if names[0] == names[1]:
        names = [f"{names[0]}-{number}" for number in (1, 2)]
    kinds = [_eyes_kind(recipe.model) for recipe in recipes]
    for kind, file in eyes.items():
        if file is not None and kind not in kinds:
            setting = "vq" if kind == "native" else "vision"
            raise IntermodalError(f"--{kind}-eyes is given, and neither side asks for it: --set-first model.{setting}={EYES}")
    return [
        Entry(name, recipe, _eyes_recipe(kind, eyes[kind] or EYES_RECIPES[kind], tiny) if kind else None, option)
        for name, recipe, kind, option in zip(names, recipes, kinds, ("--set-first", "--set-second"), strict=True)
    ]


def _eyes_kind(model: StitchConfig | NativeConfig) -> str | None:
    """Which eyes are to be trained first, if any: a model to go on from has its own."""
    if model.start is not None or eyes_setting(model)[1] != EYES:
        return None
    return "native" if isinstance(model, NativeConfig) else "stitched"


def _eyes_recipe(kind: str, file: Path, tiny: bool) -> Recipe | VQRecipe:
    made, wanted = load_recipe(file, tiny=tiny), VQRecipe if kind == "native" else Recipe
    if not isinstance(made, wanted):
        what = "a VQ-VAE's" if kind == "native" else "a CLIP's or SigLIP's"
        raise IntermodalError(f"{file} is a {type(made).__name__}; the eyes of a {kind} side want {what} ({wanted.__name__})")
    return made


def check(entry: Entry, settings: Settings) -> None:
    """Build what a run would build, with eyes that have learned nothing where they are trained first, look at its data as it would, and ask
    for what can fail of what it is asked.

    Meant for a process of its own: what it loads would count as memory of the runs.

    Raises:
        IntermodalError: names the side; says which setting of it cannot be trained, or not be asked about.
    """
    name, where = eyes_setting(entry.recipe.model)
    try:
        with tempfile.TemporaryDirectory() as folder:
            recipe = entry.recipe
            if entry.eyes is not None:
                _save_untrained(entry.eyes, Path(folder))
                recipe = with_eyes_at(recipe, Path(folder))
            _check_stages(recipe, settings)
    except IntermodalError as error:
        missing = entry.eyes is None and entry.recipe.model.start is None and not Path(where).expanduser().exists()
        hint = f" (model.{name}={where}; {entry.option} model.{name}={EYES} trains it within the run's time)" if missing else ""
        raise IntermodalError(f"{entry.name}: {error}{hint}") from error


def _save_untrained(eyes: Recipe | VQRecipe, folder: Path) -> None:
    from ..data.loader import Mixture
    from ..data.readers import open_source
    from ..models.vqvae import VQVAE, initialise
    from ..train import contrastive
    from ..weights.load import load, save

    data = eyes.data
    side = eyes.model.resolution if isinstance(eyes, VQRecipe) else eyes.model.vision.image_size
    sources = [open_source(spec, side=side, seed=data.seed, allow_urls=data.allow_urls) for spec in data.train]
    Mixture(sources, data.weights, data.seed)  # raises for weights that do not fit the sources
    if isinstance(eyes, VQRecipe):
        save(initialise(VQVAE(eyes.model)) if eyes.start is None else load(eyes.start), folder)
        return
    count = min(eyes.model.tokenizer_samples, 64)
    model = contrastive.build_model(
        eyes.model, lambda: contrastive.sample_captions(sources, data.weights, count, data.seed), eyes.train.loss
    )
    if eyes.model.start is None:
        contrastive.initialise(model, eyes.train.seed)
    save(model, folder)


def _check_stages(recipe: StagedRecipe, settings: Settings) -> None:
    from ..data.loader import Mixture
    from ..data.packing import TalkFetcher
    from ..data.talks import open_talks
    from ..train.optim import choose_learning
    from ..train.stages import build_model
    from . import measure

    sources = [open_talks(spec, seed=s.data.seed, allow_urls=s.data.allow_urls) for s in recipe.stages for spec in s.data.train]
    few = replace(recipe.model, tokenizer_samples=min(recipe.model.tokenizer_samples, 64))
    model = build_model(few, sources)
    if model.processor is None or model.processor.planner is None:
        raise IntermodalError(f"a {model.family} that sees no pictures cannot be compared by what it says of them")
    for stage in recipe.stages:
        if stage.lora is None:  # else what learns is there only once the adapters are
            choose_learning(model, stage.learn)
        data = stage.data
        side = data.side or model.picture_side
        sources = [open_talks(spec, side=side, seed=data.seed, allow_urls=data.allow_urls) for spec in data.train]
        # raises for weights that do not fit the sources
        Mixture(sources, data.weights, data.seed)  # pyright: ignore[reportArgumentType]
        TalkFetcher(sources, model.processor, data.seed, data.tokens, model.config_text.context).audit(data.max_reject_share)
    measure.tried(model.float().eval(), recipe, settings)


def claim(out: Path, both: Sequence[Entry], settings: Settings) -> None:
    """Write what is compared to `out`/settings.json. How many seeds is left out: more of them, or fewer, are the same comparison.

    A folder in which no run has come to its end holds nothing yet that other settings would spoil.

    Raises:
        IntermodalError: names what differs from the comparison that `out` holds.
    """
    asked: dict[str, Any] = {key: to_dict(entry.recipe) for key, entry in zip(("first", "second"), both, strict=True)}
    eyes = {key: to_dict(entry.eyes) for key, entry in zip(("first", "second"), both, strict=True) if entry.eyes is not None}
    rest = {name: value for name, value in asdict(settings).items() if name != "seeds"}
    asked = json.loads(json.dumps({**asked, "eyes": eyes, **rest}))
    file = out / "settings.json"
    if file.exists() and any(out.glob("*-seed*/result.json")):
        then, now = _leaves(_filled_in(read_json(file), both)), _leaves(asked)
        changed = [
            f"{name} was {_shown(then.get(name, NOT_THERE))}, and is {_shown(now.get(name, NOT_THERE))}"
            for name in dict.fromkeys([*now, *then])
            if then.get(name, NOT_THERE) != now.get(name, NOT_THERE)
        ]
        if changed:
            more = f"; and {len(changed) - SHOWN_CHANGES} more" if len(changed) > SHOWN_CHANGES else ""
            raise IntermodalError(
                f"{out} holds another comparison: {'; '.join(changed[:SHOWN_CHANGES])}{more}. Give another --out, or the old settings"
            )
    out.mkdir(parents=True, exist_ok=True)
    write_whole(file, json.dumps(asked, indent=2) + "\n")


def _filled_in(kept: dict[str, Any], both: Sequence[Entry]) -> dict[str, Any]:
    """What `claim` wrote, with the settings that recipes have got since at their defaults: what they were then, without a name."""

    def filled(values: Any, now: Any) -> Any:
        try:
            return json.loads(json.dumps(to_dict(from_dict(type(now), values))))
        except IntermodalError:  # a recipe of another kind, or with settings that are no longer there: they are named as they are
            return values

    out = {**kept, "eyes": dict(kept.get("eyes", {}))}
    for key, entry in zip(("first", "second"), both, strict=True):
        if key in kept:
            out[key] = filled(kept[key], entry.recipe)
        if key in out["eyes"] and entry.eyes is not None:
            out["eyes"][key] = filled(out["eyes"][key], entry.eyes)
    return out


def _leaves(values: dict[str, Any], path: str = "") -> dict[str, Any]:
    """Every value by its dotted path; what lists hold is found by its name where it has one (stages), as `--set-first` writes it."""
    out: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, list) and value and all(isinstance(part, dict) and "name" in part for part in value):
            value = {part["name"]: part for part in value}
        out |= _leaves(value, f"{path}{key}.") if isinstance(value, dict) else {f"{path}{key}": value}
    return out


def _shown(value: Any) -> str:
    return NOT_THERE if value == NOT_THERE else json.dumps(value)

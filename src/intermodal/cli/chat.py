"""The verbs that talk: `chat`, `generate`."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from itertools import count, takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import Guidance, ImageGuidance, ImageTemperature, ImageTopP, Json, MaxImages, Stop, Variables, say, variables_of
from .typed import COMMANDS, by_kind, command_of, content, is_missing, left_out, path_of, with_option

if TYPE_CHECKING:
    from rich.console import Console

Model = Annotated[str, typer.Argument(help="A model directory, a .gguf file or a hub id.")]
Images = Annotated[list[str] | None, typer.Option("--image", "-i", help="A picture to show; may be given several times.")]
Videos = Annotated[list[str] | None, typer.Option("--video", help="A video to show; may be given several times.")]
New = Annotated[int, typer.Option("--max-new-tokens", help="Longest reply.")]
Temperature = Annotated[float, typer.Option(help="0 is greedy.")]
Fps = Annotated[float | None, typer.Option(help="Frames a second that are read of a video; the family's rule when left out.")]
Frames = Annotated[int | None, typer.Option(help="So many frames of each video, instead.")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16 or float16.")]
System = Annotated[str | None, typer.Option(help="What the model is told before the first question.")]
ToolsFile = Annotated[
    Path | None, typer.Option("--tools", help="A JSON file: the list of schemas of what the model may call, for its chat template.")
]
TooLong = Annotated[str, typer.Option(help='What to do with a conversation that is too long: "error" or "drop_oldest" turns.')]


def generate(
    model: Model,
    prompt: Annotated[str | None, typer.Argument(help="What to say; leave it out with --jsonl.")] = None,
    image: Images = None,
    video: Videos = None,
    system: System = None,
    tools: ToolsFile = None,
    variable: Variables = None,
    jsonl: Annotated[Path | None, typer.Option(help='Conversations, one `{"messages": [...]}` a line.')] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", help="With --jsonl the file of replies, resumable; else a folder for reply.md and its pictures."
        ),
    ] = None,
    max_new_tokens: New = 256,
    temperature: Temperature = 0.0,
    top_k: Annotated[int, typer.Option(help="Keep the k likeliest tokens; 0 keeps all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Keep the smallest set with this probability.")] = 1.0,
    min_p: Annotated[float, typer.Option(help="Keep tokens at least this share as likely as the likeliest.")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1 discourages what was said.")] = 1.0,
    stop: Stop = None,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
    max_images: MaxImages = 4,
    image_temperature: ImageTemperature = 1.0,
    image_top_p: ImageTopP = 1.0,
    guidance: Guidance = 1.0,
    image_guidance: ImageGuidance = None,
    fps: Fps = None,
    frames: Frames = None,
    slots: Annotated[int, typer.Option(min=1, help="Conversations under way at once.")] = 16,
    too_long: TooLong = "error",
    dtype: Dtype = "float32",
    as_json: Json = False,
) -> None:
    """Reply once, or to a whole file of conversations.

    Examples:

    `intermodal generate Qwen2-VL-2B-Instruct "What is in the picture?" --image cat.png`

    `intermodal generate model.gguf --jsonl questions.jsonl --out replies.jsonl`

    `intermodal generate my-chameleon "draw a red apple left of a cat" --guidance 3 --out out/`
    """
    one = {"--system": system, "--tools": tools, "--image": image, "--video": video}
    _check_places(prompt, jsonl, out, [name for name, value in one.items() if value not in (None, [])])
    schemas, variables = _read_tools(tools), variables_of(variable)
    settings: dict[str, Any] = dict(
        max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
        repetition_penalty=repetition_penalty, stop=tuple(stop or ()), seed=seed, too_long=too_long, max_images=max_images,
        image_temperature=image_temperature, image_top_p=image_top_p, guidance=guidance, image_guidance=image_guidance,
    )  # fmt: skip
    _check_settings(settings)
    loaded = load_talker(model, dtype, fps, frames, variables)
    _tell_of_drawing(loaded)
    if jsonl is not None and out is not None:
        _reply_to_file(loaded, jsonl, out, slots, settings, as_json)
    else:
        messages = [*_opening(system), {"role": "user", "content": content(prompt or "", image or [], video or [])}]
        _reply_once(loaded, messages, out, settings | {"tools": schemas}, as_json)


def _check_places(prompt: str | None, jsonl: Path | None, out: Path | None, beside: list[str]) -> None:
    """Refuse, before anything is loaded, what cannot be asked or written; `beside` are the options given that belong to one prompt."""
    from ..errors import IntermodalError

    if (prompt is None) == (jsonl is None):
        raise IntermodalError("give either a prompt or --jsonl FILE")
    if jsonl is None:
        _check_folder(out)
    elif out is None:
        raise IntermodalError("--jsonl needs --out FILE for the replies")
    elif out.is_dir():
        raise IntermodalError(f"--out {out} is a folder; with --jsonl it is the file of replies")
    elif beside:
        raise IntermodalError(
            f'{" and ".join(beside)} cannot be given with --jsonl: each line has its own "messages" and "tools", and names its pictures'
        )


def _read_tools(file: Path | None) -> list[dict[str, Any]] | None:
    """The schemas of a file; raises IntermodalError where it holds none."""
    from ..errors import IntermodalError, SampleError
    from ..inputs.messages import with_tools

    if file is None:
        return None
    try:
        schemas = json.loads(file.read_text("utf-8-sig"))
        if not schemas:
            raise SampleError("it is empty")
        with_tools([], schemas)
    except (OSError, ValueError, SampleError) as error:
        raise IntermodalError(f"--tools {file} is to hold a list of JSON schemas: {error}") from error
    return schemas


def _opening(system: str | None) -> list[dict[str, Any]]:
    return [] if system is None else [{"role": "system", "content": system}]


def _check_folder(out: Path | None) -> None:
    """Refuse a folder for replies where a file is in the way."""
    from ..errors import IntermodalError

    for place in (out, *out.parents) if out is not None else ():
        if place.exists() and not place.is_dir():
            raise IntermodalError(f"--out {out} is to be a folder for reply.md and its pictures, and {place} is a file")


def _check_settings(settings: dict[str, Any]) -> None:
    """Refuse settings out of range before a model is loaded."""
    from ..generate.sample import sampling_of

    sampling_of(settings).check()


def _tell_of_drawing(model: Any) -> None:
    """Say beside the output that a model cannot draw whose vocabulary holds pictures: a reply of words does not."""
    from ..generate.draw import CANNOT_DRAW, cannot_draw

    if cannot_draw(model):
        typer.echo(f"note: {CANNOT_DRAW}", err=True)


def _reply_to_file(model: Any, jsonl: Path, out: Path, slots: int, settings: dict[str, Any], as_json: bool) -> None:
    from ..generate.batch import reply_to_file

    counts = reply_to_file(model, jsonl, out, slots=slots, progress=not as_json, **settings)
    text = f"{out}: {counts.written} replies ({counts.reused} from an earlier run), {counts.rejected} rejected"
    say({"out": str(out), "written": counts.written, "reused": counts.reused, "rejected": counts.rejected}, as_json, text)


def _reply_once(model: Any, messages: list[dict[str, Any]], out: Path | None, settings: dict[str, Any], as_json: bool) -> None:
    """Print one reply, as it comes or as JSON when it is whole; with `out` keep it and what it drew there."""
    reply = _reply_of(model, messages, settings, as_json)
    written, many = list(map(str, _write(reply, out))) if out is not None else [], len(reply.images)
    if as_json:
        row = {"reply": reply.text, "finish": reply.finish, "usage": reply.usage} | ({"note": reply.note} if reply.note else {})
        row |= {"pictures": many} if many else {}
        typer.echo(json.dumps(row | ({"files": written} if written else {}), ensure_ascii=False))
    elif written:
        typer.echo("wrote " + ", ".join(written))
    if many and not written:
        drawn = "1 picture was drawn" if many == 1 else f"{many} pictures were drawn"
        typer.echo(f"{drawn}; --out FOLDER keeps what is drawn", err=as_json)


def _reply_of(model: Any, messages: list[dict[str, Any]], settings: dict[str, Any], whole: bool) -> Any:
    """A reply, printed as it comes unless it is wanted `whole`; raises TooLong with the advice that fits the command line."""
    from ..generate.engine import TooLong

    try:
        return model.generate(messages, **settings) if whole else _say(model, messages, settings)
    except TooLong as error:
        raise TooLong(with_option(error, messages)) from error


def chat(
    model: Model,
    media: Annotated[list[str] | None, typer.Argument(help="Pictures or videos for the first question.")] = None,
    system: System = None,
    tools: ToolsFile = None,
    variable: Variables = None,
    max_new_tokens: New = 512,
    temperature: Temperature = 0.0,
    top_p: Annotated[float, typer.Option(help="Keep the smallest set of tokens with this probability.")] = 1.0,
    stop: Stop = None,
    seed: Annotated[int, typer.Option(help="Of the draws; every reply goes on from it.")] = 0,
    max_images: MaxImages = 4,
    image_temperature: ImageTemperature = 1.0,
    image_top_p: ImageTopP = 1.0,
    guidance: Guidance = 1.0,
    image_guidance: ImageGuidance = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="A folder for what the model draws: one of its own for each reply.")
    ] = None,
    fps: Fps = None,
    frames: Frames = None,
    dtype: Dtype = "float32",
    too_long: TooLong = "drop_oldest",
) -> None:
    """Talk to a model; `/image PATH` and `/video PATH` show something with the next question, `/new` starts over, an empty line ends.

    Example: `intermodal chat Qwen2-VL-2B-Instruct photo.jpg`
    """
    from rich.console import Console

    from ..errors import IntermodalError

    settings: dict[str, Any] = dict(
        max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, stop=tuple(stop or ()), seed=seed, too_long=too_long,
        max_images=max_images, image_temperature=image_temperature, image_top_p=image_top_p, guidance=guidance,
        image_guidance=image_guidance,
    )  # fmt: skip
    _check_settings(settings)
    _check_folder(out)
    if missing := [path for path in media or [] if is_missing(path)]:
        raise IntermodalError(f"{', '.join(missing)}: no such file to show")
    settings["tools"], variables = _read_tools(tools), variables_of(variable)
    console, loaded = Console(), load_talker(model, dtype, fps, frames, variables)
    _tell_of_drawing(loaded)
    talk = _Talk(loaded, console, out, *by_kind(media or []), system)
    while True:
        try:
            said = console.input("[bold cyan]you[/bold cyan] ").strip()
        except (EOFError, KeyboardInterrupt):
            break
        if not said:
            break
        # a seed of its own for each turn: the same question asked twice may be answered in another way
        talk.hear(said, {**settings, "seed": seed + talk.turns})


@dataclass
class _Talk:
    """A conversation at a terminal."""

    model: Any
    console: Console
    out: Path | None
    """Where what the model draws is kept."""
    images: list[str]
    """Paths that go with the next question."""
    videos: list[str]
    system: str | None = None
    messages: list[dict[str, Any]] = field(init=False)
    dropped: int = 0
    """Messages that the last question went to the model without."""

    def __post_init__(self) -> None:
        self.messages = _opening(self.system)

    @property
    def turns(self) -> int:
        """Questions answered so far."""
        return sum(message["role"] == "user" for message in self.messages)

    def hear(self, said: str, settings: dict[str, Any]) -> None:
        """A line of the user's: a command, or a question."""
        command = command_of(said)
        if command is None:
            self.ask(said, settings)
        elif command[0] == "/new":
            self.messages, self.images, self.videos, self.dropped = _opening(self.system), [], [], 0
        elif command[0] in COMMANDS:
            self._show(*command)
        else:
            self._tell(f"{command[0]} is no command: there are {', '.join(COMMANDS.values())}, and an empty line ends")

    def _show(self, word: str, typed: str) -> None:
        """`/image` or `/video`: keep what goes with the next question."""
        path = path_of(typed)
        if not path:
            self._tell(f"{word} needs a path")
        elif is_missing(path):
            self._tell(f"{path}: no such file")
        else:
            (self.images if word == "/image" else self.videos).append(path)

    def ask(self, said: str, settings: dict[str, Any]) -> None:
        """One question and its reply; a question that cannot be answered is taken back."""
        from ..errors import IntermodalError

        self.messages.append({"role": "user", "content": content(said, self.images, self.videos)})
        try:
            self._keep(_say(self.model, self.messages, settings))
        except IntermodalError as error:
            self._tell(f"{with_option(error, self.messages)}{self._taken_back()}")
        except KeyboardInterrupt:
            self.console.print(f"\n(interrupted; the question is taken back){self._taken_back()}", style="bright_black")
        self.images, self.videos = [], []

    def _taken_back(self) -> str:
        """Forget the last question; what a person has to do who wants to ask it again."""
        self.messages.pop()
        return " (show again what belongs to the next question)" if self.images or self.videos else ""

    def _tell(self, error: str) -> None:
        # unwrapped: a path that is broken over lines cannot be copied
        self.console.print(error, style="red", markup=False, soft_wrap=True)

    def _keep(self, reply: Any) -> None:
        dropped = reply.usage.get("dropped_messages", 0)
        if dropped > self.dropped:
            self.console.print(left_out(dropped), style="bright_black", soft_wrap=True)
        self.dropped = dropped
        if reply.images and self.out is not None:
            number = next(n for n in count(1) if not (self.out / f"reply-{n}").exists())
            written = _write(reply, self.out / f"reply-{number}")
            self.console.print("wrote " + ", ".join(map(str, written)), style="bright_black", markup=False, soft_wrap=True)
        clean = self.model.processor.sayable
        parts = [{"type": kind, kind: clean(value) if kind == "text" else value} for kind, value in reply.segments]
        text = clean(reply.text)
        self.messages.append({"role": "assistant", "content": parts if reply.images else text})
        if reply.finish == "length":
            self.console.print("(cut off: --max-new-tokens, or the end of the context)", style="bright_black")


def load_talker(
    model: str, dtype: str, fps: float | None = None, frames: int | None = None, variables: dict[str, Any] | None = None
) -> Any:
    """A model with a decoder and a processor; raises IntermodalError for one that cannot talk."""
    from ..errors import IntermodalError
    from ..inputs.video import sampling_of
    from ..models.generative import Generative
    from ..models.vqvae import VQVAE
    from ..weights.load import load

    loaded = load(model, dtype=dtype)
    if isinstance(loaded, VQVAE):
        raise IntermodalError(
            f"{model} is a VQ-VAE, which turns pictures into codes and back and says no words: name it as model.vq of a Chameleon "
            f"recipe (`intermodal train recipes/native.py model.vq={model}`), or give a Chameleon that has it"
        )
    if not isinstance(loaded, Generative):
        raise IntermodalError(
            f"{model} is a {type(loaded).__name__}, which has no decoder: use `intermodal embed`, `search` or `eval`"
        )
    if loaded.processor is None:
        raise IntermodalError(f"{model} has no tokenizer files, so it cannot chat")
    loaded.processor.video = sampling_of(loaded.processor.video, fps, frames)
    loaded.processor.variables = {**loaded.processor.variables, **(variables or {})}
    return loaded


def _say(model, messages: list[dict[str, Any]], settings: dict[str, Any]):
    """Print a reply as it comes; returns it."""
    from ..generate.draw import cannot_draw
    from ..generate.engine import Partial, Reply

    reply, drew = None, False
    for event in model.stream(messages, **settings):
        if isinstance(event, Reply):
            reply = event
        elif isinstance(event, Partial):
            drew = event.done == 1
            typer.echo("\n[a picture]" if drew else ".", nl=drew)
        else:
            typer.echo(event.removeprefix("\n") if drew else event, nl=False)  # a picture has ended its line
            drew = False
    typer.echo("")
    assert reply is not None
    if reply.note and not cannot_draw(model):  # of that it is told before
        typer.echo(f"note: {reply.note}", err=True)
    return reply


def _write(reply, folder: Path) -> list[Path]:
    """`reply.md` with the pictures beside it, in place of an earlier one and of the pictures that it shows."""
    folder.mkdir(parents=True, exist_ok=True)
    page, lines, files = folder / "reply.md", [], []
    shown = re.findall(r"^!\[picture (\d+)\]\(image-\1\.png\)$", page.read_text("utf-8", "replace") if page.exists() else "", re.M)
    for number in takewhile(lambda number: str(number) in shown, count(1)):  # what else looks like one is the reply's own words
        (folder / f"image-{number}.png").unlink(missing_ok=True)
    for kind, value in reply.segments:
        if kind == "image":
            files.append(folder / f"image-{len(files) + 1}.png")
            value.save(files[-1])
            lines.append(f"![picture {len(files)}]({files[-1].name})")
        else:
            lines.append(value.strip())
    page.write_text("\n\n".join(line for line in lines if line) + "\n", encoding="utf-8")
    return [page, *files]

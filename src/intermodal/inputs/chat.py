"""Messages -> packed tokens: ids, media, positions and the loss mask come from one pass over the chat template.

The rendered text is tokenised once. The tokenizer's own character offsets say which tokens hold the assistant's words; media
placeholders are replaced in the ids by what the planner says. There is no second tokenisation and no count of header tokens.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import compress
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tokenizers import Tokenizer

from ..batch import TokenBatch, Visual
from ..errors import CheckpointError, IntermodalError
from ..nn.attention import Segments
from .codes import CodePlanner
from .media import Clip, Expanded, MediaError, Plan, Planner, expand, load_part, rewrite
from .messages import check_messages
from .template import ChatTemplate, TemplateError
from .text import content
from .video import Sampling
from .vision_cache import VisionCache, content_key

CHAT_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "qwen.tiktoken",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
)
SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
Messages = Sequence[dict[str, Any]]


class NoSupervision(IntermodalError):
    """A conversation from which nothing can be learned, or whose loss mask is not the assistant's words."""


@dataclass
class Conversation:
    """One conversation as tokens, before packing, with what `inspect` shows about it."""

    text: str
    expanded: Expanded
    spans: list[tuple[int, int]]
    """Characters of `text` that the assistant said."""
    supervised: list[bool]
    items: list[Image.Image | Clip] = field(default_factory=list)
    plans: list[Plan] = field(default_factory=list)

    @property
    def ids(self) -> list[int]:
        return self.expanded.ids


class ChatProcessor:
    """A decoder's tokenizer, template and, for a stitched model, media planner."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: ChatTemplate | None,
        *,
        end_ids: Sequence[int],
        planner: Planner | None = None,
        files: dict[str, bytes] | None = None,
    ):
        self.tokenizer, self.template, self.planner = tokenizer, template, planner
        self.end_ids = tuple(end_ids)
        """Tokens that end a reply."""
        self.files = files or {}
        self.video: Sampling | None = getattr(planner, "sampling", None)
        """How videos given by path are sampled where a message does not say it; None is 2 frames a second."""

    @property
    def bos_id(self) -> int | None:
        """The token that begins all text, where the template knows one."""
        special = self.template.special if self.template else {}
        return self.tokenizer.token_to_id(special["bos_token"]) if "bos_token" in special else None

    @classmethod
    def from_folder(
        cls, folder: Path, config: dict[str, Any], planner: Callable[[Tokenizer], Planner] | None = None
    ) -> ChatProcessor:
        """From a checkpoint directory's own files; see `from_files`."""
        files = {name: (folder / name).read_bytes() for name in CHAT_FILES if (folder / name).exists()}
        try:
            return cls.from_files(files, config, planner)
        except CheckpointError as error:
            raise CheckpointError(f"{folder}: {error}") from error

    @classmethod
    def from_files(
        cls, files: dict[str, bytes], config: dict[str, Any], planner: Callable[[Tokenizer], Planner] | None = None
    ) -> ChatProcessor:
        """From file names and contents.

        Args:
            files: `tokenizer.json` is needed; templates may be in `chat_template.jinja`, `chat_template.json` or `tokenizer_config.json`.
            config: the model's config.json, which may name end tokens.
            planner: makes the media planner once the tokenizer is known.

        Raises:
            CheckpointError: there is no tokenizer.json, or a file is damaged.
        """
        if "tokenizer.json" not in files:
            have = ", ".join(sorted(files)) or "no tokenizer files"
            raise CheckpointError(
                f"there is no tokenizer.json ({have}); make one with transformers: AutoTokenizer.from_pretrained(...).save_pretrained(...)"
            )
        try:
            tokenizer = Tokenizer.from_str(files["tokenizer.json"].decode())
        except Exception as error:  # the Rust parser raises plain Exception
            raise CheckpointError(f"tokenizer.json is not a tokenizer: {error}") from error
        tokenizer.no_truncation()
        tokenizer.no_padding()
        settings = _json(files, "tokenizer_config.json")
        named = {**_json(files, "special_tokens_map.json"), **settings}
        special = {name: text for name in SPECIAL_NAMES if (text := content(named.get(name)))}
        source = _template(files, settings)
        ends = _end_ids(tokenizer, special, config, _json(files, "generation_config.json"))
        return cls(
            tokenizer,
            ChatTemplate(source, special) if source else None,
            end_ids=ends,
            planner=planner(tokenizer) if planner else None,
            files=files,
        )

    def set_template(self, text: str) -> None:
        """Take another chat template, also for what is saved. Raises TemplateError: it does not compile."""
        template = ChatTemplate(text, self.template.special if self.template else {})
        template.check()
        self.template = template
        self.files = {name: data for name, data in self.files.items() if name != "chat_template.json"}
        self.files["chat_template.jinja"] = text.encode()

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Plain text -> ids; `special` adds what the tokenizer adds by itself (a beginning-of-text token)."""
        return self.tokenizer.encode(text, add_special_tokens=special).ids

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        """Ids -> text, without special tokens unless asked."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=not special)

    def without_placeholders(self, text: str) -> str:
        """A text without what stands for media in a rendered conversation: a reply that spells it would be taken for a picture."""
        for token in (self.planner.placeholders if self.planner else {}).values():
            text = text.replace(str(self.tokenizer.id_to_token(token)), "")
        return text

    def conversation(self, messages: Messages, *, reply: bool = False, **variables: Any) -> Conversation:
        """Messages -> tokens with their loss mask.

        Args:
            messages: OpenAI-style; see `media.load_part` for what a part may hold.
            reply: end with the assistant's header, for generation; nothing is supervised then.
            variables: passed to the template.

        Raises:
            SampleError: these are no messages.
            TemplateError, MediaError: they do not fit the template or the model.
        """
        if self.template is None:
            raise TemplateError(
                "this model came without a chat template; give it one: model.processor.template = ChatTemplate(text)"
            )
        check_messages(messages)
        items = [item for part in _parts(messages) if (item := load_part(part, self.video)) is not None]
        if items and self.planner is None:
            raise TemplateError("this is a text-only model: it takes no pictures or videos")
        kinds = ["video" if isinstance(item, Clip) else "image" for item in items]
        plans: list[Plan] = []
        if self.planner:
            plans = [self.planner.plan(item, kinds.count(kind)) for item, kind in zip(items, kinds, strict=True)]
        plain = _without_media(self._with_boxes_written(messages, items, plans), as_text=self.planner is None)
        if self.template.drops_strings:
            plain = [{**message, "content": _as_parts(message["content"])} for message in plain]
        if reply:
            text, spans = self.template.render(plain, reply=True, **variables), []
        else:
            text, spans = self.template.render_marked(plain, **variables)
        self._check_heard(plain, text)
        if self.planner:
            names = {kind: str(self.tokenizer.id_to_token(token)) for kind, token in self.planner.placeholders.items()}
            text, spans = rewrite(text, spans, plans, names)
        # as transformers' processors of pictures: a template that leaves the beginning-of-text token to the tokenizer (LLaVA 1.5's) gets it
        begun = text.startswith(self.template.special.get("bos_token") or "\0")
        encoding = self.tokenizer.encode(text, add_special_tokens=self.planner is not None and not begun)
        expanded = expand(encoding.ids, plans)
        learned = self._supervised(encoding, spans)
        supervised = [source >= 0 and learned[source] for source in expanded.source]
        if isinstance(self.planner, CodePlanner):  # what the assistant draws is learned like what it says
            for (start, run), source in zip(expanded.runs, expanded.placeholders, strict=True):
                if learned[source]:
                    length = sum(len(piece) for piece in run)
                    supervised[start : start + length] = [True] * length
        return Conversation(text, expanded, spans, supervised, items, plans)

    def _check_heard(self, messages: Messages, text: str) -> None:
        """Raises TemplateError where a template says nothing of what a user wrote: some look for parts of another kind, or other keys."""
        for message in messages:
            parts = _as_parts(message["content"]) if message["role"] == "user" else []
            for words in (part["text"].strip() for part in parts if part["type"] == "text"):
                if words not in text:
                    raise TemplateError(
                        f"the chat template leaves out what the user said ({words[:40]!r}): give the model one that writes such messages, "
                        "model.processor.set_template(text), in a recipe model.template=FILE"
                    )

    def _with_boxes_written(self, messages: Messages, items: Sequence[Any], plans: Sequence[Plan]) -> Messages:
        """Box parts as the text that this model writes for them."""
        if not any(part.get("type") == "box" for part in _parts(messages)):
            return messages
        shown, out = -1, []
        for message in messages:
            parts = message.get("content")
            if isinstance(parts, list):
                written = []
                for part in parts:
                    kind = part.get("type")
                    shown += kind != "box" and "text" not in part
                    written.append({"type": "text", "text": self._box(part, shown, items, plans)} if kind == "box" else part)
                parts = written
            out.append({**message, "content": parts})
        return out

    def _box(self, part: dict[str, Any], shown: int, items: Sequence[Any], plans: Sequence[Plan]) -> str:
        number = part.get("item", shown)
        if self.planner is None or not 0 <= number < len(items):
            raise MediaError(f"a box part belongs to item {number}, and the conversation shows {len(items)}")
        try:
            return self.planner.frame(items[number].size, plans[number]).write(part["box"], part.get("label", ""))
        except (KeyError, TypeError, ValueError) as error:
            raise MediaError(f"a box part that cannot be written ({error}): {str(part)[:80]}") from error

    def __call__(self, messages: Messages, *, reply: bool = False, key: str = "", **variables: Any) -> TokenBatch:
        """One conversation as a batch of one, its pixels made."""
        return self.batch(self.conversation(messages, reply=reply, **variables), key)

    def batch(
        self, conversation: Conversation, key: str = "", cache: VisionCache | None = None, *, codes: bool = True
    ) -> TokenBatch:
        """A conversation as a batch of one.

        Args:
            cache: items that it knows come with what the tower said of them, without pixels.
            codes: where pictures are tokens of the vocabulary, write them; without, `write_codes` does so for many conversations at once.
        """
        ids = conversation.ids
        visual = rows = None
        if self.planner is None:
            positions = torch.arange(len(ids))
        else:
            positions = self.planner.positions(len(ids), conversation.expanded.runs)
            if conversation.items:
                rows = torch.tensor(conversation.expanded.visual).nonzero().squeeze(1)
                if isinstance(self.planner, CodePlanner):  # pictures are tokens like words: nothing is left for a tower
                    rows = None
                else:
                    visual = self._visual(self.planner, conversation, cache)
        supervised = torch.tensor(conversation.supervised)
        batch = TokenBatch(torch.tensor(ids), Segments([len(ids)]), positions, supervised, visual, rows, [key])
        if codes:
            self.write_codes([conversation], [batch])
        return batch

    def write_codes(self, conversations: Sequence[Conversation], batches: Sequence[TokenBatch]) -> None:
        """Put the tokens of pictures into batches of one that were made without, all pictures through the VQ-VAE together."""
        items = [item for conversation in conversations for item in conversation.items]
        if not items or not isinstance(self.planner, CodePlanner):
            return
        codes = self.planner.codes(items, [plan for conversation in conversations for plan in conversation.plans])
        rows = [torch.tensor(conversation.expanded.visual).nonzero().squeeze(1) for conversation in conversations]
        for batch, at, tokens in zip(batches, rows, codes.split([len(at) for at in rows]), strict=True):
            batch.ids[at] = tokens

    @staticmethod
    def _visual(planner: Planner, conversation: Conversation, cache: VisionCache | None) -> Visual:
        items, plans = conversation.items, conversation.plans
        if cache is None:
            return planner.visual(plans, planner.pixels(items, plans))
        keys = [content_key(item, plan, planner) for item, plan in zip(items, plans, strict=True)]
        known = [cache.get(key) for key in keys]
        new = [states is None for states in known]
        visual = planner.visual(plans, planner.pixels(list(compress(items, new)), list(compress(plans, new))))
        return replace(visual, keys=tuple(keys), known=tuple(known))

    def _supervised(self, encoding: Any, spans: Sequence[tuple[int, int]]) -> list[bool]:
        """Tokens that hold a character of the assistant's words, and the end-of-turn token right after them."""
        out = [False] * len(encoding.ids)
        offsets = encoding.offsets
        at = 0
        for start, stop in spans:
            while at < len(offsets) and offsets[at][1] <= start:
                at += 1
            while at < len(offsets) and offsets[at][0] < stop:
                out[at] = True
                at += 1
            if at < len(offsets) and encoding.ids[at] in self.end_ids:
                out[at] = True
                at += 1
        return out

    def audit(self, conversation: Conversation) -> None:
        """Check the loss mask of a training sample.

        Raises:
            NoSupervision: nothing is supervised, a turn has no end token, or the supervised tokens do not spell the assistant's words.
        """
        if not any(conversation.supervised):
            raise NoSupervision("no token is supervised: the conversation holds no words of the assistant")
        turns: list[list[list[int]]] = []  # for each run of supervised tokens its words, in pieces between what is drawn
        last = -2
        for index, (token, learned) in enumerate(zip(conversation.ids, conversation.supervised, strict=True)):
            if learned:
                if index != last + 1 or (turns and turns[-1][-1] and turns[-1][-1][-1] in self.end_ids):
                    turns.append([[]])
                if conversation.expanded.source[index] >= 0:
                    turns[-1][-1].append(token)
                elif turns[-1][-1]:
                    turns[-1].append([])
                last = index
        names = [str(self.tokenizer.id_to_token(token)) for token in (self.planner.placeholders.values() if self.planner else ())]
        media = re.compile("|".join(map(re.escape, names)) or "(?!)")
        said = [conversation.text[start:stop] for start, stop in conversation.spans]
        if len(turns) != len(said):
            raise NoSupervision(f"{len(said)} assistant messages, but {len(turns)} supervised runs of tokens")
        for words, pieces in zip(said, turns, strict=True):
            *before, turn = pieces
            if not turn or turn[-1] not in self.end_ids:
                ends = [self.tokenizer.id_to_token(token) for token in self.end_ids]
                raise NoSupervision(
                    f"no end-of-turn token ({', '.join(map(str, ends))}) follows {words[-40:]!r}: replies would not end"
                )
            spelled = [self.tokenizer.decode(piece, skip_special_tokens=False).strip() for piece in (*before, turn[:-1])]
            wanted = [piece.strip() for piece in media.split(words)]
            if [piece for piece in spelled if piece] != [piece for piece in wanted if piece]:
                raise NoSupervision(f"the supervised tokens spell {spelled!r:.80}, the assistant said {words[:80]!r}")

    def save(self, folder: Path) -> None:
        """Write the files as they were read, and take away another model's."""
        for name in set(CHAT_FILES) - self.files.keys():
            (folder / name).unlink(missing_ok=True)
        for name, data in self.files.items():
            (folder / name).write_bytes(data)


def _json(files: dict[str, bytes], name: str) -> dict[str, Any]:
    if name not in files:
        return {}
    try:
        value = json.loads(files[name])
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{name} is not JSON: {error}") from error
    return value if isinstance(value, dict) else {}


def _template(files: dict[str, bytes], settings: dict[str, Any]) -> str | None:
    if "chat_template.jinja" in files:
        return files["chat_template.jinja"].decode()
    for name in ("chat_template.json", "processor_config.json"):
        if text := _json(files, name).get("chat_template"):
            return text
    found = settings.get("chat_template")
    if isinstance(found, list):  # several, by name
        by_name = {entry["name"]: entry["template"] for entry in found}
        return by_name.get("default") or next(iter(by_name.values()), None)
    return found


def _end_ids(tokenizer: Tokenizer, special: dict[str, str], config: dict[str, Any], generation: dict[str, Any]) -> list[int]:
    """Every token that ends a reply: the tokenizer's end token, and those that the generation and model configs name."""
    out: list[int] = []
    if "eos_token" in special and (token := tokenizer.token_to_id(special["eos_token"])) is not None:
        out.append(token)
    for source in (generation, config, config.get("text_config") or {}):
        ids = source.get("eos_token_id")
        out += ids if isinstance(ids, list) else [ids] if ids is not None else []
    return list(dict.fromkeys(out))


def _parts(messages: Messages) -> list[dict[str, Any]]:
    return [part for message in messages if isinstance(message.get("content"), list) for part in message["content"]]


def _without_media(messages: Messages, as_text: bool) -> list[dict[str, Any]]:
    """Messages as templates want them: media without their payload; for text-only templates the text alone."""
    out = []
    for message in messages:
        value = message.get("content")
        if isinstance(value, list):
            value = [_bare(part) for part in value]
            if as_text and all(part["type"] == "text" for part in value):
                value = "".join(part["text"] for part in value)
        out.append({**message, "content": value})
    return out


def _as_parts(value: Any) -> Any:
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


def _bare(part: dict[str, Any]) -> dict[str, Any]:
    if part.get("type", "text") == "text" and "text" in part:
        return {"type": "text", "text": part["text"]}
    return {"type": "video" if "video" in part else "image"}

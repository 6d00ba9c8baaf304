"""Messages -> packed tokens: ids, media, positions and the loss mask come from one pass over the chat template.

The rendered text is tokenised once. The tokenizer's own character offsets say which tokens hold the assistant's words; media
placeholders are replaced in the ids by what the planner says. There is no second tokenisation and no count of header tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import compress, islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tokenizers import Tokenizer

from ..batch import TokenBatch, Visual
from ..errors import CheckpointError
from ..nn.attention import Segments
from .audit import NoSupervision, check_mask, rendered_whole
from .box_parts import with_boxes_written
from .codes import CodePlanner
from .marks import all_marks, refuse_marks, without_marks
from .media import Clip, Expanded, Plan, Planner, expand, load_part
from .messages import as_parts, check_messages, in_lists, parts_of, tools_of, with_tools, without_media
from .placeholders import rendered_order, rewrite
from .replies import Span, Turn
from .template import ChatTemplate, TemplateError, settings_in, template_in, variables_in, with_variables
from .text import content
from .transparency import over_white
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


@dataclass
class Conversation:
    """One conversation as tokens, before packing, with what `inspect` shows about it."""

    text: str
    expanded: Expanded
    turns: list[Turn]
    """What of `text` the assistant said."""
    supervised: list[bool]
    items: list[Image.Image | Clip] = field(default_factory=list)
    """In the order in which the template writes them, as are their plans."""
    plans: list[Plan] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)
    """Which medium of the messages each item is, counted from 0 over the whole conversation, as `item` of a box part counts."""

    @property
    def ids(self) -> list[int]:
        return self.expanded.ids

    @property
    def spans(self) -> list[Span]:
        """Characters of `text` from the first to the last that the assistant said, message by message."""
        return [turn.span for turn in self.turns]


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
        self.variables: dict[str, Any] = {}
        """What every conversation tells the template (`enable_thinking`, ...), to train on and to reply to alike; saved with the model."""

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
        settings = settings_in(files, "tokenizer_config.json")
        named = {**settings_in(files, "special_tokens_map.json"), **settings}
        special = {name: text for name in SPECIAL_NAMES if (text := content(named.get(name)))}
        source = template_in(files, settings)
        ends = _end_ids(tokenizer, special, config, settings_in(files, "generation_config.json"))
        made = cls(
            tokenizer,
            ChatTemplate(source, special) if source else None,
            end_ids=ends,
            planner=planner(tokenizer) if planner else None,
            files=files,
        )
        made.variables = variables_in(files)
        return made

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

    def _placeholders(self) -> dict[str, str]:
        """What stands for each kind of media in a rendered conversation."""
        return {
            kind: str(self.tokenizer.id_to_token(token))
            for kind, token in (self.planner.placeholders if self.planner else {}).items()
        }

    @cached_property
    def marks(self) -> frozenset[int]:
        """Tokens that no words may spell, where the model's vocabulary holds pictures."""
        return all_marks(self.tokenizer, self.planner) if isinstance(self.planner, CodePlanner) else frozenset()

    def sayable(self, text: str) -> str:
        """A reply's text as it may be said again in a conversation: what stands for media, or is a mark, would be read as that."""
        for placeholder in self._placeholders().values():
            text = text.replace(placeholder, "")
        return without_marks(self.tokenizer, text, self.marks) if self.marks else text

    def conversation(
        self, messages: Messages, *, reply: bool = False, tools: Sequence[dict[str, Any]] | None = None, **variables: Any
    ) -> Conversation:
        """Messages -> tokens with their loss mask.

        Args:
            messages: OpenAI-style; see `media.load_part` for what a part may hold.
            reply: end with the assistant's header, for generation; nothing is supervised then.
            tools: JSON schemas of what the assistant may call, for the template; those that `messages.with_tools` gave the messages when
                left out.
            variables: passed to the template, before those of the processor.

        Raises:
            SampleError: these are no messages, or no tools.
            TemplateError, MediaError: they do not fit the template or the model.
        """
        if self.template is None:
            raise TemplateError(
                "this model came without a chat template; give it one: model.processor.template = ChatTemplate(text)"
            )
        check_messages(messages)
        messages = in_lists(messages)
        if self.marks:
            refuse_marks(self.tokenizer, messages, self.marks)
        variables = {**self.variables, **variables, "tools": tools_of(with_tools(messages, tools))}
        blend = getattr(self.planner, "blend", over_white)
        items = [item for part in parts_of(messages) if (item := load_part(part, self.video, blend)) is not None]
        if items and self.planner is None:
            raise TemplateError("this is a text-only model: it takes no pictures or videos")
        kinds = ["video" if isinstance(item, Clip) else "image" for item in items]
        plans: list[Plan] = []
        if self.planner:
            plans = [self.planner.plan(item, kinds.count(kind)) for item, kind in zip(items, kinds, strict=True)]
        plain = without_media(with_boxes_written(messages, self.planner, items, plans), as_text=self.planner is None)
        if self.template.drops_strings:
            plain = [message | {"content": as_parts(message["content"])} if "content" in message else message for message in plain]
        draws = isinstance(self.planner, CodePlanner)
        ends = [str(self.tokenizer.id_to_token(token)) for token in self.end_ids]
        text, turns = rendered_whole(self.template, plain, ends, draws, reply, **variables)
        numbers: list[int] = []
        if self.planner:
            numbers = rendered_order(text, kinds, self._placeholders())
            items, plans = [items[number] for number in numbers], [plans[number] for number in numbers]
            text, turns = _rewritten(text, turns, plans, self._placeholders())
        # as transformers' processors of pictures: a template that leaves the beginning-of-text token to the tokenizer (LLaVA 1.5's) gets it
        begun = text.startswith(self.template.special.get("bos_token") or "\0")
        encoding = self.tokenizer.encode(text, add_special_tokens=self.planner is not None and not begun)
        expanded = expand(encoding.ids, plans)
        return Conversation(text, expanded, turns, self._supervised(text, encoding, turns, expanded, draws), items, plans, numbers)

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

    def _supervised(self, text: str, encoding: Any, turns: Sequence[Turn], expanded: Expanded, draws: bool) -> list[bool]:
        """The loss mask, media in their places: what the assistant draws is learned like what it says."""
        learned = self._supervised_text(text, encoding, turns)
        out = [source >= 0 and learned[source] for source in expanded.source]
        for (start, run), source in zip(expanded.runs, expanded.placeholders, strict=True) if draws else ():
            if learned[source]:
                length = sum(len(piece) for piece in run)
                out[start : start + length] = [True] * length
        return out

    def _supervised_text(self, text: str, encoding: Any, turns: Sequence[Turn]) -> list[bool]:
        """Rendered tokens that hold a character of the assistant's words, and after a turn that has some its end-of-turn token, with the
        white space that a template writes before it (Llama 2's): without it the model would never come to the end."""
        out = [False] * len(encoding.ids)
        offsets, ids = encoding.offsets, encoding.ids
        at = 0
        for turn in turns:
            for start, stop in turn.words:
                while at < len(offsets) and offsets[at][1] <= start:
                    at += 1
                while at < len(offsets) and offsets[at][0] < stop:
                    out[at] = True
                    at += 1
            while turn.words and at < len(offsets) and offsets[at][0] < turn.span[1]:  # a picture after the last word
                at += 1
            end = at
            while end < len(ids) and ids[end] not in self.end_ids and not text[slice(*offsets[end])].strip():
                end += 1
            if turn.words and end < len(ids) and ids[end] in self.end_ids:
                out[at : end + 1] = [True] * (end + 1 - at)
                at = end + 1
        return out

    def audit(self, conversation: Conversation) -> None:
        """Check the loss mask of a training sample.

        Raises:
            NoSupervision: nothing is supervised, or something else than the assistant's words and the ends of its turns.
        """
        if not any(conversation.supervised):
            raise NoSupervision("no token is supervised: the conversation holds no words of the assistant")
        if not any(turn.says for turn in conversation.turns):
            raise NoSupervision("only the ends of turns are supervised: all that the assistant says is empty")
        draws = isinstance(self.planner, CodePlanner)
        ends = {token: str(self.tokenizer.id_to_token(token)) for token in self.end_ids}
        normalise = self.tokenizer.normalizer.normalize_str if self.tokenizer.normalizer else str
        media = list(self._placeholders().values())
        check_mask(conversation, partial(self.decode, special=True), normalise, ends, media, draws)

    def save(self, folder: Path) -> None:
        """Write the files as they were read, with `variables`, and take away another model's.

        Raises:
            CheckpointError: a variable that JSON cannot write.
        """
        files = with_variables(self.files, self.variables)
        for name in set(CHAT_FILES) - files.keys():
            (folder / name).unlink(missing_ok=True)
        for name, data in files.items():
            (folder / name).write_bytes(data)


def _end_ids(tokenizer: Tokenizer, special: dict[str, str], config: dict[str, Any], generation: dict[str, Any]) -> list[int]:
    """Every token that ends a reply: the tokenizer's end token, and those that the generation and model configs name.

    Raises:
        CheckpointError: a config names what is no id of a token.
    """
    out: list[int] = []
    if "eos_token" in special and (token := tokenizer.token_to_id(special["eos_token"])) is not None:
        out.append(token)
    inner = config.get("text_config") or {}
    for name, source in (("generation_config.json: ", generation), ("config.json: ", config), ("config.json: text_config.", inner)):
        given = source.get("eos_token_id")
        ids = given if isinstance(given, list) else [given] if given is not None else []
        if not all(type(token) is int and 0 <= token < 2**32 for token in ids):  # what the tokenizer can look up
            raise CheckpointError(f"{name}eos_token_id is the id of a token, as 2, or a list of ids, and not {given!r:.80}")
        out += ids
    return list(dict.fromkeys(out))


def _rewritten(text: str, turns: Sequence[Turn], plans: Sequence[Plan], names: dict[str, str]) -> tuple[str, list[Turn]]:
    """The text with its media as the model writes them (`media.rewrite`), and where the turns are in it."""
    text, moved = rewrite(text, [span for turn in turns for span in (turn.span, *turn.words)], plans, names)
    spans = iter(moved)
    return text, [replace(turn, span=next(spans), words=tuple(islice(spans, len(turn.words)))) for turn in turns]

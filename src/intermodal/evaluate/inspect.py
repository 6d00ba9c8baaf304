"""What a model is trained on, to look at: every position of a conversation with its token, place and label, and where on the picture a
visual token stands. One HTML page without anything outside it."""

from __future__ import annotations

import html
import json
from dataclasses import dataclass
from typing import Any

from PIL import Image

from ..inputs.boxes import Box
from ..inputs.chat import ChatProcessor, Conversation
from ..inputs.media import Clip
from .report import inline

SHOWN_SIDE = 448
"""Pictures are shown at most this large."""


@dataclass(frozen=True)
class Position:
    """One token of a conversation."""

    index: int
    id: int
    text: str
    modality: str
    """"text", "image" or "video"; "layout" for what stands between media's features (newlines)."""
    place: tuple[int, ...]
    """(t, h, w) for M-RoPE, else (position,)."""
    learned: bool
    item: int | None = None
    """Which picture or clip of the conversation: counted from 0 as they stand in the messages, which is how `item` of a box part counts,
    and not as the template writes them."""
    frame: int = 0
    box: Box | None = None
    """Pixels of the original picture, of frame `frame` of a clip."""


def positions(processor: ChatProcessor, conversation: Conversation) -> list[Position]:
    """Every position of a conversation, in order."""
    planner, count = processor.planner, len(conversation.ids)
    places = [(index,) for index in range(count)]
    shown: list[tuple[int, int, Box | None] | None] = [None] * count
    kinds = dict(zip(conversation.numbers, (plan.kind for plan in conversation.plans), strict=True))
    if planner is not None:
        found = planner.positions(count, conversation.expanded.runs)
        places = [tuple(column) for column in (found if found.ndim == 2 else found[None]).T.tolist()]
        visual = iter(index for index, is_visual in enumerate(conversation.expanded.visual) if is_visual)
        for item, media, plan in zip(conversation.numbers, conversation.items, conversation.plans, strict=True):
            frame = planner.frame(media.size, plan)
            slice_length = max(1, len(frame.tokens) // frame.frames)
            for number, box in enumerate(frame.tokens):
                shown[next(visual)] = item, min(number // slice_length, frame.frames - 1), box
    out = []
    for index, token in enumerate(conversation.ids):
        seen = shown[index]
        modality = "text"
        if seen is not None:
            modality = kinds[seen[0]] if seen[2] is not None else "layout"
        text = processor.tokenizer.decode([token], skip_special_tokens=False)
        item, frame, box = seen or (None, 0, None)
        out.append(
            Position(index, token, text, modality, places[index], conversation.supervised[index], item, frame, box)  # pyright: ignore[reportArgumentType]
        )
    return out


def page(processor: ChatProcessor, samples: list[tuple[str, Conversation | None, str, bool]]) -> str:
    """The page of (name, conversation, verdict, whether it can be trained on); a conversation that could not be read is None, and the
    verdict says why."""
    sections = []
    for number, (name, conversation, verdict, fine) in enumerate(samples):
        title = f"<h2>{html.escape(name)}</h2><p class={'good' if fine else 'bad'}>{html.escape(verdict)}</p>"
        sections.append(f"<section id=s{number}>{title}{_body(processor, conversation) if conversation else ''}</section>")
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>intermodal inspect</title><style>{_STYLE}</style>"
        f"<h1>What the model is trained on</h1><p class=legend><b class=on>green</b> is learned, <b>black</b> is read, "
        f"<b class=image>purple</b> is filled by the vision tower (padding and newlines are pale). Point at a token for its place, at a "
        f"picture for its token.</p><div id=detail>&nbsp;</div>{''.join(sections)}<script>{_SCRIPT}</script></html>"
    )


def _body(processor: ChatProcessor, conversation: Conversation) -> str:
    rows = positions(processor, conversation)
    learned, visual = sum(row.learned for row in rows), sum(row.item is not None for row in rows)
    counts = f"<p>{len(rows)} tokens: {learned} learned, {visual} visual</p>"
    media = []
    shown = zip(conversation.numbers, conversation.items, conversation.plans, strict=True)
    for item, content, plan in sorted(shown, key=lambda one: one[0]):  # as the messages have them
        frames = _pictures(content, max((row.frame for row in rows if row.item == item), default=0) + 1)
        width, height = content.size
        cards = "".join(
            f'<div class=picture data-item={item} data-frame={frame} data-width={width} data-height={height}><img src="{inline(picture)}" '
            f'alt="{plan.kind}, item {item}"><i></i></div>'
            for frame, picture in enumerate(frames)
        )
        size = f"{width} x {height}, {len(plan)} tokens"
        media.append(f"<figure>{cards}<figcaption>{plan.kind}, item {item} of the messages: {size}</figcaption></figure>")
    tokens = "".join(_token(row) for row in rows)
    return f"{counts}<div class=both><div class=media>{''.join(media)}</div><div class=tokens>{tokens}</div></div>"


def _token(row: Position) -> str:
    place = f"({', '.join(map(str, row.place))})"
    axes = "(t, h, w)" if len(row.place) == 3 else "position"
    facts = f"#{row.index}  {row.text!r}  id {row.id}  {row.modality}  {axes} = {place}  label {'on' if row.learned else 'off'}"
    data: dict[str, Any] = {}
    if row.item is not None:
        facts += f"  item {row.item}"
    if row.item is not None and row.box is not None:
        box = [round(value, 1) for value in row.box]
        facts += f"  box {tuple(box)}" + (f"  frame {row.frame}" if row.modality == "video" else "")
        data = {"item": row.item, "frame": row.frame, "box": json.dumps(box, separators=(",", ":"))}
    attributes = "".join(f' data-{key}="{value}"' for key, value in data.items())
    if row.item is not None:
        kind, text = ("visual" if row.box is not None else "visual blank"), ""
    else:
        kind = "on" if row.learned else "off"
        text = html.escape(row.text).replace("\n", "↵<br>") or "∅"
    return f'<span class="{kind}" title="{html.escape(facts, quote=True)}"{attributes}>{text}</span>'


def _pictures(content: Image.Image | Clip, count: int) -> list[Image.Image]:
    """The picture, or `count` frames of a clip that stand for its slices."""
    pictures = [content]
    if isinstance(content, Clip):
        step = -(-len(content.frames) // count)
        pictures = [Image.fromarray(content.frames[min(index * step, len(content.frames) - 1)]) for index in range(count)]
    out = []
    for picture in pictures:
        assert isinstance(picture, Image.Image)
        small = picture.copy()
        small.thumbnail((SHOWN_SIDE, SHOWN_SIDE))
        out.append(small)
    return out


_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:80rem;padding:0 1rem;color:#1b1f24}
h1{font-size:1.4rem}h2{font-size:1.1rem;margin-bottom:0}section{border-top:1px solid #ccd;padding:1rem 0}
.good{color:#1a7f37}.bad{color:#c1121f}p{margin:.3rem 0}
#detail{position:sticky;top:0;background:#f4f5fa;border:1px solid #ccd;border-radius:4px;padding:.3rem .6rem;z-index:2;
font:13px/1.5 ui-monospace,monospace;white-space:pre-wrap}
.both{display:flex;gap:1.5rem;align-items:flex-start;flex-wrap:wrap}.media{flex:0 1 28rem}.tokens{flex:1 1 24rem;min-width:18rem}
figure{margin:0 0 1rem}figcaption{font-size:.85rem;color:#57606a}
.picture{position:relative;display:inline-block;margin:0 4px 4px 0}
.picture img{display:block;min-width:128px;max-width:100%;image-rendering:auto}
.picture i{position:absolute;border:2px solid #d6249f;box-shadow:0 0 0 1px #fff;display:none;box-sizing:border-box;pointer-events:none}
.tokens span{border-radius:3px;padding:1px 0;white-space:pre-wrap}
.tokens span:hover,.tokens span.hit{outline:2px solid #d6249f}
.on{background:#c8efd2;color:#0f5223}.off{color:#24292f}.image{color:#7a3db8}
.tokens .visual{display:inline-block;width:9px;height:9px;margin:1px;background:#a678d8;vertical-align:middle}
.tokens .blank{background:#e3d8f0}
"""
_SCRIPT = """
const detail=document.getElementById('detail');
for(const section of document.querySelectorAll('section')){
  const pictures=[...section.querySelectorAll('.picture')],spans=[...section.querySelectorAll('span[data-box]')];
  const clear=()=>{for(const p of pictures)p.querySelector('i').style.display='none';for(const s of spans)s.classList.remove('hit')};
  const mark=span=>{
    const p=pictures.find(p=>p.dataset.item===span.dataset.item&&p.dataset.frame===span.dataset.frame);if(!p)return;
    const [l,t,r,b]=JSON.parse(span.dataset.box),w=100/p.dataset.width,h=100/p.dataset.height,i=p.querySelector('i');
    Object.assign(i.style,{display:'block',left:l*w+'%',top:t*h+'%',width:(r-l)*w+'%',height:(b-t)*h+'%'})};
  section.addEventListener('mouseover',event=>{
    const span=event.target.closest('.tokens span'),picture=event.target.closest('.picture');
    if(span){clear();detail.textContent=span.title;if(span.dataset.box)mark(span)}else if(!picture)clear()});
  for(const p of pictures)p.addEventListener('mousemove',event=>{
    const area=p.getBoundingClientRect(),x=(event.clientX-area.left)/area.width*p.dataset.width,
      y=(event.clientY-area.top)/area.height*p.dataset.height;
    clear();
    const hits=spans.filter(s=>{if(s.dataset.item!==p.dataset.item||s.dataset.frame!==p.dataset.frame)return false;
      const [l,t,r,b]=JSON.parse(s.dataset.box);return l<=x&&x<r&&t<=y&&y<b});
    for(const s of hits)s.classList.add('hit');
    if(hits.length){const last=hits[hits.length-1];mark(last);detail.textContent=hits.map(s=>s.title).join('\\n')}});
}
"""

"""What a cache of the tower's states must hold for every stitched family."""

import torch

from intermodal.inputs.vision_cache import DiskCache, MemoryCache, content_key, fingerprint


def check_cached_equals_uncached(model, conversations, tmp_path, atol=1e-6):
    """Two passes over every conversation: states from memory, and from disk, give the scores that looking gives; the second pass
    looks at nothing."""
    processor = model.processor
    plain = [processor.batch(processor.conversation(messages)) for messages in conversations]
    with torch.no_grad():
        expected = [model(batch) for batch in plain]
        for cache in (MemoryCache(), DiskCache(tmp_path, fingerprint(model.tower_parameters()))):
            model.vision_cache = cache
            for again in (False, True):
                for messages, scores in zip(conversations, expected, strict=True):
                    batch = processor.batch(processor.conversation(messages), cache=cache)
                    assert not again or len(batch.visual.pixels) == 0
                    torch.testing.assert_close(model(batch), scores, atol=atol, rtol=1e-5)
        # half known, half new, packed with others
        cache = model.vision_cache = MemoryCache()
        model(processor.batch(processor.conversation(conversations[0]), cache=cache))
        both = [processor.batch(processor.conversation(messages), cache=cache) for messages in conversations]
        packed = type(both[0]).pack(both)
        assert {states is None for states in packed.visual.known} == {True, False}
        torch.testing.assert_close(model(packed), torch.cat(expected), atol=1e-5, rtol=1e-4)
    model.vision_cache = None


def check_turns_look_once(model, first, more):
    """A chat looks at a picture once, until the tower's weights change."""
    looked, see = [], model.see

    def count(visual):
        looked.append(len(visual.rows()))
        return see(visual)

    model.see = count
    reply = model.generate(first, max_new_tokens=3)
    talk = [*first, {"role": "assistant", "content": reply.text}, more]
    kept = model.generate(talk, max_new_tokens=3).ids
    assert looked == [1]
    model.vision_cache = None
    assert model.generate(talk, max_new_tokens=3).ids == kept
    assert looked == [1, 1]
    tower = [part for name, part in model.named_parameters() if name.startswith("vis")]
    with torch.no_grad():
        tower[0].add_(0.5)
    model.generate(talk, max_new_tokens=3)
    assert looked == [1, 1, 1]
    for part in tower:
        part.grad = torch.ones_like(part)
    torch.optim.AdamW(tower, lr=1e-3, fused=True).step()  # changes weights without telling their versions
    model.zero_grad()
    model.generate(talk, max_new_tokens=3)
    assert looked == [1, 1, 1, 1]


def check_keys(processor, picture, other):
    planner = processor.planner
    plan = planner.plan(picture, 1)
    key = content_key(picture, plan, planner)
    assert key == content_key(picture.copy(), planner.plan(picture, 1), planner)
    assert key != content_key(other, planner.plan(other, 1), planner)

"""All captions that are true of a scene, in every language, so that what a decoder says can be looked up."""

from collections import Counter
from itertools import permutations

from data_tools.make_tiny.captions import Description, Group, word_everywhere
from data_tools.make_tiny.languages import Size
from data_tools.make_tiny.scenes import SINGLE_EXTENT, Scene, relation_of


def true_captions(scene: Scene) -> dict[str, list[str]]:
    """`whole`: those that name every object of the scene; `part`: those that name some, and are true as well.

    The forms are those of training. Of equal objects the number must be right; of two, where one is, must be beyond
    dispute; a size is that of the only object, if it has one.
    """
    whole, part = set[str](), set[str]()
    for description, is_whole in _descriptions(scene):
        (whole if is_whole else part).update(word_everywhere(description).values())
    return {"whole": sorted(whole), "part": sorted(part - whole)}


def _descriptions(scene: Scene) -> list[tuple[Description, bool]]:
    """What is true of a scene, and whether it names every object."""
    counts = Counter((thing.color, thing.shape) for thing in scene.things)
    groups = [Group(count, *pair) for pair, count in counts.items()]
    found = [
        (Description(chosen), len(chosen) == len(groups))
        for length in range(1, len(groups) + 1)
        for chosen in permutations(groups, length)
    ]
    found += [(Description((group,), background=scene.background), len(groups) == 1) for group in groups]
    of_shape = Counter(thing.shape for thing in scene.things)
    found += [
        (Description((group,), shape_alone=True), len(scene.things) == 1)
        for group in groups
        if of_shape[group.shape] == 1
    ]
    if len(scene.things) == 1:
        size = _size(scene)
        found += [(Description(tuple(groups), size=size), True)] if size is not None else []
    for one, other in permutations(scene.things, 2):
        pairs = (one.color, one.shape), (other.color, other.shape)
        relation = relation_of(one, other)
        if relation is not None and all(counts[pair] == 1 for pair in pairs):
            two = tuple(Group(1, *pair) for pair in pairs)
            found.append((Description(two, relation=relation), len(scene.things) == 2))
    return found


def _size(scene: Scene) -> Size | None:
    share = scene.things[0].extent / min(scene.width, scene.height)
    # pixels are whole, so that an extent may lie a little outside of its range
    return min(SINGLE_EXTENT, key=lambda size: abs(share - sum(SINGLE_EXTENT[size]) / 2))

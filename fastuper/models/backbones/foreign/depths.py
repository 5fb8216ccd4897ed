"""Layer depths of another library's backbone, for layer-wise decay of learning rates, counted from names."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from fastuper.models.configuration import ForeignBackboneConfig

MOST_STAGES = 8
"""More layers than this are blocks, not stages."""


@dataclass(frozen=True)
class Layers:
    """The layers of a network, by the names of its parameters.

    Attributes:
        prefix: what the names of the layers' parameters begin with, before the layer's number.
        first: the number of the first layer.
        count: the number of layers.
        least: the depth of the last layer.
        after: the names of the parameters after the last layer; their depth is 0.
    """

    prefix: str
    first: int
    count: int
    least: int
    after: frozenset[str]

    def depth(self, name: str) -> int:
        """Return the depth of a parameter: `least` in the last layer, one more in each before it and in the stem."""
        match = re.match(r"(\d+)[._]", name[len(self.prefix) :]) if name.startswith(self.prefix) else None
        if match is not None:
            return self.least + self.count - 1 - (int(match[1]) - self.first)
        return 0 if name in self.after else self.least + self.count


def count_layers(names: Sequence[str], is_flat: bool) -> Layers | None:
    """Return the layers of a network; None if its names do not number them.

    A vision transformer has blocks, and BEiT's depths (https://arxiv.org/abs/2106.08254): 1 in the last block, one more
    in each block before it, the largest in the embeddings, 0 in a final norm. Other networks have stages, and the
    depths of ConvNeXt's authors (https://arxiv.org/abs/2201.03545): 3 in the last stage, one more in each before it,
    and the largest in the stem. The layers between two stages count to the stage in which the library has them. If a
    library numbers the blocks through all stages, the blocks have BEiT's depths too.

    Args:
        names: the names of all parameters, in the network's order.
        is_flat: True for a vision transformer.
    """
    numbers: dict[str, set[int]] = defaultdict(set)
    covered: dict[str, int] = defaultdict(int)
    for name in names:
        for prefix, number in _numbered(name):
            numbers[prefix].add(number)
            covered[prefix] += 1
    fitting = [
        prefix
        for prefix, found in numbers.items()
        if len(found) >= 3 and max(found) - min(found) == len(found) - 1 and 2 * covered[prefix] > len(names)
    ]
    if not fitting:
        return None
    prefix = min(fitting, key=lambda prefix: (prefix.count("."), -covered[prefix]))
    inside = [i for i, name in enumerate(names) if any(found == prefix for found, _ in _numbered(name))]
    found = numbers[prefix]
    least = 1 if is_flat or len(found) > MOST_STAGES else 3
    return Layers(prefix, min(found), len(found), least, frozenset(names[inside[-1] + 1 :]))


def _numbered(name: str) -> Iterable[tuple[str, int]]:
    """Yield the numbers in the path of a parameter, each with all that is before it."""
    for match in re.finditer(r"(?<!\d)(\d+)[._]", name):
        yield name[: match.start()], int(match[1])


def foreign_depth(name: str, config: Any) -> int:
    """Return the layer depth of a parameter of another library's backbone, by the configuration of the built backbone.

    Raises:
        ValueError: the layers cannot be counted, or no backbone was built of the configuration.
    """
    layers = config.layers if isinstance(config, ForeignBackboneConfig) else None
    if not isinstance(layers, Layers):
        raise ValueError(
            f"layer_decay needs a backbone whose layers can be counted; the names in this {config.model_type!r} do not "
            "number them: leave layer_decay out"
        )
    return layers.depth(name)

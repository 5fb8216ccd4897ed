"""The bounds of each value in config.json and preprocessor_config.json: what the value of a network can be.

A configuration is checked when it is read or made, and again when a model is built from it. A few hundred bytes of JSON
can therefore not ask for more work or memory than a network needs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

from fastuper.io.messages import shown
from fastuper.io.options import Limits

WIDEST = 16_384
DEEPEST = 400
"""The number of blocks of a whole backbone; the deepest published ResNet has 333."""
STAGES = 16


@dataclass(frozen=True, kw_only=True)
class Bound(Limits):
    """What a value may be: a number within limits, a list of such numbers, a flag or a text.

    Attributes:
        kind: the type of the number: int for whole numbers, float for any; bool for a flag, str for a text.
        items: the largest number of items of a list; None if the value is no list.
        pair: True if the value may also be a pair (height, width).
        optional: True if the value may be None.
    """

    kind: type = int
    items: int | None = None
    pair: bool = False
    optional: bool = False

    def check(self, name: str, value: Any) -> None:
        """Raise ValueError if a value is not within the bound; the message names the value and the bound."""
        if value is None and self.optional:
            return
        numbers = {name: value}
        if self.items is not None or (self.pair and isinstance(value, list | tuple)):
            if not isinstance(value, list | tuple) or not (len(value) == 2 if self.pair else self._fits(len(value))):
                raise ValueError(f"{name} must be {self._in_words()}, got {shown(value)}")
            numbers = {f"{name}[{index}]": item for index, item in enumerate(value)}
        for place, number in numbers.items():
            if not self._is_of_kind(number) or not self.allow(number):
                raise ValueError(f"{place} must be {self._of_one()}, got {shown(number)}")

    def _fits(self, length: int) -> bool:
        assert self.items is not None
        return 1 <= length <= self.items

    def _is_of_kind(self, value: Any) -> bool:
        if self.kind is float:
            return isinstance(value, int | float) and not isinstance(value, bool)
        return isinstance(value, self.kind) and (self.kind is bool or not isinstance(value, bool))

    def _of_one(self) -> str:
        words = {bool: "true or false", str: "a text", int: "a whole number of ", float: "a number of "}[self.kind]
        return words + self.in_words()

    def _in_words(self) -> str:
        if self.items is not None:
            return f"a list of one or more numbers (at most {self.items}), each {self._of_one()}"
        return f"{self._of_one()}, or two such numbers"


def _whole(low: int, high: int, **more: Any) -> Bound:
    return Bound(at_least=low, at_most=high, **more)


def _real(low: float, high: float) -> Bound:
    return Bound(kind=float, at_least=low, at_most=high)


FLAG = Bound(kind=bool)
FLAG_OR_NONE = Bound(kind=bool, optional=True)
TEXT = Bound(kind=str)

BOUNDS: dict[str, Bound] = {
    # All configurations.
    "num_labels": _whole(1, 65_536),
    "return_dict": FLAG_OR_NONE,
    "output_hidden_states": FLAG_OR_NONE,
    "output_attentions": FLAG_OR_NONE,
    # UPerNet.
    "backbone": Bound(kind=str, optional=True),
    "use_pretrained_backbone": FLAG_OR_NONE,
    "use_timm_backbone": FLAG_OR_NONE,
    "hidden_size": _whole(1, WIDEST),
    "initializer_range": _real(0, 100),
    "pool_channels": _whole(1, WIDEST),
    "pool_scales": _whole(1, 256, items=32),
    "resample_first": FLAG,
    "texture_channels": _whole(1, WIDEST),
    "use_auxiliary_head": FLAG,
    "auxiliary_loss_weight": _real(0, 1000),
    "auxiliary_in_channels": _whole(1, 65_536, optional=True),
    "auxiliary_channels": _whole(1, WIDEST),
    "auxiliary_num_convs": _whole(0, 100),
    "auxiliary_concat_input": FLAG,
    "loss_ignore_index": _whole(-(2**31), 2**31 - 1),
    "align_corners": FLAG,
    "output_align_corners": FLAG_OR_NONE,
    "feature_norms": FLAG,
    # Backbones.
    "num_channels": _whole(1, 1024),
    "patch_size": _whole(1, 256, pair=True),
    "image_size": _whole(1, 65_536, pair=True),
    "num_stages": _whole(1, STAGES),
    "depths": _whole(1, DEEPEST, items=DEEPEST),
    "hidden_sizes": _whole(1, WIDEST, items=STAGES),
    "stem_widths": _whole(1, WIDEST, items=3),
    "avg_down": FLAG,
    "strides": _whole(1, 32, items=STAGES, optional=True),
    "dilations": _whole(1, 256, items=STAGES, optional=True),
    "contract_dilation": FLAG,
    "multi_grid": _whole(1, 256, items=DEEPEST, optional=True),
    "embedding_size": _whole(1, WIDEST),
    "embed_dim": _whole(1, WIDEST),
    "num_heads": _whole(1, WIDEST, items=STAGES),
    "window_size": _whole(1, 64),
    "pretrained_window_sizes": _whole(0, 64, items=STAGES),
    "mlp_ratio": Bound(kind=float, more_than=0, at_most=64),
    "encoder_stride": _whole(1, 65_536),
    "hidden_act": TEXT,
    "layer_type": TEXT,
    "layer_norm_eps": _real(0, 1),
    "layer_scale_init_value": _real(-100, 100),
    "drop_path_rate": _real(0, 0.99),  # a block that is always dropped would divide by 0
    "hidden_dropout_prob": _real(0, 1),
    "attention_probs_dropout_prob": _real(0, 1),
    "qkv_bias": FLAG,
    "use_absolute_embeddings": FLAG,
    "mlp_depth": _whole(2, STAGES),
    "pad_patches": FLAG,
    "patch_bias": FLAG,
    "patch_norm": FLAG,
    "use_class_token": FLAG,
    "interpolation": TEXT,
    "pre_norm": FLAG,
    "final_norm": FLAG,
    "key_bias": FLAG,
    "proj_bias": FLAG,
    "use_relative_position_bias": FLAG,
    "neck": TEXT,
    "neck_scales": Bound(kind=float, more_than=0, at_most=16, items=STAGES),
    "neck_channels": _whole(1, WIDEST, optional=True),
    "neck_norm": FLAG,
    "neck_act": TEXT,
    "always_partition": FLAG,
    "output_norms": FLAG,
    "out_levels": _whole(0, STAGES, items=STAGES, optional=True),
    "downsample_in_first_stage": FLAG,
    "downsample_in_bottleneck": FLAG,
    # Vision transformers, ours and Transformers'.
    "num_hidden_layers": _whole(1, DEEPEST),
    "num_attention_heads": _whole(1, WIDEST),
    "intermediate_size": _whole(1, 4 * WIDEST),
    # The image processor.
    "height": _whole(1, WIDEST),
    "width": _whole(1, WIDEST),
    "shortest_edge": _whole(1, WIDEST),
    "longest_edge": _whole(1, WIDEST),
    "size_divisor": _whole(1, WIDEST),
    "max_height": _whole(1, WIDEST),
    "max_width": _whole(1, WIDEST),
    "rescale_factor": Bound(kind=float, more_than=0, at_most=10**6),
    "image_mean": Bound(kind=float, at_least=-(10**6), at_most=10**6, items=1024),
    "image_std": Bound(kind=float, at_least=0, at_most=10**6, items=1024),
}
"""The bound of each value by its name."""


def plain(value: Any) -> Any:
    """Return a number or an array of NumPy, or another library's list, as Python's own; other values as they are."""
    if type(value).__module__ == "numpy" and hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, tuple):
        return tuple(map(plain, value))
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [plain(item) for item in value]
    return value


def check_bounds(values: Mapping[str, Any]) -> None:
    """Check the values that `BOUNDS` names; other values are not checked.

    Raises:
        ValueError: a value is not within its bound; the message names both.
    """
    for name, bound in BOUNDS.items():
        if name in values:
            bound.check(name, values[name])


def check_foreign_bounds(values: Mapping[str, Any]) -> None:
    """Check the upper bounds of the values of another library's backbone, whose types are its own.

    Raises:
        ValueError: a number is not finite, or larger than the bound of its name.
    """
    for name, value in values.items():
        bound = BOUNDS.get(name)
        limit = 2**31 if bound is None or bound.at_most is None else bound.at_most
        for number in _numbers(value):
            if not -(2**31) <= number <= limit:
                raise ValueError(f"{name} must be at most {limit}, got {shown(number)}")
    if sum(_numbers(values.get("depths"))) > DEEPEST:
        raise ValueError(f"depths must be at most {DEEPEST} in all, got {shown(values['depths'])}")


def _numbers(value: Any) -> Iterator[Any]:
    """Yield the numbers in a value and in the lists that it consists of."""
    if isinstance(value, list | tuple):
        for item in value:
            yield from _numbers(item)
    elif isinstance(value, Real) and not isinstance(value, bool):
        yield value

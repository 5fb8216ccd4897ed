"""The configurations of Transformers' classes of the same names: their arguments, their defaults, their config.json."""

from __future__ import annotations

import copy
import importlib.util
import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch

from fastuper.io.files import read_json
from fastuper.io.hub import HubOptions, find_file
from fastuper_kernels.dispatch.files import atomic_path

logger = logging.getLogger(__name__)

CONFIG_NAME = "config.json"

# What says the same in other words, and goes when one of them is overridden.
LABELS = ("id2label", "label2id", "num_labels")
LEVELS = ("out_features", "out_indices")
LINKED = {
    "id2label": LABELS,
    "num_labels": LABELS,
    "out_features": LEVELS,
    "out_indices": LEVELS,
    "torch_dtype": ("dtype",),
}


class Config:
    """What every configuration has.

    Args:
        return_dict: whether `forward` returns an output object (True) or a tuple.
        output_hidden_states: whether `forward` returns the hidden states when it is not told.
        output_attentions: whether `forward` returns the attention weights when it is not told.
        dtype: the dtype of the weights, a `torch.dtype` or its name ("bfloat16"); `torch_dtype` is its older name.
        id2label: the name of each class. Keys may be strings, as JSON has them.
        label2id: the inverse; made from `id2label` where it is not given.
        num_labels: the number of classes, where they have no names.
        **extra: anything else that stands in a config.json is kept as an attribute, and written back.
    """

    model_type: ClassVar[str] = ""

    def __init__(
        self,
        *,
        return_dict: bool = True,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        dtype: torch.dtype | str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        id2label: Mapping[Any, str] | None = None,
        label2id: Mapping[str, int] | None = None,
        num_labels: int | None = None,
        **extra: Any,
    ):
        self.return_dict = extra.pop("use_return_dict", return_dict)
        self.output_hidden_states = output_hidden_states
        self.output_attentions = output_attentions
        self.dtype = as_dtype(dtype if dtype is not None else torch_dtype)
        self.name_or_path: str = extra.pop("name_or_path", None) or extra.pop("_name_or_path", "")
        self._commit_hash: str | None = extra.pop("_commit_hash", None)  # the pipelines of Transformers 4.x read it
        self.architectures: list[str] | None = extra.pop("architectures", None)
        self.task_specific_params: dict[str, Any] | None = extra.pop("task_specific_params", None)
        if id2label is not None:
            try:
                self.id2label = {int(key): str(name) for key, name in id2label.items()}
            except (AttributeError, TypeError, ValueError):
                raise ValueError(f"id2label must map class numbers to names, got {id2label!r}") from None
            if not self.id2label:
                raise ValueError("id2label names no class; leave it out, or give each class a name")
            if num_labels is not None and num_labels != len(self.id2label):
                logger.warning(
                    "num_labels=%d disagrees with the %d names of id2label: using %d classes",
                    num_labels,
                    len(self.id2label),
                    len(self.id2label),
                )
            self.label2id = (
                dict(label2id) if label2id is not None else {name: key for key, name in self.id2label.items()}
            )
        else:
            self.num_labels = 2 if num_labels is None else num_labels
        for name in ("model_type", "_name_or_path", "_attn_implementation_autoset", "transformers_version"):
            extra.pop(name, None)
        for name, value in extra.items():
            setattr(self, name, value)

    @property
    def num_labels(self) -> int:
        """The number of classes. Setting it to another number renames them LABEL_0, LABEL_1, ..."""
        return len(self.id2label)

    @num_labels.setter
    def num_labels(self, number: int) -> None:
        check_counts(1, num_labels=number)
        if len(getattr(self, "id2label", ())) != number:
            self.id2label = {i: f"LABEL_{i}" for i in range(number)}
            self.label2id = {name: i for i, name in self.id2label.items()}

    @property
    def use_return_dict(self) -> bool:
        """`return_dict`, by the name that Transformers 4.x also has for it."""
        return self.return_dict

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """`dtype`, by its older name."""
        return self.dtype

    @torch_dtype.setter
    def torch_dtype(self, dtype: torch.dtype | str | None) -> None:
        self.dtype = as_dtype(dtype)

    def to_dict(self) -> dict[str, Any]:
        """Return everything, in types that JSON has."""
        values = {name: copy.deepcopy(value) for name, value in vars(self).items() if not name.startswith("_")}
        values["model_type"] = self.model_type
        values["dtype"] = None if self.dtype is None else str(self.dtype).removeprefix("torch.")
        values["id2label"] = {str(key): name for key, name in self.id2label.items()}
        values["_name_or_path"] = values.pop("name_or_path")
        return values

    def to_json_string(self, use_diff: bool = True) -> str:
        """Return config.json's text. `use_diff` is Transformers' argument; everything is written either way."""
        values = {name: value for name, value in self.to_dict().items() if name != "_name_or_path"}
        return json.dumps(values, indent=2, sort_keys=True, default=_to_json) + "\n"

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> None:
        """Write config.json, which Transformers 4.56 and 5.x read as well."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_path(folder / CONFIG_NAME) as path:
            path.write_text(self.to_json_string(), encoding="utf-8")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], **overrides: Any) -> Any:
        """Build a configuration from config.json's content; `overrides` take the place of its values.

        Raises:
            TypeError: an override is nothing that the configuration has.
            ValueError: a value is not possible.
        """
        config = cls(**copy.deepcopy(dict(values)))
        if overrides.get("num_labels") == config.num_labels:  # the classes keep their names
            del overrides["num_labels"]
        if not overrides:
            return config
        if unknown := [name for name in overrides if name.startswith("_") or not hasattr(config, name)]:
            raise TypeError(f"{cls.__name__} has no {', '.join(unknown)}")
        return cls(**_overridden(config.to_dict(), overrides))

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        subfolder: str = "",
        revision: str | None = None,
        local_files_only: bool = False,
        **overrides: Any,
    ) -> Any:
        """Read config.json from a folder or a Hub repository.

        Raises:
            OSError: there is no config.json, or it is not one; the message names the place.
            ValueError: it is the configuration of another kind of model.
        """
        options = HubOptions(token, cache_dir, subfolder or "", revision, local_files_only)
        path = find_file(pretrained_model_name_or_path, CONFIG_NAME, options)
        if path is None:
            place = f"{pretrained_model_name_or_path}/{subfolder}" if subfolder else pretrained_model_name_or_path
            raise FileNotFoundError(f"{place} has no {CONFIG_NAME}; give a checkpoint's folder or Hub repository")
        values = read_json(path)
        if values.get("model_type", cls.model_type) != cls.model_type:
            raise ValueError(
                f"{path} describes a {values['model_type']!r} model; {cls.__name__} reads {cls.model_type!r}"
            )
        try:
            config = cls.from_dict(values)
        except (AttributeError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from error
        if overrides:  # outside the block above: their errors are not the file's
            config = cls.from_dict(values, **overrides)
        config.name_or_path = str(pretrained_model_name_or_path)
        return config

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"{type(self).__name__} {self.to_json_string()}"


class BackboneConfig(Config):
    """A configuration that says which of the stages a backbone returns.

    Args:
        depths: blocks of each stage; the stages are named "stem", "stage1", ...
        out_features: names of the stages to return, in their order; the last one where nothing is said.
        out_indices: the same as numbers; negative ones count from the end.
        **extra: see `Config`.
    """

    def __init__(
        self,
        depths: Sequence[int],
        out_features: Sequence[str] | None = None,
        out_indices: Sequence[int] | None = None,
        **extra: Any,
    ):
        extra.pop("stage_names", None)
        super().__init__(**extra)
        self.depths = list(depths)
        check_counts(1, **{f"depths[{i}]": depth for i, depth in enumerate(self.depths)})
        self.stage_names = ["stem", *(f"stage{i + 1}" for i in range(len(self.depths)))]
        self._select(out_features, out_indices)

    def _select(self, out_features: Sequence[str] | None, out_indices: Sequence[int] | None) -> None:
        names = self.stage_names
        if isinstance(out_features, str) or isinstance(out_indices, int):
            raise ValueError(f"out_features and out_indices are lists, got {out_features!r} and {out_indices!r}")
        if out_features is None and out_indices is None:
            out_indices = [len(names) - 1]
        if out_indices is not None and any(not -len(names) <= i < len(names) for i in out_indices):
            raise ValueError(f"out_indices {list(out_indices)} must be indices into the stages {names}")
        features = list(out_features) if out_features is not None else [names[i] for i in out_indices or ()]
        if not features:
            raise ValueError(f"out_features and out_indices must name at least one of the stages {names}")
        if any(name not in names for name in features):
            raise ValueError(f"out_features {features} must be among the stages {names}")
        if features != [name for name in names if name in features]:
            raise ValueError(f"out_features {features} must be in the order of the stages {names}, each once")
        if out_indices is not None and features != [names[i] for i in out_indices]:
            raise ValueError(f"out_features {features} and out_indices {list(out_indices)} name different stages")
        self._out_features = features
        self._out_indices = list(out_indices) if out_indices is not None else [names.index(name) for name in features]

    @property
    def out_features(self) -> list[str]:
        """The names of the stages that are returned; setting it sets `out_indices` too."""
        return self._out_features

    @out_features.setter
    def out_features(self, out_features: Sequence[str] | None) -> None:
        self._select(out_features, None)

    @property
    def out_indices(self) -> list[int]:
        """The indices of the stages that are returned; setting it sets `out_features` too."""
        return self._out_indices

    @out_indices.setter
    def out_indices(self, out_indices: Sequence[int] | None) -> None:
        self._select(None, out_indices)

    def to_dict(self) -> dict[str, Any]:
        """Return everything, in types that JSON has."""
        values = super().to_dict()
        values["out_features"] = list(self._out_features)
        values["out_indices"] = list(self._out_indices)
        return values


class ConvNextConfig(BackboneConfig):
    """ConvNeXt (https://arxiv.org/abs/2201.03545); the defaults are ConvNeXt-Tiny.

    Args:
        num_channels: channels of the input.
        patch_size: the stride of the stem.
        num_stages: the number of stages.
        hidden_sizes: channels of each stage; (96, 192, 384, 768) where None.
        depths: blocks of each stage; (3, 3, 9, 3) where None.
        hidden_act: the activation between a block's two pointwise layers.
        initializer_range: standard deviation of the initial weights.
        layer_norm_eps: kept for config.json; the backbone's norms use 1e-6, as the reference's do.
        layer_scale_init_value: initial LayerScale; none at all where it is 0.
        drop_path_rate: stochastic depth of the last block, growing linearly from 0 at the first.
        image_size: kept for config.json; any size may be given to the model.
        out_features: see `BackboneConfig`.
        out_indices: see `BackboneConfig`.
        **extra: see `Config`.
    """

    model_type = "convnext"

    def __init__(
        self,
        num_channels: int = 3,
        patch_size: int = 4,
        num_stages: int = 4,
        hidden_sizes: Sequence[int] | None = None,
        depths: Sequence[int] | None = None,
        hidden_act: str = "gelu",
        initializer_range: float = 0.02,
        layer_norm_eps: float = 1e-12,
        layer_scale_init_value: float = 1e-6,
        drop_path_rate: float = 0.0,
        image_size: int = 224,
        out_features: Sequence[str] | None = None,
        out_indices: Sequence[int] | None = None,
        **extra: Any,
    ):
        self.num_channels = num_channels
        self.patch_size = patch_size
        self.num_stages = num_stages
        self.hidden_sizes = [96, 192, 384, 768] if hidden_sizes is None else list(hidden_sizes)
        self.depths = [3, 3, 9, 3] if depths is None else list(depths)
        self.hidden_act = hidden_act
        self.initializer_range = initializer_range
        self.layer_norm_eps = layer_norm_eps
        self.layer_scale_init_value = layer_scale_init_value
        self.drop_path_rate = drop_path_rate
        self.image_size = image_size
        check_counts(1, num_channels=num_channels)
        if not len(self.hidden_sizes) == len(self.depths) == num_stages:
            raise ValueError(
                f"num_stages={num_stages}, hidden_sizes={self.hidden_sizes} and depths={self.depths} "
                "must speak of the same number of stages"
            )
        super().__init__(self.depths, out_features, out_indices, **extra)


class SwinConfig(BackboneConfig):
    """Swin Transformer (https://arxiv.org/abs/2103.14030); the defaults are Swin-Tiny.

    Args:
        image_size: the size that the absolute position embeddings are for, an int or (height, width).
        patch_size: the stride of the stem, an int or (height, width).
        num_channels: channels of the input.
        embed_dim: channels of the first stage; each further stage has twice as many.
        depths: blocks of each stage.
        num_heads: attention heads of each stage.
        window_size: side of the attention windows.
        mlp_ratio: width of a block's hidden layer over its channels.
        qkv_bias: whether the query, key and value layers have a bias.
        hidden_dropout_prob: dropout after the patch embedding, the attention and the second layer of each MLP.
        attention_probs_dropout_prob: dropout of the attention weights.
        drop_path_rate: stochastic depth of the last block, growing linearly from 0 at the first.
        hidden_act: the activation of the MLPs.
        use_absolute_embeddings: whether a learned position embedding is added to the patches.
        initializer_range: standard deviation of the initial weights.
        layer_norm_eps: epsilon of the norms inside the blocks; the others use 1e-5, as the reference's do.
        encoder_stride: kept for config.json.
        out_features: see `BackboneConfig`.
        out_indices: see `BackboneConfig`.
        **extra: see `Config`.
    """

    model_type = "swin"

    def __init__(
        self,
        image_size: int | Sequence[int] = 224,
        patch_size: int | Sequence[int] = 4,
        num_channels: int = 3,
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_size: int = 7,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        hidden_dropout_prob: float = 0.0,
        attention_probs_dropout_prob: float = 0.0,
        drop_path_rate: float = 0.1,
        hidden_act: str = "gelu",
        use_absolute_embeddings: bool = False,
        initializer_range: float = 0.02,
        layer_norm_eps: float = 1e-5,
        encoder_stride: int = 32,
        out_features: Sequence[str] | None = None,
        out_indices: Sequence[int] | None = None,
        **extra: Any,
    ):
        self.image_size = image_size
        self.patch_size = patch_size
        self.num_channels = num_channels
        self.embed_dim = embed_dim
        self.depths = list(depths)
        self.num_heads = list(num_heads)
        self.window_size = window_size
        self.mlp_ratio = mlp_ratio
        self.qkv_bias = qkv_bias
        self.hidden_dropout_prob = hidden_dropout_prob
        self.attention_probs_dropout_prob = attention_probs_dropout_prob
        self.drop_path_rate = drop_path_rate
        self.hidden_act = hidden_act
        self.use_absolute_embeddings = use_absolute_embeddings
        self.initializer_range = initializer_range
        self.layer_norm_eps = layer_norm_eps
        self.encoder_stride = encoder_stride
        check_counts(1, window_size=window_size, num_channels=num_channels, embed_dim=embed_dim)
        if len(self.depths) != len(self.num_heads):
            raise ValueError(
                f"depths={self.depths} and num_heads={self.num_heads} must speak of the same number of stages"
            )
        for stage, heads in enumerate(self.num_heads):
            if embed_dim * 2**stage % heads:
                raise ValueError(
                    f"the {embed_dim * 2**stage} channels of stage {stage + 1} (embed_dim={embed_dim}) "
                    f"are not a multiple of its {heads} attention heads"
                )
        for derived in ("num_layers", "hidden_size"):
            extra.pop(derived, None)
        super().__init__(self.depths, out_features, out_indices, **extra)

    @property
    def num_layers(self) -> int:
        """The number of stages."""
        return len(self.depths)

    @property
    def hidden_size(self) -> int:
        """Channels of the last stage."""
        return self.embed_dim * 2 ** (len(self.depths) - 1)


class ResNetConfig(BackboneConfig):
    """ResNet (https://arxiv.org/abs/1512.03385); the defaults are ResNet-50.

    Args:
        num_channels: channels of the input.
        embedding_size: channels of the stem.
        hidden_sizes: channels of each stage.
        depths: blocks of each stage.
        layer_type: "basic" (ResNet-18, -34) or "bottleneck" (ResNet-50 and deeper).
        hidden_act: the activation after the stem and each block; inside the blocks it is ReLU, as in the reference.
        downsample_in_first_stage: whether the first stage halves the map as well.
        downsample_in_bottleneck: whether a bottleneck's first 1x1 convolution has the stride, not its 3x3.
        out_features: see `BackboneConfig`.
        out_indices: see `BackboneConfig`.
        **extra: see `Config`.
    """

    model_type = "resnet"
    layer_types: ClassVar[list[str]] = ["basic", "bottleneck"]

    def __init__(
        self,
        num_channels: int = 3,
        embedding_size: int = 64,
        hidden_sizes: Sequence[int] = (256, 512, 1024, 2048),
        depths: Sequence[int] = (3, 4, 6, 3),
        layer_type: str = "bottleneck",
        hidden_act: str = "relu",
        downsample_in_first_stage: bool = False,
        downsample_in_bottleneck: bool = False,
        out_features: Sequence[str] | None = None,
        out_indices: Sequence[int] | None = None,
        **extra: Any,
    ):
        if layer_type not in self.layer_types:
            raise ValueError(f"layer_type={layer_type!r} is not one of {', '.join(self.layer_types)}")
        self.num_channels = num_channels
        self.embedding_size = embedding_size
        self.hidden_sizes = list(hidden_sizes)
        self.depths = list(depths)
        self.layer_type = layer_type
        self.hidden_act = hidden_act
        self.downsample_in_first_stage = downsample_in_first_stage
        self.downsample_in_bottleneck = downsample_in_bottleneck
        if len(self.hidden_sizes) != len(self.depths):
            raise ValueError(
                f"hidden_sizes={self.hidden_sizes} and depths={self.depths} must speak of the same number of stages"
            )
        super().__init__(self.depths, out_features, out_indices, **extra)


class ForeignBackboneConfig(Config):
    """The configuration of a backbone that another library builds: `model_type` is what Transformers calls it.

    Args:
        model_type: "timm_backbone" (with `backbone`, a timm model's name, and `out_indices`), or any type that
            Transformers' `AutoBackbone` knows.
        **values: the rest of its configuration, kept as it is.
    """

    def __init__(self, model_type: str, **values: Any):
        self.model_type = model_type  # type: ignore[misc]
        self.values = dict(values)
        super().__init__()

    def __getattr__(self, name: str) -> Any:
        values = self.__dict__.get("values", {})
        if name in values:
            return values[name]
        raise AttributeError(f"the {self.__dict__.get('model_type')!r} configuration has no {name!r}")

    def to_dict(self) -> dict[str, Any]:
        """Return what it was made of."""
        return {**copy.deepcopy(self.values), "model_type": self.model_type}


BACKBONE_CONFIGS: dict[str, type[BackboneConfig]] = {
    config.model_type: config for config in (ConvNextConfig, ResNetConfig, SwinConfig)
}


class UperNetConfig(Config):
    """UPerNet (https://arxiv.org/abs/1807.10221): a backbone, the head over its feature maps, an auxiliary head.

    The arguments and defaults are Transformers' (4.56), with two differences, both where it cannot build a model: with
    an auxiliary head, which needs three maps, a backbone configuration (ConvNeXt, ResNet, Swin) that names no stages to
    return gives all of them, not only the last; and a timm backbone without `out_indices` gives its last four.

    Args:
        backbone_config: a configuration of the backbone, ours or Transformers', or its dictionary; ResNet-50 if None.
        backbone: instead of `backbone_config`, the name of a timm model (with `use_timm_backbone`), or a folder or Hub
            id with the backbone's config.json.
        use_pretrained_backbone: whether to load the weights that go with `backbone`.
        use_timm_backbone: whether `backbone` is timm's.
        backbone_kwargs: what to override in the configuration that `backbone` names, such as `out_indices`.
        hidden_size: channels of the head.
        initializer_range: standard deviation of the heads' initial weights.
        pool_scales: sides of the grids of the pyramid pooling module.
        use_auxiliary_head: whether there is an auxiliary head; it runs only when labels are given.
        auxiliary_loss_weight: its part in the loss.
        auxiliary_in_channels: channels of the feature map that it reads, the third; the backbone's own where None.
        auxiliary_channels: its width.
        auxiliary_num_convs: its 3x3 convolutions before the classifier.
        auxiliary_concat_input: whether its input is concatenated before the classifier.
        loss_ignore_index: the label that no loss is taken at.
        **extra: see `Config`.

    Raises:
        ValueError: arguments that contradict each other, or a type of backbone that is not known.
    """

    model_type = "upernet"

    def __init__(
        self,
        backbone_config: Any = None,
        backbone: str | None = None,
        use_pretrained_backbone: bool = False,
        use_timm_backbone: bool = False,
        backbone_kwargs: Mapping[str, Any] | None = None,
        hidden_size: int = 512,
        initializer_range: float = 0.02,
        pool_scales: Sequence[int] = (1, 2, 3, 6),
        use_auxiliary_head: bool = True,
        auxiliary_loss_weight: float = 0.4,
        auxiliary_in_channels: int | None = None,
        auxiliary_channels: int = 256,
        auxiliary_num_convs: int = 1,
        auxiliary_concat_input: bool = False,
        loss_ignore_index: int = 255,
        **extra: Any,
    ):
        if backbone_config is not None:
            for name, value in {
                "backbone": backbone,
                "use_timm_backbone": use_timm_backbone,
                "backbone_kwargs": backbone_kwargs,
            }.items():
                if value:
                    raise ValueError(f"give either backbone_config or {name}, not both")
        if use_timm_backbone and backbone is None:
            raise ValueError("use_timm_backbone=True needs backbone, the name of a timm model")
        if use_pretrained_backbone and backbone is None:
            raise ValueError("use_pretrained_backbone=True needs backbone, the name of what is to be loaded")
        if not isinstance(pool_scales, Sequence) or not pool_scales:
            raise ValueError(f"pool_scales must be a list of one or more numbers, got {pool_scales!r}")
        check_counts(1, **{f"pool_scales[{i}]": scale for i, scale in enumerate(pool_scales)})
        check_counts(1, hidden_size=hidden_size, auxiliary_channels=auxiliary_channels)
        check_counts(0, auxiliary_num_convs=auxiliary_num_convs)
        super().__init__(**extra)
        self.backbone = backbone
        self.use_pretrained_backbone = use_pretrained_backbone
        self.use_timm_backbone = use_timm_backbone
        self.backbone_kwargs = None if backbone_kwargs is None else dict(backbone_kwargs)
        self.hidden_size = hidden_size
        self.initializer_range = initializer_range
        self.pool_scales = list(pool_scales)
        self.use_auxiliary_head = use_auxiliary_head
        self.auxiliary_loss_weight = auxiliary_loss_weight
        self.auxiliary_in_channels = auxiliary_in_channels
        self.auxiliary_channels = auxiliary_channels
        self.auxiliary_num_convs = auxiliary_num_convs
        self.auxiliary_concat_input = auxiliary_concat_input
        self.loss_ignore_index = loss_ignore_index
        if backbone_config is None and backbone is None:
            backbone_config = ResNetConfig(out_features=["stage1", "stage2", "stage3", "stage4"])
        self.backbone_config = backbone_config

    @property
    def backbone_config(self) -> Any:
        """The backbone's configuration, in a class of ours and with all the stages that the heads need.

        Setting it, to one of ours, of Transformers' or a dictionary, makes a copy.
        """
        return self._backbone_config

    @backbone_config.setter
    def backbone_config(self, config: Any) -> None:
        self._backbone_config = config = None if config is None else backbone_config_from(config)
        # One level alone has no third map for the auxiliary head: Transformers fails here with an IndexError.
        if (
            isinstance(config, BackboneConfig)
            and self.use_auxiliary_head
            and config.out_features == config.stage_names[-1:]
        ):
            config.out_features = config.stage_names[1:]

    def to_dict(self) -> dict[str, Any]:
        """Return everything, in types that JSON has."""
        values = super().to_dict()
        values["backbone_config"] = None if self.backbone_config is None else self.backbone_config.to_dict()
        return values


def upernet_config_from(config: Any) -> UperNetConfig:
    """Return a `UperNetConfig`: the one given, or a copy of Transformers' configuration or of a dictionary.

    Raises:
        TypeError: it is none of these.
    """
    if isinstance(config, UperNetConfig):
        return config
    values = _as_dict(config)
    if values is None or values.get("model_type", "upernet") != "upernet":
        raise TypeError(f"expected a UperNetConfig, ours or Transformers', got {type(config).__name__}")
    return UperNetConfig.from_dict(values)


def backbone_config_from(config: Any) -> BackboneConfig | ForeignBackboneConfig:
    """Return a backbone's configuration as one of ours, always a copy.

    Raises:
        TypeError: it is neither a configuration nor a dictionary.
        ValueError: its `model_type` is known neither here nor to an installed Transformers; the message lists those
            that are.
    """
    if isinstance(config, BackboneConfig | ForeignBackboneConfig):
        return copy.deepcopy(config)
    values = _as_dict(config)
    if values is None:
        raise TypeError(f"expected a backbone's configuration or its dictionary, got {type(config).__name__}")
    model_type = values.pop("model_type", None)
    if model_type in BACKBONE_CONFIGS:
        return BACKBONE_CONFIGS[model_type](**values)
    if model_type == "timm_backbone" or model_type in _transformers_backbones():
        return ForeignBackboneConfig(model_type, **values)
    known = [*BACKBONE_CONFIGS, "timm_backbone"]
    hint = (
        "" if importlib.util.find_spec("transformers") else "; with Transformers installed, those of its AutoBackbone"
    )
    raise ValueError(f"backbone type {model_type!r} is not known; known are {', '.join(known)}{hint}")


def named_backbone_config(config: UperNetConfig) -> BackboneConfig | ForeignBackboneConfig:
    """Return the configuration of the backbone that `config.backbone` names: a timm model, a folder or a Hub id.

    Raises:
        OSError: the folder or the repository has no config.json, or cannot be reached.
        TypeError: `backbone_kwargs` has a name that the configuration has not.
    """
    assert config.backbone is not None
    overrides = config.backbone_kwargs or {}
    if config.use_timm_backbone:
        overrides = {"use_pretrained_backbone": config.use_pretrained_backbone, **overrides}
        return ForeignBackboneConfig("timm_backbone", backbone=config.backbone, **overrides)
    path = find_file(config.backbone, CONFIG_NAME)
    if path is None:
        raise FileNotFoundError(f"backbone={config.backbone!r} has no {CONFIG_NAME}")
    saved = backbone_config_from(read_json(path))
    if isinstance(saved, BackboneConfig):
        return type(saved).from_dict(saved.to_dict(), **overrides)
    return ForeignBackboneConfig(saved.model_type, **_overridden(saved.values, overrides))


def _overridden(values: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return values with the overrides in the place of all that says the same in other words."""
    replaced = {other for name in overrides for other in LINKED.get(name, (name,))}
    return {**{name: value for name, value in values.items() if name not in replaced}, **overrides}


def check_counts(least: int, **values: Any) -> None:
    """Raise ValueError where one of these is no whole number, or less than `least`."""
    for name, value in values.items():
        if not isinstance(value, int) or value < least:
            raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")


def as_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """Return the floating-point dtype that a name ("bfloat16", "torch.bfloat16") means.

    Raises:
        ValueError: it means none.
    """
    if dtype is None:
        return None
    named = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if not isinstance(named, torch.dtype) or not named.is_floating_point:
        raise ValueError(f'dtype={dtype!r} is not a floating-point dtype; "float32" and torch.bfloat16 are')
    return named


def _as_dict(config: Any) -> dict[str, Any] | None:
    if isinstance(config, Mapping):
        return dict(config)
    return config.to_dict() if hasattr(config, "to_dict") else None


def _transformers_backbones() -> set[str]:
    """The types that Transformers' AutoBackbone builds, none where it is not installed."""
    if importlib.util.find_spec("transformers") is None:
        return set()
    from transformers.models.auto.modeling_auto import MODEL_FOR_BACKBONE_MAPPING_NAMES

    return set(MODEL_FOR_BACKBONE_MAPPING_NAMES)


def _to_json(value: Any) -> Any:
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, set | tuple):
        return list(value)
    raise TypeError(f"{value!r} cannot be written to {CONFIG_NAME}")

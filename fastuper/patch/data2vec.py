"""The heads of Transformers' Data2Vec-Vision, accelerated: copies of BEiT's."""

from __future__ import annotations

from transformers.models.data2vec import modeling_data2vec_vision as theirs

from fastuper.patch.accelerated import MODELS, KnownModel
from fastuper.patch.beit import IS_OF_5, ConvParts, HeadSteps, PoolingParts, PoolingSteps

if IS_OF_5:

    class Data2VecVisionConvLayer(ConvParts, theirs.Data2VecVisionConvLayer, replaces=theirs.Data2VecVisionConvLayer):
        """A convolution, BatchNorm and ReLU, in one step."""

else:

    class Data2VecVisionConvModule(
        ConvParts, theirs.Data2VecVisionConvModule, replaces=theirs.Data2VecVisionConvModule
    ):
        """A convolution, BatchNorm and ReLU, in one step."""


class Data2VecVisionPyramidPoolingBlock(
    PoolingParts, theirs.Data2VecVisionPyramidPoolingBlock, replaces=theirs.Data2VecVisionPyramidPoolingBlock
):
    """A branch of the pyramid pooling."""

    forward = theirs.Data2VecVisionPyramidPoolingBlock.forward


class Data2VecVisionPyramidPoolingModule(
    PoolingSteps, theirs.Data2VecVisionPyramidPoolingModule, replaces=theirs.Data2VecVisionPyramidPoolingModule
):
    """The pyramid pooling."""


class Data2VecVisionUperHead(HeadSteps, theirs.Data2VecVisionUperHead, replaces=theirs.Data2VecVisionUperHead):
    """UPerNet's head."""


MODELS.append(
    KnownModel(
        "Transformers' Data2VecVisionForSemanticSegmentation",
        theirs.Data2VecVisionForSemanticSegmentation,
        "decode_head",
        theirs.Data2VecVisionUperHead,
    )
)

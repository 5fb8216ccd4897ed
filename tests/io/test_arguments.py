"""Arguments of Transformers' `from_pretrained`: values that do nothing pass, all others are refused by name."""

from __future__ import annotations

from itertools import cycle

import pytest

import fastuper
from fastuper.io.arguments import IGNORED, ONLY, REFUSED, take_arguments
from fastuper.io.hub import HubOptions

STAGES = ["stage1", "stage2", "stage3", "stage4"]
NOTHING = {
    **dict(zip(IGNORED, cycle([None, True, "x", {}]), strict=False)),
    **dict(zip(REFUSED, cycle([None, False, {}]), strict=False)),
    **{name: values[-1] for name, (values, _) in ONLY.items()},
    "use_auth_token": None,
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    backbone = fastuper.ConvNextConfig(hidden_sizes=[8] * 4, depths=[1] * 4, out_features=STAGES)
    config = fastuper.UperNetConfig(backbone_config=backbone, hidden_size=8, use_auxiliary_head=False)
    fastuper.UperNetForSemanticSegmentation(config).save_pretrained(folder)
    backbone.save_pretrained(folder / "backbone")
    fastuper.UperNetImageProcessor().save_pretrained(folder)
    return folder


CLASSES = {
    "UperNetConfig": "",
    "ConvNextConfig": "backbone",
    "UperNetImageProcessor": "",
    "UperNetForSemanticSegmentation": "",
}


@pytest.mark.parametrize("name", CLASSES)
def test_values_that_do_nothing_pass(name, checkpoint):
    cls, subfolder = getattr(fastuper, name), CLASSES[name]
    cls.from_pretrained(checkpoint, subfolder=subfolder, **NOTHING)
    cls.from_pretrained(
        checkpoint, subfolder=subfolder, force_download=False, revision="main", token=None, cache_dir=None
    )


def test_dictionaries_and_constructors_take_them_too(checkpoint):
    for cls in (fastuper.UperNetConfig, fastuper.UperNetImageProcessor):
        given = cls.from_pretrained(checkpoint)
        assert cls.from_dict(given.to_dict(), **NOTHING).to_dict() == given.to_dict()
    assert fastuper.UperNetImageProcessor(use_fast=False).size == {"height": 512, "width": 512}


@pytest.mark.parametrize("argument", [*REFUSED, *ONLY])
def test_other_values_are_refused_by_name(argument, checkpoint):
    for name, subfolder in CLASSES.items():
        with pytest.raises(TypeError, match=f"{name} does not support {argument}='other': .") as caught:
            getattr(fastuper, name).from_pretrained(checkpoint, subfolder=subfolder, **{argument: "other"})
        assert "\n" not in str(caught.value)


def test_a_long_value_is_shortened():
    with pytest.raises(TypeError, match=r"support quantization_config='x{1,60}\.\.\.: quantised"):
        take_arguments("Model", {"quantization_config": "x" * 1000}, HubOptions())


def test_the_older_name_of_the_token():
    arguments = {"use_auth_token": "hf_secret", "num_labels": 3}
    assert take_arguments("Model", arguments, HubOptions(revision="v1")) == HubOptions("hf_secret", revision="v1")
    assert arguments == {"num_labels": 3}
    with pytest.raises(ValueError, match="use_auth_token is the older name of token"):
        take_arguments("Model", {"use_auth_token": True}, HubOptions("hf_other"))


def test_unknown_arguments_are_returned_if_asked(checkpoint):
    for cls in (fastuper.UperNetConfig, fastuper.UperNetImageProcessor):
        _, unused = cls.from_pretrained(checkpoint, return_unused_kwargs=True, foo=1)
        assert unused == {"foo": 1}
        with pytest.raises(TypeError, match="foo"):
            cls.from_pretrained(checkpoint, foo=1)

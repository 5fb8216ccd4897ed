"""`export_model`: what it proves, what its folder has, and what it refuses."""

from __future__ import annotations

import copy
import io
import json
import os
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import fastuper
from fastuper import UperNetForSemanticSegmentation, UperNetImageProcessor
from fastuper.export import ExportError, ProofError, export_model
from fastuper.export.graph import Graph
from fastuper.export.proof import prove
from fastuper.export.settings import ExportSettings
from fastuper.export.sizes import arrays_of, checked_cases, traced_case
from fastuper.models.backbones.foreign.measuring import Sizes
from tests.models.heads import randomize
from tests.models.test_parsing_model import model as parsing_model
from tests.models.test_upernet import model as small_model


def model(kind: str = "convnext", **values: Any) -> Any:
    return randomize(small_model(kind, **{"hidden_size": 8, **values}))


@pytest.fixture(scope="module")
def network() -> Any:
    return model()


def eager(graph: Graph, change: Callable[[dict[str, np.ndarray]], Any] = lambda found: found) -> Any:
    """Return a runner that runs the graph itself, and changes its outputs."""

    def run(arrays: Any) -> Any:
        with torch.no_grad():
            outputs = graph(*(torch.from_numpy(arrays[name]) for name in graph.input_names))
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        found = {name: x.numpy() for name, x in zip(graph.output_names, outputs, strict=True)}
        return change(found)

    return run


class Stub:
    """A format whose exported model is the graph itself: the tests of the folder need no tracer."""

    EXTRA, PACKAGES, RUNTIME, MODEL_FILES = "onnx", ("torch",), "torch", ("model.onnx", "model.onnx.data")

    def __init__(self, change: Callable[[Any], Any] = lambda found: found):
        self.change = change

    def write(self, graph: Graph, settings: ExportSettings, folder: Any, metadata: Any) -> None:
        self.graph, self.metadata = graph, metadata
        (folder / "model.onnx").write_bytes(b"model")

    def load(self, folder: Any, settings: ExportSettings) -> Any:
        assert (folder / "model.onnx").read_bytes() == b"model"
        return eager(self.graph, self.change)

    def versions(self) -> dict[str, str]:
        return {"stub": "1.0"}


@pytest.fixture
def three_sizes(monkeypatch) -> None:
    """Check the three smallest sizes alone."""
    monkeypatch.setattr("fastuper.export.proof.checked_cases", lambda graph: checked_cases(graph)[:3])


@pytest.fixture
def stub(monkeypatch, three_sizes) -> Stub:
    made = Stub()
    monkeypatch.setattr("fastuper.export.exporting.format_of", lambda name: made)
    return made


# Sizes ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["convnext", "swin", "vit_pyramid"])
def test_the_checked_sizes_are_eight_others(kind):
    graph = Graph(model(kind), ExportSettings("torch", labels=True, target_size=True))
    traced, cases = traced_case(graph), checked_cases(graph)
    sizes = {(case.height, case.width) for case in cases}
    assert len(cases) == 8 == len(sizes)
    assert (traced.height, traced.width) not in sizes
    assert (16, 16) in sizes
    assert {case.batch for case in cases} == {1, 2, 3}
    assert len({case.target_size for case in cases} | {traced.target_size}) == 9
    assert any(case.height % 2 and case.width % 2 for case in cases)
    last = [(-(-case.height // 32), -(-case.width // 32)) for case in cases]
    assert any(all(side % 2 and side % 3 for side in sides) and min(sides) > 1 for sides in last)
    if kind == "swin":  # windows of 4 positions, 128 pixels of the image
        assert (128, 128) in sizes
        assert traced.height > 128
        assert traced.width > 128


def test_one_size_is_checked_with_eight_inputs():
    graph = Graph(model(), ExportSettings("torch", size="48x80"))
    cases = checked_cases(graph)
    assert [(case.height, case.width) for case in cases] == [(48, 80)] * 8
    assert {case.batch for case in cases} == {1, 2, 3}
    inputs = [arrays_of(case, graph)["pixel_values"][0] for case in [traced_case(graph), *cases]]
    assert all(not np.array_equal(a, b) for i, a in enumerate(inputs) for b in inputs[:i])
    graph.settings = ExportSettings("executorch", size="48x80")
    assert {case.batch for case in [traced_case(graph), *checked_cases(graph)]} == {1}


# Proof ---------------------------------------------------------------------------------------------------------------


def tampered(name: str) -> Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]:
    """Return a change of the outputs by its name; each is wrong at one size, or by one position."""

    def change(found: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        (key,) = found
        x = found[key].copy()
        if name == "scaled" and x.shape[0] == 3:
            x[2] *= 1.0001
        elif name == "one-pixel":
            x[0, ..., -1, -1] = x[0, ..., -1, -1] + 1
        elif name == "nan":
            x[..., 0, 0] = np.nan
        elif name == "cropped":
            x = x[..., :-1]
        elif name == "no-batch":
            x = x[:1]
        elif name == "swapped":
            x = x[::-1]
        return {"other": x} if name == "renamed" else {key: x}

    return change


WRONG = {
    "scaled": "at 3 x 37 x 23 the exported model differs from the model by",
    "one-pixel": "at 1 x 16 x 16 the exported model differs",
    "nan": "differs from the model by nan",
    "cropped": "at 1 x 16 x 16 the exported model gives logits (1, 5, 16, 15) in place of (1, 5, 16, 16)",
    "no-batch": "gives logits (1, 5, 37, 23) in place of (3, 5, 37, 23)",
    "swapped": "at 3 x 37 x 23 the exported model differs",
    "renamed": "has no output logits",
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_export_is_found(network, case):
    graph = Graph(copy.deepcopy(network), ExportSettings("torch"))
    with pytest.raises(ProofError) as raised:
        prove(eager(graph, tampered(case)), graph, network)
    assert WRONG[case] in str(raised.value)
    assert "nothing was written; give size=HEIGHTxWIDTH, or another format" in str(raised.value)


def test_wrong_labels_are_found(network):
    graph = Graph(copy.deepcopy(network), ExportSettings("torch", labels=True))
    with pytest.raises(ProofError, match=r"at 1 x 16 x 16 the exported model gives 1 of 256 pixels another label"):
        prove(eager(graph, tampered("one-pixel")), graph, network)


def test_labels_are_compared_where_float32_decides(three_sizes, monkeypatch):
    """The first two classes, of which one is the best everywhere, differ by 2e-5 of the largest logit."""
    network = model(num_labels=3)
    head = network.decode_head.classifier
    with torch.no_grad():
        head.weight[1] = head.weight[0]
        head.bias.copy_(torch.tensor([10, 10.0002, 0]))
    graph = Graph(copy.deepcopy(network), ExportSettings("torch", labels=True))
    assert all(each["labels_undecided"] == 0 for each in prove(eager(graph), graph, network))

    def zero(found: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {"labels": np.zeros_like(found["labels"])}

    with pytest.raises(ProofError, match="gives 256 of 256 pixels another label"):
        prove(eager(graph, zero), graph, network)
    monkeypatch.setattr("fastuper.export.proof.WIDE", 0)  # then float32 is compared with float32
    sizes = prove(eager(graph, zero), graph, network)
    assert {(each["reference"], each["labels_undecided"]) for each in sizes} == {("float32", 1.0)}


def test_a_runtime_that_fails_is_named(network):
    def fail(arrays: Any) -> Any:
        if arrays["pixel_values"].shape[0] == 2:
            raise IndexError("no such\nsize")
        return eager(graph)(arrays)

    graph = Graph(copy.deepcopy(network), ExportSettings("torch"))
    with pytest.raises(ProofError, match=r"at 2 x 65 x 97 the exported model does not run: IndexError: no such size;"):
        prove(fail, graph, network)


def test_logits_that_are_not_finite_are_the_models_fault(network):
    broken = copy.deepcopy(network)
    broken.decode_head.classifier.bias.data[0] = float("inf")
    graph = Graph(broken, ExportSettings("torch"))
    with pytest.raises(ExportError, match="the model's own logits are not finite"):
        prove(eager(graph), graph, broken)


@pytest.mark.parametrize(
    ("labels", "values"),
    [(False, {"num_labels": 1}), (True, {"align_corners": True})],
    ids=str,
)
def test_a_right_export_is_proved(labels, values):
    network = model(**values)
    graph = Graph(copy.deepcopy(network), ExportSettings("torch", labels=labels, target_size=labels))
    sizes = prove(eager(graph), graph, network)
    assert len(sizes) == 8
    assert {each["reference"] for each in sizes} == {"float64"}
    for each in sizes:
        assert each["labels_different"] == 0
        assert each["labels_undecided"] < 0.05
        assert ("target_size" in each) is labels
        assert ("error" in each) is not labels
        assert labels or each["error"] < 2e-5


@pytest.mark.parametrize("labels", [False, True])
def test_a_parsing_model_is_proved(three_sizes, labels):
    network = parsing_model()
    graph = Graph(copy.deepcopy(network), ExportSettings("torch", labels=labels, target_size=labels))
    sizes = prove(eager(graph), graph, network)
    assert all(each["error"] < 2e-5 for each in sizes)  # of the scenes at least
    assert all(each.get("labels_undecided", 0) < 0.1 for each in sizes)

    def other_parts(found: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        part = found["part"]
        return {**found, "part": np.where(part == part.max(), 0, part) if labels else part * np.float32(1.001)}

    with pytest.raises(ProofError, match="another label" if labels else "differs from the model"):
        prove(eager(graph, other_parts), graph, network)


def test_16_bits_are_compared_with_the_model_in_float32(three_sizes, network):
    graph = Graph(copy.deepcopy(network).bfloat16(), ExportSettings("torch", dtype="bfloat16"))
    sizes = prove(eager(graph), graph, network)
    assert all(1e-4 < each["error"] < 6e-2 for each in sizes)


# The folder ----------------------------------------------------------------------------------------------------------


def test_the_folder(stub, network, tmp_path):
    network = copy.deepcopy(network).train()
    before = copy.deepcopy(network.state_dict())
    processor = UperNetImageProcessor(size=(64, 96))
    network.config.id2label = {0: "sky", 1: "façade", 2: "道路", 3: "tree", 4: "person"}
    place = tmp_path / "a" / "b"
    report = export_model(network, str(place), processor=processor, labels=True)
    assert network.training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    files = ["export.json", "model.onnx", "photo.py", "preprocessor_config.json", "run.py"]
    assert sorted(os.listdir(place)) == files
    assert os.listdir(tmp_path / "a") == ["b"]
    stored = json.loads((place / "export.json").read_text())
    assert stored == json.loads(json.dumps(report))
    assert stored["format"] == "onnx"
    assert stored["files"] == ["model.onnx"]
    assert stored["versions"]["stub"] == "1.0"
    assert stored["versions"]["fastuper"] == fastuper.__version__
    assert stored["inputs"] == {"pixel_values": {"dtype": "float32", "shape": ["batch", 3, "height", "width"]}}
    assert stored["outputs"] == {"labels": {"dtype": "uint8", "classes": 5}}
    assert stored["checked"] is True
    assert [each["batch"] for each in stored["proof"]["sizes"]] == [1, 3, 2]
    assert stored["settings"]["labels"] is True
    assert stored["id2label"]["2"] == "道路"
    assert len(stored["palette"]) == 5
    assert stored["preprocessing"]["size"] == {"height": 64, "width": 96}
    assert UperNetImageProcessor.from_pretrained(place).to_dict() == processor.to_dict()
    assert json.loads(stub.metadata["class_names"])[1] == "façade"
    assert json.loads(stub.metadata["mean"]) == list(processor.image_mean)
    assert json.loads(stub.metadata["size"]) == {"height": 64, "width": 96}
    assert not stub.graph.training
    with pytest.raises(ExportError, match="b is not empty; give a new folder"):
        export_model(network, place)


def test_unchecked_is_marked(stub, network, tmp_path):
    stub.load = None
    (tmp_path / "made").mkdir()
    report = export_model(network, tmp_path / "made", check=False)
    assert report["checked"] is False
    assert "proof" not in report
    assert "no image processor was given" in report["notes"][0]


# What fails ----------------------------------------------------------------------------------------------------------


def refused(source: Any, tmp_path: Any, *words: str, error: Any = ExportError, **options: Any) -> str:
    """Check that an export fails with one line that has these words, and leaves nothing."""
    with pytest.raises(error) as raised:
        export_model(source, tmp_path / "new" / "made", **options)
    message = str(raised.value)
    for word in words:
        assert word in message
    assert "\n" not in message
    assert os.listdir(tmp_path) == []
    return message


def test_a_failed_proof_leaves_nothing(stub, network, tmp_path):
    stub.change = tampered("one-pixel")
    refused(network, tmp_path, "format=onnx: at 1 x 16 x 16 the exported model differs", error=ProofError)


@pytest.mark.parametrize(
    ("fault", "error", "words"),
    [
        (KeyboardInterrupt(), KeyboardInterrupt, ""),
        (OSError(28, "No space left on device"), OSError, "No space left on device"),
        (ValueError("node 7\nunknown"), ExportError, "cannot be written in this format (ValueError: node 7 unknown)"),
        (ExportError("opset=9 is too old"), ExportError, "opset=9 is too old"),
        (ProofError("int8 loses"), ProofError, "int8 loses"),
        (ModuleNotFoundError("No module named 'onnxscript'"), ExportError, "'onnxscript': install fastuper[onnx]"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_write_that_fails_leaves_nothing(stub, network, tmp_path, fault, error, words):
    def write(graph: Any, settings: Any, folder: Any, metadata: Any) -> None:
        (folder / "model.onnx").write_bytes(b"half")
        raise fault

    stub.write = write
    refused(network, tmp_path, words, error=error)


def test_a_full_disk_at_the_end_leaves_nothing(stub, network, tmp_path, monkeypatch):
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(UperNetImageProcessor, "save_pretrained", full)
    refused(network, tmp_path, "No space left on device", error=OSError)


@pytest.mark.parametrize("fault", [RuntimeError("basic_ios::clear"), ExportError("it has no form")], ids=str)
def test_a_full_disk_that_a_library_does_not_name(stub, network, tmp_path, monkeypatch, fault):
    class Full(io.BytesIO):
        def write(self, data: Any) -> int:
            raise OSError(28, "No space left on device")

    def write(*_: object) -> None:
        monkeypatch.setattr(tempfile, "TemporaryFile", lambda **_: Full())
        raise fault

    stub.write = write
    refused(network, tmp_path, "No space left on device", error=OSError)


def test_a_missing_runtime_names_the_extra(stub, network, tmp_path):
    stub.RUNTIME = "no_such_runtime"
    refused(network, tmp_path, "format=onnx needs no_such_runtime,", "install fastuper[onnx], or give no-check")
    stub.PACKAGES = ("torch", "no_such_writer")
    for check in (True, False):
        message = refused(network, tmp_path, "format=onnx needs no_such_writer,", "fastuper[onnx]", check=check)
        assert "no-check" not in message


def test_what_quantises_is_missed_before_the_export(stub, network, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "nncf", None)
    message = refused(network, tmp_path, "needs nncf, which", "fastuper[onnx]", format="openvino", int8=tmp_path)
    assert "no-check" not in message


def test_places_that_are_not_new(stub, network, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ExportError, match="file is a file; give a new folder"):
        export_model(network, tmp_path / "file")
    with pytest.raises(OSError, match="file"):
        export_model(network, tmp_path / "file" / "inside")
    assert os.listdir(tmp_path) == ["file"]


def hooked(network: Any) -> None:
    network.backbone.register_forward_hook(lambda *_: None)


def pruned(network: Any) -> None:
    prune.random_unstructured(network.decode_head.classifier, "weight", 0.5)


def normed(network: Any) -> None:
    nn.utils.weight_norm(network.decode_head.classifier)


def parametrized(network: Any) -> None:
    parametrizations.weight_norm(network.decode_head.classifier)


def replaced(network: Any) -> None:
    network.decode_head.classifier.forward = lambda x: x


def quantised(network: Any) -> None:
    class Int8(nn.Parameter):
        pass

    network.decode_head.classifier.weight = Int8(network.decode_head.classifier.weight.data)


def meta(network: Any) -> None:
    network.decode_head.to("meta")


TOUCHED = {
    hooked: ("backbone: a hook is registered on it (hooked.<locals>.<lambda>)", "remove it by its handle"),
    pruned: ("decode_head.classifier: a hook is registered", "torch.nn.utils.prune.remove(module, name)"),
    normed: ("decode_head.classifier: a hook is registered", "torch.nn.utils.remove_weight_norm(module)"),
    parametrized: ("decode_head.classifier: it has parametrizations", "remove_parametrizations"),
    replaced: ("decode_head.classifier: its forward was replaced",),
    quantised: ("decode_head.classifier: its weight is of the class Int8, quantised",),
    meta: ("has tensors on the device meta",),
}


@pytest.mark.parametrize("touch", TOUCHED, ids=lambda touch: touch.__name__)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_touched_model_is_refused_by_name(stub, network, tmp_path, touch):
    changed = copy.deepcopy(network)
    touch(changed)
    refused(changed, tmp_path, "UperNetForSemanticSegmentation", *TOUCHED[touch])


def test_adapters_are_refused(stub, network, tmp_path):
    import peft

    adapted = peft.get_peft_model(copy.deepcopy(network), peft.LoraConfig(target_modules=["classifier"], r=2))
    refused(adapted, tmp_path, "of peft; export what merge_and_unload() of the adapted model returns")
    assert export_model(adapted.merge_and_unload(), tmp_path / "made")["checked"]


def test_wrapped_models_name_the_model_inside(stub, network, tmp_path):
    refused(nn.DataParallel(network), tmp_path, "wrapped in DataParallel; export its .module")
    refused(torch.compile(network), tmp_path, "it is compiled; export the model that torch.compile was given")
    refused(nn.Sequential(network), tmp_path, "Sequential holds a UperNetForSemanticSegmentation")
    refused(nn.Linear(2, 2), tmp_path, "Linear is neither a UPerNet of fastuper nor of Transformers", "convert")
    refused(7, tmp_path, "a model, a folder or a Hub id is exported, not int")


def test_sources_that_cannot_be_loaded(stub, tmp_path, network):
    refused("no/such/model/here", tmp_path, "cannot load the model no/such/model/here")
    refused(network, tmp_path, "processor", processor=3)
    with pytest.raises(TypeError, match="colour"):
        export_model(network, tmp_path / "made", colour="blue")


@pytest.mark.parametrize("accelerated", [False, True])
def test_models_of_transformers(stub, tmp_path, accelerated):
    import transformers

    torch.manual_seed(0)
    values = {
        "hidden_sizes": [8, 8, 16, 16],
        "depths": [1, 1, 1, 1],
        "out_features": ["stage1", "stage2", "stage3", "stage4"],
    }
    config = transformers.UperNetConfig(
        backbone_config=transformers.ConvNextConfig(**values), hidden_size=8, num_labels=5, auxiliary_in_channels=16
    )
    theirs = randomize(transformers.UperNetForSemanticSegmentation(config)).eval()
    plain = copy.deepcopy(theirs)
    if accelerated:
        fastuper.accelerate(theirs)
    processor = transformers.SegformerImageProcessor(size={"height": 64, "width": 96})
    report = export_model(theirs, tmp_path / "made", processor=processor)
    assert report["model"] == "UperNetForSemanticSegmentation"
    assert report["preprocessing"]["size"] == {"height": 64, "width": 96}
    pixels = torch.randn(1, 3, 70, 90)
    found = stub.graph(pixels)
    torch.testing.assert_close(found, plain(pixels).logits, rtol=1e-4, atol=1e-4)
    theirs.decode_head.fpn_bottleneck.activation = nn.Sigmoid()
    with pytest.raises(ExportError, match="is another function as a model of fastuper"):
        export_model(theirs, tmp_path / "other")


class OneSize(nn.Module):
    """A backbone that takes images of 64 x 96 pixels alone."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, 4)

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        if tuple(images.shape[2:]) != (64, 96):
            raise ValueError("images must be 64 x 96")
        finest = self.stem(images)
        return [finest, *(nn.functional.avg_pool2d(finest, side) for side in (2, 4, 8))]


def test_a_model_of_one_size_is_exported_for_it(stub, tmp_path):
    network = randomize(
        UperNetForSemanticSegmentation.over(OneSize(), channels=[8] * 4, hidden_size=8, num_labels=5)
    ).eval()
    refused(
        network, tmp_path, "size=any: the model takes no images of 16 x 16 to 512 x 512", "give the size that it takes"
    )
    refused(
        network, tmp_path, "size=64x64: the model takes no images of this size: images must be 64 x 96", size="64x64"
    )
    assert export_model(network, tmp_path / "made", size="64x96")["checked"]
    network.image_sizes = Sizes("OneSize", (1, 1), (64, 96), (64, 96))
    with pytest.raises(ExportError, match="OneSize takes images of at most 64 x 96 pixels, and size=any is every size"):
        export_model(network, tmp_path / "other")

"""Times head, backbone, full logits and label maps of all peers: `make bench`, or `pytest bench -k ...`."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from bench import truth, variants
from bench.arithmetic import operations
from bench.conftest import readable
from bench.names import (
    AUTOCAST,
    COMPILED,
    CONVOLUTION,
    EAGER,
    FASTUPER,
    FROZEN,
    NOT_SELECTED,
    ONNX,
    OPENVINO,
    OURS_COMPILED,
    SMALLER,
    SMP,
    TUNED,
    WITHOUT_AUXILIARY,
)
from bench.peers import CONVOLUTION_FLOP, PEERS, Peer, Task, World
from bench.timing import Call, Timed, alternate

pytestmark = pytest.mark.timeout(0)  # a task's first test builds, compiles and times all its peers
TARGET = (683, 1024)  # the label map of a photo of 1024 x 683, which the processor resizes to 512 x 512
ALL = [*EAGER, *WITHOUT_AUXILIARY, COMPILED, FROZEN, TUNED, *SMP, ONNX, OPENVINO, FASTUPER, OURS_COMPILED, CONVOLUTION]
QUICK = [EAGER[0], EAGER[1], FASTUPER]
# For larger images, peers that are not prepared for one size warm up at this size. Their first call packs weights and
# starts threads, and neither depends on the size.
WARM_UP = 512


@dataclass(frozen=True)
class Plan:
    """A task, its peers and the number of rounds."""

    section: str
    task: Task
    peers: tuple[str, ...]
    rounds: int


def _plans() -> list[Plan]:
    plans = []

    def add(section: str, task: Task, peers: list[str], rounds: int) -> None:
        plans.append(Plan(section, task, tuple(peers), rounds))

    for backbone in ("convnext-t", "swin-t"):
        add("512", Task("logits", backbone, 512), ALL, 5)
        labels = [*EAGER, *WITHOUT_AUXILIARY, FROZEN, SMP[0], ONNX, OPENVINO, FASTUPER]
        add("512", Task("labels", backbone, 512, target=TARGET), labels, 4)
        parts = [*EAGER, FROZEN, SMP[0], ONNX, OPENVINO, FASTUPER]
        add("512", Task("head", backbone, 512), parts, 4)
        add("512", Task("backbone", backbone, 512), parts, 7)
        add("waterfall", Task("waterfall", backbone, 512), list(variants.VARIANTS), 4)
        add("bfloat16", Task("logits", backbone, 512, "bfloat16"), BFLOAT16, 5)
        # Larger images have fewer peers and rounds: at 2048 one run of Transformers takes most of a minute.
        most = [*EAGER, *WITHOUT_AUXILIARY, FROZEN, SMP[0], ONNX, OPENVINO, FASTUPER]
        add("1024", Task("logits", backbone, 1024), most, 3)
        for part, target in (("labels", (2 * TARGET[0], 2 * TARGET[1])), ("head", None), ("backbone", None)):
            add("1024", Task(part, backbone, 1024, target=target), [*EAGER, OPENVINO, FASTUPER], 3)
        # At this size the models of OpenVINO, Transformers and fastuper together do not fit into 24 GB.
        add("2048", Task("logits", backbone, 2048), [*EAGER, FASTUPER, SMALLER], 3)
        add("2048", Task("labels", backbone, 2048, target=(4 * TARGET[0], 4 * TARGET[1])), [EAGER[0], FASTUPER], 2)
        # `make bench-quick` runs some tasks again, in under three minutes on two cores. A round of all three peers
        # takes 7 s for the whole model.
        add("quick", Task("logits", backbone, 512), QUICK, 3)
        if backbone == "convnext-t":
            add("quick", Task("labels", backbone, 512, target=TARGET), QUICK, 2)
            add("quick", Task("head", backbone, 512), QUICK, 3)
    for backbone in ("convnext-b", "swin-b", "convnext-l", "swin-l"):
        add("larger", Task("logits", backbone, 512), [*EAGER, FASTUPER], 3)
    return plans


BFLOAT16 = [*EAGER, *WITHOUT_AUXILIARY, AUTOCAST, FROZEN, TUNED, OPENVINO, FASTUPER, CONVOLUTION]
PLANS = _plans()
CASES = [
    pytest.param(plan, peer, id=readable(plan.section, plan.task.name, peer), marks=pytest.mark.section(plan.section))
    for plan in PLANS
    for peer in plan.peers
]


class Worlds:
    """The models of one backbone at a time, and the results of all plans timed so far."""

    def __init__(self, config: pytest.Config):
        self.config = config
        self.world: World | None = None
        self.results: dict[Plan, Timed] = {}

    def timed(self, plan: Plan) -> Timed:
        if plan not in self.results:
            if self.world is None or self.world.backbone != plan.task.backbone:
                self.world = None
                gc.collect()
                self.world = World(plan.task.backbone)
            self.results[plan] = self.time(plan, self.world)
        return self.results[plan]

    def time(self, plan: Plan, world: World) -> Timed:
        # The waterfall times full logits of the rows of VARIANTS.
        is_waterfall = plan.task.part == "waterfall"
        task = dataclasses.replace(plan.task, part="logits") if is_waterfall else plan.task
        rows = variants.VARIANTS if is_waterfall else PEERS
        wanted = [part for part in self.config.getoption("--peers").split(";") if part]
        names = [name for name in plan.peers if not wanted or any(part in name for part in wanted)]
        with_truth = not self.config.getoption("--no-truth")

        def builder(peer: Peer) -> Callable[[], tuple[Call, Call]]:
            def build() -> tuple[Call, Call]:
                call = peer.build(world, task)
                if peer.shape_bound or task.size <= WARM_UP:
                    return call, call
                return call, peer.build(world, dataclasses.replace(task, size=WARM_UP))

            return build

        def examine(name: str, call: Call) -> dict[str, Any]:
            if name == CONVOLUTION:
                return {"flop": CONVOLUTION_FLOP}
            if not rows[name].compared or not with_truth:
                return {}
            return truth.errors(world, task, call())

        if with_truth and task.part in ("logits", "labels"):
            with torch.inference_mode():
                truth.stride_4_logits(world, task)  # first, while the peers do not yet fill the memory
        rounds = self.config.getoption("--rounds") or plan.rounds
        result = alternate({name: builder(rows[name]) for name in names}, rounds, examine)
        for name in plan.peers:
            if name not in names:
                result.skipped[name] = NOT_SELECTED
        return result


@pytest.fixture(scope="module")
def worlds(request: pytest.FixtureRequest) -> Worlds:
    return Worlds(request.config)


@pytest.mark.parametrize(("plan", "peer"), CASES)
def test_model(plan: Plan, peer: str, worlds: Worlds, report: Any) -> None:
    timed = worlds.timed(plan)
    assert worlds.world is not None
    task = {
        "name": plan.task.name,
        "section": plan.section,
        "order": list(plan.peers),
        **{key: value for key, value in dataclasses.asdict(plan.task).items() if value is not None},
        "flop": operations(worlds.world.config, plan.task.size),
    }
    report(task, peer, timed)

"""The components of the page: the photo and the model on the left, what was found on the right."""

from __future__ import annotations

import shutil
from collections.abc import Awaitable, Callable, Sequence
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fastuper.scenes.dataset import scene
from fastuper.serve.models import DEMO
from fastuper.serve.service import RefusedError, Service, plain_name, shown_scenes

_SCENES = (5, 62, 131)  # test scenes: the demo model was not trained on them
_LICENCE = (
    "Photographs from scikit-image: the astronaut Eileen Collins (NASA, public domain), a cup of coffee (Rachel "
    "Michetti, CC0)"
)


def build_page(service: Service, folder: Path) -> Any:
    """Return the page as Gradio's blocks.

    Args:
        service: runs the models.
        folder: an existing folder for the examples.
    """
    import gradio as gr

    names = service.models.names

    async def show(photo: tuple[str, str] | None, model: str) -> dict[str, Any] | None:
        if photo is None:
            return None
        path, name = Path(photo[0]), plain_name(photo[1])
        try:
            answer = await service.answer(path, name, model)
        except RefusedError as error:
            return {"error": error.message}
        size = f"{answer.result['width']} x {answer.result['height']}"
        return answer.view | {
            "caption": f"{name}, {size} pixels, {answer.view['seconds']:.1f} s",
            "scene": shown_scenes(answer.result["scene"]),
            "files": answer.result["files"],
        }

    with gr.Blocks(title="fastuper", analytics_enabled=False) as page:
        gr.Markdown("# fastuper\nThe class of every pixel of a photo. Photos stay on the machine that runs this page.")
        with gr.Row(equal_height=False):
            with gr.Column(scale=2, min_width=300):
                photo = gr.Image(
                    label="Photo",
                    sources=["upload", "webcam", "clipboard"],
                    height=300,
                    buttons=[],
                    elem_id="photo",
                )
                model = gr.Dropdown(
                    names,
                    value=names[0],
                    label="Model",
                    info="The package's own model knows drawn street scenes only." if names == [DEMO] else None,
                    interactive=True,
                    filterable=False,
                    elem_id="model",
                )
                examples = _draw_scenes(folder) if names == [DEMO] else _photographs(folder)
                if examples:
                    # Not gr.Examples: a click would replace the photo's component, and what is set on it below.
                    dataset = gr.Dataset(
                        components=[photo],
                        samples=[[str(path)] for path in examples],
                        label="Drawn scenes" if names == [DEMO] else _LICENCE,
                    )
                    dataset.click(_first, dataset, photo, show_progress="hidden", api_visibility="private")
            with gr.Column(scale=5, min_width=400):
                viewer = gr.HTML(
                    html_template='<div class="viewer"></div>',
                    css_template=_viewer_file("viewer.css"),
                    js_on_load=_viewer_file("viewer.js"),
                    apply_default_css=False,
                    elem_id="viewer",
                )
        # Attributes, not subclasses: Gradio writes a file beside the source of each subclass of a component.
        # Gradio's own decodes the photo by other rules, and stores it as WebP.
        photo.__dict__["preprocess"] = _as_uploaded
        for component in page.blocks.values():
            component.async_move_resource_to_block_cache = _local_only(
                component.async_move_resource_to_block_cache,
                folder.parent,
                gr.Error("this is no uploaded photo: upload the file", print_exception=False),
            )
        gr.on(
            [photo.change, model.change],
            show,
            [photo, model],
            viewer,
            concurrency_limit=None,  # the service has the queue
            trigger_mode="always_last",
            api_visibility="private",
        )
    return page


def _as_uploaded(payload: Any) -> tuple[str, str] | None:
    """Return the path and the name of an uploaded photo."""
    return payload and (payload.path, payload.orig_name or Path(payload.path).name)


def theme() -> Any:
    """Return the page's colours and fonts; the fonts are files of Gradio's package."""
    import gradio as gr

    regular_and_bold = gr.themes.utils.fonts.LocalFont("Source Sans Pro", weights=(400, 700))
    return gr.themes.Default(
        primary_hue="emerald", neutral_hue="slate", font=(regular_and_bold, "system-ui", "sans-serif")
    )


def _first(sample: Sequence[str]) -> str:
    """Return the photo of an example."""
    return sample[0]


def _local_only(
    move: Callable[[Any], Awaitable[str | None]], folder: Path, error: Exception
) -> Callable[[Any], Awaitable[str | None]]:
    """Return Gradio's function that takes a component's file, made to refuse what is not in the temporary folder.

    Gradio would download an address, and read any file that the process can read.
    """

    async def refusing(path: Any) -> str | None:
        if path is not None and not Path(path).resolve().is_relative_to(folder.resolve()):
            raise error
        return await move(path)

    return refusing


def _draw_scenes(folder: Path) -> list[Path]:
    """Draw the examples for the package's own model."""
    paths = []
    for seed in _SCENES:
        paths.append(folder / f"scene-{seed}.png")
        scene(seed)[0].save(paths[-1])
    return paths


def _photographs(folder: Path) -> list[Path]:
    """Copy the examples for other models, if scikit-image is installed: two of its pictures."""
    package = find_spec("skimage")
    places = package.submodule_search_locations if package is not None else None
    found = [Path(place) / "data" / name for place in places or () for name in ("astronaut.png", "coffee.png")]
    return [Path(shutil.copy(path, folder)) for path in found if path.is_file()]


def _viewer_file(name: str) -> str:
    return (files(__package__) / "viewer" / name).read_text(encoding="utf-8")

"""The page of the server: controls of a video, its progress, and the videos before it.

It is made of Gradio's components, whose events call `page_actions`; videos and previews come from
the routes of the API.
"""

import os
from collections.abc import Callable
from typing import Any

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

import gradio as gr
from fastapi import FastAPI

from framepack_jax.server import uploads
from framepack_jax.server.errors import ApiError
from framepack_jax.server.form import DEFAULT_SECONDS, STEP_CACHES
from framepack_jax.server.page_actions import (
    NUMBERS,
    Actions,
    player_html,
    preview_html,
    progress_html,
)

# Seconds between two looks at the video that is shown.
LOOK = 1.0
# Seconds after which Gradio's copies of uploads are removed.
KEPT = 3600
# Fonts of the system: those of Gradio's themes come from another host.
FONTS = ["system-ui", "sans-serif"]
STYLE = """
.gradio-container video, .gradio-container img#fp-preview { width: 100%; border-radius: 8px; }
.gradio-container video { max-height: 70vh; background: #000; }
progress#fp-bar { width: 100%; height: 14px; accent-color: #2563eb; }
.fp-error { color: #b91c1c; font-weight: 600; }
#history label { white-space: normal; }
footer { display: none !important; }
"""


def add_page(app: FastAPI, actions: Actions) -> FastAPI:
    """Mount the page at / of the server."""
    theme = gr.themes.Default(font=FONTS, font_mono=["monospace"])
    return gr.mount_gradio_app(
        app, _blocks(actions), path="/", theme=theme, css=STYLE, footer_links=[],
        max_file_size=actions.limits.upload_bytes, ssr_mode=False, show_error=True,
    )  # fmt: skip


def _blocks(actions: Actions) -> gr.Blocks:
    title = f"framepack: {actions.model.name}"
    with gr.Blocks(title=title, analytics_enabled=False, delete_cache=(KEPT, KEPT)) as blocks:
        gr.Markdown(f"## {title}")
        chosen = gr.State(None)
        seen = gr.State({})
        with gr.Row():
            with gr.Column(scale=2, min_width=320):
                controls = _controls(actions)
                generate = gr.Button("Generate", variant="primary", elem_id="generate")
            with gr.Column(scale=3, min_width=320):
                progress = gr.HTML(elem_id="progress")
                player = gr.HTML(elem_id="player")
                preview = gr.HTML(elem_id="preview")
                with gr.Row(visible=False) as steering:
                    new_prompt = gr.Textbox(
                        label="New prompt, from the next section on", scale=4, elem_id="new-prompt"
                    )
                    steer = gr.Button("Change", scale=1, elem_id="steer")
                with gr.Row(visible=False) as buttons:
                    again = gr.Button("Use settings again", elem_id="again")
                    onward = gr.Button("Continue", elem_id="onward")
                    delete = gr.Button("Delete", variant="stop", elem_id="delete")
                history = gr.Radio(label="Videos", choices=[], elem_id="history")
        names, fields = list(controls), list(controls.values())
        shown = [progress, player, preview, history, steering, buttons, seen]

        def look(name: str | None, before: dict[str, Any]) -> list[Any]:
            return _look(actions, name, before)

        def create(*values: Any) -> Any:
            return _told(lambda: actions.create(dict(zip(names, values, strict=True))))

        def use_again(name: str | None) -> list[Any]:
            values = _told(lambda: actions.settings(_needed(name)))
            return [values[control] for control in names]

        def steered(name: str | None, prompt: str) -> str:
            _told(lambda: actions.steer(_needed(name), prompt))
            return ""

        def removed(name: str | None) -> None:
            _told(lambda: actions.delete(_needed(name)))

        view: dict[str, Any] = {
            "fn": look,
            "inputs": [chosen, seen],
            "outputs": shown,
            "show_progress": "hidden",
        }
        generate.click(create, fields, chosen).success(**view)
        again.click(use_again, chosen, fields)
        onward.click(_needed, chosen, controls["extends"])
        steer.click(steered, [chosen, new_prompt], new_prompt)
        delete.click(removed, chosen, None).success(lambda: None, None, chosen).success(**view)
        history.input(lambda name: name, history, chosen).success(**view)
        blocks.load(lambda: _first(actions), None, chosen).success(**view)
        gr.Timer(LOOK).tick(**view)
    return blocks


def _controls(actions: Actions) -> dict[str, Any]:
    """Return the controls of a video by the names that `Actions.create` knows."""
    defaults = actions.model.pipe.sampling
    limits = actions.limits
    made: dict[str, Any] = {}
    made["image"] = gr.Image(
        label="First frame (none: from the prompt alone)", type="filepath", elem_id="image",
        sources=["upload", "clipboard"], height=260,
    )  # fmt: skip
    made["prompt"] = gr.Textbox(label="Prompt", lines=3, elem_id="prompt")
    with gr.Row():
        made["seconds"] = gr.Slider(
            0.1, limits.max_seconds, float(DEFAULT_SECONDS), step=0.1, label="Seconds",
            elem_id="seconds",
        )  # fmt: skip
        made["size"] = gr.Dropdown(
            actions.sizes, value=actions.sizes[0], allow_custom_value=not limits.sizes,
            label="Size", info="Automatic, or WIDTHxHEIGHT", elem_id="size",
        )  # fmt: skip
    with gr.Row():
        made["seed"] = gr.Number(-1, label="Seed", info="-1 draws one", precision=0, elem_id="seed")
        made["steps"] = gr.Slider(
            1, limits.max_steps, _one(defaults.steps), step=1, label="Steps", elem_id="steps"
        )
    with gr.Accordion("Prompts over time", open=False):
        made["prompts"] = gr.Dataframe(
            headers=["from second", "prompt"], datatype=["number", "str"], type="array",
            row_count=2, column_count=2, interactive=True, show_label=False, elem_id="prompts",
        )  # fmt: skip
        made["prompt_blend"] = gr.Number(
            1.0, label="Blend", info="Seconds from one prompt to the next", minimum=0
        )
    with gr.Accordion("End image, key frames, video to continue", open=False):
        made["end_image"] = gr.Image(label="Last frame", type="filepath", height=200)
        made["key_frames"] = gr.File(
            label="Key frames", file_count="multiple", file_types=["image"], height=120
        )
        made["key_frame_seconds"] = gr.Textbox(
            label="Seconds of the key frames", placeholder="2.5, 6"
        )
        made["video"] = gr.File(
            label="Video to continue, in place of the first frame", file_types=["video"], height=120
        )
        made["extends"] = gr.Textbox(
            label="Or the ID of a video above", placeholder="video_...", elem_id="extends"
        )
    with gr.Accordion("Guidance and speed", open=False):
        made["negative_prompt"] = gr.Textbox(
            label="Negative prompt", info="Needs a CFG scale other than 1", lines=2
        )
        with gr.Row():
            made["distilled_guidance"] = gr.Number(
                defaults.distilled_guidance, label="Distilled guidance"
            )
            made["cfg_scale"] = gr.Number(defaults.cfg_scale, label="CFG scale")
            made["cfg_rescale"] = gr.Number(0.0, label="CFG rescale")
        with gr.Row():
            made["step_cache"] = gr.Dropdown(list(STEP_CACHES), value="none", label="Step cache")
            made["cache_threshold"] = gr.Number(None, label="Threshold", info="empty: its default")
    assert {*NUMBERS} <= made.keys() and uploads.END in made
    return made


def _one(steps: int | tuple[int, ...] | None) -> int:
    """Return the steps of a section, of its first stage if it has several."""
    return steps[0] if isinstance(steps, tuple) else steps or 1


def _first(actions: Actions) -> str | None:
    """Return the video to show to a new visitor: the one in progress, or the newest."""
    running = [job.id for job in actions.queue.running]
    return next(iter([*running, *(name for _, name in actions.listed())]), None)


def _look(actions: Actions, name: str | None, before: dict[str, Any]) -> list[Any]:
    """Return what changed since the last look: progress, player, preview, history, the rows of
    buttons, and what is seen now."""
    state = actions.state(name)
    preview = state is not None and (actions.queue.folder / state["id"] / "preview.png").exists()
    now: dict[str, Any] = {
        "progress": progress_html(state),
        "player": player_html(state),
        "preview": preview_html(state, preview),
        "history": [name, actions.listed()],
        "steering": state is not None and state["status"] in ("queued", "in_progress"),
        "buttons": state is not None,
    }
    changed = {part: value for part, value in now.items() if before.get(part) != value}
    for part in {"steering", "buttons"} & changed.keys():
        changed[part] = gr.update(visible=now[part])
    if "history" in changed:
        labels = [label for label, _ in now["history"][1]]
        known = name if state is not None else None
        changed["history"] = gr.update(
            choices=now["history"][1], value=known, label=f"Videos ({len(labels)})"
        )
    return [*(changed.get(part, gr.skip()) for part in now), now if changed else gr.skip()]


def _needed(name: str | None) -> str:
    if name is None:
        raise gr.Error("choose a video first")
    return name


def _told(action: Callable[[], Any]) -> Any:
    """Do something; show its error to the user."""
    try:
        return action()
    except ApiError as error:
        raise gr.Error(error.message, duration=None) from None
    except (ValueError, OSError) as error:
        raise gr.Error(str(error), duration=None) from None

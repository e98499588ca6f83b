"""The page: gradio's components around the desk. Nothing of it is computed here."""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

import gradio as gr

from elva.data.pictures import FORMATS
from elva.demo import view
from elva.demo.desk import MOST_MB, MOST_PICTURES, Asked, Desk, Scratch
from elva.errors import UserError

HERE, OWN = "what is here", "your own pictures"
"""What is searched, as the page calls it."""

TYPES = [".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".heic"]
"""What the page offers to choose; what a file is, its bytes say (`elva.data.pictures`)."""

SOURCES = {
    "data": "as the data names them",
    "rules": "by rules of English",
    "words": "its words: nobody names grains",
}

SESSION_SECONDS = 3600
"""Ours: how long a visitor's pictures are kept after the last look at them."""


@dataclass
class _Visit:
    """What one visitor has asked and dropped."""

    asked: Asked | None = None
    scratch: Scratch | None = None

    def leave(self) -> None:
        if self.scratch is not None:
            self.scratch.remove()


def theme() -> Any:
    """The fonts of the machine, so that none is fetched, and the reports' blue."""
    return gr.themes.Default(
        primary_hue="sky", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
    ).set(
        button_primary_background_fill="#0072b2", button_primary_background_fill_hover="#005a8c",
        button_primary_background_fill_dark="#0072b2", body_text_color_subdued="#5b6670",
        body_text_color_subdued_dark="#9aa5b1", block_info_text_color="#5b6670",
        block_info_text_color_dark="#9aa5b1",
    )  # fmt: skip


def build(desk: Desk, heading: str, examples: Sequence[str]) -> gr.Blocks:
    """The page of a desk, not yet served.

    Args:
        heading: what is searched, in a line.
        examples: queries to begin with.
    """
    with gr.Blocks(title="ELVA", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        visit = gr.State(
            _Visit(), time_to_live=SESSION_SECONDS, delete_callback=lambda gone: gone.leave()
        )
        gr.HTML(view.title(heading), elem_id="title")
        with gr.Row(elem_id="main"):
            with gr.Column(scale=2, min_width=300):
                words, image, where, search, grains = _inputs(desk)
                tried = _examples(examples)
                files, kept = _own(desk)
            with gr.Column(scale=5, min_width=300):
                found = gr.HTML(view.HINT, elem_id="found", padding=False, apply_default_css=False)
        _wire(desk, visit, words, image, where, search, grains, files, kept, found, tried)
    return page


def _inputs(desk: Desk) -> tuple[Any, ...]:
    reads = desk.modalities
    words = gr.Textbox(
        label="Query", placeholder="what should the picture show?", max_lines=3, autofocus=True,
        max_length=2000, elem_id="words", visible="text" in reads,
    )  # fmt: skip
    image = gr.Image(
        label="Query picture", type="filepath", sources=["upload", "clipboard"], height=170,
        elem_id="image", buttons=[], visible="image" in reads or "image,text" in reads,
    )  # fmt: skip
    where = gr.Radio([HERE, OWN], value=HERE, label="Search", elem_id="where", visible=False)
    search = gr.Button("Search", variant="primary", elem_id="search")
    grains = gr.CheckboxGroup(
        label="Grains", info="Switch one off and see which ranks move.", elem_id="grains",
        visible=False,
    )  # fmt: skip
    return words, image, where, search, grains


def _examples(examples: Sequence[str]) -> Any:
    return gr.Dataset(
        components=[gr.Textbox(visible=False)], samples=[[one] for one in examples], label="Try",
        elem_id="examples", type="values", visible=bool(examples),
    )  # fmt: skip


def _own(desk: Desk) -> tuple[Any, Any]:
    with gr.Accordion("Your own pictures", open=False, visible="image" in desk.modalities):
        files = gr.File(
            label=f"Drop up to {MOST_PICTURES}, {MOST_MB} MB each: {', '.join(FORMATS)}",
            file_count="multiple", file_types=TYPES, elem_id="files", height=140,
        )  # fmt: skip
        kept = gr.HTML(elem_id="kept", apply_default_css=False)
    return files, kept


def _wire(
    desk: Desk, visit: Any, words: Any, image: Any, where: Any, search: Any, grains: Any,
    files: Any, kept: Any, found: Any, tried: Any,
) -> None:  # fmt: skip
    """Who calls what. Without `preprocess` gradio opens no picture itself."""
    shared = {
        "concurrency_id": "model", "concurrency_limit": 1, "api_visibility": "private",
        "preprocess": False,
    }  # fmt: skip
    asking: dict[str, Any] = {
        "fn": _told(_ask(desk)), "inputs": [visit, words, image, where],
        "outputs": [visit, grains, found], **shared,
    }  # fmt: skip
    words.submit(**asking)
    search.click(**asking)
    where.input(**asking)
    grains.input(_told(_flip(desk)), [visit, grains], [found], trigger_mode="always_last", **shared)
    files.upload(_told(_drop(desk)), [visit, files], [visit, files, where, kept], **shared).success(
        **asking
    )
    tried.click(lambda sample: str(sample[0]), tried, words, api_visibility="private").success(
        **asking
    )


def _told(call: Callable[..., Any]) -> Callable[..., Any]:
    """The same, of which a visitor is told what they can mend; words of theirs are no HTML."""

    @wraps(call)
    def told(*args: Any) -> Any:
        try:
            return call(*args)
        except UserError as error:
            line = str(error).removeprefix("search: ").removeprefix("demo: ")
            raise gr.Error(html.escape(line), print_exception=False) from None

    return told


def _ask(desk: Desk) -> Callable[..., Any]:
    def ask(visit: _Visit, words: Any, image: Any, where: Any) -> tuple[Any, ...]:
        if not _text(words).strip() and _file(image) is None:
            visit.asked = None
            return visit, gr.CheckboxGroup(visible=False), view.HINT
        scratch = visit.scratch if where == OWN else None
        if where == OWN and scratch is None:
            raise UserError("demo: pictures must be dropped first, got none; drop some")
        visit.asked = desk.ask(_text(words), _file(image), scratch)
        switches = visit.asked.switches
        shown = gr.CheckboxGroup(
            choices=[(f"{name} · {grain.type}", at) for at, (name, grain) in
                     enumerate(zip(switches.names, switches.grains, strict=True))],
            value=[*range(len(switches.grains))],
            label=f"Grains, {SOURCES[switches.source]}",
            visible=bool(switches.grains),
        )  # fmt: skip
        return visit, shown, view.found(visit.asked, desk.k)

    return ask


def _flip(desk: Desk) -> Callable[..., Any]:
    def flip(visit: _Visit, on: Any) -> str:
        asked = visit.asked
        if asked is None:
            raise UserError("demo: a query must be asked first, got none; ask one")
        there = range(len(asked.switches.grains))
        off = [at for at in there if at not in (on if isinstance(on, list) else [])]
        if not off:
            return view.found(asked, desk.k)
        scratch = visit.scratch if asked.own else None
        return view.moved(asked, desk.without(asked, off, scratch), off, desk.k)

    return flip


def _drop(desk: Desk) -> Callable[..., Any]:
    def drop(visit: _Visit, files: Any) -> tuple[Any, ...]:
        visit.scratch = visit.scratch or desk.scratch()
        paths = [path for one in files or [] if (path := _file(one)) is not None]
        desk.add(visit.scratch, paths)
        count = visit.scratch.count
        where = gr.Radio(visible=bool(count), value=OWN if count else HERE)
        return visit, None, where, view.own(count, visit.scratch.lines)

    return drop


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _file(value: Any) -> Path | None:
    """The path of an uploaded file; the guard has seen that it is one."""
    return Path(value["path"]) if isinstance(value, dict) and value.get("path") else None

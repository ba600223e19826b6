"""One self-contained HTML page of a comparison: table, trade-off, videos, kept blocks."""

import json
from base64 import b64encode
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from accel.files import write_atomically
from accel.pipelines import figures
from accel.pipelines.compare_findings import sentences_of
from accel.pipelines.compare_table import COLUMNS, failures, rows_of
from accel.pipelines.report_style import STYLE
from accel.pipelines.trade_off_picture import trade_off
from accel.pipelines.video_files import encode_animation, load_frames

ANIMATION_SIDE = 192  # pixels; smaller frames are enlarged
UNFOLDED_TO = 8  # arms: of more, the frames are folded away
KEPT_SHOWN = 8  # arms whose kept blocks are drawn


def write_report(folder: Path) -> Path:
    """Write `report.html`, `trade-off.svg` and `animations/*.gif` from a comparison's `folder`."""
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    arms = results["arms"]
    dense = results["baselines"]
    finished = [n for n, a in arms.items() if n not in dense and a.get("seconds")]
    shown = next((n for n in finished if arms[n]["maps"]), next(iter(finished), "dense"))
    sparse = {name: arm for name, arm in arms.items() if name not in dense}
    parts = [
        _head(results, shown),
        _section("Speed, memory and quality", _table(results, shown)),
        _section("Trade-off", _trade_off(folder, results, sparse, shown)),
    ]
    parts += [_videos(folder, results, prompt) for prompt in _prompts(arms[shown])]
    parts += [_kept(sparse), _maps(folder, shown, arms[shown].get("maps")), _about(results)]
    body = "\n".join(part for part in parts if part)
    title = escape(f"accel: {results['settings']['model']}")
    page = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>{STYLE}</style></head>\n<body><main>\n{body}\n</main></body></html>\n"
    )
    return write_atomically(folder / "report.html", page)


def _head(results: Mapping[str, Any], shown: str) -> str:
    settings, arm = results["settings"], results["arms"][shown]
    tiles = []
    if arm.get("speedup") and shown != "dense":
        what = f"speed-up of {shown} over the fastest dense run"
        tiles.append((f"{arm['speedup']:.2f}x", what))
    if arm.get("psnr"):
        tiles.append((f"{arm['psnr']['mean']:.1f} dB", "mean PSNR against dense"))
        tiles.append((f"{arm['psnr']['worst']:.1f} dB", "worst video"))
    if arm.get("keep") and shown != "dense":
        tiles.append((f"{arm['keep']:.0%}", "of the blocks computed in sparse steps"))
    boxes = "".join(
        f"<div class=tile><b>{escape(value)}</b><span>{escape(what)}</span></div>"
        for value, what in tiles
    )
    call = settings["call"]
    frames = f"{call['num_frames']} frames" if "num_frames" in call else "images"
    about = (
        f"{results['device']} · {settings['dtype']} · {settings['steps']} steps ·"
        f" {frames} of {call.get('width')} x {call.get('height')} ·"
        f" prompts: {len(settings['prompts'])}, rounds: {settings['rounds']} ·"
        f" {results['date'][:10]}"
    )
    return (
        f"<header><h1>{escape(settings['model'])}</h1><p class=about>{escape(about)}</p>"
        f"<div class=tiles>{boxes}</div></header>"
    )


def _section(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>\n{content}</section>" if content else ""


def _table(results: Mapping[str, Any], shown: str) -> str:
    head, *body = rows_of(results)
    meanings = {c.head: c.meaning for c in COLUMNS}
    cells = "".join(f'<th title="{escape(meanings.get(h, ""))}">{escape(h)}</th>' for h in head)
    rows = []
    for row in body:
        if len(row) == 1:
            rows.append(f"<tr class=group><td colspan={len(head)}>{escape(row[0])}</td></tr>")
            continue
        mark = " class=shown" if row[0] == shown else ""
        rows.append(f"<tr{mark}>" + "".join(f"<td>{escape(c)}</td>" for c in row) + "</tr>")
    notes = "".join(f"<li>{escape(line)}</li>" for line in failures(results))
    terms = "".join(
        f"<dt>{escape(h)}</dt><dd>{escape(meanings[h])}.</dd>" for h in head if h in meanings
    )
    return (
        f"<div class=wide><table><thead><tr>{cells}</tr></thead><tbody>{''.join(rows)}</tbody>"
        f"</table></div>{f'<ul class=notes>{notes}</ul>' if notes else ''}"
        f"<details><summary>What the columns mean</summary><dl>{terms}</dl></details>"
    )


def _trade_off(
    folder: Path, results: Mapping[str, Any], arms: Mapping[str, Any], shown: str
) -> str:
    if not any(a.get("psnr") and a.get("speedup") for a in arms.values()):
        return ""
    drawn = trade_off(arms, shown, results["trade_off"]["lines"])
    write_atomically(folder / "trade-off.svg", drawn)
    picture = _image(drawn, "svg+xml", "speed-up against PSNR")
    found = "".join(f"<li>{escape(line)}</li>" for line in sentences_of(results))
    return (
        f"<div class=plot>{picture}</div><p>Up and to the right is better. A mark is the mean over"
        " all videos, the whisker goes down to the worst one. Left of the grey line, dense is"
        " faster. Lines join the plans of a front, by their numbers, and the plans with a cache"
        f" that no other one beats.</p>{f'<ul class=found>{found}</ul>' if found else ''}"
    )


def _prompts(arm: Mapping[str, Any]) -> list[int]:
    """The first prompt, and the one in which the shown arm is furthest from dense."""
    made = {n: v.get("psnr", np.inf) for n, v in enumerate(arm.get("videos", ())) if v}
    return sorted({min(made), min(made, key=made.__getitem__)}) if made else []


def _videos(folder: Path, results: Mapping[str, Any], prompt: int) -> str:
    videos = {}
    for name, arm in results["arms"].items():
        made = arm.get("videos", [])
        if prompt < len(made) and made[prompt]:
            videos[name] = load_frames(folder / made[prompt]["file"])
    fps = results["settings"]["fps"]
    moving, still = [], []
    for name, video in videos.items():
        gif = encode_animation(video, "gif", fps=fps, min_side=ANIMATION_SIDE)
        write_atomically(folder / "animations" / f"p{prompt:02d}-{name}.gif", gif)
        webp = encode_animation(video, "webp", fps=fps, min_side=ANIMATION_SIDE)
        label = f"<figcaption>{escape(name)}</figcaption>"
        moving.append(f"<figure>{_image(webp, 'webp', f'{name}, moving')}{label}</figure>")
        still.append(_stills(name, video, videos.get("dense")))
    text = results["settings"]["prompts"][prompt]
    content = (
        f"<div class=moving>{''.join(moving)}</div>"
        f"<details{' open' if len(videos) <= UNFOLDED_TO else ''}><summary>Frames and differences"
        "</summary><div class=strips><span></span><span>frames from first to last</span>"
        f"<span>difference to dense, {figures.AMPLIFIED} times</span>{''.join(still)}</div>"
        "</details>"
    )
    return _section(f"Prompt {prompt + 1}: “{text}”", content)


def _stills(name: str, video: np.ndarray, dense: np.ndarray | None) -> str:
    frames = _image(figures.strip(video), "png", f"{name}, frames")
    apart = "<i>reference</i>" if name == "dense" else ""
    if dense is not None and name != "dense":
        apart = _image(
            figures.strip(figures.difference(video, dense)), "png", f"{name}, difference"
        )
    return f"<b>{escape(name)}</b><div>{frames}</div><div>{apart}</div>"


def _kept(arms: Mapping[str, Any]) -> str:
    made = {n: a for n, a in arms.items() if a.get("summary") and not a["cache"]}
    if not made:
        return ""
    drawn = dict(list(made.items())[:KEPT_SHOWN])
    picture = _image(figures.keep_and_recall(drawn), "svg+xml", "keep and recall by layer")
    more = "" if len(made) == len(drawn) else f" Of the first {len(drawn)} plans and recipes."
    return _section(
        "What is computed, and what it holds",
        f"<div class=plot>{picture}</div><p>Above: the fraction of blocks computed, by layer (rows)"
        " and band of the schedule (columns); dense steps are left out. Below: recall, the share"
        " of attention that lies inside the computed blocks, on sampled rows; the bar goes down to"
        " the worst head. Where block means replace the rest, recall understates the result."
        f"{more}</p>",
    )


def _maps(folder: Path, shown: str, seen: Mapping[str, Any] | None) -> str:
    if not seen or not seen["maps"]:
        return ""
    with np.load(folder / seen["file"], allow_pickle=False) as file:
        mass, keep = (
            [file[f"{key}-{i}"] for i in range(len(seen["maps"]))] for key in ("mass", "keep")
        )
    picture = _image(figures.attention_maps(seen["maps"], mass, keep), "webp", "attention maps")
    return _section(
        f"Attention and kept blocks of {shown}",
        f"<div class=plot>{picture}</div><p>Rows are queries, columns keys, in the token order of"
        f" the head; step {seen['step'] + 1} of {seen['steps']}, conditional branch, of a dense run"
        " up to there. Bright is more attention, logarithmic, against uniform attention. Below"
        " each map, only the blocks that the plan computes, by the masks that hold at this step."
        "</p>",
    )


def _about(results: Mapping[str, Any]) -> str:
    settings = results["settings"]
    seconds = settings["probe"].get("seconds") or {}
    rows = {
        "device": results["device"],
        "precision": settings["dtype"]
        + (f" ({_listed({k: f'{v:.1f} s' for k, v in seconds.items()})} dense)" if seconds else ""),
        "call": _listed(settings["call"]),
        "prompts": "; ".join(settings["prompts"]),
        "noise": f"seed {settings['seed']} + number of the prompt",
        "rounds": f"{settings['rounds']}; those after the first repeat the timing of"
        f" {settings['timing_prompts']} prompts",
        "versions": _listed(results["versions"]),
        "date": results["date"],
    }
    cells = "".join(f"<tr><th>{k}</th><td>{escape(v)}</td></tr>" for k, v in rows.items())
    command = f"<pre>{escape(settings['command'])}</pre>" if settings["command"] else ""
    return _section(
        "How it was measured",
        "<p>Every arm is a process of its own with the same pipeline, prompts and noise."
        f" {settings['loaded_at_once']} at most are loaded at once, the dense ones with each group."
        " The arms take turns, and a speed-up is the median of ratios of generations of the same"
        " turn, to the fastest dense arm in the fastest precision of this device; loading"
        " and warm-up are not counted. Quality is that of the 8-bit frames.</p>"
        f"<table class=about>{cells}</table>{command}",
    )


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items())


def _image(content: bytes, kind: str, what: str) -> str:
    data = b64encode(content).decode()
    return f'<img alt="{escape(what)}" src="data:image/{kind};base64,{data}">'

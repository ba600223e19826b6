"""One self-contained HTML page of a comparison: table, trade-off, what was made, kept blocks."""

import json
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from accel.files import write_atomically
from accel.pipelines import figures
from accel.pipelines.compare_findings import sentences_of
from accel.pipelines.compare_table import columns_of, failures, rows_of
from accel.pipelines.output import Output, Picture
from accel.pipelines.outputs import output_of
from accel.pipelines.report_parts import image, listed, section
from accel.pipelines.report_style import STYLE
from accel.pipelines.trade_off_picture import spots_of, trade_off

KEPT_SHOWN = 8  # arms whose kept blocks are drawn


def write_report(folder: Path) -> Path:
    """Write `report.html` and the pictures beside it from a comparison's `folder`."""
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    arms, kind = results["arms"], kind_of(results)
    dense = results["baselines"]
    finished = [n for n, a in arms.items() if n not in dense and a.get("seconds")]
    shown = next((n for n in finished if arms[n]["maps"]), next(iter(finished), "dense"))
    sparse = {name: arm for name, arm in arms.items() if name not in dense}
    parts = [
        _head(results, shown),
        section("Speed, memory and quality", _table(results, shown)),
        section("Trade-off", _trade_offs(folder, results, sparse, shown)),
    ]
    parts += kind.sections(folder, results, shown)
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
    tiles += kind_of(results).tiles(arm)
    if arm.get("keep") and shown != "dense":
        tiles.append((f"{arm['keep']:.0%}", "of the blocks computed in sparse steps"))
    boxes = "".join(
        f"<div class=tile><b>{escape(value)}</b><span>{escape(what)}</span></div>"
        for value, what in tiles
    )
    words = " · ".join(kind_of(results).words(settings))
    about = (
        f"{results['device']} · {settings['dtype']} · {words} ·"
        f" prompts: {len(settings['prompts'])}, rounds: {settings['rounds']} ·"
        f" {results['date'][:10]}"
    )
    return (
        f"<header><h1>{escape(settings['model'])}</h1><p class=about>{escape(about)}</p>"
        f"<div class=tiles>{boxes}</div></header>"
    )


def _table(results: Mapping[str, Any], shown: str) -> str:
    head, *body = rows_of(results)
    meanings = {c.head: c.meaning for c in columns_of(results)}
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


def _trade_offs(
    folder: Path, results: Mapping[str, Any], arms: Mapping[str, Any], shown: str
) -> str:
    """The pictures of the trade-off that there is something for, then what was found."""
    drawn = [p for p in kind_of(results).pictures if spots_of(arms, p.speed, p.quality)]
    if not drawn:
        return ""
    found = "".join(f"<li>{escape(line)}</li>" for line in sentences_of(results))
    return "".join(_trade_off(folder, results, arms, shown, picture) for picture in drawn) + (
        "<p>Up and to the right is better. Left of the grey line, dense is faster. Lines join the"
        " plans of a front, by their numbers, and the plans with a cache that no other one beats."
        f"</p>{f'<ul class=found>{found}</ul>' if found else ''}"
    )


def _trade_off(
    folder: Path,
    results: Mapping[str, Any],
    arms: Mapping[str, Any],
    shown: str,
    picture: Picture,
) -> str:
    fastest = results["arms"].get(results["baseline"], {})
    lines, dense = results["trade_off"]["lines"], picture.speed.of(fastest)
    level = picture.quality.of(results["arms"].get("dense", {}))
    drawn = trade_off(arms, shown, lines, picture.speed, picture.quality, dense, level)
    write_atomically(folder / picture.file, drawn)
    what = f"{picture.speed.label} against {picture.quality.label}"
    return f"<div class=plot>{image(drawn, 'svg+xml', what)}</div><p>{escape(picture.about)}</p>"


def _kept(arms: Mapping[str, Any]) -> str:
    made = {
        n: a for n, a in arms.items() if (a.get("summary") or {}).get("rows") and not a["cache"]
    }
    if not made:
        return ""
    drawn = dict(list(made.items())[:KEPT_SHOWN])
    picture = image(figures.keep_and_recall(drawn), "svg+xml", "keep and recall by layer")
    more = "" if len(made) == len(drawn) else f" Of the first {len(drawn)} plans and recipes."
    return section(
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
    picture = image(figures.attention_maps(seen["maps"], mass, keep), "webp", "attention maps")
    return section(
        f"Attention and kept blocks of {shown}",
        f"<div class=plot>{picture}</div><p>Rows are queries, columns keys, in the token order of"
        f" the head; step {seen['step'] + 1} of {seen['steps']}, conditional branch, of a dense run"
        " up to there. Bright is more attention, logarithmic, against uniform attention. Below"
        " each map, only the blocks that the plan computes, by the masks that hold at this step."
        "</p>",
    )


def _about(results: Mapping[str, Any]) -> str:
    settings, kind = results["settings"], kind_of(results)
    seconds = settings["probe"].get("seconds") or {}
    rows = {
        "device": results["device"],
        "precision": settings["dtype"]
        + (f" ({listed({k: f'{v:.1f} s' for k, v in seconds.items()})} dense)" if seconds else ""),
        "call": listed(settings["call"]),
        "prompts": kind.prompts_in_words(settings["prompts"]),
        "noise": f"seed {settings['seed']} + number of the prompt",
        "rounds": f"{settings['rounds']}; those after the first repeat the timing of"
        f" {settings['timing_prompts']} prompts",
        "versions": listed(results["versions"]),
        "date": results["date"],
    }
    cells = "".join(f"<tr><th>{k}</th><td>{escape(v)}</td></tr>" for k, v in rows.items())
    command = f"<pre>{escape(settings['command'])}</pre>" if settings["command"] else ""
    return section(
        "How it was measured",
        "<p>Every arm is a process of its own with the same pipeline, prompts and noise."
        f" {settings['loaded_at_once']} at most are loaded at once, the dense ones with each group."
        " The arms take turns, and a speed-up is the median of ratios of generations of the same"
        " turn, to the fastest dense arm in the fastest precision of this device; loading"
        f" and warm-up are not counted. {escape(kind.measured)}</p>"
        f"<table class=about>{cells}</table>{command}",
    )


def kind_of(results: Mapping[str, Any]) -> Output:
    """The kind of output that was compared."""
    return output_of(results["settings"].get("output", "frames"))

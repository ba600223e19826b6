"""What arms say together: fronts, hypervolumes, predictions, plans that travelled."""

from collections.abc import Iterable, Mapping
from typing import Any

from accel.cost_calibration import mape, rank_correlation
from accel.pipelines.compare_arms import KINDS
from accel.pipelines.frames_output import PSNR
from accel.pipelines.measures import Quality
from accel.pipelines.outputs import output_of
from accel.pipelines.trade_off import Point, hypervolume, quality_at, unbeaten

Arms = Mapping[str, Mapping[str, Any]]


def findings_of(results: Mapping[str, Any]) -> dict[str, Any]:
    """Results with what the arms say together: `arms` with `against_front` and `against_scaled`
    (the fastest dense model and smaller inputs of it), `trade_off`, `prediction` and `travelled`.
    """
    arms: Arms = results["arms"]
    quality = quality_of(results)
    lines = lines_of(arms, quality)
    fronts = {name: line for name, line in lines.items() if arms[line[0]]["kind"] == "front"}
    smaller = [name for name, arm in arms.items() if arm["kind"] == "scaled"]
    rivals = {"scaled": [results["baseline"], *smaller]} if smaller else {}
    judged = {
        name: {
            **arm,
            "against_front": _against(arms, name, fronts, quality),
            "against_scaled": _against(arms, name, rivals, quality).get("scaled"),
        }
        for name, arm in arms.items()
    }
    return {
        "arms": judged,
        "trade_off": {
            "reference": {
                "time": 1.0,
                f"{quality.name}_floor": quality.floor,
                f"{quality.name}_cap": quality.cap,
            },
            "lines": lines,
            "hypervolume": {
                name: hypervolume(_points(arms, members, quality), quality.floor, quality.cap)
                for name, members in _sets(arms).items()
            },
        },
        "prediction": prediction_of(arms),
        "travelled": travelled(arms, quality),
    }


def quality_of(results: Mapping[str, Any]) -> Quality:
    """What is held against time: that of the kind of output."""
    return output_of(results["settings"].get("output", "frames")).quality


def point_of(arm: Mapping[str, Any], quality: Quality = PSNR) -> Point | None:
    """(time as a fraction of the fastest dense, mean quality); None where one was not measured."""
    value = quality.of(arm)
    return None if value is None or not arm.get("speedup") else (1 / arm["speedup"], value)


def lines_of(arms: Arms, quality: Quality = PSNR) -> dict[str, list[str]]:
    """What is drawn as a line: by name, its arms by rising time.

    Of a front that was searched, and of smaller inputs, all points; of plans with caches, those
    that no other one beats.
    """
    lines: dict[str, list[str]] = {}
    for name, members in _sets(arms).items():
        made = {arm: p for arm in members if (p := point_of(arms[arm], quality)) is not None}
        if name == "plan + cache":
            kept = unbeaten(made.values())
            made = {arm: p for arm, p in made.items() if p in kept}
        elif any(arms[arm]["kind"] not in ("front", "scaled") for arm in made):
            continue
        if made:
            lines[name] = sorted(made, key=lambda arm: made[arm])
    return lines


def prediction_of(arms: Arms) -> dict[str, Any] | None:
    """How far predicted times are from measured ones, over the arms that have both; None for none.

    mape: mean absolute error as a fraction of the measured time. rank_correlation: Spearman's.
    """
    pairs = [
        (1 / arm["predicted_speedup"], 1 / arm["speedup"])
        for arm in arms.values()
        if arm["kind"] != "dense" and arm["predicted_speedup"] and arm["speedup"]
    ]
    if not pairs:
        return None
    return {
        "arms": len(pairs),
        "mape": mape(pairs),
        "rank_correlation": rank_correlation(pairs),
    }


def travelled(arms: Arms, quality: Quality = PSNR) -> dict[str, dict[str, Any]]:
    """The plans that were made elsewhere than they ran here, by arm: where they were made, and what
    they lose against the plan made here that is nearest in time.

    loss: how much lower their quality is; time_ratio: their time over that plan's.
    """
    placed = {
        name: arm
        for name, arm in arms.items()
        if arm["kind"] in ("plan", "front", "recipe") and arm.get("made_at") and arm.get("call")
    }
    searched = {n: a for n, a in placed.items() if a["kind"] != "recipe"}
    here = {
        n: p
        for n, a in searched.items()
        if a["made_at"] == a["call"] and (p := point_of(a, quality))
    }
    found = {}
    for name, arm in placed.items():
        if arm["made_at"] == arm["call"]:
            continue
        found[name] = {"made_at": arm["made_at"], "ran_at": arm["call"]}
        point = point_of(arm, quality)
        if point is not None and here:
            other = min(here, key=lambda n: abs(here[n][0] - point[0]))
            time, value = here[other]
            found[name] |= {
                "against": other,
                "loss": value - point[1],
                "time_ratio": point[0] / time,
            }
    return found


def sentences_of(results: Mapping[str, Any]) -> list[str]:
    """The findings in words, one line each."""
    arms: Arms = results["arms"]
    quality, lines = quality_of(results), _spread_of_dense(results)
    areas = results["trade_off"]["hypervolume"]
    if len(areas) > 1:
        listed = ", ".join(f"{name} {area:.2f}" for name, area in areas.items())
        lines.append(
            f"hypervolume (time below the fastest dense run times {quality.unit} from"
            f" {quality.floor:g} to {quality.cap:g}): {listed}"
        )
    given = {arm["precision"] for arm in arms.values() if arm["precision"]}
    lines += [
        f"recipes compute in precision {word!r}, like the dense arm of that name; one that chooses"
        " its precision keeps it"
        for word in sorted(given)
    ]
    for front in _fronts(arms):
        recipes = {n: a for n, a in arms.items() if a["kind"] == "recipe" and point_of(a, quality)}
        above = {
            name: arm["against_front"][front]["above"]
            for name, arm in recipes.items()
            if front in arm["against_front"]
        }
        if above:
            least = min(above, key=above.__getitem__)
            fast = sorted(set(recipes) - set(above))
            beyond = f"; faster than all of it: {', '.join(fast)}" if fast else ""
            lines.append(
                f"at their times {front} is at least {above[least]:+.1f} {quality.unit} above"
                f" {len(above)} of {_counted(len(recipes), 'recipe')}, nearest to {least}{beyond}"
            )
    told = results["prediction"]
    if told is not None:
        ranks = told["rank_correlation"]
        order = "" if ranks is None else f"; rank correlation {ranks:.2f}"
        lines.append(
            f"predicted times are off by {told['mape']:.1%} in the mean over"
            f" {_counted(told['arms'], 'arm')}{order}"
        )
    lines += _sources_of_predictions(arms)
    for name, one in results["travelled"].items():
        told_place, ran = _place(one["made_at"]), _place(one["ran_at"])
        if "against" in one:
            verb = "loses" if one["loss"] >= 0 else "gains"
            lines.append(
                f"found at {told_place}, {name!r} {verb} {abs(one['loss']):.1f} {quality.unit}"
                f" against {one['against']!r}, which was searched here ({ran}), at"
                f" {one['time_ratio']:.2f} times its time"
            )
        else:
            lines.append(f"{name!r} was found at {told_place} and ran at {ran}")
    return lines


def _spread_of_dense(results: Mapping[str, Any]) -> list[str]:
    """How far the dense runs lie apart, and so how much a speed-up of few pairs is worth."""
    lines = []
    for name, told in results["dense_runs"].items():
        if told["runs"] > 1:
            took, ratio = told["seconds"], told["most_over_least"]
            apart = "" if ratio is None else f"; in one sitting up to {ratio:.2f} times apart"
            lines.append(
                f"{name} took {took['least']:.2f} to {took['most']:.2f} s in {told['runs']} runs,"
                f" {took['median']:.2f} in the median{apart}"
            )
    pairs = [a["pairs"] for a in results["arms"].values() if a["kind"] != "dense" and a["pairs"]]
    if pairs:
        few = ", and may be off by as much as the dense runs lie apart" if min(pairs) < 3 else ""
        lines.append(
            f"speed-ups are medians of at least {_counted(min(pairs), 'pair')} with dense in the"
            f" same turn{few}"
        )
    return lines


def _sources_of_predictions(arms: Arms) -> list[str]:
    """Where predicted times come from: one sentence, for each source where there are several."""
    by_source: dict[str, list[str]] = {}
    for name, arm in arms.items():
        if arm["kind"] != "dense" and arm["predicted_speedup"]:
            source = arm["predicted_from"] or "from where, the plan does not say"
            by_source.setdefault(source, []).append(name)
    lines = []
    for source, names in by_source.items():
        of = f" of {', '.join(names)}" if len(by_source) > 1 else ""
        lines.append(f"predicted times{of} rest on kernel costs: {source}")
    return lines


def _counted(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _place(where: Mapping[str, Any]) -> str:
    return f"{'x'.join(map(str, where['grid']))} in {where['steps']} steps"


def _fronts(arms: Arms) -> list[str]:
    return list(dict.fromkeys(a["front"] for a in arms.values() if a["kind"] == "front"))


def _sets(arms: Arms) -> dict[str, list[str]]:
    """Arms that are judged together, by name: fronts, recipes, caches, plans with caches."""
    sets = {
        front: [n for n, a in arms.items() if a["kind"] == "front" and a["front"] == front]
        for front in _fronts(arms)
    }
    for kind in ("recipe", "cache", "plan + cache", "scaled"):
        sets[KINDS[kind]] = [n for n, arm in arms.items() if arm["kind"] == kind]
    return {name: members for name, members in sets.items() if members}


def _points(arms: Arms, names: Iterable[str], quality: Quality) -> list[Point]:
    return [point for name in names if (point := point_of(arms[name], quality)) is not None]


def _against(
    arms: Arms, name: str, fronts: Mapping[str, list[str]], quality: Quality
) -> dict[str, Any]:
    """For every front, its quality at this arm's time, and how much that is above the arm's."""
    point = point_of(arms[name], quality)
    if point is None or arms[name]["kind"] in ("dense", "front", "scaled"):
        return {}
    found = {}
    for front, members in fronts.items():
        value = quality_at(_points(arms, members, quality), point[0])
        if value is not None:
            found[front] = {quality.name: value, "above": value - point[1]}
    return found

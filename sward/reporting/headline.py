"""The first sentence of a report, and the sentences that qualify it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sward.reporting.costs import Cost, this_cpu
from sward.reporting.runs import VALIDATION, Group, differences_beside_method, teacher_folder
from sward.reporting.scores import against, decisive, first_scores, interval_text, metric_of, score

MISSING = {
    "teacher": "No run of the teacher is at hand, so this page cannot say how much of it the student keeps.",
    "alone": "No run of the student alone is at hand (sward train ... --distillation none), so this page cannot say "
    "what the teacher adds.",
    "distilled": "No distilled run is at hand.",
}
"""Role -> what its absence means."""


@dataclass(frozen=True)
class Headline:
    """What a reader who stops after one paragraph should know."""

    first: str
    """One sentence."""
    more: tuple[str, ...]
    """What it rests on, and what is missing."""


def headline(groups: Sequence[Group], costs: Mapping[str, Cost | None]) -> Headline:
    """Describe the best student of some groups of one data set beside its teacher and itself alone.

    Args:
        groups: of `sward.reporting.runs.group`.
        costs: title of a group -> its cost.
    """
    missing = [sentence for role, sentence in MISSING.items() if not any(group.role == role for group in groups)]
    name, metric = metric_of(groups[0].runs[0].info.num_classes)
    evaluation = decisive(groups)
    scores = {} if evaluation is None else {group.title: score(group, evaluation, metric) for group in groups}
    scored = [(group, found) for group in groups if (found := scores.get(group.title)) is not None]
    if evaluation is None or not scored:
        return Headline("No run has been scored yet.", tuple(missing))
    rivals = [(group, found) for group, found in scored if group.role == "distilled"]
    rivals = rivals or [(group, found) for group, found in scored if group.role == "alone"] or scored
    best, mine = max(rivals, key=lambda each: each[1].mean)
    teacher = _teacher(best, groups)
    if best.role == "distilled" and teacher is None and MISSING["teacher"] not in missing:
        missing.insert(0, MISSING["teacher"])  # the page holds teachers, but of other students
    theirs = None if teacher is None else scores[teacher.title]
    own, other = costs.get(best.title), None if teacher is None else costs.get(teacher.title)
    speed = "" if own is None else f" and {own.milliseconds:.1f} ms per image on this CPU"
    who = "teacher" if best.role == "teacher" else "student"
    if theirs is not None and theirs.mean > 0:
        kept = f"The student keeps {100 * mine.mean / theirs.mean:.1f} % of the teacher's {name}"
        size = "" if own is None or other is None else f" with {_share(own.params, other.params)} the parameters"
        first = f"{kept}{size}{speed if size else ''}."
        compared = f"{mine.mean:.1f} of {theirs.mean:.1f} %"
    else:
        size = "" if own is None else f" with {own.params / 1e6:.2f} M parameters"
        first = f"The {who} reaches {mine.mean:.1f} % {name}{size}{speed}."
        compared = f"{mine.mean:.1f} %"
    stored = first_scores(groups, evaluation)
    weights = "weights of the last step" if evaluation == VALIDATION else f"{stored.get('checkpoint', 'best')} weights"
    more = [f"{best.title}: {compared} {name} on {stored['images']} images ({evaluation}, {weights})."]
    if len(rivals) > 1 and best.role == "distilled":
        more[0] = f"{more[0][:-1]}, the best of {len(rivals)} distilled students."
    if own is not None:
        more.append(
            f"Time: batches of one image of {own.size[0]} x {own.size[1]} pixels, {this_cpu()}, measured for this page."
        )
    alone = baseline(best, groups)
    if alone is not None:
        more.append(_gain(best, alone, evaluation, metric, name))
    elif best.role == "distilled" and MISSING["alone"] not in missing:
        unlike = next(group for group in groups if group.role == "alone")
        reason = differences_beside_method(best.runs[0], unlike.runs[0])[0]
        more.append(
            f"The students alone on this page were trained otherwise ({reason}), so that it cannot say what the "
            "teacher adds."
        )
    return Headline(first, (*more, *missing))


def baseline(group: Group, groups: Sequence[Group]) -> Group | None:
    """Return the student alone that was trained alike; None for teachers and students alone, and without one."""
    if group.role != "distilled":
        return None
    return next(
        (
            each
            for each in groups
            if each.role == "alone" and not differences_beside_method(group.runs[0], each.runs[0])
        ),
        None,
    )


def _teacher(group: Group, groups: Sequence[Group]) -> Group | None:
    """Return the group that holds the teacher of a distilled student."""
    folder = teacher_folder(group.runs[0])
    if folder is None:
        return None
    return next((each for each in groups if any(folder.samefile(run.folder.path) for run in each.runs)), None)


def _gain(best: Group, alone: Group, evaluation: str, metric: str, name: str) -> str:
    found = against(best, alone, evaluation, metric)
    if found is None:
        return "What the teacher adds is not known to be more than chance: that takes two seeds of both students."
    stated = f"{found.mean:+.1f} {interval_text(found)} points of {name}, {found.count} seeds, 95 % interval"
    if found.low > 0:
        return f"The teacher adds {stated}."
    if found.high < 0:
        return f"The teacher does harm: {stated}."
    return f"What the teacher adds may be chance, as the interval holds 0: {stated}."


def _share(part: int, whole: int) -> str:
    if part > whole:
        return f"{part / whole:.2g} times"
    # A fraction whose denominator is small is too coarse.
    return f"1/{whole / part:.0f} of" if whole >= 5 * part else f"{100 * part / whole:.0f} % of"

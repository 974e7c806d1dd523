"""The verdict in words: a card in Markdown for TensorBoard and loggers, and one line for the terminal."""

from __future__ import annotations

from lightning_mue.health.departures import Level
from lightning_mue.health.judging import Group, Health, Symptom

#: Level -> (word, colour).
LOOKS = {Level.HEALTHY: ("healthy", "#1b7837"), Level.WATCH: ("watch", "#b35806"), Level.ACT: ("act", "#b2182b")}
#: Of the table of symptoms, one line an indicator.
HEADERS = ("since step", "level", "indicator", "where", "value", "expected", "what it says", "what to do")
_LEGEND = (
    "*healthy*: nothing left its range. *watch*: an indicator did. *act*: a value is not finite or beyond its limit."
)


def as_markdown(verdict: Health) -> str:
    """The card: the verdict, its first cause, and a table of the symptoms with what to do."""
    lines = [f"# {LOOKS[verdict.level][0].upper()}", "", headline(verdict), ""]
    if verdict.symptoms:
        lines += [f"| {' | '.join(HEADERS)} |", "|---" * len(HEADERS) + "|"]
        lines += ["| " + " | ".join(cell.replace("|", "/") for cell in cells(group)) + " |" for group in verdict.groups]
    return "\n".join([*lines, "", _LEGEND])


def headline(verdict: Health) -> str:
    """One sentence: the verdict and the symptom that came first."""
    if verdict.samples == 0:
        return "No samples yet."
    if not verdict.symptoms:
        return f"Nothing left its healthy range in {verdict.samples} samples to step {verdict.last_step}."
    more = len(verdict.groups) - 1
    others = f", then {more} other indicator{'s' if more > 1 else ''}" if more else ""
    return f"First: {sentence(verdict.groups[0])}{others}."


def sentence(group: Group) -> str:
    """The symptoms of one indicator in words, without a full stop."""
    first = group.first
    where = f" of {group.place}" if group.place else ""
    now = "" if group.lasts else ", which is over"
    return (
        f"{first.indicator.name}{where} was {first.value:.3g} at step {first.step}, expected {first.told}{now}: "
        f"{first.indicator.means}"
    )


def cells(group: Group) -> list[str]:
    """One line of the table of symptoms."""
    first: Symptom = group.first
    return [
        f"{first.step}{'' if group.lasts else ' (over)'}",
        LOOKS[group.level][0],
        first.indicator.name,
        group.place,
        f"{first.value:.3g}",
        first.told,
        first.indicator.means,
        first.indicator.do,
    ]

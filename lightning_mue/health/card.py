"""The verdict in words: a card in Markdown for TensorBoard and loggers, and one line for the terminal."""

from __future__ import annotations

from lightning_mue.health.departures import LEAST_HISTORY, Level
from lightning_mue.health.judging import Group, Health, Symptom

#: Level -> (word, colour).
LOOKS = {Level.HEALTHY: ("healthy", "#1b7837"), Level.WATCH: ("watch", "#b35806"), Level.ACT: ("act", "#b2182b")}
#: Of the table of symptoms, one line an indicator.
HEADERS = ("since step", "level", "indicator", "where", "value", "expected", "what it says", "what to do")
_UNKNOWN = ("not known yet", "#666666")
LEGEND = (
    f"not known yet: fewer than {LEAST_HISTORY} samples. healthy: nothing left its range. watch: an indicator did. act: a value is "
    "not finite or beyond its limit."
)


def look(verdict: Health) -> tuple[str, str]:
    """(word, colour) of a verdict; one without evidence has a word of its own."""
    return LOOKS[verdict.level] if verdict.known else _UNKNOWN


def as_markdown(verdict: Health) -> str:
    """The card: the verdict, its first cause, and a table of the symptoms with what to do."""
    lines = [f"# {look(verdict)[0].upper()}", "", headline(verdict), ""]
    if verdict.symptoms:
        lines += [f"| {' | '.join(HEADERS)} |", "|---" * len(HEADERS) + "|"]
        lines += ["| " + " | ".join(cell.replace("|", "/") for cell in cells(group)) + " |" for group in verdict.groups]
    return "\n".join([*lines, "", LEGEND])


def headline(verdict: Health) -> str:
    """One sentence: the verdict and the symptom that came first."""
    seen = (
        f"{_count(verdict.samples, 'sample')} of {_count(verdict.indicators, 'indicator')} to step {verdict.last_step}"
    )
    if not verdict.known:
        return f"{seen}, {LEAST_HISTORY} are needed: log more often (log_every_n_steps, every_n_steps), or wait."
    if not verdict.symptoms:
        return f"Nothing left its healthy range in {seen}."
    more = len(verdict.groups) - 1
    others = f", then {_count(more, 'other indicator')}" if more else ""
    return f"First: {sentence(verdict.groups[0])}{others}."


def _count(n: int, what: str) -> str:
    return f"{n} {what}{'' if n == 1 else 's'}"


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

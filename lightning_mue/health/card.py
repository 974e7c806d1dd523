"""The verdict in words: a card in Markdown for TensorBoard and loggers, and one line for the terminal."""

from __future__ import annotations

from lightning_mue.health.departures import Level
from lightning_mue.health.judging import Finding, Verdict

#: Level -> (word, colour).
LOOKS = {Level.HEALTHY: ("healthy", "#1b7837"), Level.WATCH: ("watch", "#b35806"), Level.ACT: ("act", "#b2182b")}
_MOST_ROWS = 12


def as_markdown(verdict: Verdict) -> str:
    """The card: the verdict, its first cause, and a table of the findings with what to do."""
    lines = [f"# {LOOKS[verdict.level][0].upper()}", "", headline(verdict), ""]
    if verdict.findings:
        lines += [
            "| since step | indicator | where | value | expected | what it says | what to do |",
            "|---|---|---|---|---|---|---|",
        ]
        lines += [_row(finding) for finding in verdict.findings[:_MOST_ROWS]]
        if len(verdict.findings) > _MOST_ROWS:
            lines += ["", f"{len(verdict.findings) - _MOST_ROWS} more; `lightning-mue report` shows all of them."]
    lines += [
        "",
        "*healthy*: nothing left its range. *watch*: an indicator did. *act*: a value is not finite or beyond its limit.",
    ]
    return "\n".join(lines)


def headline(verdict: Verdict) -> str:
    """One sentence: the verdict and the finding that came first."""
    if verdict.samples == 0:
        return "No samples yet."
    if not verdict.findings:
        return f"Nothing left its healthy range in {verdict.samples} samples to step {verdict.last_step}."
    first = verdict.findings[0]
    more = len(verdict.findings) - 1
    others = f" and {more} more finding{'s' if more > 1 else ''}" if more else ""
    return f"First: {sentence(first)}{others}."


def sentence(finding: Finding) -> str:
    """One finding in words, without a full stop."""
    place = f" of {finding.place}" if finding.place else ""
    now = "" if finding.lasts else ", which is over"
    return (
        f"{finding.indicator.name}{place} was {finding.value:.3g} at step {finding.step}, expected {finding.told}{now}: "
        f"{finding.indicator.means}"
    )


def _row(finding: Finding) -> str:
    over = "" if finding.lasts else " (over)"
    cells = [
        f"{finding.step}{over}",
        finding.indicator.name,
        finding.place,
        f"{finding.value:.3g}",
        finding.told,
        finding.indicator.means,
        finding.indicator.do,
    ]
    return "| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |"

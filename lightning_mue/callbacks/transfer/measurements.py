"""Merges the measurements of a sampled step into one value per quantity, role and place."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence

from lightning_mue.callbacks.transfer.probes import UpdateProbe

#: Averaged over tensors or modules by the mean; all others, which are RMS values, by the RMS.
_MEANS = ("z/", "loss/")
#: Only used to compute others.
_INNER = ("change/", "gates/")


def measurements(raw: Mapping[str, float], keys: Mapping[str, str], updates: Sequence[UpdateProbe]) -> dict[str, float]:
    """Merges the values of single tensors and modules.

    Args:
        raw: ``<quantity>/<role>/<place>/<name>`` (or a tag in ``keys``) -> value of one tensor or module.
        keys: Tag -> ``<quantity>/<role>/<place>/<name>`` for probes whose metrics have names of their own.
        updates: The probes of the weights, of which ``raw`` holds ``change/<label>`` and ``weight/<label>``.

    Returns:
        ``<quantity>/<role>/<place>`` -> value, as in a `Fingerprint`. Neither ``update`` nor ``reach`` if nothing moved.
    """
    found: dict[str, list[float]] = defaultdict(list)
    for tag, value in raw.items():
        found[keys.get(tag, tag).rpartition("/")[0]].append(value)
    gates = {key.split("/")[2]: sum(values) / len(values) for key, values in found.items() if key.startswith("gates/")}
    if any(value for tag, value in raw.items() if tag.startswith("change/")):
        for probe in updates:
            change, weight = raw.get(f"change/{probe.label}"), raw.get(f"weight/{probe.label}")
            if change is None or weight is None:
                continue
            curve = probe.label.rpartition("/")[0]
            role, _, place = curve.partition("/")
            if weight > 0:
                found[f"update/{curve}"].append(change / weight)
            if not probe.relative:
                gate = gates.get(place, 1.0) if role == "expert_down" else 1.0
                found[f"reach/{curve}"].append(probe.reach * gate * change)
            elif weight > 0:
                found[f"reach/{curve}"].append(probe.reach * change / weight)
    return {key: _merged(key, values) for key, values in found.items() if not key.startswith(_INNER)}


def _merged(key: str, values: Sequence[float]) -> float:
    if key.startswith(_MEANS):
        return sum(values) / len(values)
    return math.sqrt(sum(value * value for value in values) / len(values))

"""The pictures of docs/indicators/: each indicator in a healthy run and in one with a fault that it shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from run import HEALTHY, Setting
from score import Score

from lightning_mue.files import whole_file
from lightning_mue.health.pictures import lines
from lightning_mue.health.series import Run

#: Page of docs/indicators/ -> (tag, the fault that it is drawn with).
PICTURES: Mapping[str, tuple[str, str]] = {
    "angular-step": ("updates/angular_step/embedding_mean", "embedding lr x 64"),
    "attention-error": ("stability/attention_error/attention_max", "bf16 softmax, no QK-norm"),
    "dead-experts": ("routing/dead_experts/01", "dead expert"),
    "kurtosis": ("stability/kurtosis/ffn_max", "router lr x 32"),
    "largest-logit": ("stability/max_logit/router_max", "router lr x 32"),
    "load-entropy": ("routing/load_entropy/01", "dead expert"),
    "max-over-rms": ("stability/max_over_rms/ffn_max", "lr x 8"),
    "max-violation": ("routing/max_violation_max", "no auxiliary loss"),
    "outlier-percent": ("stability/outlier_percent/ffn_max", "lr x 8"),
    "output-rms": ("stability/rms/ffn_mean", "lr x 8"),
    "router-entropy": ("routing/token_entropy_min", "router lr x 32"),
    "sequence-entropy": ("data/sequence_entropy_max", "corrupt shard"),
    "update-ratio": ("updates/update_ratio/norm_mean", "beta2 too high"),
    "z-value": ("stability/z/router_mean", "router lr x 32"),
}


def draw(runs: Mapping[tuple[str, int], Run], scores: Sequence[Score], setting: Setting, folder: Path) -> None:
    """Draws the pictures of the first seed that has faults, as SVG; the step at which the fault begins is marked."""
    seed = next(s.seed for s in scores if s.fault != HEALTHY)
    for page, (tag, fault) in PICTURES.items():
        if (fault, seed) not in runs:
            continue
        both = {"healthy": {"": runs[HEALTHY, seed][tag]}, fault: {"": runs[fault, seed][tag]}}
        figure = lines(tag, both, marks=[(setting.at, "#888888")])
        with whole_file(folder / f"{page}.svg") as part:
            figure.savefig(part, format="svg", metadata={"Date": None, "Creator": None})

"""Trials of a sweep with known truth: a parabola in log2 lr at each size, noise that seeds share, and noise of their own."""

import math

import numpy as np

from lightning_mue.analysis.trials import Trial

GRID = 0.016 * 2.0 ** np.arange(-3, 4)


def sweep(
    sizes,
    *,
    rule="complete-mue",
    rates=GRID,
    seeds=3,
    noise=1e-9,
    shared=0.0,
    best=0.016,
    drift=0.0,
    loss=lambda ratio: 2.0 + 0.5 / ratio,
    curvature=lambda ratio: 0.05,
    diverges_above=math.inf,
    draw=0,
    **more,
):
    """Trials at sizes {ratio to the base: size}; the optimum moves by `drift` octaves each time the ratio doubles.

    `curvature` is relative to the loss at the optimum, per squared octave. `shared` noise is the same at all rates and sizes of
    a seed. Without noise two seeds would be copies, which are refused.
    """
    rng = np.random.default_rng(draw)
    common = shared * rng.normal(size=seeds)
    trials = []
    for ratio, size in sizes.items():
        optimum = math.log2(best) + drift * math.log2(ratio)
        for seed in range(seeds):
            for lr in rates:
                value = loss(ratio) * (1 + curvature(ratio) * (math.log2(lr) - optimum) ** 2 + noise * rng.normal())
                value = math.inf if lr > diverges_above else value + common[seed]
                extra = {key: of(ratio) for key, of in more.items()}
                trials.append(Trial(rule, size, seed, float(lr), float(value), **extra))
    return trials


WIDTHS = {1: {"width": 64}, 2: {"width": 128}, 4: {"width": 256}, 8: {"width": 512}}

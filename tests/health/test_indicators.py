"""Tags are taken for the indicators that they are, and for nothing else."""

import pytest

from lightning_mue.health.indicators import INDICATORS, indicator_of
from lightning_mue.health.losses import is_loss, is_training_loss


@pytest.mark.parametrize(
    ("tag", "name", "where", "layer"),
    [
        ("stability/z/attention/03", "Z-value", "attention", "03"),
        ("stability/z/attention_max", "Z-value", "attention", "max"),
        ("stability/z/lm_logits", "Z-value", "lm_logits", ""),
        ("stability/rms/ffn/00", "output RMS", "ffn", "00"),
        ("stability/max_over_rms/ffn_mean", "max / RMS", "ffn", "mean"),
        ("routing/max_violation/07", "MaxVio", "router", "07"),
        ("routing/max_violation_mean", "MaxVio", "router", "mean"),
        ("routing/token_entropy_min", "router entropy", "router", "min"),
        ("updates/update_ratio/expert_up/02", "update ratio", "expert_up", "02"),
        ("train/loss", "loss", "train/loss", ""),
    ],
)
def test_an_indicator_is_recognized(tag, name, where, layer):
    indicator, *place = indicator_of(tag)
    assert (indicator.name, *place) == (name, where, layer)


@pytest.mark.parametrize(
    "tag", ["stability/rms_after_multiplier/ffn/00", "mue/lr/router", "epoch", "lr-AdamW", "acc", ""]
)
def test_other_tags_are_none(tag):
    assert indicator_of(tag) is None


@pytest.mark.parametrize(
    "tag",
    ["loss", "train_loss", "train/loss", "training.loss", "loss_step", "loss/train", "nll", "model/cross_entropy"],
)
def test_a_users_own_training_loss_is_known(tag):
    assert is_training_loss(tag)


@pytest.mark.parametrize("tag", ["val_loss", "val/loss", "validation-loss", "test_loss"])
def test_a_validation_loss_is_a_loss_but_not_of_training(tag):
    assert is_loss(tag)
    assert not is_training_loss(tag)


@pytest.mark.parametrize(
    "tag", ["train/aux_loss", "z_loss", "balance_loss", "closs", "train/glossary", "final/train/loss"]
)
def test_parts_of_a_loss_and_other_words_are_none(tag):
    assert not is_loss(tag)


def test_names_and_tags_are_distinct():
    assert len({i.name for i in INDICATORS}) == len({i.tag for i in INDICATORS}) == len(INDICATORS)
    assert all(i.means and i.do for i in INDICATORS)

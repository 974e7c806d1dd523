"""The table of trials comes back as it was written, and another file is refused with its name."""

import math

import pytest

from lightning_mue.analysis.trials import Trial, read_trials, write_trials


def test_what_was_written_comes_back(tmp_path):
    trials = [
        Trial("complete-mue", {"width": 64, "n_experts": 0}, 0, 0.1 + 0.2, 1.25, 1e6, 3e12),
        Trial(
            "sp", {"width": 128, "gate": "sqrt"}, 1, 2**-9, math.inf, settings={"model.init_args.embedding_std": 0.3}
        ),
    ]
    write_trials(tmp_path / "new" / "trials.csv", trials)
    back = read_trials(tmp_path / "new" / "trials.csv")
    assert back[0] == trials[0]
    assert (back[1].size, back[1].settings, back[1].loss) == (trials[1].size, trials[1].settings, math.inf)
    assert math.isnan(back[1].tokens)


@pytest.mark.parametrize("text", ["step,loss\n1,2\n", "rule,seed,lr,loss,tokens,compute\nsp,x,1,1,1,1\n"])
def test_another_file_is_refused_by_name(tmp_path, text):
    (tmp_path / "metrics.csv").write_text(text)
    with pytest.raises(ValueError, match=r"metrics\.csv: found .*, expected a table with the columns rule, seed"):
        read_trials(tmp_path / "metrics.csv")

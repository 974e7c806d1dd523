"""Options are written in full and have one value; what a parser would guess or drop is refused, by every command."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_mue.cli import forecast, sweep
from lightning_mue.cli.lightning_cli import MuECLI
from lightning_mue.cli.parsing.groups import GROUPS
from lightning_mue.cli.parsing.options import nearest
from lightning_mue.cli.parsing.words import check_environment, check_words

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "configs" / "debug.yaml"
#: Command, words, the option that is meant; the first of each kind is fast.
NOT_IN_FULL = [
    ("fit", ["--trainer.max_step", "5"], "--trainer.max_steps"),
    ("certify", ["runs", "--drif", "1"], "--drift"),
    ("report", ["runs", "--out", "x"], "--output"),
    ("sweep", ["--rule", "mup"], "--rules"),
    ("forecast", ["runs", "--tok", "3"], "--tokens"),
    ("sweep", ["--axi", "width=8,16"], "--axis"),
    ("forecast", ["runs", "--lr-ke=lr"], "--lr-key"),
    ("fit", ["--trainer.max_step=5"], "--trainer.max_steps"),
    ("fit", ["--Trainer.Max_Steps", "5"], "--trainer.max_steps"),
    ("fit", ["--ckpt", "x"], "--ckpt_path"),
    ("fit", ["--seed", "3"], "--seed_everything"),
    ("fit", ["--conf", "x"], "--config"),
    ("fit", ["--mue.rul", "mup"], "rule"),
    ("fit", ["--model.Init_Args.width", "32"], "width"),
    ("fit", ["--model.Width", "32"], "width"),
    ("validate", ["--trainer.limit_val_batch", "5"], "--trainer.limit_val_batches"),
    ("test", ["--ckpt", "x"], "--ckpt_path"),
    ("predict", ["--trainer.accelerato", "cpu"], "--trainer.accelerator"),
    ("explain", ["--famil", "adam"], "--family"),
    ("export-plan", ["--outpu", "x", "--to", "megatron"], "--output"),
    ("dry-run", ["--worl", "8"], "--world"),
    ("dry-run", ["--tensor", "8", "--world", "8"], "--tensor_parallel"),
    ("coord-check", ["--axis", "width=16,32", "--toleranc", "1"], "--tolerance"),
]
FAST = 5


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("command", "words", "meant"),
    [pytest.param(*case, marks=[] if i < FAST else [pytest.mark.slow]) for i, case in enumerate(NOT_IN_FULL)],
)
def test_an_option_that_is_not_written_in_full(run, command, words, meant):
    config = [] if command in ("certify", "report", "forecast", "sweep") else ["--config", CONFIG]
    status, out = run(command, *config, *words)
    assert status == 2, out
    assert f"Did you mean '{meant}'?" in out
    assert "Traceback" not in out
    assert len(out) < 1600


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (["fit", "--trainer.max_steps", "5", "--trainer.max_steps", "6"], "--trainer.max_steps"),
        (["fit", "--trainer.max_steps=5", "--seed_everything", "1", "--trainer.max_steps", "6"], "--trainer.max_steps"),
        (["dry-run", "--tensor-parallel", "2", "--tensor_parallel", "4"], "--tensor_parallel"),
        (["fit", "--trainer.callbacks=A", "--trainer.callbacks=B"], "--trainer.callbacks"),
        (["report", "a", "--output", "x", "--output", "y"], "--output"),
        (["certify", "a", "--drift", "1", "--drift", "2"], "--drift"),
        (["fit", "--model.init_args", "{width: 8, depth: 2, width: 9}"], "width"),
    ],
)
def test_two_values_are_refused(run, words, key):
    status, out = run(*words)
    assert status == 2, out
    assert out.startswith(f"lightning-mue: error: {key}: found ")


@pytest.mark.parametrize(
    "words",
    [
        ["--config", "a.yaml", "--config", "b.yaml", "-c", "c.yaml"],
        ["--axis", "width=1,2", "--axis=depth=1,2"],
        ["--trainer.max_steps", "5", "--trainer.max_steps=5"],
        [
            "--trainer.callbacks+=A",
            "--trainer.callbacks.x",
            "1",
            "--trainer.callbacks+=B",
            "--trainer.callbacks.x",
            "2",
        ],
        ["--model.width", "8", "--model.depth", "-1", "--verify"],
        ["--mue.roles", "{a: hidden, b: hidden}", "--mue.multipliers", "[{a: 1}, {a: 1}]"],
        ["--name", "{not yaml", "--other", "[1, {a: b]"],
    ],
)
def test_what_may_come_several_times(words):
    check_words(words, ("--config", "-c", "--axis"))


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("trainer:\n  max_steps: 5\n  logger: false\n  max_steps: 6\n", "trainer.max_steps"),
        ("trainer:\n  callbacks:\n    - class_path: A\n      class_path: B\n", r"trainer.callbacks\[0\].class_path"),
        ("model: {a: 1}\nmodel: {a: 2}\n", "model"),
    ],
)
@pytest.mark.parametrize("words", [["--config"], ["-c"], ["--model"]])
def test_a_key_that_a_file_has_twice(tmp_path, text, key, words):
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(
        ValueError, match=rf"^{key}: found a second value in line \d of .*config.yaml, after that of line \d"
    ):
        check_words([*words, str(tmp_path / "config.yaml")], ("--config",))


def test_keys_that_are_merged_may_come_twice_and_so_do_none_of_ours(tmp_path):
    (tmp_path / "merged.yaml").write_text("a: &a {x: 1}\nb: &b {y: 2}\nc:\n  <<: *a\n  <<: *b\n  x: 3\n")
    files = [tmp_path / "merged.yaml", *(ROOT / "configs").glob("**/*.yaml"), *(ROOT / "tests").glob("**/*.yaml")]
    assert len(files) > 5
    for file in files:
        check_words(["--config", str(file)], ())


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["certify", "a", "--drift", "x"], "--drift: found 'x', expected a value that is float"),
        (["report"], "RUN_DIR: found nothing, expected a value: the command needs it"),
        (["report", "a", "--output"], "--output: found nothing, expected a value after it"),
    ],
)
def test_commands_without_a_configuration_tell_errors_alike(run, words, told):
    status, out = run(*words)
    assert status == 2
    assert out.startswith(f"lightning-mue: error: {told}")
    assert "usage" not in out


def test_a_variable_that_nothing_reads_is_refused(run, monkeypatch):
    monkeypatch.setenv("LIGHTNING_MUE_CASHE", "x")
    status, out = run("report", "x")
    assert status == 2
    assert "LIGHTNING_MUE_CASHE: found a variable of the environment that nothing reads" in out
    assert "Did you mean 'LIGHTNING_MUE_CACHE'?" in out


def test_a_variable_of_lightning_that_the_command_line_overrides_is_warned_of(monkeypatch, corpus):
    monkeypatch.setenv("PL_TRAINER_LIMIT_VAL_BATCHES", "7")
    with pytest.warns(
        UserWarning, match=r"^PL_TRAINER_LIMIT_VAL_BATCHES: .*Give --trainer.limit_val_batches, or unset it"
    ):
        check_environment()
    monkeypatch.setattr(MuECLI, "_run_subcommand", lambda self, subcommand: None)
    cli = MuECLI(["fit", "--config", str(CONFIG), "--data.path", str(corpus)])
    assert cli.trainer.limit_val_batches != 7


@pytest.mark.parametrize("parser", [sweep._parser, forecast._parser])
def test_options_of_the_run_are_not_taken_for_misspelled_ones(parser):
    others = ["trainer", "model", "data", "ckpt_path", "seed_everything", "print_config", "weights_only"]
    words = [f"--{name}" for name in (*others, *GROUPS)]
    assert parser().parse_known_args(["runs", *words] if parser is forecast._parser else words)[1] == words


def test_the_nearest_name():
    known = ["--trainer.max_steps", "--trainer.max_epochs", "--ckpt_path", "--Model"]
    for key, meant in {
        "--trainer.max_step": known[0],
        "--TRAINER.MAX_STEPS": known[0],
        "--max_epoch": known[1],
        "--ck": known[2],
        "--model": "--Model",
    }.items():
        assert nearest(key, known) == f"Did you mean {meant!r}?"
    assert nearest("--nothing_like_it", known) == nearest("", known) == ""

"""What a sweep varies is read as it was written, and what cannot be meant is refused with its option."""

import pytest

from lightning_mue.analysis.sweep.axes import (
    Axis,
    Range,
    parse_axis,
    parse_range,
    parse_rates,
    parse_rules,
    parse_values,
)


def test_parts_of_an_axis_vary_together():
    assert parse_axis(["width=64,128,256", "n_heads=2,4,4"]) == Axis(
        ("width", "n_heads"), ((64, 2), (128, 4), (256, 4))
    )


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("k=1,2", (1, 2)),
        ("k=1e-3,2.5e6", (1e-3, 2.5e6)),  # YAML takes the first for a text
        ("k=sqrt,linear", ("sqrt", "linear")),
        ("k=null,true", (None, True)),
        ("a.b=1", (1,)),
    ],
)
def test_values(text, values):
    name, read = parse_values("--set", text)
    assert (name, read) == (text.partition("=")[0], values)
    assert [type(v) for v in read] == [type(v) for v in values]


def test_rates_and_ranges():
    assert parse_rates("0.02,1e-2") == (0.01, 0.02)
    assert parse_rates("log:1e-3:1e-1") == Range("log", 1e-3, 1e-1)
    assert parse_range("--search", "model.k=int:1:8") == ("model.k", Range("int", 1, 8))
    assert parse_range("--search", "k=lin:-1:1") == ("k", Range("lin", -1.0, 1.0))


@pytest.mark.parametrize(
    ("read", "message"),
    [
        (lambda: parse_axis(["width"]), "--axis: found 'width', expected key=value"),
        (lambda: parse_axis(["width=64,128,64"]), "--axis width: found 64 twice"),
        (
            lambda: parse_axis(["width=64,128", "n_heads=2"]),
            "--axis: found width: 2, n_heads: 1, expected equally many",
        ),
        (lambda: parse_axis(["width=1,2", "width=3,4"]), "--axis: found .* twice, expected each name once"),
        (lambda: parse_axis(["width=64,,128"]), "--axis width: found '', expected a number"),
        (lambda: parse_values("--set", "k={a: 1}"), "--set k: found '{a: 1}', expected a number"),
        (lambda: parse_values("--set", "k=[1"), r"--set k: found '\[1', expected a number"),
        (lambda: parse_rules("sp,mup,sp"), "--rules: found 'sp' twice"),
        (lambda: parse_rules("sp,mu"), "--rules: found 'mu', expected one of .*'complete-mue'.*'none'"),
        (lambda: parse_rates("0.1,0"), "--lr: found 0, expected a positive"),
        (lambda: parse_rates("-0.1"), "--lr: found -0.1, expected a positive"),
        (lambda: parse_rates("nan"), "--lr: found nan, expected a positive"),
        (lambda: parse_rates("0.1,inf"), "--lr: found inf, expected a positive"),
        (lambda: parse_rates("fast"), "--lr: found 'fast', expected a positive"),
        (lambda: parse_rates("0.1,0.10"), "--lr: found 0.1 twice"),
        (lambda: parse_rates("log:0:1"), "--lr: found 'log:0:1', expected LOW below HIGH"),
        (lambda: parse_rates("log:1:0.1"), "--lr: found .*, expected LOW below HIGH"),
        (lambda: parse_range("--search", "k=exp:1:2"), "--search k: found 'exp', expected one of 'log'"),
        (lambda: parse_range("--search", "k=log:1"), "--search k: found .*, expected .* with two numbers"),
    ],
)
def test_what_is_refused(read, message):
    with pytest.raises(ValueError, match=message):
        read()

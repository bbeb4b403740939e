"""``--set``: every setting of every method can be given on the command line, and a bad value is refused in words."""

import dataclasses
import itertools
import json
import math
import types
import typing
from typing import Literal, get_args, get_origin, get_type_hints

import pytest

from bayeslora.cli.settings import build_method
from bayeslora.cli.values import read
from bayeslora.errors import InputError
from bayeslora.methods import METHODS, Ensemble, Inference, Ivon, Map, Swag

VALUES = {("ivon", "preset"): "arc_easy", ("blob", "preset"): "llama2"}
"""Values that cannot be told from a setting's annotation. A newcomer's other settings are tried unasked."""
INFINITE = (
    ("ivon", "prior_sigma"), ("ivon", "clip_radius"), ("ivon", "price_clip"), ("temperature", "prior_sigma"),
)  # fmt: skip
"""Settings that may be infinite: no prior, no clipping."""
MEMBERS = (Map(), Swag())
"""What may stand where a method is asked for."""


def candidates(method, key):
    """Values other than the default that a setting's annotation allows, the likeliest first."""
    default, hint = getattr(method, key), get_type_hints(type(method))[key]
    found = [VALUES[method.name, key]] if (method.name, key) in VALUES else list(_allowed(hint, default))
    return [value for value in found if value != default]


def _allowed(hint, default):
    origin, inside = get_origin(hint), get_args(hint)
    if origin is Literal:
        return list(inside)
    if origin in (typing.Union, types.UnionType):
        return [value for each in inside for value in _allowed(each, default)]
    if origin is tuple:
        options = [_allowed(each, None) for each in (inside[:1] * 2 if inside[-1] is Ellipsis else inside)]
        return list(itertools.product(*options))
    if origin is list:
        return [[value] for value in _allowed(inside[0], None)]
    if isinstance(hint, type) and issubclass(hint, Inference):
        return list(MEMBERS)
    return {bool: [True, False], int: [2, 3, 7], float: [0.25, 0.03, 2.5], type(None): [None]}.get(hint, [])


def word(value):
    if isinstance(value, Inference):
        return next(name for name, make in METHODS.items() if make is type(value))
    return value if isinstance(value, str) else json.dumps(value)


def accepted(method, key):
    """Changes with this setting that the method itself accepts: alone, else with another one that it needs."""
    others = [f.name for f in dataclasses.fields(method) if f.name != key]
    found = []
    for value in candidates(method, key):
        more = [{}] + [{other: one} for other in others for one in candidates(method, other)]
        for extra in more:
            try:
                dataclasses.replace(method, **{key: value}, **extra)
            except InputError:
                continue
            found.append({key: value, **extra})
            break
    return found


CASES = [
    (name, path, f.name)
    for name, make in METHODS.items()
    for path in ["", *(f.name for f in dataclasses.fields(make()) if isinstance(getattr(make(), f.name), Inference))]
    for f in dataclasses.fields(getattr(make(), path) if path else make())
]


def same(one, other):
    """Equal in value and in the type of every value."""
    if isinstance(one, Inference):
        return type(one) is type(other) and all(
            same(getattr(one, f.name), getattr(other, f.name)) for f in dataclasses.fields(one)
        )
    return bool(one == other) and type(one) is type(other)


@pytest.mark.parametrize(("name", "path", "key"), CASES)
def test_every_setting_of_every_method_can_be_given_as_a_word(name, path, key):
    plain = METHODS[name]()
    inner = getattr(plain, path) if path else plain
    found = accepted(inner, key)
    assert found, f"no value of {name}'s setting {key} is known; add one to VALUES"
    for changes in found:
        wanted = dataclasses.replace(inner, **changes)
        wanted = dataclasses.replace(plain, **{path: wanted}) if path else wanted
        for prefix in ("", f"{path}.") if path else ("",):
            made = build_method(name, [f"{prefix}{setting}={word(value)}" for setting, value in changes.items()])
            assert same(made, wanted), (changes, made)


@pytest.mark.parametrize(
    "text", ["[0.9,0.99999]", "[0.9, 0.99999]", "(0.9, 0.99999)", "0.9,0.99999", ".9,.99999"]
)  # fmt: skip
def test_betas_are_two_numbers_in_any_brackets_or_none(text):
    assert build_method("ivon", [f"betas={text}"]) == Ivon(betas=(0.9, 0.99999))


def test_numbers_are_written_as_flags_take_them():
    assert build_method("ivon", ["prior_sigma=.02"]) == Ivon(prior_sigma=0.02)
    assert build_method("ivon", ["prior_sigma=2."]) == Ivon(prior_sigma=2.0)
    assert build_method("ivon", ["prior_sigma=inf"]) == Ivon(prior_sigma=math.inf)


@pytest.mark.parametrize("name", METHODS)
def test_infinity_is_refused_where_it_has_no_meaning(name):
    method = METHODS[name]()
    for key, hint in get_type_hints(type(method)).items():
        if float in (hint, *get_args(hint)) and (name, key) not in INFINITE:
            with pytest.raises(InputError):
                build_method(name, [f"{key}=inf"])


def test_nothing_and_truth_are_words_in_either_spelling():
    for nothing in ("null", "None", "none"):
        assert build_method("ivon", [f"betas={nothing}", f"preset={nothing}"]) == Ivon()
    for yes in ("true", "True"):
        assert build_method("ivon", [f"rescale_lr={yes}"]) == Ivon(rescale_lr=True)


def test_a_whole_number_is_a_number_where_one_is_asked_for_and_stays_whole_where_it_may():
    assert same(build_method("map", ["kl=1"]), Map(kl=1.0))
    assert same(build_method("swag", ["start=3"]), Swag(start=3))
    assert same(read([1, 2], tuple[float, ...], "it"), (1.0, 2.0))
    assert same(read("[a, b]", tuple[str, ...], "it"), ("a", "b"))


def test_the_members_method_and_its_settings_are_settings_of_the_ensemble():
    assert build_method("ensemble:2", ["member=swag", "member.rank=9"]) == Ensemble(2, Swag(rank=9))
    assert build_method("ensemble", ["together=true", "kl=0.5"]) == Ensemble(5, Map(kl=0.5), together=True)


@pytest.mark.parametrize(
    ("name", "setting", "told"),
    [
        ("ivon", "betas=0.9", r"ivon's setting betas must be \[a number, a number\] or null, and it is 0.9"),
        ("ivon", "betas=[0.9]", r"betas must be \[a number, a number\] or null, and it is \[0.9\]"),
        ("ivon", "betas=[0.9,high]", r"betas must be \[a number, a number\] or null, and it is '\[0.9,high\]'"),
        ("ivon", "ess=square", "ess must be a number or sqrt or null, and it is 'square'"),
        ("ivon", "rescale_lr=1", "rescale_lr must be true or false, and it is 1"),
        ("blob", "update=elbow", "blob's setting update must be one of paper, elbo, and it is 'elbow'"),
        ("map", "kl=none", "kl must be a number, and it is None"),
        ("ensemble", "members=two", "members must be a whole number, and it is 'two'"),
        ("ensemble", "member=swog", "unknown method 'swog', did you mean swag"),
        ("ensemble", "member.kll=1", "ensemble has no setting 'kll', did you mean kl"),
        ("ensemble", "rang=1", "ensemble has no setting 'rang', known: members, dropout_draws, together, weight_decay"),
        ("swag", "member.rank=1", "swag has no setting 'member.rank'"),
        ("swag", "scale=nan", "scale must be a number or divergence or null, and it is"),
    ],
)
def test_a_bad_value_is_refused_with_the_setting_and_what_it_may_be(name, setting, told):
    with pytest.raises(InputError, match=told):
        build_method(name, [setting])


def test_a_setting_that_is_given_twice_is_refused():
    with pytest.raises(InputError, match="the setting 'rank' is given a second time, as 'rank=3'; keep one of the two"):
        build_method("swag", ["rank=2", "rank=3"])


def test_a_tuple_is_a_word_of_compare_and_a_list_of_a_file(refused, home, tmp_path):
    from bayeslora.cli.parse import parse
    from bayeslora.cli.settings import build_methods
    from bayeslora.cli.train import Options as Train

    made = build_methods(["slow=ivon"], ["slow.betas=[0.9,0.99999]"])
    assert made == {"slow": Ivon(betas=(0.9, 0.99999))}
    (tmp_path / "run.yaml").write_text("method: ivon\nset: {betas: [0.9, 0.99999], rescale_lr: true, preset: null}\n")
    options = parse(Train, ["--config", str(tmp_path / "run.yaml")], verb="train", examples="")
    assert build_method(options.method, options.set) == Ivon(betas=(0.9, 0.99999), rescale_lr=True)
    words = ["--method", "ivon", "--set", "betas=0.9", "--out", tmp_path / "out"]
    assert "betas must be [a number, a number] or null" in refused("train", *home.marbles(), *words)

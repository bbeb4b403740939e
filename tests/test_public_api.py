"""The public interface is held: names, parameters with their order and defaults, members, and the command line's flags.

`support/public_api.json` is the interface of the last release. What is new may come; what is there stays, or is
accepted under its former name for one release, and CHANGELOG says so. One member was taken out: `PostHoc.posterior`,
which only raised (on `PostHoc` and on the five methods that inherited it).
"""

import importlib
import inspect
import json
import re
import sys
from pathlib import Path

import pytest

import bayeslora as bl

HELD = json.loads((Path(__file__).parent / "support" / "public_api.json").read_text(encoding="utf-8"))

MOVED = {
    "bayeslora.card": "bayeslora.posteriors.card",
    "bayeslora.demo_model": "bayeslora.cli.demo.model",
    "bayeslora.distillation": "bayeslora.training.distillation",
    "bayeslora.engine": "bayeslora.prediction",
    "bayeslora.evaluation": "bayeslora.metrics.evaluation",
    "bayeslora.generation": "bayeslora.prediction.generation",
    "bayeslora.hub": "bayeslora.posteriors.hub",
    "bayeslora.integrations.samples": "bayeslora.integrations.lm_eval_calibration",
    "bayeslora.integrations.vllm": "bayeslora.integrations.openai.client",
    "bayeslora.methods.trainers": "bayeslora.training.trainer_kwargs",
    "bayeslora.operations": "bayeslora.posteriors.transforms",
    "bayeslora.optim": "bayeslora.methods.ivon.optimizer",
    "bayeslora.origin": "bayeslora.posteriors.provenance",
    "bayeslora.rewards": "bayeslora.prediction.rewards",
    "bayeslora.serve": "bayeslora.integrations.server",
    "bayeslora.serve.worker": "bayeslora.integrations.server.worker",
    "bayeslora.storage": "bayeslora.posteriors.loading",
    "bayeslora.tasks.chance": "bayeslora.tasks.synthetic",
}


def parameters(called):
    """Return the parameters of a callable by name: kind and default, in order."""
    try:
        signature = inspect.signature(called)
    except ValueError:  # a built-in exception
        return {}
    return {
        name: [p.kind.name, None if p.default is p.empty else re.sub(" at 0x[0-9a-f]+", "", repr(p.default))]
        for name, p in signature.parameters.items()
        if name != "self"
    }


def members(kind):
    """Return the public methods and properties of a class, with the methods' parameters."""
    found = {}
    for name in dir(kind):
        if name.startswith("_"):
            continue
        static = inspect.getattr_static(kind, name)
        raw = static.__func__ if isinstance(static, classmethod | staticmethod) else static
        if inspect.isfunction(raw) and raw.__module__.startswith("bayeslora"):
            found[name] = parameters(raw)
        elif not callable(static):
            found[name] = None
    return found


def interface():
    """Return today's interface in the form of the held one."""
    own = {name: getattr(bl, name) for name in bl.__all__}
    return {
        name: {"parameters": parameters(each), "members": members(each) if inspect.isclass(each) else {}}
        for name, each in own.items()
        if callable(each)
    }


@pytest.mark.parametrize("name", sorted(HELD["names"]))
def test_a_name_keeps_its_parameters_and_members(name):
    today, held = interface()[name], HELD["names"][name]
    assert_held(name, held["parameters"], today["parameters"], getattr(bl, name))
    assert held["members"].keys() <= today["members"].keys()
    for member, taken in held["members"].items():
        if taken is not None:
            assert_held(f"{name}.{member}", taken, today["members"][member], getattr(getattr(bl, name), member))


def assert_held(name, held, today, called):
    """Check that every call which was right still is: same names, kinds, defaults and positions."""
    former = getattr(called, "former_keywords", ())
    for parameter, facts in held.items():
        if parameter not in former:
            assert parameter in today, f"{name} lost {parameter}"
            kind, default = facts
            wanted = [kind, today[parameter][1] if default is None else default]  # what was required may get a default
            assert today[parameter] == wanted, f"{name} changed {parameter}"
    places = [p for p, (kind, _) in held.items() if kind == "POSITIONAL_OR_KEYWORD"]
    assert list(today)[: len(places)] == places, f"{name} changed the order of its parameters"
    for parameter in today.keys() - held.keys():
        kind, default = today[parameter]
        assert default is not None or kind.startswith("VAR"), f"{name} wants a new argument {parameter}"


def test_every_exported_name_can_be_had():
    assert set(HELD["names"]) <= set(bl.__all__)
    for name in bl.__all__:
        assert getattr(bl, name) is not None


@pytest.mark.parametrize("verb", HELD["flags"])
def test_a_verb_accepts_the_flags_it_had(verb, capsys):
    from bayeslora.cli import main

    for flag, value in HELD["flags"][verb].items():
        assert main([verb, flag, *([] if value is None else [value]), "--no-such-option"]) == 2
        said = capsys.readouterr().err
        assert "unknown option --no-such-option" in said, f"{verb} {flag}: {said}"


@pytest.mark.parametrize("former", MOVED)
def test_a_module_that_moved_is_imported_from_its_former_path_with_a_warning(former):
    sys.modules.pop(former, None)
    with pytest.warns(DeprecationWarning, match=f"{former} has moved; import {MOVED[former]}$"):
        module = importlib.import_module(former)
    assert module is importlib.import_module(MOVED[former])
    assert module.__spec__.name == MOVED[former]


def test_fit_is_imported_from_the_package_of_training_too():
    from bayeslora.training import fit

    assert fit is bl.fit


def test_an_unknown_module_or_name_is_unknown():
    with pytest.raises(ModuleNotFoundError, match=r"bayeslora\.no_such_module"):
        importlib.import_module("bayeslora.no_such_module")
    with pytest.raises(AttributeError, match="no attribute 'no_such_name'"):
        bl.no_such_name  # noqa: B018

"""The public names: exactly those of the contract, each documented."""

import inspect

import pytest

import ricciq

PUBLIC = {
    "Recipe",
    "run",
    "quantize",
    "calibrate",
    "finetune",
    "RicciFlow",
    "export_onnx",
    "RicciqError",
    "load_model",
    "open_data",
    "evaluate",
    "Preprocessing",
}


def test_the_public_names_are_those_of_the_contract():
    assert sorted(ricciq.__all__) == sorted(PUBLIC)
    assert set(dir(ricciq)) >= PUBLIC


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_a_public_name_resolves_and_is_documented(name):
    thing = getattr(ricciq, name)
    assert thing.__name__ == name
    assert thing.__module__.startswith("ricciq.")
    assert inspect.getdoc(thing)


def test_a_public_function_has_types():
    functions = sorted(name for name in PUBLIC if inspect.isfunction(getattr(ricciq, name)))
    assert len(functions) == 8
    for name in functions:
        signature = inspect.signature(getattr(ricciq, name))
        hints = [p.annotation for p in signature.parameters.values()]
        assert inspect.Signature.empty not in [*hints, signature.return_annotation], name


def test_another_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = ricciq.no_such_name

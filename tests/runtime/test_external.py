"""Names of one's own: what is imported, and each mistake in a line."""

import fractions

import pytest

from tlt_jax.runtime import external


def test_a_name_with_a_colon_is_from_outside():
    assert external.is_external("a.b:C")
    assert not external.is_external("learned") and not external.is_external("a.b.C")


def test_what_is_named_is_given_as_it_is():
    found = external.load("thing", "fractions:Fraction")
    assert found is fractions.Fraction


FILES = {
    "own_broken": "1 / 0",
    "own_needy": "import no_such_dependency",
    "own_fine": "def reward(text): pass\nlimit = 3",
}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("own_fine", "accepted is 'package.module:name'."),
        (":reward", "accepted is 'package.module:name'."),
        ("own_fine:", "accepted is 'package.module:name'."),
        (
            "no_such.module:f",
            "there is no module 'no_such'. Start the command where its file lies, "
            "install it, or put its directory on PYTHONPATH.",
        ),
        (
            "own_broken:f",
            "importing 'own_broken' fails with ZeroDivisionError: division by zero",
        ),
        (
            "own_needy:f",
            "importing 'own_needy' fails, it needs the module 'no_such_dependency'.",
        ),
        (
            "own_fine:rewards",
            "module 'own_fine' has no 'rewards'; did you mean 'reward'?",
        ),
        ("own_fine:zzz", "module 'own_fine' has no 'zzz'."),
        (
            "own_fine:limit",
            "is of type int, which cannot be called: name a function or a class.",
        ),
    ],
)
def test_mistakes_are_named(tmp_path, monkeypatch, name, message):
    for module, text in FILES.items():
        (tmp_path / f"{module}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError) as error:
        external.load("reward function", name)
    said = str(error.value)
    assert said.startswith(f"reward function {name!r}") and said.endswith(message)

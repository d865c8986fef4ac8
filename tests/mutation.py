"""Modules with one error built in, for tests of tests."""

import inspect
import types


def mutate(module, old, new):
    """Make a copy of `module` whose source has `new` in place of its one `old`."""
    source = inspect.getsource(module)
    assert source.count(old) == 1, f"{old!r} occurs {source.count(old)} times"
    mutated = types.ModuleType(f"{module.__name__}_mutated")
    mutated.__file__ = module.__file__
    exec(compile(source.replace(old, new), module.__file__, "exec"), mutated.__dict__)
    return mutated

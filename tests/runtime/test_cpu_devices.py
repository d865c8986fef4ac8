"""How many devices are simulated, and when none are."""

import types

import pytest

from tests import tiny_runs
from tlt_jax.runtime import cpu_devices

FLAG = "--xla_force_host_platform_device_count=3"


@pytest.fixture
def made(monkeypatch):
    """Tell how many devices are made for the settings; None: it is left alone."""

    def prepare(flags="", num_before=-1, **settings):
        monkeypatch.setenv("XLA_FLAGS", flags)
        found = {}
        config = types.SimpleNamespace(
            jax_num_cpu_devices=num_before, update=found.__setitem__
        )
        fake = types.SimpleNamespace(config=config)
        monkeypatch.setattr(cpu_devices, "jax", fake)
        cpu_devices.prepare(tiny_runs.config_of(**settings))
        assert found.keys() <= {"jax_num_cpu_devices"}
        return found.get("jax_num_cpu_devices")

    return prepare


@pytest.mark.parametrize(
    "num,tensor,mesh_tensor,expected",
    [
        (1, 0, 1, None),
        (3, 0, 1, 3),
        (1, 2, 1, 2),
        # An engine's are as many as the learner's unless given.
        (3, 0, 2, 6),
        (3, 1, 2, 4),  # Three, and whole groups of two.
        (1, 1, 4, 4),
        (2, 4, 2, 8),
        (2, 0, -1, 2),  # All that remain: nothing is asked for.
    ],
)
def test_each_worker_has_devices_of_its_own(made, num, tensor, mesh_tensor, expected):
    settings = {
        "workers.num": num,
        "rollout.tensor": tensor,
        "mesh.tensor": mesh_tensor,
    }
    assert made(**settings) == expected


def test_what_the_user_asked_for_is_left_as_it_is(made):
    assert made(flags=FLAG, **{"workers.num": 2}) is None
    assert made(num_before=5, **{"workers.num": 2}) is None
    assert made(flags="--xla_dump_to=here", **{"workers.num": 2}) == 2

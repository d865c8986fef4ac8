"""Errors are built into the kernels, and the shared suite sees each of them.

On the CPU kernels are interpreted, and those for TPUs simulated: memory that was never
written is NaN, reads beyond an array raise, and a detector tells races.
"""

import dataclasses

import jax.numpy as jnp
import pytest
from jax.experimental.pallas import tpu as pltpu

from tests.pallas_kernels import suite
from tlt_jax.pallas_kernels.verify_attention import (
    api,
    arg_specs,
    page_layout,
    pallas_gpu,
    tpu_kernel,
    tpu_plan,
)


def simulator(mode="on_wait"):
    return api.Implementation(
        "mosaic_tpu",
        interpret=pltpu.InterpretParams(
            detect_races=True, uninitialized_memory="nan", dma_execution_mode=mode
        ),
    )


@pytest.fixture
def small_blocks(monkeypatch):
    """Pages arrive in blocks of the fewest, so that rows have several."""
    monkeypatch.setattr(tpu_plan, "_BLOCK_BYTES", 1)


def test_a_simulated_tpu_sees_no_race_and_reads_nothing_that_it_must_not(
    small_blocks, capfd
):
    spec = suite.SIMULATED
    sizes = spec.query_shape, spec.dtype, spec.page_size, spec.max_pages
    cut = tpu_plan.plan(*sizes)
    assert spec.max_pages > cut.pages and cut.packing > 1
    suite.assert_right(spec, simulator())
    assert "RACE" not in capfd.readouterr().out


@pytest.mark.simulator
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("mode", ["eager", "on_wait"])
@pytest.mark.parametrize("spec", arg_specs.SUITE, ids=lambda spec: spec.name)
def test_the_suite_in_the_simulator(small_blocks, capfd, spec, mode):
    """As caches for TPUs lie, and both ways in which copies may arrive."""
    packing = page_layout.packing("mosaic_tpu", spec.page_size, spec.head_dim)
    suite.assert_right(spec, simulator(mode), packing)
    assert "RACE" not in capfd.readouterr().out


class Forgetful:
    """A copy that is started and never waited for."""

    def __init__(self, copy):
        self.start = copy.start

    def wait(self):
        pass


def faulty(spec, name):
    """Traced as nothing else was, lest a right program be taken from a cache."""
    return dataclasses.replace(spec, name=name, num_tokens=3)


@pytest.mark.parametrize("mode", ["eager", "on_wait"])
def test_a_missing_wait_is_seen(small_blocks, monkeypatch, capfd, mode):
    """So that silence means something: both ways to simulate show it, each its own.

    Copies made at once give right numbers, and the detector tells the race; copies
    made when they are waited for never arrive. Where only one of a page's two copies
    is waited for the detector tells nothing, and the numbers alone are wrong.
    """
    real = pltpu.make_async_copy
    monkeypatch.setattr(
        pltpu, "make_async_copy", lambda *given: Forgetful(real(*given))
    )
    spec = faulty(suite.SIMULATED, f"forgetful_{mode}")
    if mode == "eager":
        suite.assert_right(spec, simulator(mode))
        assert "RACE" in capfd.readouterr().out
    else:
        with pytest.raises(AssertionError):
            suite.assert_right(spec, simulator(mode))


def another_page_on_tpus(monkeypatch):
    real = tpu_kernel._Step._copies
    monkeypatch.setattr(
        tpu_kernel._Step,
        "_copies",
        lambda self, row, page, turn, slot: real(
            self, row, jnp.maximum(page - 1, 0), turn, slot
        ),
    )


def a_slot_too_many_on_tpus(monkeypatch):
    real = tpu_kernel._Step.add_pages
    monkeypatch.setattr(
        tpu_kernel._Step,
        "add_pages",
        lambda self, *given: real(
            dataclasses.replace(self, length=self.length + 1), *given
        ),
    )


def another_page_on_gpus(monkeypatch):
    real = pallas_gpu._operands

    def operands(*given):
        made = real(*given)
        return made._replace(table=made.table.at[:, 1:].set(made.table[:, :-1]))

    monkeypatch.setattr(pallas_gpu, "_operands", operands)


def a_slot_too_many_on_gpus(monkeypatch):
    real = pallas_gpu._Walk.begin

    def begin(*given):
        walk = real(*given)
        return dataclasses.replace(walk, length=walk.length + 1)

    monkeypatch.setattr(pallas_gpu._Walk, "begin", begin)


OF_TPU = (another_page_on_tpus, a_slot_too_many_on_tpus)
OF_GPU = (another_page_on_gpus, a_slot_too_many_on_gpus)


@pytest.mark.simulator
@pytest.mark.timeout(600)
@pytest.mark.parametrize("fault", OF_TPU)
def test_an_error_is_seen_by_the_simulator(small_blocks, monkeypatch, fault):
    fault(monkeypatch)
    with pytest.raises(AssertionError):
        suite.assert_right(faulty(suite.SIMULATED, fault.__name__), simulator())


@pytest.mark.parametrize("fault", [*OF_TPU, *OF_GPU])
def test_an_error_is_seen_where_kernels_are_interpreted(monkeypatch, fault):
    name = "mosaic_tpu" if fault in OF_TPU else "triton_gpu"
    implementation = suite.INTERPRETED[name]
    spec = faulty(suite.TREE, fault.__name__)
    fault(monkeypatch)
    with pytest.raises(AssertionError):
        suite.assert_right(spec, implementation)

"""What tests of workers share: an engine, and what it alone generates."""

import pytest

from tests.rl import engines


@pytest.fixture(scope="module")
def first():
    """An engine whose programs the others share."""
    engine = engines.engine_of(max_rows=2)
    engine.warm_up()
    yield engine
    engine.pool.close()


@pytest.fixture(scope="module")
def expected(first):
    completions, _ = first.run(engines.REQUESTS, engines.SEED)
    return [(c.request_id, c.tokens.tolist(), c.finish_reason) for c in completions]

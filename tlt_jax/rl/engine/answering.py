"""Run requests to their end: engines side by side, from one queue.

For engines of this process that are not expected to fail. `workers.Workers` does it for
those that are, and for several processes.
"""

import concurrent.futures
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from tlt_jax import types
from tlt_jax.rl.engine import request_queue
from tlt_jax.rl.engine import stats as rollout_stats

if TYPE_CHECKING:
    from tlt_jax.rl.engine import engine as engine_lib


def answer(
    engines: Sequence["engine_lib.Engine"],
    requests: Sequence[types.Request],
    seed: int,
    *,
    expected_lengths: Mapping[int, float] | None = None,
    on_completion: Callable[[types.Completion], None] | None = None,
    on_call: Callable[[int, int], None] | None = None,
) -> tuple[list[types.Completion], rollout_stats.RolloutStats]:
    """Generate a completion for every request; which engine does changes no token.

    Args:
      engines: of equal sizes and weights; at least one.
      requests: ids distinct; prompts of equal `prompt_id` equal.
      seed: of the noise.
      expected_lengths: tokens by `prompt_id`; the longest are started first.
      on_completion: called with each completion as soon as it is there, by one thread
        at a time.
      on_call: called after each decode call with completions done, and tokens.

    Returns:
      Completions in the order of the requests, and what was done; seconds are summed
      over engines.

    Raises:
      ValueError: a request is empty, does not fit, its id is not unique, or its prompt
        is not that of its `prompt_id` or not of the vocabulary.
    """
    engines[0].check(requests)
    queue = request_queue.RequestQueue(
        requests, num_workers=len(engines), expected_lengths=expected_lengths
    )
    lock, tokens = threading.Lock(), [0] * len(engines)
    done: dict[int, types.Completion] = {}

    def serve(number):
        def keep(completion):
            with lock:
                done[completion.request_id] = completion
                if on_completion:
                    on_completion(completion)

        def report(num_tokens):
            with lock:
                tokens[number] = num_tokens
                if on_call:
                    on_call(len(done), sum(tokens))

        source = queue.share(number)
        return engines[number].serve(source, seed, on_completion=keep, on_call=report)

    if len(engines) == 1:
        stats = serve(0)
    else:
        stats = rollout_stats.RolloutStats()
        with concurrent.futures.ThreadPoolExecutor(len(engines), "answer") as pool:
            for own in pool.map(serve, range(len(engines))):
                stats = stats.join(own)
    return [done[request.request_id] for request in requests], stats

"""Plain decoding against its peers: tokens per second, fp32, greedy and at T=1.

    python -m experiments.decode_speed --scale=cpu
    python -m experiments.decode_speed --scale=cpu --model-dir=DIR \
        --peers=transformers,llamacpp,vllm --peer-python=transformers=PATH,...

Every row generates the same number of tokens, end-of-sequence ignored. Each round asks
for one token, then for `--new-tokens`: the first is called prefill, the difference
gives the decode rate. `tokens_per_s` counts all of it. Rows are eight chat prompts in
order, as often as the batch needs; systems that can share a prompt's cache between
rows of one call may do so, and none keeps it from call to call.

Targets: at least 1.5 times `transformers` at batch 1, 8, 32; level with llama.cpp at
batch 1; ahead of vLLM's CPU build at 8 and 32.
"""

import argparse
import hashlib
import pathlib
import tempfile

from experiments.lab import harness, prompts

SLUG = "decode_speed"
OURS = "tlt_jax"
OUR_SCRIPT = "run_tlt_jax.py"
PEERS = {
    "transformers": "run_transformers.py",
    "llamacpp": "run_llamacpp.py",
    "vllm": "run_vllm.py",
}
BATCH_LIMITS = {"llamacpp": 8}  # its slots share one product only up to small batches
MAX_PROMPT_TOKENS = 256
CASE_KEYS = ("batch", "temperature")
LOAD_TIMEOUT_S = 900.0
RUN_TIMEOUT_S = 900.0


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = harness.argument_parser(__doc__, PEERS)
    parser.add_argument("--batches", default="1,8,32")
    parser.add_argument("--temperatures", default="0,1")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2, help="for llama.cpp")
    options = parser.parse_args(arguments)
    if options.new_tokens < 2:
        raise ValueError(
            f"--new-tokens={options.new_tokens}: a decode rate needs at least 2."
        )
    return options


def load_request(options: argparse.Namespace) -> harness.Row:
    """Returns what every runner is told when it loads."""
    return {
        **harness.model_request(options),
        "max_batch": max(map(int, options.batches.split(","))),
        "max_length": options.new_tokens + MAX_PROMPT_TOKENS,
        "threads": options.threads,
    }


def measurement(runners: dict[str, harness.Runner], ids: list, options, outputs: dict):
    """Returns the function that asks one system for one case."""

    def measure(name: str, case: harness.Row, number: int) -> harness.Row | None:
        batch = case["batch"]
        if batch > BATCH_LIMITS.get(name, batch):
            return None
        request = {
            "prompts": [ids[row % len(ids)] for row in range(batch)],
            "prompt_ids": [row % len(ids) for row in range(batch)],
            "temperature": case["temperature"],
            "seed": 1000 + number,
            "timeout_s": RUN_TIMEOUT_S,
        }
        first = runners[name].ask("run", new_tokens=1, **request)
        whole = runners[name].ask("run", new_tokens=options.new_tokens, **request)
        tokens = whole.get("tokens")
        outputs[*case.values(), name] = tokens
        total_s, prefill_s = whole["total_s"], first["total_s"]
        decode_s = total_s - prefill_s
        decoded = batch * (options.new_tokens - 1)
        return {
            "new_tokens": options.new_tokens,
            "prefill_s": prefill_s,
            "total_s": total_s,
            "tokens_per_s": batch * options.new_tokens / total_s,
            # Noise can exceed what a few tokens of a tiny model take.
            "decode_tokens_per_s": decoded / decode_s if decode_s > 0 else None,
            "tokens_digest": tokens and digest(tokens),
        }

    return measure


def digest(tokens: list[list[int]]) -> str:
    """Returns 12 hex digits over all token ids in row order."""
    return hashlib.sha256(repr(tokens).encode()).hexdigest()[:12]


def count_same_rows(outputs: dict, summary: list[harness.Row]) -> None:
    """Adds to greedy summaries how many rows are token for token ours."""
    for row in summary:
        key = (row["batch"], row["temperature"])
        ours, theirs = outputs.get((*key, OURS)), outputs.get((*key, row["system"]))
        if row["temperature"] == 0 and ours and theirs and row["system"] != OURS:
            row["rows_as_ours"] = sum(a == b for a, b in zip(ours, theirs, strict=True))


def main(arguments: list[str] | None = None) -> list[harness.Row]:
    """Runs the experiment; returns the summary that it also writes."""
    options = parse_arguments(arguments)
    request = load_request(options)
    peers = harness.choose_peers(PEERS, options.peers, options.peer_python)
    systems = [harness.our_system(OURS, OUR_SCRIPT), *peers]
    cases = [
        {"batch": int(batch), "temperature": float(temperature)}
        for temperature in options.temperatures.split(",")
        for batch in options.batches.split(",")
    ]
    settings = {
        "scale": options.scale,
        "dtype": "float32",
        "prompts": prompts.CHAT,
        "new_tokens": options.new_tokens,
        "cases": cases,
        "rounds": options.rounds,
        "systems": [system.name for system in systems],
    }
    outputs: dict = {}
    with tempfile.TemporaryDirectory() as log_dir:
        with harness.loaded(
            systems, pathlib.Path(log_dir), request, LOAD_TIMEOUT_S
        ) as (runners, versions):
            provenance = harness.Provenance(SLUG, settings, versions)
            turns = [prompts.as_messages(text) for text in prompts.CHAT]
            ids = runners[OURS].ask("encode", timeout_s=60.0, messages=turns)["ids"]
            rows = harness.run_paired(
                list(runners),
                cases,
                measurement(runners, ids, options, outputs),
                rounds=options.rounds,
                warmups=1,
            )
    summary = harness.summarise(
        rows,
        case_keys=CASE_KEYS,
        metrics={"tokens_per_s": "higher", "decode_tokens_per_s": "higher"},
        reference=OURS,
    )
    count_same_rows(outputs, summary)
    harness.write_results(options, SLUG, rows, summary, provenance)
    return summary


if __name__ == "__main__":
    main()

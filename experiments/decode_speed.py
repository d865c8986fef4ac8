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
import contextlib

from experiments.lab import claims, experiment, paired, prompts, provenance, tables

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
RUN_TIMEOUT_S = 900.0


def check(options: argparse.Namespace) -> None:
    """Finds the systems; refuses answers too short for a rate."""
    if options.new_tokens < 2:
        raise ValueError(
            f"--new-tokens={options.new_tokens}: a decode rate needs at least 2."
        )
    options.systems = paired.systems_of(OURS, OUR_SCRIPT, PEERS, options)


def cases_of(options: argparse.Namespace) -> list[tables.Row]:
    """Lists the batches at each temperature."""
    return [
        {"batch": batch, "temperature": temperature}
        for temperature in experiment.numbers(
            options.temperatures, "temperatures", float
        )
        for batch in experiment.numbers(options.batches, "batches")
    ]


def load_request(options: argparse.Namespace) -> tables.Row:
    """Returns what every runner is told when it loads."""
    return {
        **paired.model_request(options),
        "max_batch": max(experiment.numbers(options.batches, "batches")),
        "max_length": options.new_tokens + MAX_PROMPT_TOKENS,
        "threads": options.threads,
    }


def load(
    options: argparse.Namespace,
    closing: contextlib.ExitStack,
    record: provenance.Provenance,
) -> tuple[dict, list]:
    """Loads the systems; returns the runners, and the prompts' tokens."""
    runners = paired.load(options, load_request(options), closing, record)
    turns = [prompts.as_messages(text) for text in prompts.CHAT]
    return runners, runners[OURS].ask("encode", timeout_s=60.0, messages=turns)["ids"]


def measure(
    options: argparse.Namespace, context: tuple[dict, list], cell: tables.Cell
) -> list[tables.Row]:
    """Asks all systems for one case, in turns."""
    (runners, ids), outputs, batch = context, {}, cell["batch"]

    def ask(name, case, number):
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
        tokens = outputs[name] = whole.get("tokens")
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
            "tokens_digest": tokens and provenance.digest(repr(tokens)),
        }

    rows = paired.run_paired(
        list(runners), [cell.overrides], ask, rounds=options.rounds, warmups=1
    )
    ours = outputs.get(OURS)
    for row in rows:
        theirs = outputs[row["system"]]
        if cell["temperature"] == 0 and ours and theirs and row["system"] != OURS:
            row["rows_as_ours"] = sum(a == b for a, b in zip(ours, theirs, strict=True))
    return rows


def summary_of(rows: list[tables.Row]) -> list[tables.Row]:
    """Adds to greedy medians how many rows are token for token ours."""
    summary = paired.summarise(
        rows,
        case_keys=CASE_KEYS,
        metrics={"tokens_per_s": "higher", "decode_tokens_per_s": "higher"},
        reference=OURS,
    )
    for row in summary:
        its = tables.where(rows, **{k: row[k] for k in (*CASE_KEYS, "system")})[0]
        if its.get("rows_as_ours") is not None:
            row["rows_as_ours"] = its["rows_as_ours"]
    return summary


EXPERIMENT = experiment.Experiment(
    slug="decode_speed",
    text=__doc__,
    title="plain decoding beside peers",
    needs="--model-dir=DIR --peers=transformers,llamacpp,vllm",
    larger=experiment.both(
        "--model-dir=DIR --peers=transformers,vllm --batches=1,8,32,128"
    ),
    options=(
        *paired.options_of(PEERS),
        *experiment.plain(new_tokens=64, rounds=5),
        *experiment.plain(recorded=False, batches="1,8,32", temperatures="0,1"),
        experiment.Option("threads", 2, "for llama.cpp", recorded=False),
    ),
    check=check,
    settings=lambda options: {
        "scale": options.scale,
        "dtype": "float32",
        "prompts": prompts.CHAT,
        "cases": cases_of(options),
        "systems": [system.name for system in options.systems],
    },
    context=load,
    cells=lambda cases: [tables.Cell(case, None) for case in cases],
    measure=measure,
    summary=summary_of,
    claims={
        f"{least:g} times {peer}'s tokens per second at batch {batch}": claims.at_least(
            "tokens_per_s/times", least, batch=batch, system=peer, temperature=0
        )
        for peer, batch, least in (
            *(("transformers", batch, 1.5) for batch in (1, 8, 32)),
            *(("llamacpp", 1, 1.0), ("vllm", 8, 1.0), ("vllm", 32, 1.0)),
        )
    },
)
main = EXPERIMENT.main


if __name__ == "__main__":
    main()

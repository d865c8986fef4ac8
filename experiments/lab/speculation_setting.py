"""What the speculation experiments share: options, model, drafter, prompts, engines."""

import argparse
import dataclasses
import json
import pathlib
from collections.abc import Sequence

import numpy as np

from experiments.lab import experiment, paired, prompts, recipes, tables
from tlt_jax import policy, speculation, types
from tlt_jax.models.drafters import drafter, shipped
from tlt_jax.models.drafters import io as drafter_io
from tlt_jax.rl.adaptation import offline_texts
from tlt_jax.rl.engine import engine as engine_lib
from tlt_jax.runtime import compile_cache
from tlt_jax.settings import drafter_run
from tlt_jax.specdec import chain, sampling
from tlt_jax.specdec import strategy as strategy_lib
from tlt_jax.specdec.texts import shards
from tlt_jax.specdec.tuners import cost_model

MAX_PROMPT_TOKENS = 320
PAGE_SIZE = 64
TASKS_OF_RECORD = ("counting", "random_numbers")
_DIGITS = "min_terms=2,max_terms=2,min_digits=1,max_digits=1"
# Kinds of text that a general drafter serves, by the sources of their prompts.
TEXTS = {
    "chats": ("everyday",),
    "reasoning": (
        *(f"products:cot,{_DIGITS}", f"chain_sum:cot,{_DIGITS}"),
        *("gsm_symbolic:cot", "lcm:cot"),
    ),
}
OPTIONS = (
    *experiment.plain(
        recorded=False,
        model=paired.DEFAULT_MODEL,
        new_tokens=128,
        num_prompts=16,
    ),
    experiment.Option(
        "drafter",
        "",
        "workdir of tlt_jax.train_drafter: its drafter, and its held-out prompts. That "
        f"of record: {recipes.TRAIN_COUNTING}",
        required=True,
        recorded=False,
    ),
)


class Setting:
    """A model, its drafter and held-out prompts; makes engines."""

    def __init__(self, options: argparse.Namespace, texts: str = ""):
        """Loads all of it; `texts`, of `TEXTS`, in place of the drafter's own."""
        compile_cache.enable()
        self.options, self._kind = options, texts
        self.policy = policy.load(options.model)
        self.drafter = speculation.load(options.drafter, self.policy.config)
        found = self._held_out(pathlib.Path(options.drafter))
        most = MAX_PROMPT_TOKENS
        if trained_for := self.drafter.speculator_cfg.drafter_cfg.max_length:
            most = min(most, trained_for - options.new_tokens)
        self.prompts = [p for p in found if len(p) <= most][: options.num_prompts]
        if not self.prompts:
            raise ValueError(
                f"no prompt of {options.drafter} has at most {most} tokens, which "
                f"--new-tokens={options.new_tokens} leaves of what the drafter was "
                "trained for: ask for fewer."
            )
        self.max_length = max(map(len, self.prompts)) + options.new_tokens

    def _held_out(self, workdir: pathlib.Path) -> list[np.ndarray]:
        """Prompts of the texts that the drafter was measured on, never trained on.

        Where the drafter came without its workdir: the fixed chat prompts. Of a named
        kind of text: held-out prompts, which no training asks.
        """
        if self._kind:
            asked = offline_texts.ask(
                drafter_run.Texts(
                    tasks=TEXTS[self._kind],
                    num=1,
                    num_held_out=self.options.num_prompts,
                    max_prompt_tokens=MAX_PROMPT_TOKENS,
                ),
                lambda example: self.policy.tokenizer.encode_prompt(example.prompt),
            )
            return [request.prompt for request in asked[1:]]
        if not (workdir / "texts").is_dir():
            encode = self.policy.tokenizer.encode_prompt
            return [encode(prompts.as_messages(text)) for text in prompts.CHAT]
        texts = texts_of(workdir)
        records = [texts.read(i) for i in held_out(texts)]
        return [record.tokens[: record.response_start] for record in records]

    def engine(
        self,
        batch: int,
        temperature: float,
        strategy: strategy_lib.Strategy | None,
        ranking: str = "coupled",
        rule: str = chain.KEYED,
        most_rows: int = 0,
        others: Sequence[strategy_lib.Strategy] = (),
    ) -> engine_lib.Engine:
        """Makes an engine of `batch` rows that always does the same.

        With `others` the cost model chooses among these, `strategy` and plain decoding.
        With a cache for `most_rows` rows engines of fewer find its programs compiled.
        """
        chosen, tuner = speculation.PLAIN, None
        if strategy is not None:
            table = strategy_lib.Arms(((batch, (strategy, *others)),))
            if others:
                tuner = cost_model.CostModel(table, max_rows=batch)
            chosen = speculation.Speculation(
                dataclasses.replace(
                    self.drafter.speculator_cfg,
                    table=table,
                    ranking=ranking,
                    rule=rule,
                ),
                self.drafter.params,
                tuner,
            )
        return self.policy.engine(
            max_rows=batch,
            max_length=self.max_length,
            speculation=chosen,
            page_size=PAGE_SIZE,
            num_pages=self.num_pages(max(batch, most_rows)),
            steps_per_call=64,
            sampling_cfg=sampling.SamplingConfig(temperature),
        )

    def num_pages(self, num_rows: int) -> int:
        """Returns the size of a cache for so many rows."""
        return 1 + num_rows * (-(-self.max_length // PAGE_SIZE) + 1)

    def requests(self, count: int) -> list[types.Request]:
        """Makes requests of the held-out prompts in order, as often as needed."""
        return requests_of(self.prompts, count, self.options.new_tokens)

    @property
    def texts(self) -> str:
        """What the prompts are of: their kind, or the tasks of the drafter's texts."""
        if self._kind:
            return self._kind
        path = pathlib.Path(self.options.drafter) / "config.json"
        if not (path.parent / "texts").is_dir():
            return "chat"
        settings = json.loads(path.read_text(encoding="utf-8"))
        return " ".join(dict.fromkeys(settings["texts"]["tasks"]))

    def about(self) -> tables.Row:
        """Returns what stands in the record of a run."""
        cfg = self.drafter.speculator_cfg.drafter_cfg
        made = drafter_io.about(speculation.folder(self.options.drafter))
        # It may be a path; what the target is, its fingerprint says.
        made.pop("target", None)
        sharpness, tau = drafter.measured(self.drafter.params)
        return {
            "target": cfg.target,
            "drafter": {
                "feature_layers": cfg.feature_layers,
                "draft_vocab_size": cfg.draft_vocab_size,
                "sharpness": float(sharpness),
                "tau": float(tau),
                "about": made,
            },
            "texts": self.texts,
            "prompts": len(self.prompts),
            "new_tokens": self.options.new_tokens,
        }


def check_drafter(directory: str, scale: str) -> None:
    """Refuses a workdir that is not there; says of other texts than of record's.

    Raises:
      ValueError: there is no such directory.
    """
    if directory not in shipped.names() and not pathlib.Path(directory).is_dir():
        raise ValueError(
            f"--drafter={directory} is no directory here: train one, for example "
            f"with {recipes.TRAIN_COUNTING}"
        )
    if scale == "cpu":
        used_for = "the tables of record are of"
        recipes.print_other_tasks(directory, TASKS_OF_RECORD, used_for)


def requests_of(
    prompts: Sequence[np.ndarray], count: int, new_tokens: int
) -> list[types.Request]:
    """Makes requests of prompts in order, as often as needed."""
    turns = (divmod(i, len(prompts)) for i in range(count))
    return [
        types.Request(i, which, sample, prompts[which], new_tokens)
        for i, (sample, which) in enumerate(turns)
    ]


def texts_of(workdir: pathlib.Path) -> shards.Shards:
    """Opens the texts that a drafter was trained and measured on.

    Raises:
      ValueError: there are none.
    """
    if not (workdir / "texts").is_dir():
        raise ValueError(
            f"--drafter={workdir} has no folder texts: name the workdir of "
            "tlt_jax.train_drafter, with the texts that it was measured on."
        )
    settings = json.loads((workdir / "config.json").read_text(encoding="utf-8"))
    return shards.Shards(workdir / "texts", settings["texts"]["dtype"])


def held_out(texts: shards.Shards) -> list[int]:
    """Lists the indices of the texts that the drafter never saw."""
    return np.flatnonzero(np.asarray(texts.text_ids) >= offline_texts.HELD_OUT).tolist()

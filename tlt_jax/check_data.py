r"""Check data sets before a run: name every bad line, say how it is mended.

    python -m tlt_jax.check_data NAME ...

NAME is a .jsonl file (one JSON object a line, UTF-8), a .csv file (with a header), a
.parquet file, a directory of such or one that datasets' save_to_disk wrote, or
hub:ORGANISATION/NAME. What a row holds:

    prompt   text, or a list of messages {"role": ..., "content": ...} that ends with
             the user's; roles are system, user, assistant, tool
    answer   text or a number; may be missing, but rewards compare with it
    id       text or an integer, distinct within the set; may be missing
    others   kept for the reward function

--prompt_key and its like name other columns; a.b is field b of column a. With --reward
every row must have an answer that this reward takes for right itself; with
--tokenizer_of and --max_prompt_tokens prompts must fit. Ends with status 1 if any row
is bad, and with 2 if a data set cannot be read.
"""

import collections
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence

from absl import app, flags

from tlt_jax import types
from tlt_jax.models.formats import source
from tlt_jax.rl.tasks import examples as examples_lib
from tlt_jax.rl.tasks import files as data_files
from tlt_jax.rl.tasks import rewards
from tlt_jax.runtime import command_line

_SPLIT = flags.DEFINE_string("split", None, "Split of a set that has several.")
_SUBSET = flags.DEFINE_string("subset", None, "Subset of a set on the hub.")
_KEYS = {
    "prompt_key": flags.DEFINE_string("prompt_key", "prompt", "Column of prompts."),
    "answer_key": flags.DEFINE_string("answer_key", "answer", "Column of answers."),
    "id_key": flags.DEFINE_string("id_key", "id", "Column of ids."),
}
_REWARD = flags.DEFINE_string(
    "reward", None, "Reward that the run will have: math_verify, exact or number."
)
_TOKENIZER = flags.DEFINE_string(
    "tokenizer_of", None, "Model whose tokenizer and chat template measure prompts."
)
_AS_CHAT = flags.DEFINE_bool(
    "as_chat",
    False,
    "Prompts that are text become messages, as with task.options.chat.",
)
_MAX_PROMPT_TOKENS = flags.DEFINE_integer(
    "max_prompt_tokens",
    None,
    "Longest prompt, template included; needs --tokenizer_of.",
    lower_bound=1,
)
_SHOWN = flags.DEFINE_integer(
    "shown", 20, "Bad rows printed of each set; all are counted.", lower_bound=0
)

Check = Callable[[types.Example], str | None]


def answers(reward: str) -> Check:
    """Make the check of a row's answer: the reward must take it for right.

    Raises:
      ValueError: there is no such reward, or it compares with no answer.
    """
    if not rewards.needs_answer(reward):
        raise ValueError(
            f"--reward={reward}: name one that compares with an answer: math_verify, "
            "exact or number."
        )
    score = rewards.named(reward)

    def check(example: types.Example) -> str | None:
        if example.answer is None:
            return (
                f"no answer, which the reward {reward} compares with: add it, or name "
                "its column with answer_key"
            )
        try:
            right = score(example, f"Answer: {example.answer}") == 1.0
        except ValueError as error:
            return str(error).removesuffix(".")
        if not right:
            return (
                f"the reward {reward} does not take the answer {example.answer!r} for "
                "right itself: give the bare result, or use another reward"
            )
        return None

    return check


def lengths(spec: str, max_tokens: int, chat: bool = False) -> Check:
    """Make the check of a prompt's length with the tokenizer of a model.

    With `chat` text goes through the chat template, too.

    Raises:
      ValueError: there is no such model.
    """
    tokenizer = source.resolve(spec).tokenizer()

    def check(example: types.Example) -> str | None:
        asked = examples_lib.as_chat(example) if chat else example
        num = len(tokenizer.encode_prompt(asked.prompt))
        if num <= max_tokens:
            return None
        return (
            f"the prompt has {num} tokens, more than {max_tokens}: shorten it, raise "
            "task.max_prompt_tokens, or leave such prompts out "
            "(task.long_prompts=skip)"
        )

    return check


def problems(
    found: Iterable[examples_lib.Found],
    checks: Sequence[Check],
    counts: collections.Counter,
) -> Iterator[str]:
    """Yield what is wrong, a line for each bad row, counting rows on the way."""
    for row in found:
        counts["rows"] += 1
        if row.example is None:
            counts["bad"] += 1
            yield f"{row.where}: {row.problem}"
            continue
        counts["answers"] += row.example.answer is not None
        wrong = next(filter(None, (check(row.example) for check in checks)), None)
        if wrong:
            counts["bad"] += 1
            yield f"{row.where}: {wrong}"


def run(names: Sequence[str]) -> int:
    """Check as the flags say, all of `names`; return the status, see `main`."""
    if (_TOKENIZER.value is None) != (_MAX_PROMPT_TOKENS.value is None):
        raise ValueError("--tokenizer_of and --max_prompt_tokens belong together.")
    checks = []
    if _REWARD.value is not None:
        checks.append(answers(_REWARD.value))
    if _TOKENIZER.value is not None:
        limit = _MAX_PROMPT_TOKENS.value
        checks.append(lengths(_TOKENIZER.value, limit, _AS_CHAT.value))
    keys = {name: flag.value for name, flag in _KEYS.items()}
    status = 0
    for name in names:
        counts: collections.Counter = collections.Counter()
        rows = examples_lib.scan(name, split=_SPLIT.value, subset=_SUBSET.value, **keys)
        try:
            wrong = problems(rows, checks, counts)
            for line in itertools.islice(wrong, _SHOWN.value):
                print(line)
            # The rest is counted.
            collections.deque(wrong, maxlen=0)
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            status = 2
            continue
        num, bad = counts["rows"], counts["bad"]
        print(
            f"{name}: {num} rows, {counts['answers']} with an answer, {bad} bad"
            + (f" ({_SHOWN.value} shown)" if bad > _SHOWN.value else "")
            + ("" if num else ": it is empty")
        )
        if bad or not num:
            status = max(status, 1)
    return status


def main(argv: Sequence[str]) -> None:
    """Check; status 1: a row is bad, or there is none; 2: a set cannot be read."""
    if len(argv) < 2:
        command_line.fail(f"name at least one data set: {data_files.ACCEPTED}.")
    with command_line.told():
        status = run(argv[1:])
    sys.exit(status)


if __name__ == "__main__":
    app.run(main, flags_parser=command_line.parse_flags)

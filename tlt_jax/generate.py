r"""Complete a prompt and say how fast.

    python -m tlt_jax.generate --model=SPEC --prompt="..."

SPEC is a Hugging Face directory, gguf:FILE, a hub name, smollm2-135m-instruct, or the
workdir of a run. The completion goes to standard output, everything else to standard
error.

With a drafter the text is the same, and comes sooner; --compare decodes plainly as well
and says how much sooner.

    python -m tlt_jax.generate --model=SPEC --drafter=DIR --compare --prompt="..."
"""

import pathlib
import sys
from collections.abc import Sequence

import numpy as np
from absl import app, flags

from tlt_jax import policy, types
from tlt_jax import speculation as speculation_lib
from tlt_jax.models.formats import tokenizer as model_tokenizer
from tlt_jax.rl.engine import stats as rollout_stats
from tlt_jax.runtime import command_line, compile_cache
from tlt_jax.specdec import chain, sampling
from tlt_jax.specdec.proposers import learned

_MODEL = flags.DEFINE_string(
    "model", None, "Hugging Face directory, gguf:FILE, hub name, or a run's workdir."
)
_PROMPT = flags.DEFINE_string("prompt", None, "The prompt; - reads standard input.")
_PROMPT_FILE = flags.DEFINE_string("prompt_file", None, "File that holds the prompt.")
_SYSTEM = flags.DEFINE_string("system", None, "System message before the prompt.")
_RAW = flags.DEFINE_bool(
    "raw", False, "Continue the prompt as it stands, without the chat template."
)
_NUM_SAMPLES = flags.DEFINE_integer(
    "num_samples", 1, "Completions to draw; they share the prompt.", lower_bound=1
)
_MAX_NEW_TOKENS = flags.DEFINE_integer(
    "max_new_tokens", 256, "Longest completion in tokens.", lower_bound=1
)
_TEMPERATURE = flags.DEFINE_float(
    "temperature", 1.0, "Divides the logits; 0 takes the likeliest token."
)
_TOP_P = flags.DEFINE_float(
    "top_p", 1.0, "Draw from the smallest set with this probability; 1: from all."
)
_TOP_K = flags.DEFINE_integer("top_k", 0, "Draw from the k likeliest; 0: from all.")
_MIN_P = flags.DEFINE_float(
    "min_p", 0.0, "Draw from tokens at least this fraction as likely as the likeliest."
)
_SEED = flags.DEFINE_integer("seed", 0, "Fixes all draws.", lower_bound=0)
_STOP = flags.DEFINE_multi_string(
    "stop", [], "String that ends a completion; may be given several times."
)
_PRECISION = flags.DEFINE_enum(
    "precision", "float32", ["float32", "bfloat16"], "Of weights and activations."
)
_DRAFTER = flags.DEFINE_string(
    "drafter",
    None,
    "Directory of a learned drafter, ours or a published EAGLE, EAGLE-3 or speculators "
    "one; or ngram: guess from what the texts hold already.",
)
_STRATEGY = flags.DEFINE_multi_string(
    "strategy",
    [],
    "<rows>:D<draft_depth>K<topk>V<tokens_to_verify>: how to speculate for up to so "
    "many rows; may be given several times, the fewest rows first.",
)
_RANKING = flags.DEFINE_enum(
    "ranking",
    "coupled",
    list(learned.RANKINGS),
    "Guess the sample by its own noise, or the likeliest tokens.",
)
_RULE = flags.DEFINE_enum(
    "rule",
    chain.KEYED,
    list(chain.RULES),
    "What accepts drafted tokens. keyed keeps the tokens of plain decoding; the "
    "standard rules for sampled chains, for comparison, keep only their law.",
)
_COMPARE = flags.DEFINE_bool(
    "compare", False, "Decode plainly as well; keyed tokens must be equal."
)

_MAX_ROWS = 64
# Engines of equal sizes find each other's programs in the compilation cache.
_LENGTH_STEP = 512


def encode(
    tokenizer: model_tokenizer.Tokenizer,
    text: str,
    system: str | None = None,
    raw: bool = False,
) -> np.ndarray:
    """Encode a prompt, `[n] int32`: as a chat where there is a template, else as it is.

    A system message needs a chat template; `raw` leaves the template out.

    Raises:
      ValueError: the prompt is empty, or `system` has no place.
    """
    if not text:
        raise ValueError("the prompt is empty: give some text with --prompt.")
    if raw or tokenizer.chat_template is None:
        if system is not None:
            remedy = "drop --raw" if raw else "put the text into the prompt"
            why = "--raw leaves out" if raw else "this model has no"
            raise ValueError(f"--system needs a chat template, {why} one: {remedy}.")
        return tokenizer.encode(text)
    messages = [{"role": "user", "content": text}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    return tokenizer.encode_prompt(messages)


def complete(
    asked: policy.Policy,
    prompt: np.ndarray,
    sampling_cfg: sampling.SamplingConfig,
    *,
    num_samples: int = 1,
    max_new_tokens: int = 256,
    stop: Sequence[str] = (),
    seed: int = 0,
    speculation: speculation_lib.Speculation = speculation_lib.PLAIN,
) -> tuple[list[types.Completion], rollout_stats.RolloutStats]:
    """Draw completions of one prompt, `[n] int32`, whose computation they share.

    `max_new_tokens` is the longest completion, EOS included; `stop` are strings that
    end one, and the seed is of the noise.

    Raises:
      ValueError: the text would be longer than the model's context, or than the
        drafter was trained for.
    """
    longest, limit = len(prompt) + max_new_tokens, asked.config.max_positions
    if longest > limit:
        raise ValueError(
            f"the prompt of {len(prompt)} tokens and max_new_tokens={max_new_tokens} "
            f"exceed the model's context of {limit}: lower --max_new_tokens to "
            f"{limit - len(prompt)} or less."
            if len(prompt) < limit
            else f"the prompt of {len(prompt)} tokens fills the model's context of "
            f"{limit}: shorten it."
        )
    max_length = -(-longest // _LENGTH_STEP) * _LENGTH_STEP
    if longest <= speculation.max_length:
        max_length = min(max_length, speculation.max_length)
    engine = asked.engine(
        max_rows=min(num_samples, _MAX_ROWS),
        max_length=max_length,
        speculation=speculation,
        sampling_cfg=sampling_cfg,
        stop=tuple(stop),
    )
    requests = [
        types.Request(i, 0, i, prompt, max_new_tokens) for i in range(num_samples)
    ]
    try:
        return engine.run(requests, seed)
    finally:
        engine.pool.close()


def report(stats: rollout_stats.RolloutStats, num_samples: int) -> str:
    """Say in a few lines what was computed and how fast; compilation apart."""

    def line(name: str, num_tokens: int, seconds: float) -> str:
        speed = f"{num_tokens / seconds:.1f} tokens/s" if seconds else "nothing to do"
        return f"{name} {num_tokens} tokens in {seconds:.2f} s, {speed}"

    decoded = line("decode ", stats.num_tokens, stats.decode_s)
    rows = "" if num_samples == 1 else f" for {num_samples} rows"
    lines = [
        line("prefill", stats.num_prefill_tokens, stats.prefill_s),
        f"{decoded}, {stats.num_steps} target forwards{rows}",
        f"compile {stats.compile_s:.2f} s",
    ]
    if stats.num_fill_tokens:
        lines.insert(1, line("drafter", stats.num_fill_tokens, stats.fill_s))
    if not stats.num_accepted:
        return "\n".join([*lines, "accept length 1.00: a token per target forward"])
    rates = " ".join(f"{rate:.2f}" for rate in stats.accept_rates())
    calls = ", ".join(f"{name} {count}" for name, count in stats.strategies.items())
    lines += [
        f"accept length {stats.accept_length:.2f} tokens per target forward; "
        f"accepted by depth: {rates}",
        f"calls by strategy: {calls}",
    ]
    return "\n".join(lines)


def compare(
    completions: Sequence[types.Completion],
    stats: rollout_stats.RolloutStats,
    plain_completions: Sequence[types.Completion],
    plain_stats: rollout_stats.RolloutStats,
) -> str:
    """Say how speculation did against plain decoding of the same requests."""
    num_equal = sum(
        np.array_equal(a.tokens, b.tokens)
        for a, b in zip(completions, plain_completions, strict=True)
    )
    num_tokens, plain_s = plain_stats.num_tokens, plain_stats.decode_s
    ratio = plain_s / (stats.decode_s + stats.fill_s)
    why = ""
    if stats.rule != chain.KEYED:
        why = f" (rule {stats.rule} draws others from the same law)"
    return (
        f"plain   {num_tokens} tokens in {plain_s:.2f} s, "
        f"{num_tokens / plain_s:.1f} tokens/s\n"
        f"speculation: {ratio:.2f} times as fast, tokens equal in {num_equal} of "
        f"{len(completions)}{why}"
    )


def run() -> None:
    """Generate as the flags say."""
    is_keyed = _RULE.value == chain.KEYED
    if _DRAFTER.value is None and (_COMPARE.value or _STRATEGY.value or not is_keyed):
        raise ValueError(
            "--compare, --strategy and --rule are about speculation: name a drafter "
            "with --drafter=DIR, or --drafter=ngram."
        )
    if _MODEL.value is None:
        raise ValueError(
            "--model=SPEC is missing: name a model, such as smollm2-135m-instruct, or "
            "a run's workdir."
        )
    text = _prompt()
    sampling_cfg = sampling.SamplingConfig(
        _TEMPERATURE.value, _TOP_K.value, _TOP_P.value, _MIN_P.value
    )
    compile_cache.enable()
    asked = policy.load(_MODEL.value, _PRECISION.value)
    speculation = speculation_lib.PLAIN
    if _DRAFTER.value is not None:
        speculation = speculation_lib.load(
            _DRAFTER.value,
            asked.config,
            _STRATEGY.value,
            ranking=_RANKING.value,
            rule=_RULE.value,
            dtype=_PRECISION.value,
        )
    prompt = encode(asked.tokenizer, text, _SYSTEM.value, _RAW.value)
    settings = dict(
        num_samples=_NUM_SAMPLES.value,
        max_new_tokens=_MAX_NEW_TOKENS.value,
        stop=_STOP.value,
        seed=_SEED.value,
    )
    completions, stats = complete(
        asked, prompt, sampling_cfg, speculation=speculation, **settings
    )
    for i, completion in enumerate(completions):
        length, reason = len(completion.tokens), completion.finish_reason
        where = sys.stderr if len(completions) == 1 else sys.stdout
        print(f"[{i + 1}] {length} tokens, ended by {reason}", file=where, flush=True)
        print(asked.tokenizer.decode(completion.tokens), flush=True)
    print(f"\n{asked.identity}, {asked.precision}", file=sys.stderr)
    print(report(stats, len(completions)), file=sys.stderr)
    if _COMPARE.value:
        plainly = complete(asked, prompt, sampling_cfg, **settings)
        print(compare(completions, stats, *plainly), file=sys.stderr)


def _prompt() -> str:
    """Read the prompt from where the flags say; a final line end is left out."""
    if (_PROMPT.value is None) == (_PROMPT_FILE.value is None):
        raise ValueError(
            "give either --prompt=TEXT (- reads standard input) or --prompt_file=FILE."
        )
    if _PROMPT_FILE.value is not None:
        path = pathlib.Path(_PROMPT_FILE.value)
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"--prompt_file={path} cannot be read: {error}.") from None
    elif _PROMPT.value == "-":
        text = sys.stdin.read()
    else:
        return _PROMPT.value
    return text.removesuffix("\n")


def main(argv: Sequence[str]) -> None:
    """Generate; what a user can mend is one line, not a traceback."""
    if len(argv) > 1:
        command_line.fail(f"unexpected argument {argv[1]!r}: did you quote the prompt?")
    with command_line.told(OSError):
        run()


def parse(argv: Sequence[str]) -> list[str]:
    """Parse flags; exit with status 2 and one line if they cannot be used."""
    try:
        return flags.FLAGS(list(argv))
    except flags.Error as error:
        command_line.fail(error)


if __name__ == "__main__":
    app.run(main, flags_parser=parse)

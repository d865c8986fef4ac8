r"""Complete prompts, or converse, and say how fast.

    python -m tlt_jax.generate --model=SPEC --prompt="..."
    python -m tlt_jax.generate --model=SPEC --prompts_file=FILE.jsonl --out=FILE.jsonl
    python -m tlt_jax.generate --model=SPEC --chat

SPEC is a Hugging Face directory, gguf:FILE, a hub name, smollm2-135m-instruct, or the
workdir of a run. Completions go to standard output, everything else to standard error;
on a terminal a single one is shown as it comes.

With a drafter the text is the same, and comes sooner; --compare decodes plainly as well
and says how much sooner.

    python -m tlt_jax.generate --model=SPEC --drafter=DIR --compare --prompt="..."
"""

import functools
import json
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from absl import app, flags

from tlt_jax import policy, types
from tlt_jax import speculation as speculation_lib
from tlt_jax.models.formats import text_stream
from tlt_jax.models.formats import tokenizer as model_tokenizer
from tlt_jax.rl.engine import engine as engine_lib
from tlt_jax.rl.engine import stats as rollout_stats
from tlt_jax.rl.tasks import examples as examples_lib
from tlt_jax.runtime import command_line, compile_cache
from tlt_jax.specdec import sampling
from tlt_jax.viz import conversation, speed, status_line

_FLAGS = policy.Flags()
_PROMPT = flags.DEFINE_multi_string(
    "prompt",
    [],
    "A prompt; - reads standard input. May be given several times.",
)
_PROMPT_FILE = flags.DEFINE_string("prompt_file", None, "File that holds one prompt.")
_PROMPTS_FILE = flags.DEFINE_string(
    "prompts_file",
    None,
    "File of prompts: .jsonl or .parquet with a column prompt (text or messages) or "
    "messages, or .txt, a prompt a line.",
)
_CHAT = flags.DEFINE_bool(
    "chat", False, "Converse on the terminal; what was said is kept."
)
_OUT = flags.DEFINE_string(
    "out",
    None,
    "File to write, .jsonl, a line for each completion; absent before.",
    allow_override=True,
)
_SYSTEM = flags.DEFINE_string("system", None, "System message before each prompt.")
_RAW = flags.DEFINE_bool(
    "raw", False, "Continue the prompt as it stands, without the chat template."
)
_NUM_SAMPLES = flags.DEFINE_integer(
    "num_samples",
    None,
    "Completions of each prompt; they share it. Default: 1.",
    lower_bound=1,
    allow_override=True,
)
_MAX_NEW_TOKENS = flags.DEFINE_integer(
    "max_new_tokens",
    None,
    "Longest completion in tokens. Default: 256, or what the context leaves.",
    lower_bound=1,
    allow_override=True,
)
_SEED = flags.DEFINE_integer(
    "seed",
    None,
    "Fixes all draws. Default: 0.",
    lower_bound=0,
    allow_override=True,
)
_STOP = flags.DEFINE_multi_string(
    "stop", [], "String that ends a completion; may be given several times."
)
_STREAM = flags.DEFINE_bool(
    "stream",
    None,
    "Show the text as it comes. Default: on a terminal, where there is one completion.",
)
_COMPARE = flags.DEFINE_bool(
    "compare", False, "Decode plainly as well; keyed tokens must be equal."
)

Prompt = str | Sequence[Mapping[str, str]]

# Longest completion where nobody says.
_MOST_NEW_TOKENS = 256
# Decode steps between two pieces of a text that is shown as it comes.
_STREAM_STEPS = 8
# Positions that a conversation begins with; they are doubled when it has filled them.
_CHAT_LENGTH = 1024


def encode(
    tokenizer: model_tokenizer.Tokenizer,
    prompt: Prompt,
    system: str | None = None,
    raw: bool = False,
    template_options: Mapping[str, Any] | None = None,
) -> np.ndarray:
    """Encode a prompt, `[n] int32`: as a chat where there is a template, else as it is.

    Messages and a system message need a chat template, to which the options go; `raw`
    leaves it out.

    Raises:
      ValueError: the prompt is empty, or something has no place.
    """
    if not prompt:
        raise ValueError("the prompt is empty: give some text with --prompt.")
    lacks = raw or tokenizer.chat_template is None
    remedy = "drop --raw" if raw else "put the text into the prompt"
    why = "--raw leaves out one" if raw else "this model has none"
    for flag, given in (("--system", system), ("--template_option", template_options)):
        if lacks and given:
            raise ValueError(f"{flag} needs a chat template, {why}: {remedy}.")
    if isinstance(prompt, str):
        if lacks:
            return tokenizer.encode(prompt)
        prompt = [{"role": "user", "content": prompt}]
    elif lacks:
        raise ValueError(f"messages need a chat template, {why}: {remedy}.")
    if system is not None:
        if prompt[0]["role"] == "system":
            raise ValueError(
                "--system is given, but the messages begin with a system message of "
                "their own: leave one of them out."
            )
        prompt = [{"role": "system", "content": system}, *prompt]
    return tokenizer.encode_prompt(prompt, **(template_options or {}))


def requests_of(
    prompts: Sequence[np.ndarray],
    num_samples: int,
    max_new_tokens: int | None,
    limit: int = sys.maxsize,
) -> list[types.Request]:
    """Ask for completions of each prompt, `[n] int32`, whose computation they share.

    `max_new_tokens` is the longest completion; None: 256, or as many as a text of
    `limit` tokens leaves beside its prompt.
    """
    lengths = [
        max_new_tokens or max(1, min(_MOST_NEW_TOKENS, limit - len(prompt)))
        for prompt in prompts
    ]
    return [
        types.Request(i * num_samples + sample, i, sample, prompt, lengths[i])
        for i, prompt in enumerate(prompts)
        for sample in range(num_samples)
    ]


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
    requests = requests_of([prompt], num_samples, max_new_tokens)
    settings = dict(sampling_cfg=sampling_cfg, stop=tuple(stop))
    engine = asked.engine_for(requests, speculation, **settings)
    try:
        return engine.run(requests, seed)
    finally:
        engine.pool.close()


def _limit(asked: policy.Policy, speculation: speculation_lib.Speculation) -> int:
    """The longest text in tokens that model and drafter take."""
    positions = asked.config.max_positions
    return min(positions, speculation.max_length or positions)


class _Answers:
    """Passes completions on in the order of their requests, as soon as it can."""

    def __init__(self, prompts: Sequence[tuple[str, Prompt]], num_samples: int, decode):
        self._prompts, self._num_samples = prompts, num_samples
        self._decode = decode
        self._waiting: dict[int, types.Completion] = {}
        self._next = 0
        self.is_single = len(prompts) * num_samples == 1

    def put(self, completion: types.Completion) -> None:
        """Take one; write those that nobody is missing before."""
        self._waiting[completion.request_id] = completion
        while self._next in self._waiting:
            self._write(self._waiting.pop(self._next))
            self._next += 1

    def _write(self, completion: types.Completion) -> None:
        number, sample = divmod(completion.request_id, self._num_samples)
        name, prompt = self._prompts[number]
        text = self._decode(completion.tokens)
        length, reason = len(completion.tokens), completion.finish_reason
        if _OUT.value is not None:
            record = dict(id=name, prompt=prompt, sample=sample, text=text)
            record |= dict(num_tokens=length, finish_reason=reason)
            line = json.dumps(record, ensure_ascii=False)
            # Closed each time: what is written survives whatever ends the command.
            with open(_OUT.value, "a", encoding="utf-8") as file:
                file.write(line + "\n")
            return
        label = f"{sample + 1}" if len(self._prompts) == 1 else f"{number + 1}"
        if len(self._prompts) > 1 and self._num_samples > 1:
            label += f".{sample + 1}"
        where = sys.stderr if self.is_single else sys.stdout
        print(f"[{label}] {length} tokens, ended by {reason}", file=where, flush=True)
        print(text, flush=True)


def run() -> None:
    """Generate as the flags say."""
    _check()
    prompts = [] if _CHAT.value else _prompts()
    compile_cache.enable()
    with status_line.StatusLine() as display:
        asked, speculation = _FLAGS.load(display)
        law, how = _FLAGS.law(asked)
        settings = dict(sampling_cfg=law, stop=tuple(_STOP.value))
        if _CHAT.value:
            display.note(f"{asked.identity}, {asked.precision}, {how}")
            _converse(asked, speculation, settings, display)
            return
        options = _FLAGS.template_options()
        encoded = [
            encode(asked.tokenizer, prompt, _SYSTEM.value, _RAW.value, options)
            for _, prompt in prompts
        ]
        num_samples = _NUM_SAMPLES.value or 1
        limit = _limit(asked, speculation)
        requests = requests_of(encoded, num_samples, _MAX_NEW_TOKENS.value, limit)
        answers = _Answers(prompts, num_samples, asked.tokenizer.decode)
        completions, stats = _generate(
            asked, requests, answers, speculation, settings, display
        )
        print(f"\n{asked.identity}, {asked.precision}, {how}", file=sys.stderr)
        print(speed.report(stats, len(completions)), file=sys.stderr)
        if _COMPARE.value:
            display.stage("decoding plainly")
            engine = asked.engine_for(requests, **settings)
            plainly = engine.run(requests, _SEED.value or 0)
            engine.pool.close()
            display.clear()
            print(speed.compare(completions, stats, *plainly), file=sys.stderr)


def _generate(
    asked: policy.Policy,
    requests: Sequence[types.Request],
    answers: _Answers,
    speculation: speculation_lib.Speculation,
    settings: Mapping[str, Any],
    display: status_line.StatusLine,
) -> tuple[list[types.Completion], rollout_stats.RolloutStats]:
    """Generate, showing what is to be shown meanwhile."""
    streams = _STREAM.value
    if streams is None:
        streams = answers.is_single and _OUT.value is None and sys.stdout.isatty()
    stream = text_stream.TextStream(asked.tokenizer)

    def show(request_id, tokens):
        del request_id
        display.clear()
        print(stream.feed(tokens), end="", flush=True)

    def put(completion):
        display.clear()
        if not streams:
            answers.put(completion)

    def progress(num_done, num_tokens):
        if not streams:
            display.stage("generating")
            display.within(num_done, len(requests), f"{num_tokens} tokens")

    sizes = dict(steps_per_call=_STREAM_STEPS) if streams else {}
    engine = asked.engine_for(requests, speculation, **settings, **sizes)
    display.stage("compiling, reading the prompt")
    try:
        completions, stats = engine.run(
            requests,
            _SEED.value or 0,
            on_completion=put,
            on_call=progress,
            on_tokens=show if streams else None,
        )
    finally:
        engine.pool.close()
    display.clear()
    if streams:
        print(stream.end(), flush=True)
        length, reason = len(completions[0].tokens), completions[0].finish_reason
        print(f"[1] {length} tokens, ended by {reason}", file=sys.stderr)
    elif _OUT.value is not None:
        num = len(completions)
        print(f"wrote {num} completions to {_OUT.value}", file=sys.stderr)
    return completions, stats


def _converse(
    asked: policy.Policy,
    speculation: speculation_lib.Speculation,
    settings: Mapping[str, Any],
    display: status_line.StatusLine,
) -> None:
    """Answer what is typed until there is no more."""
    engine: engine_lib.Engine | None = None
    limit, num_answers = asked.config.max_positions, 0

    def fitting(longest: int) -> engine_lib.Engine:
        """An engine for so many positions: the one at hand, or a larger one."""
        nonlocal engine
        if engine is not None and longest <= engine.engine_cfg.max_length:
            return engine
        if engine is not None:
            engine.pool.close()
        length = _CHAT_LENGTH
        while length < longest:
            length *= 2
        length = min(length, _limit(asked, speculation))
        engine = asked.engine(
            max_rows=1,
            max_length=max(length, longest),
            speculation=speculation,
            steps_per_call=_STREAM_STEPS,
            **settings,
        )
        display.stage("compiling, reading the prompt")
        return engine

    def answer(messages, show: Callable[[str], None]) -> str:
        nonlocal num_answers
        options = _FLAGS.template_options()
        prompt = encode(asked.tokenizer, messages, template_options=options)
        room = limit - len(prompt)
        if room < 1:
            raise ValueError(
                f"the conversation of {len(prompt)} tokens fills the model's context "
                f"of {limit}: /clear begins anew."
            )
        most = min(_MAX_NEW_TOKENS.value or _MOST_NEW_TOKENS, room)
        # Each answer has noise of its own.
        request = types.Request(num_answers, num_answers, 0, prompt, most)
        num_answers += 1
        stream = text_stream.TextStream(asked.tokenizer)
        with conversation.interruptible() as check:

            def take(request_id, tokens):
                del request_id
                display.clear()
                show(stream.feed(tokens))
                check()

            try:
                (completion,), _ = fitting(len(prompt) + most).run(
                    [request], _SEED.value or 0, on_tokens=take
                )
            finally:
                display.clear()
        show(stream.end())
        return asked.tokenizer.decode(completion.tokens)

    if asked.tokenizer.chat_template is None:
        raise ValueError(
            "--chat needs a chat template, this model has none: complete text with "
            "--prompt, or name an instruction-tuned model."
        )
    display.note(conversation.HELP)
    try:
        conversation.converse(answer, system=_SYSTEM.value, read=_read_line)
    finally:
        if engine is not None:
            engine.pool.close()


def _read_line(prompt: str) -> str:
    """Read a line that is typed, or one of what is piped in."""
    if sys.stdin.isatty():
        return input(prompt)
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line


def _check() -> None:
    """Refuse flags that do not go together, before anything is loaded."""
    if _COMPARE.value and not _FLAGS.speculates:
        raise ValueError(
            "--compare is about speculation: name a drafter with --drafter=DIR, or "
            "--drafter=ngram."
        )
    _FLAGS.check()
    sources = [bool(_PROMPT.value), _PROMPT_FILE.value is not None]
    sources += [_PROMPTS_FILE.value is not None, _CHAT.value]
    if sum(sources) != 1:
        raise ValueError(
            "give either --prompt=TEXT (- reads standard input; several may be given), "
            "--prompt_file=FILE, --prompts_file=FILE or --chat."
        )
    several = (_NUM_SAMPLES.value or 1) > 1 or len(_PROMPT.value) > 1
    several |= _PROMPTS_FILE.value is not None
    unfit = {"--num_samples": several, "--out": _OUT.value, "--raw": _RAW.value}
    unfit["--compare"] = _COMPARE.value
    for flag, given in unfit.items():
        if _CHAT.value and given:
            raise ValueError(f"{flag} has no place in a conversation: drop it.")
    if _STREAM.value and (several or _OUT.value is not None):
        raise ValueError(
            "--stream shows one completion as it comes: give one prompt, one sample, "
            "and no --out."
        )
    if _OUT.value is not None:
        policy.check_new("out", _OUT.value)


def _prompts() -> list[tuple[str, Prompt]]:
    """Read prompts with their names from where the flags say."""
    if _PROMPT.value:
        texts = [_standard_input() if p == "-" else p for p in _PROMPT.value]
    elif _PROMPT_FILE.value is not None:
        texts = [_text("prompt_file", _PROMPT_FILE.value).removesuffix("\n")]
    elif _PROMPTS_FILE.value.endswith(".txt"):
        lines = _text("prompts_file", _PROMPTS_FILE.value).splitlines()
        texts = [line for line in lines if line.strip()]
        if not texts:
            raise ValueError(f"--prompts_file={_PROMPTS_FILE.value} holds no prompt.")
    else:
        return _rows(_PROMPTS_FILE.value)
    return [(f"{i + 1}", text) for i, text in enumerate(texts)]


def _rows(name: str) -> list[tuple[str, Prompt]]:
    """Read a data set; its prompts are in the column prompt, or else messages."""
    firsts = {
        key: next(examples_lib.scan(name, prompt_key=key), None)
        for key in ("prompt", "messages")
    }
    good = [key for key, first in firsts.items() if first and first.example]
    found = examples_lib.read_examples(name, prompt_key=good[0] if good else "prompt")
    return [(example.example_id, example.prompt) for example in found]


@functools.cache
def _standard_input() -> str:
    return sys.stdin.read().removesuffix("\n")


def _text(flag: str, name: str) -> str:
    try:
        return pathlib.Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--{flag}={name} cannot be read: {error}.") from None


def main(argv: Sequence[str]) -> None:
    """Generate; what a user can mend is one line, not a traceback."""
    if len(argv) > 1:
        command_line.fail(f"unexpected argument {argv[1]!r}: did you quote the prompt?")
    with command_line.told(OSError):
        run()


if __name__ == "__main__":
    app.run(main, flags_parser=command_line.parse_flags)

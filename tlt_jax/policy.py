"""A policy ready to be asked: weights, tokenizer and engine of a model or of a run.

`Flags` are those by which a command names a policy and how it is asked.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags

from tlt_jax import assembly, config, types
from tlt_jax import speculation as speculation_lib
from tlt_jax.models import config as model_config
from tlt_jax.models import params as model_params
from tlt_jax.models.formats import source
from tlt_jax.models.formats import tokenizer as model_tokenizer
from tlt_jax.rl.engine import engine as engine_lib
from tlt_jax.runtime import watch as watch_lib
from tlt_jax.settings import text
from tlt_jax.specdec import chain, sampling
from tlt_jax.specdec.proposers import learned
from tlt_jax.workdir import checkpoint, metrics

# What `Flags` defines is said to be of the command that does.
flags.disclaim_key_flags()

_TOKENIZER, _SETTINGS = "tokenizer", "config.json"
# The workdir of a run has one of these.
_RUN_MARKS = (checkpoint.DIRECTORY, metrics.FILE, _TOKENIZER)
# Where nobody says how to sample: small models ramble at 1.
_TEMPERATURE = 0.7
_MAX_ROWS = 64
# Engines of equal sizes find each other's programs in the compilation cache.
_LENGTH_STEP = 512


@dataclasses.dataclass(frozen=True)
class Policy:
    """A model that can be asked.

    Attributes:
      config: the architecture.
      params: on the first device, layers as a tuple, of the type of `precision`.
      tokenizer: the model's own.
      identity: which weights these are, for people to read.
      precision: of weights, activations and cache: `float32` or `bfloat16`.
      sampling: those of temperature, top_k, top_p and min_p that the model's makers
        recommend, or the run had.
      workdir: of the run whose policy it is; None: it is no run's.
      files: that all this was read from; of a run's checkpoint the file that has the
        checksums of the rest.
    """

    config: model_config.ModelConfig
    params: model_params.Params
    tokenizer: model_tokenizer.Tokenizer
    identity: str
    precision: str
    sampling: Mapping[str, float] = dataclasses.field(default_factory=dict)
    workdir: str | None = None
    files: tuple[pathlib.Path, ...] = ()

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Ids that end a completion: the model's and the tokenizer's."""
        return assembly.eos_ids_of(self.config, self.tokenizer)

    def engine(
        self,
        *,
        max_rows: int,
        max_length: int,
        speculation: speculation_lib.Speculation = speculation_lib.PLAIN,
        **settings: Any,
    ) -> engine_lib.Engine:
        """Make an engine that has the weights; it compiles what it needs when it does.

        `max_length` is of the longest text in tokens, prompt and completion; `settings`
        are further ones of `engine_programs.EngineConfig`.
        """
        # On TPUs the attention kernel takes pages of a whole tile.
        page_size = 128 if jax.default_backend() == "tpu" else 64
        sizes = dict(dtype=self.precision, page_size=page_size) | settings
        engine = assembly.engine_of(
            self.config,
            self.tokenizer,
            speculation,
            max_rows=max_rows,
            max_length=max_length,
            **sizes,
        )
        engine.set_params(self.params, version=0)
        if speculation.params is not None:
            engine.set_drafter(speculation.params, version=0)
        return engine

    def engine_for(
        self,
        requests: Sequence[types.Request],
        speculation: speculation_lib.Speculation = speculation_lib.PLAIN,
        **settings: Any,
    ) -> engine_lib.Engine:
        """Make an engine large enough for requests; see `engine`.

        Raises:
          ValueError: a text would be longer than the model's context, or than the
            drafter was trained for.
        """
        longest = 0
        for request in requests:
            self._check_context(len(request.prompt), request.max_new_tokens)
            longest = max(longest, len(request.prompt) + request.max_new_tokens)
        max_length = -(-longest // _LENGTH_STEP) * _LENGTH_STEP
        if longest <= speculation.max_length:
            max_length = min(max_length, speculation.max_length)
        sizes = dict(max_rows=min(len(requests), _MAX_ROWS), max_length=max_length)
        return self.engine(speculation=speculation, **(sizes | settings))

    def _check_context(self, prompt: int, max_new_tokens: int) -> None:
        limit = self.config.max_positions
        if prompt >= limit:
            raise ValueError(
                f"the prompt of {prompt} tokens fills the model's context of {limit}: "
                "shorten it."
            )
        if prompt + max_new_tokens > limit:
            raise ValueError(
                f"the prompt of {prompt} tokens and max_new_tokens={max_new_tokens} "
                f"exceed the model's context of {limit}: lower --max_new_tokens to "
                f"{limit - prompt} or less."
            )


def load(
    spec: str,
    precision: str | None = "float32",
    step: int | None = None,
    observer: watch_lib.Observer | None = None,
) -> Policy:
    """Load the policy that `spec` names.

    It names what `models.formats.source.resolve` takes, or the workdir of a run, of
    which the checkpoint of a step is read; None: the newest. `precision` is `float32`
    or `bfloat16`; None: the run's own, and float32 where there is no run. `observer` is
    told of fetching and loading.

    Raises:
      ValueError: nothing of that name can be had, or it is not computed here.
      CheckpointError: the run has no such complete checkpoint, or it is damaged.
    """
    observer = observer or watch_lib.Silent()
    if (directory := workdir_of(spec)) is not None:
        observer.stage(f"loading {spec}")
        law, own_precision = _law_of_run(directory)
        precision = precision or own_precision
        dtype = jnp.dtype(precision)
        params, cfg, step = checkpoint.restore_policy(directory, step)
        params = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
        return Policy(
            cfg,
            model_params.unstack(params),
            model_tokenizer.from_directory(os.path.join(directory, _TOKENIZER)),
            f"{spec}, step {step}",
            precision,
            law,
            directory,
            (
                checkpoint.checksums_path(directory, step),
                *sorted(pathlib.Path(directory, _TOKENIZER).glob("*")),
            ),
        )
    if step is not None:
        raise ValueError(
            f"step={step} is for the workdir of a run, and {spec} is none: leave "
            "--step out."
        )
    here = os.path.expanduser(spec)
    is_here = os.path.isdir(here)
    if is_here and not os.path.exists(os.path.join(here, _SETTINGS)):
        raise ValueError(
            f"{spec} is a directory without a model ({_SETTINGS} and *.safetensors) "
            f"and without a run (one of {', '.join(_RUN_MARKS)}): name another one; "
            f"accepted: {source.ACCEPTED}, or a run's workdir."
        )
    if not is_here and not spec.startswith("gguf:"):
        observer.stage(f"fetching {spec} (unless it is here already)")
    found = source.resolve(spec)
    observer.stage(f"loading {spec}")
    precision = precision or "float32"
    params = model_params.unstack(found.load(jnp.dtype(precision)))
    return Policy(
        found.config,
        params,
        found.tokenizer(),
        spec,
        precision,
        found.sampling,
        files=tuple(pathlib.Path(path) for path in found.files()),
    )


def workdir_of(spec: str) -> str | None:
    """Return the directory if `spec` names a run's; None: it names none."""
    directory = os.path.expanduser(spec)
    marks = [os.path.join(directory, name) for name in _RUN_MARKS]
    return directory if any(map(os.path.exists, marks)) else None


def run_of(workdir: str) -> config.RunConfig:
    """Read the settings of a run.

    Raises:
      ValueError: the workdir holds none, or another version's.
    """
    path = pathlib.Path(workdir, _SETTINGS)
    try:
        return config.load(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} does not give the settings of a run ({error}): restore it, or "
            "export the policy (tlt_jax.export) and name that directory."
        ) from error


def _law_of_run(directory: str) -> tuple[dict[str, float], str]:
    """How a run samples, and its precision.

    They are read also where other settings are another version's.
    """
    try:
        path = pathlib.Path(directory, _SETTINGS)
        settings = json.loads(path.read_text(encoding="utf-8"))
        law, precision = settings["sampling"], settings["precision"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}, "float32"
    names = {field.name for field in dataclasses.fields(sampling.SamplingConfig)}
    return {key: value for key, value in law.items() if key in names}, precision


def law_of(
    given: Mapping[str, float | None],
    recommended: Mapping[str, float],
    whose: str = "the model's own",
) -> tuple[sampling.SamplingConfig, str]:
    """Choose how to sample: as asked, else as recommended, else at temperature 0.7.

    A temperature that is asked for brings nothing recommended along: those belong
    together. `whose` says whose recommendation it is.

    Returns:
      The law, and a few words that say it and where it is from.

    Raises:
      ValueError: a setting is out of range.
    """
    own = {key: value for key, value in given.items() if value is not None}
    if own.get("temperature") is not None:
        recommended = {}
    base = dict(recommended) or {"temperature": _TEMPERATURE}
    law = sampling.SamplingConfig(**(base | own))
    parts = [f"temperature {law.temperature:g}" if law.temperature else "greedy"]
    parts += [
        f"{key} {getattr(law, key):g}"
        for key in ("top_k", "top_p", "min_p")
        if getattr(law, key) != getattr(sampling.SamplingConfig(), key)
    ]
    if "temperature" not in own:
        parts[0] += f" ({whose})" if recommended else " (by default)"
    return law, ", ".join(parts)


class Flags:
    """Flags by which a command names a policy, a law, and how to speculate.

    Several commands of one process may define them: they are the same.
    """

    def __init__(self):
        """Define them; call it where the command's own flags stand."""
        shared = dict(allow_override=True)
        self._model = flags.DEFINE_string(
            "model",
            None,
            "Hugging Face directory, gguf:FILE, hub name, or a run's workdir.",
            **shared,
        )
        self._step = flags.DEFINE_integer(
            "step",
            None,
            "RL step whose checkpoint of the workdir is read; default: the newest.",
            **shared,
        )
        self._precision = flags.DEFINE_enum(
            "precision",
            None,
            ["float32", "bfloat16"],
            "Of weights and activations; default: float32, or the run's.",
            **shared,
        )
        meanings = {
            "temperature": "Divides the logits; 0 takes the likeliest token. Default: "
            "what the model's generation_config.json or its run says, else 0.7.",
            "top_p": "Draw from the smallest set with this probability; 1: from all.",
            "min_p": "Draw from tokens at least this fraction as likely as the "
            "likeliest; 0: from all.",
        }
        self._law = {
            name: flags.DEFINE_float(name, None, meaning, **shared)
            for name, meaning in meanings.items()
        }
        self._law["top_k"] = flags.DEFINE_integer(
            "top_k", None, "Draw from the k likeliest; 0: from all.", **shared
        )
        self._template_options = flags.DEFINE_multi_string(
            "template_option",
            [],
            "KEY=VALUE for the model's chat template, such as enable_thinking=False; "
            "may be given several times.",
            **shared,
        )
        self._drafter = flags.DEFINE_string(
            "drafter",
            None,
            "Speculate with this learned drafter: a directory, ours or a published "
            "EAGLE, EAGLE-3 or speculators one; the name of one that comes with the "
            "package (smollm2-135m-instruct); or ngram: guess from what the texts hold "
            "already.",
            **shared,
        )
        self._strategy = flags.DEFINE_multi_string(
            "strategy",
            [],
            "<rows>:D<draft_depth>K<topk>V<tokens_to_verify>, N<budget of all rows> "
            "behind it if they shall share: how to speculate for up to so many rows; "
            "may be given several times, the fewest rows first.",
            **shared,
        )
        self._ranking = flags.DEFINE_enum(
            "ranking",
            "coupled",
            list(learned.RANKINGS),
            "Guess the sample by its own noise, or the likeliest tokens.",
            **shared,
        )
        self._rule = flags.DEFINE_enum(
            "rule",
            chain.KEYED,
            list(chain.RULES),
            "What accepts drafted tokens. keyed keeps the tokens of plain decoding; "
            "rejection, for chains and trees of the drafter (such as D5K1V6, D4K2V8), "
            "and block, for chains, keep only their law.",
            **shared,
        )

    @property
    def model(self) -> str:
        """What is named; `check` has seen that it is."""
        return self._model.value

    @property
    def speculates(self) -> bool:
        """Whether a drafter is named."""
        return self._drafter.value is not None

    def check(self) -> None:
        """Refuse what can be refused before anything is loaded.

        Raises:
          ValueError: no model is named, or no drafter where there must be one.
        """
        is_keyed = self._rule.value == chain.KEYED
        if not self.speculates and (self._strategy.value or not is_keyed):
            raise ValueError(
                "--strategy and --rule are about speculation: name a drafter with "
                "--drafter=DIR, or --drafter=ngram."
            )
        if self._model.value is None:
            raise ValueError(
                "--model=SPEC is missing: name a model, such as smollm2-135m-instruct, "
                "or a run's workdir."
            )
        # Its mistakes are told before minutes of loading.
        self.template_options()
        law_of(self._given(), {})

    def load(
        self,
        observer: watch_lib.Observer,
    ) -> tuple[Policy, speculation_lib.Speculation]:
        """Load the policy, and what it speculates with.

        Raises:
          ValueError, CheckpointError: see `load` and `speculation.load`.
        """
        asked = load(self.model, self._precision.value, self._step.value, observer)
        if not self.speculates:
            return asked, speculation_lib.PLAIN
        return asked, speculation_lib.load(
            self._drafter.value,
            asked.config,
            self._strategy.value,
            ranking=self._ranking.value,
            rule=self._rule.value,
            dtype=asked.precision,
        )

    def law(
        self, asked: Policy, recommended: Mapping[str, float] | None = None
    ) -> tuple[sampling.SamplingConfig, str]:
        """Choose how to sample, see `law_of`; None: the policy's recommendation."""
        whose = "the run's" if asked.workdir else "the model's own"
        if recommended is None:
            recommended = asked.sampling
        return law_of(self._given(), recommended, whose)

    def _given(self) -> dict[str, float | None]:
        return {name: flag.value for name, flag in self._law.items()}

    def template_options(self) -> dict[str, Any]:
        """Read the settings of the chat template.

        Raises:
          ValueError: one is not of the form KEY=VALUE.
        """
        return literals("template_option", self._template_options.value)


def literals(flag: str, pairs: Sequence[str]) -> dict[str, Any]:
    """Read `KEY=VALUE` settings: values as free settings of a run are written.

    Raises:
      ValueError: one is not of this form, or a key comes twice.
    """
    found: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not (key and equals):
            raise ValueError(f"--{flag}={pair!r} is not of the form KEY=VALUE.")
        if key in found:
            raise ValueError(f"--{flag}={key}=... is given twice: give it once.")
        found[key] = text.literal(value)
    return found


def check_new(flag: str, path: str) -> None:
    """Refuse a file to write that is there already, or that cannot be made.

    Raises:
      ValueError: it is so.
    """
    file = pathlib.Path(path)
    if file.exists() or not file.parent.is_dir():
        why = "is there already" if file.exists() else "lies in no directory"
        raise ValueError(f"--{flag}={path} {why}: name another file.")

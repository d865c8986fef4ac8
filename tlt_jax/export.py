r"""Write a run's policy, or its drafter, for other programs.

    python -m tlt_jax.export --workdir=DIR --out=DIR [--step=N] [--dtype=bfloat16]
    python -m tlt_jax.export --workdir=DIR --drafter_layout=LAYOUT --out=DIR
    python -m tlt_jax.export --workdir=DIR --ship=smollm2-135m-instruct

The policy's directory holds config.json, generation_config.json, safetensors and the
tokenizer; transformers and the usual serving engines load it by its path.

LAYOUT says who shall load the drafter: eagle or eagle3 (SGLang), speculators (vLLM), or
tlt: this package, by --drafter=DIR and drafter.directory. The workdir is that of a run
with specdec.mode=tlt, or of tlt_jax.train_drafter. Engines compute what the layout's
name means and nothing else: drafters of ours that shall go there are trained with
drafter.architecture=eagle or eagle3.

--ship puts the newest drafter that a training has measured into the package, in
bfloat16, with a card, where --drafter and drafter.directory find it by its name.
"""

import dataclasses
import json
import os
import pathlib
from importlib import metadata
from typing import Any

from absl import app, flags, logging

from tlt_jax import assembly, policy
from tlt_jax.models.drafters import head as drafter_head
from tlt_jax.models.drafters import hf as drafter_hf
from tlt_jax.models.drafters import io as drafter_io
from tlt_jax.models.drafters import layouts, shipped
from tlt_jax.models.formats import convert
from tlt_jax.models.formats import tokenizer as model_tokenizer
from tlt_jax.runtime import command_line
from tlt_jax.workdir import checkpoint, drafter_checkpoint, metrics

_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run.")
_OUT = flags.DEFINE_string("out", None, "Directory to write; absent or empty.")
_SHIP = flags.DEFINE_string(
    "ship",
    None,
    "In place of --out: put the drafter into the package under this name of its model.",
)
_NOTES = flags.DEFINE_string(
    "notes", None, "A file of Markdown that the card of --ship ends with."
)
_STEP = flags.DEFINE_integer(
    "step", None, "RL step whose checkpoint is exported; default: the newest."
)
_DTYPE = flags.DEFINE_enum(
    "dtype", "bfloat16", list(convert.DTYPES), "Type of the weights written."
)
_OWN = "tlt"
_LAYOUT = flags.DEFINE_enum(
    "drafter_layout",
    None,
    [*layouts.LAYOUTS, _OWN],
    "Write the drafter in this layout, and not the policy.",
)
_VERIFIER = flags.DEFINE_string(
    "verifier",
    "",
    "Name or directory of the model that verifies, by which vLLM finds it (speculators "
    "alone); default: the run's model.spec.",
)
_NUM_SPECULATIVE_TOKENS = flags.DEFINE_integer(
    "num_speculative_tokens",
    5,
    "Tokens that vLLM shall draft (speculators alone).",
    lower_bound=1,
)

TOKENIZER_DIRECTORY = "tokenizer"
# A training of a drafter leaves the model that it made here, its result there.
_MADE_TARGET, _TRAINED = "target", "drafter"


def export(workdir: str, out: str, step: int | None = None, dtype="bfloat16") -> int:
    """Write the policy of a checkpoint as a Hugging Face directory; return its step.

    `out` is absent or empty; complete or absent afterwards. `step` None: the newest.

    Raises:
      CheckpointError: if there is no such checkpoint or it is damaged.
      ValueError: if `out` is not empty, or the run has no tokenizer.
      OSError: if the disk is full or not writable.
    """
    tokenizer = os.path.join(workdir, TOKENIZER_DIRECTORY)
    params, cfg, step = checkpoint.restore_policy(workdir, step)
    if not os.path.exists(os.path.join(tokenizer, "tokenizer.json")):
        raise ValueError(
            f"{tokenizer} holds no tokenizer.json, which a run writes when it starts: "
            "copy the tokenizer files of the run's model there."
        )
    # Who loads it ends texts by these alone; rollouts end at the tokenizer's, too.
    own = model_tokenizer.from_directory(tokenizer)
    cfg = dataclasses.replace(cfg, eos_ids=assembly.eos_ids_of(cfg, own))
    convert.save(params, cfg, out, tokenizer_source=tokenizer, dtype=dtype)
    return step


def export_drafter(
    workdir: str,
    out: str,
    layout: str,
    step: int | None = None,
    dtype: str = "bfloat16",
    verifier: str = "",
    num_speculative_tokens: int = 5,
) -> str:
    """Write a run's drafter; return which one it was, for people to read.

    The run has specdec.mode=tlt, or is a training of a drafter. `layout` is one of
    `layouts.LAYOUTS`, or `tlt`, which keeps the weights' own dtype; `verifier` (empty:
    the run's model.spec) and `num_speculative_tokens` are for `speculators`. `out` and
    `step` are as in `export`.

    Raises:
      CheckpointError, OSError: see `export`.
      ValueError: if the workdir holds no drafter, the layout has no place for what it
        computes, or `out` is not empty.
    """
    cfg, params, (target_cfg, target_params, spec), what = _drafter(workdir, step)
    if layout == _OWN:
        if os.path.exists(out) and os.listdir(out):
            raise ValueError(f"out={out} is not empty: name another or remove it.")
        drafter_io.save(out, params, cfg, {"from": what})
        return what
    drafter_hf.save(
        out,
        params,
        cfg,
        layout,
        target_cfg,
        head=drafter_head.head_rows(target_params, params.draft_ids),
        dtype=dtype,
        verifier=verifier or spec,
        num_speculative_tokens=num_speculative_tokens,
    )
    return what


def ship_drafter(workdir: str, name: str, notes: str = "") -> str:
    """Put the drafter of a training into the package; return where it is.

    It is the one that was measured last, of a training that may go on. See
    `shipped.save` for `name` and `notes`.

    Raises:
      ValueError: the workdir is of no training that has measured a drafter.
    """
    if os.path.isdir(os.path.join(workdir, drafter_checkpoint.DIRECTORY)):
        raise ValueError(
            f"{workdir} is of a run, whose drafter serves the model that it trained: "
            "--ship takes the workdir of tlt_jax.train_drafter."
        )
    cfg, params, (_, _, spec), _ = _drafter(workdir, None)
    settings = _settings(workdir)
    step = drafter_io.about(os.path.join(workdir, _TRAINED))["num_steps"]
    texts, batch = settings["texts"], settings["batch"]
    round_steps = texts.get("round_steps", 0)
    num_texts = texts["num"] * (-(-step // round_steps) if round_steps else 1)
    row = {row["step"]: row for row in metrics.read(workdir)}.get(step, {})
    if "eval/coupled_accept_length" not in row:
        raise ValueError(
            f"{workdir} has no measurement of step {step}, at which its drafter was "
            "written: start the training again, which measures it."
        )
    asked = ", ".join(dict.fromkeys(texts["tasks"]))
    rates = " ".join(f"{x:.2f}" for x in row["eval/coupled_rate_by_depth"])
    about = {
        "target": spec,
        "trained": f"{step} steps of up to {batch['num_rows'] * batch['row_bases']} "
        f"positions, tlt_jax {metadata.version('tlt-jax')}",
        "texts": f"{num_texts} answers of the target at temperature 1, of up to "
        f"{texts['max_new_tokens']} tokens, to {asked}",
        "objective": json.dumps(settings["objective"]),
        "layer": f"features {list(cfg.feature_layers)}, {cfg.draft_vocab_size} tokens "
        f"that can be proposed, texts of up to {cfg.max_length} positions",
        f"held out, temperature 1, chains of {settings['eval']['depth']}": "accept "
        "length "
        f"{row['eval/coupled_accept_length']:.3f} coupled, "
        f"{row['eval/deterministic_accept_length']:.3f} deterministic; rates by depth, "
        f"coupled, {rates}; sharpness {row['eval/sharpness']:g}, tau "
        f"{row['eval/tau']:.3f}",
    }
    return str(shipped.save(name, params, cfg, about, notes))


def _drafter(workdir: str, step: int | None):
    """Find a workdir's drafter: description, weights, target, and what to call it.

    The target is its configuration, weights, and name.
    """
    if os.path.isdir(os.path.join(workdir, drafter_checkpoint.DIRECTORY)):
        cfg, params, step, version = drafter_checkpoint.restore_weights(workdir, step)
        if not version:
            logging.warning(
                "the drafter of step %d was never good enough to be used: the run had "
                "not trained it long enough.",
                step,
            )
        if cfg.draft_vocab_size and params.draft_ids is None:
            raise ValueError(
                f"the drafter of step {step} has not chosen the tokens that it "
                "proposes yet: let the run train it first."
            )
        target_params, target_cfg, _ = checkpoint.restore_policy(workdir, step)
        target = (target_cfg, target_params, _spec(workdir))
        return cfg, params, target, f"the drafter of step {step}"
    directory = os.path.join(workdir, _TRAINED)
    if not os.path.isdir(directory):
        raise ValueError(
            f"{workdir} holds no drafter: give the --workdir of a run with "
            "specdec.mode=tlt that reached a checkpoint, or of a finished "
            "tlt_jax.train_drafter."
        )
    if step is not None:
        raise ValueError(
            f"--step={step} is for RL runs: {workdir} holds one trained drafter."
        )
    made = os.path.join(workdir, _MADE_TARGET)
    spec = made if os.path.isdir(made) else _spec(workdir)
    loaded = policy.load(spec)
    cfg, params = drafter_io.load(directory, loaded.config)
    target = (loaded.config, loaded.params, spec)
    steps = drafter_io.about(directory).get("num_steps")
    return cfg, params, target, f"the drafter trained for {steps} steps"


def _spec(workdir: str) -> str:
    """The model that a run was started with."""
    return _settings(workdir)["model"]["spec"]


def _settings(workdir: str) -> dict[str, Any]:
    """The settings that a run was started with."""
    path = os.path.join(workdir, "config.json")
    try:
        with open(path, encoding="utf-8") as file:
            settings = json.load(file)
        if not isinstance(settings["model"]["spec"], str):
            raise ValueError("model.spec is no text")
        return settings
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} does not say which model the run has ({error!r}): give the "
            "--workdir of a run."
        ) from error


def main(argv: list[str]) -> None:
    """Export as the flags say."""
    if len(argv) > 1:
        command_line.fail(
            f"unexpected argument {argv[1]!r}: every setting is a --flag."
        )
    with command_line.told(OSError):
        if _SHIP.value is not None:
            notes = pathlib.Path(_NOTES.value).read_text() if _NOTES.value else ""
            where = ship_drafter(_WORKDIR.value, _SHIP.value, notes)
            print(f"wrote the drafter {_SHIP.value} to {where}")
            return
        if _LAYOUT.value is None:
            step = export(_WORKDIR.value, _OUT.value, _STEP.value, _DTYPE.value)
            what = f"the policy of step {step}"
        else:
            asked = (_LAYOUT, _STEP, _DTYPE, _VERIFIER, _NUM_SPECULATIVE_TOKENS)
            values = [flag.value for flag in asked]
            what = export_drafter(_WORKDIR.value, _OUT.value, *values)
    print(f"wrote {what} to {_OUT.value}")


def run() -> None:
    """Entry point."""
    flags.mark_flags_as_required(["workdir"])
    flags.register_multi_flags_validator(
        ["out", "ship"],
        lambda given: (given["out"] is None) != (given["ship"] is None),
        "name where to write: either --out=DIR or --ship=NAME.",
    )
    app.run(main, flags_parser=command_line.parse_flags)


if __name__ == "__main__":
    run()

r"""Write a run's policy as a Hugging Face directory.

    python -m tlt_jax.export --workdir=DIR --out=DIR [--step=N] [--dtype=bfloat16]

The directory holds config.json, generation_config.json, safetensors and the tokenizer;
transformers and the usual serving engines load it by its path.
"""

import os
import sys

from absl import app, flags, logging

from tlt_jax import checkpoint
from tlt_jax.models import convert

_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run.")
_OUT = flags.DEFINE_string("out", None, "Directory to write; absent or empty.")
_STEP = flags.DEFINE_integer(
    "step", None, "RL step whose checkpoint is exported; default: the newest."
)
_DTYPE = flags.DEFINE_enum(
    "dtype", "bfloat16", list(convert.DTYPES), "Type of the weights written."
)

TOKENIZER_DIRECTORY = "tokenizer"


def export(workdir: str, out: str, step: int | None = None, dtype="bfloat16") -> int:
    """Write the policy of a checkpoint as a Hugging Face directory.

    Args:
      workdir: of the run.
      out: absent or empty; complete or absent afterwards.
      step: RL step of the checkpoint, None for the newest.
      dtype: of the weights written.

    Returns:
      The step that was written.

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
    convert.save(params, cfg, out, tokenizer_source=tokenizer, dtype=dtype)
    return step


def main(argv: list[str]) -> None:
    """Export as the flags say."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    try:
        step = export(_WORKDIR.value, _OUT.value, _STEP.value, _DTYPE.value)
    except (ValueError, OSError, checkpoint.CheckpointError) as error:
        # What a user can repair needs no traceback.
        logging.error("%s", error)
        sys.exit(1)
    print(f"wrote the policy of step {step} to {_OUT.value}")


def run() -> None:
    """Entry point."""
    flags.mark_flags_as_required(["workdir", "out"])
    app.run(main)


if __name__ == "__main__":
    run()

"""The compiled programs of a recipe, described without weights or devices."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from experiments import step_costs
from tlt_jax import assembly, types
from tlt_jax import config as config_lib
from tlt_jax import speculation as speculation_lib
from tlt_jax.models import config as model_config
from tlt_jax.models import flash_attention
from tlt_jax.models import params as model_params
from tlt_jax.rl.adaptation import training
from tlt_jax.rl.engine import engine as engine_lib
from tlt_jax.rl.engine import programs as engine_programs
from tlt_jax.rl.tasks import prompts
from tlt_jax.rl.update import algorithms, experience, learner, policy_gradient
from tlt_jax.rl.workers import weight_sync
from tlt_jax.runtime import programs, sharding


@dataclasses.dataclass(frozen=True)
class Program:
    """One program of a run, and what traces and lowers it.

    Besides its arguments the run then holds `beside_bytes` on the fullest device. Of
    arguments of `given_bytes` compilers leave out what is not read, which is held all
    the same; 0: all is read. Where the policy trains, `row_cost` counts a packed row.
    """

    name: str
    lower: Callable[[], jax.stages.Lowered]
    beside_bytes: int
    row_cost: Callable[[], step_costs.Cost] | None = None
    given_bytes: int = 0


class Recipe:
    """A run's programs on described devices. Its parts are those that a run makes."""

    def __init__(
        self,
        model: model_config.ModelConfig,
        run: config_lib.RunConfig,
        devices: Sequence[Any],
    ):
        """Makes learner, weight sync and engine of a policy without weights."""
        self.model, self.run = model, run
        self.mesh = sharding.make_mesh(
            *(run.mesh.data, run.mesh.fsdp, run.mesh.tensor),
            devices=devices,
            expert=run.mesh.expert,
        )
        # Predictions on each device. A run takes the learner's default, which holds
        # less and gathers the head's weights more often.
        self.head_chunk = 2048
        pool = programs.ProgramPool()
        flash = flash_attention.choose(
            *(run.learner.attention, model, run.precision, self.mesh),
            sharding.ShardingRules(),
            flash_attention.Lengths(
                prompt=run.task.max_prompt_tokens,
                answer=run.rollout.max_new_tokens,
                group_size=run.rollout.group_size,
                row=run.learner.row_tokens,
            ),
        )
        self.learner = learner.Learner(
            model,
            assembly.law_of(run.sampling),
            run.learner,
            run.optimizer,
            num_steps=run.num_steps,
            precision=run.precision,
            remat=run.model.remat,
            mesh=self.mesh,
            pool=pool,
            head_chunk=self.head_chunk,
            flash=flash,
        )
        self.state = self.learner.abstract_state()
        (engine_mesh,) = weight_sync.engine_meshes(self.mesh, tensor=run.rollout.tensor)
        self.sync = weight_sync.WeightSync(
            model,
            source=self.mesh,
            targets=[engine_mesh],
            dtype=run.precision,
            pool=pool,
        )
        speculation = speculation_lib.of_run(run, model)
        self.speculator_cfg = speculation.speculator_cfg
        self.engine = engine_lib.Engine(
            model,
            engine_programs.EngineConfig(
                max_rows=run.rollout.max_batch,
                max_length=run.longest_text,
                page_size=run.cache.page_size,
                num_pages=run.cache.num_pages,
                steps_per_call=run.rollout.steps_per_call,
                prefill_chunk=run.rollout.prefill_chunk,
                sampling_cfg=assembly.law_of(run.sampling),
                eos_ids=model.eos_ids,
                dtype=run.precision,
                attention=run.rollout.attention,
                keep_routes=model.experts is not None,
            ),
            speculator_cfg=self.speculator_cfg,
            mesh=engine_mesh,
            **{name: one.for_engine() for name, one in speculation.tuners.items()},
        )
        self.weights = self._engine_weights(engine_mesh)
        self.engine.set_params(self.weights, 0)

    def programs(self) -> list[Program]:
        """Returns the largest programs of a step, those of the update first.

        Log-probabilities of the reference are `accumulate` without its backward pass,
        and smaller buckets decode like the largest: both need less. The cache is given
        up before the update, and the last layer to be synchronised finds all others.
        """
        return self.updates() + self.rollouts()

    def updates(self) -> list[Program]:
        """Returns those of the update, and of bringing weights to the engine."""
        # What is lowered is what the run lowers, hence the private names.
        state = self.state
        params, weights = device_bytes(state.params), device_bytes(self.weights)
        moments = device_bytes(state.opt_state)
        loss = self._algorithm().loss
        reference = params if loss.kl_coef > 0 else 0
        rows, columns, num_sequences = self.micro_batch()
        return [
            Program(
                "accumulate",
                self.learner._accumulate_program(
                    rows, columns, loss, num_sequences
                ).lower,
                moments + reference + weights,
                lambda: self._row_cost(rows, columns, loss, num_sequences),
            ),
            Program("apply", self.learner._apply_program().lower, reference + weights),
            # The engine holds its old weights until the new ones are there. What has
            # the embedding is larger than a layer, and holds no learner's layers.
            Program(
                "sync",
                self.sync.others_program().lower,
                params + moments + reference + 2 * weights,
            ),
        ]

    def _row_cost(self, rows, columns, loss, num_sequences) -> step_costs.Cost:
        compute = functools.partial(
            policy_gradient.accumulate,
            cfg=self.learner.forward_cfg,
            loss_cfg=loss,
            num_sequences=num_sequences,
            constrain=self.learner._constrain,
        )
        given = self.state.params, self.learner._gradient, rows, columns
        length = self.run.learner.row_tokens
        whole = step_costs.of_program(
            jax.make_jaxpr(compute)(*given),
            self.mesh.devices.flat[0].platform,
            # What asks how long it goes on is the portable attention's walk over tiles
            # of 1024 columns, to the diagonal.
            trips=(length / 1024 + 1) / 2,
            columns=length,
            per_token=self.model.experts.per_token if self.model.experts else 1,
        )
        return whole.times(1 / self.learner.rows_per_micro_batch)

    def rollouts(self) -> list[Program]:
        """Returns those of the engine, of the largest batch of each kind.

        Those of a run that speculates are called so: its pages keep features, too.
        """
        engine, recorder = self.engine, _Recorder()
        engine.pool = recorder
        engine.warm_up(wait=False)
        largest: dict[str, tuple] = {}
        for key in recorder.lowering:
            if key[0] in ("prefill", "decode", "speculate", "fill"):
                before = largest.get(key[0], key)
                largest[key[0]] = max(before, key, key=lambda one: one[1])
        run = "tlt_" if engine.programs.captures else ""
        return [
            Program(
                f"{run}{kind}_{key[1]}", recorder.lowering[key], self._policy_bytes()
            )
            for kind, key in largest.items()
        ]

    def drafter_training(self) -> list[Program]:
        """Returns those of a step of the drafter's training on a worker that waits.

        It is the worker's first device; more of them would share the rows. The worker
        keeps its weights and the pages of both caches meanwhile, and of the drafter two
        copies: in use, and offered. Bringing one there is a copy through the host. What
        measures drafts runs at temperature 1 alone, and holds less than a gradient.
        """
        learner = training.learner_of(
            self.run.adaptation,
            self.speculator_cfg.drafter_cfg,
            precision=self.run.precision,
            is_trained=bool(self.run.drafter.directory),
        )
        learner.state = learner.abstract_state()
        devices = learner.devices_of([self.engine.mesh])
        state, batch, target, under_way = learner.described(devices, self.weights)
        made = self.engine.programs
        drafts = made._drafter_weights(self.weights)
        kept = self.weights, made.abstract_caches, drafts.head, *[drafts.params] * 2
        waiting = self._policy_bytes() + sum(map(device_bytes, kept))
        read = state.params, batch, target
        given = {
            "begin": read,
            "add": (under_way, read),
            "close": (under_way.grads, under_way.seen_grads, read),
            "update": (state, under_way.grads, under_way.sums, batch),
        }
        found = []
        for name, arguments in given.items():
            held = waiting + device_bytes((state, batch, target))
            if name != "begin":
                held += device_bytes(under_way)
            size = device_bytes(arguments)
            lower = functools.partial(learner._lower, name, devices, self.weights)
            found.append(Program(f"drafter_{name}", lower, held - size, None, size))
        return found

    def _policy_bytes(self) -> int:
        """Of the policy's training, on a device: weights, moments, reference."""
        params, moments = map(device_bytes, (self.state.params, self.state.opt_state))
        reference = params if self._algorithm().loss.kl_coef > 0 else 0
        return params + moments + reference

    def micro_batch(self) -> tuple[policy_gradient.Rows, Any, int]:
        """Makes the largest micro-batch: full rows of one prompt and response each.

        Returns rows and columns, abstract and placed, and the bound on sequences.
        """
        run, num_rows = self.run, self.learner.rows_per_micro_batch
        algorithm = self._algorithm()
        prompt = np.zeros(run.task.max_prompt_tokens, np.int32)
        tokens = np.zeros(run.rollout.max_new_tokens, np.int32)
        logprobs = np.zeros(len(tokens), np.float32)
        routes = experience.no_routes(self.model, len(prompt) + len(tokens) - 1)
        example = types.Example("", "", None, {})
        batch = experience.Experience(
            [prompts.Prompt(i, example, prompt) for i in range(num_rows)],
            [
                types.Completion(i, tokens, logprobs, "length", routes=routes)
                for i in range(num_rows)
            ],
            np.zeros((num_rows, 1)),
        )
        later_updates = run.learner.epochs * run.learner.minibatches > 1
        recompute = run.learner.old_logprobs == "recompute"
        given = [logprobs] * num_rows
        _, (micro,) = experience.micro_batches(
            batch,
            experience.Layout(run.learner.row_tokens, num_rows),
            algorithm,
            np.zeros(num_rows, np.float32),
            max_new_tokens=run.rollout.max_new_tokens,
            old_logprobs=given if later_updates or not recompute else None,
            ref_logprobs=given if algorithm.loss.kl_coef > 0 else None,
            num_experts=self.model.experts.num if self.model.experts else 0,
        )

        def place(leaf):
            where = sharding.named(
                self.mesh, self.learner.rules, ("batch",), leaf.shape
            )
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

        rows, columns = jax.tree.map(place, (micro.rows, micro.columns))
        return rows, columns, micro.num_sequences

    def _algorithm(self) -> algorithms.Algorithm:
        chosen = self.run.algorithm
        return algorithms.build(algorithms.preset(chosen.name) | chosen.overrides())

    def _engine_weights(self, mesh: jax.sharding.Mesh) -> model_params.Params:
        abstract = jax.eval_shape(
            model_params.unstack, model_params.abstract(self.model, self.run.precision)
        )
        return jax.tree.map(
            lambda leaf, where: jax.ShapeDtypeStruct(
                leaf.shape, leaf.dtype, sharding=where
            ),
            abstract,
            self.sync.placed[0],
        )


class _Recorder:
    """Takes a program pool's place and keeps how programs are lowered."""

    def __init__(self):
        self.lowering: dict[tuple, Callable[[], jax.stages.Lowered]] = {}

    def prepare(self, program: programs.Program) -> None:
        """Keeps a program's lowering."""
        self.lowering[program.key] = program.lower


def device_bytes(tree: Any) -> int:
    """Returns what a tree of placed abstract arrays takes on one of its devices."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )

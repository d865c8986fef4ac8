"""Mutants of engine, workers, adaptation, checkpoint: by file and tests, (old, new)."""

_DRAFTS = "tests/rl/engine/test_engine_drafts.py"
_ACCEPTED = f"{_DRAFTS} -k accepted"
_PAGES = f"{_DRAFTS} -k pages_are"
_SCORES = "tests/rl/engine/test_engine_scores.py"
_SPECULATOR = "tests/rl/engine/test_speculator.py"
_SPOT = "tests/rl/adaptation/test_spot_trainer.py"

EDITS = {
    ("rl/engine/scheduler.py", "tests/rl/engine/test_scheduler.py"): [
        ("self._pool.release(row.pages[kept:])", "pass"),
        ("if sum(lacking) > self._pool.num_free:", "if False:"),
        ("self._references[page] = 1", "self._references[page] = 2"),
        ("if self._references[page] == 0:", "if self._references[page] <= 1:"),
        ("num_shared = prompt_length // page_size", "num_shared = 0"),
        (
            "row.pages, row.length, row.drafted = [], 0, 0",
            "row.pages, row.length = [], 0",
            _PAGES,
        ),
        ("self.waiting.appendleft(row)", "self.waiting.append(row)"),
        ("needed += prompt_length % page_size > 0", "needed += 0"),
        ("return max(1, num_rows // 8)", "return num_rows"),
        ("self._preempt(self.rows[-1])", "self._preempt(self.rows[0])"),
    ],
    ("rl/engine/decode_calls.py", "tests/rl/engine/test_decode_calls.py"): [
        ("min(row.remaining for row in rows) <= steps", "False"),
        ("            or cfg.stop\n", ""),
        ("(len(rows) < cfg.max_rows and plan.num_waiting)", "False"),
        ("not plan.reserve_ahead(2 * steps)", "not plan.reserve_ahead(steps)"),
        ("now - max(call.enqueued_s, self._last_read_s)", "now - call.enqueued_s"),
        ("if finished and self._ahead is not None:", "if False:"),
    ],
    ("runtime/programs.py", "tests/rl/engine/test_programs.py -k compile_a"): [
        ("with self._turn(program):", "if True:"),
        ("_turn(self._kind, program.key)", "_turn(id(self), program.key)"),
    ],
    ("runtime/compile_cache.py", "tests/rl/engine/test_programs.py -k compile_a"): [
        ("strip_device_assignment or _is_nameless(jax)", "strip_device_assignment"),
    ],
    ("rl/engine/cache_writer.py", "tests/rl/engine/test_cache_writer.py"): [
        ("job.text[first + ahead :][:count]", "job.text[first:][:count]", _PAGES),
        (
            "left.sort(key=lambda i: done[i] - lengths[i])",
            "left.sort(key=lambda i: lengths[i] - done[i])",
        ),
        (
            "counts[row], starts[row] = count, first",
            "counts[row], starts[row] = count, 0",
            _PAGES,
        ),
    ],
    ("rl/engine/capture.py", "tests/rl/engine/test_capture.py"): [
        ("(request_id * _SPREAD) % 2**32 < frac", "request_id % 2**32 < frac"),
        (
            "response_start=len(row.request.prompt),",
            "response_start=len(row.request.prompt) - 1,",
        ),
        (
            "hidden=known[:, num_fused:],",
            "hidden=known[:, : known.shape[1] - num_fused],",
        ),
        (
            "row.pages[: -(-min(row.length, len(row.text())) // page_size)]",
            "row.pages",
        ),
        ("if num_bytes <= most_bytes and not task.done():", "if not task.done():"),
        ("if self._has_failed:", "if False:"),
    ],
    ("rl/engine/requests.py", "tests/rl/engine/test_requests.py"): [
        ("if sure >= longest + _MARGIN:", "if True:"),
        ("old - num, len(known) - longest", "old - num, len(known)"),
    ],
    ("rl/engine/stats.py", "tests/rl/engine/test_stats.py"): [
        (
            "self.num_tried, call.num_accepted[:-1])",
            "self.num_tried, call.num_accepted)",
        ),
        (
            "return sum(num_accepted) / num_accepted[0]",
            "return sum(num_accepted[1:]) / num_accepted[0]",
        ),
        ("call.accepted_by_room[-1]", "call.accepted_by_room[1]"),
        ("np.diff(within, axis=1, prepend=0)", "np.array(within)"),
        ("chosen.drafts and not chosen.matches", "chosen.drafts"),
    ],
    ("rl/engine/speculator.py", _SPECULATOR): [
        (
            "0 <= behind < strategy.max_accept_length and",
            "0 <= behind < strategy.max_accept_length - 1 and",
        ),
        ("stop = max(row.length - 1, 0)", "stop = max(row.length, 0)"),
        (
            "self._filled.difference_update(job.pages[job.start // self._page_size :])",
            "self._filled.difference_update(())",
        ),
        (
            "sharpness, tau = drafter.measured(params)",
            "tau, sharpness = drafter.measured(params)",
            "tests/rl/engine/test_engine_speculation.py -k sharpness",
        ),
        (
            "own if self.cfg.tau is None else np.float32(self.cfg.tau)",
            "np.float32(self.cfg.tau or drafter.TAU)",
            "tests/rl/engine/test_engine_speculation.py -k sharpness",
        ),
        (
            "self._outcomes * np.float32(self.cfg.texts.discount)",
            "self._outcomes * np.float32(1)",
        ),
        (
            "self.weights = learned.weights_of(self._params, target)",
            "self.weights = self.weights or learned.weights_of(self._params, target)",
            _PAGES,
        ),
        (
            "parts = self._tuner, self._early_tuner, self._calibration",
            "parts = self._tuner, self._early_tuner",
        ),
        ("        self._calibration.begin_run()\n", "", _SCORES),
        ("if self.cfg.tau is None:\n", "if True:\n", _SCORES),
        ("row.drafted = int(length)", "row.drafted = int(length) + 1"),
        ("row.drafted = 0\n", "row.drafted += 0\n"),
        (
            "self._filled.update(job.pages[: job.stop // size])",
            "self._filled.update(())",
        ),
    ],
    ("rl/engine/engine.py", _PAGES): [
        ("self._speculator.begin()", "pass", f"{_DRAFTS} -k discounted"),
        (
            "self._speculator.written((*admission.prompts, *admission.returns))",
            "pass",
            f"{_DRAFTS} -k anew",
        ),
        (
            "written((*admission.prompts, *admission.returns))",
            "written(admission.returns)",
            f"{_DRAFTS} -k anew",
        ),
    ],
    ("rl/workers/coordinator.py", "tests/rl/workers/test_coordinator.py"): [
        (
            "generation == state.generation and worker in state.unreturned\n",
            "worker in state.unreturned\n",
        ),
        (
            "if silent_s > cfg.heartbeat_timeout_s:",
            "if silent_s > 2 * cfg.heartbeat_timeout_s:",
        ),
        ("or worker.round != event.round:", "or False:"),
        ("and state.training.stop_asked_s is None\n", "and True\n"),
        (
            "if len(state.which(records.Activity.LOST)) == len(state.workers):",
            "if False:",
        ),
        ("number = state.num_trainings + 1", "number = 1"),
        (
            "state.num_restarts <= cfg.max_restarts",
            "state.num_restarts < cfg.max_restarts",
        ),
        (
            "late = late[: cfg.max_members - len(training.members)]",
            "late = late[: cfg.max_members]",
        ),
        ("for w in members[: cfg.max_members])", "for w in members)"),
    ],
    ("rl/workers/separate.py", "tests/rl/workers/test_separate.py"): [
        ("            one.talk.hang_up()\n", "            pass\n"),
        ("self._taking_part.add(one.number)", "pass"),
        ("self.lost.pop(one.number, None)", "pass"),
        ("left = [r for r in left if r.request_id not in done]", "left = []"),
    ],
    ("runtime/transport/door.py", "tests/rl/workers/test_separate.py"): [
        ("if about.get(name) != self._about[name]", "if False"),
    ],
    ("rl/adaptation/elsewhere.py", "tests/rl/adaptation/test_elsewhere.py"): [
        ("self.learner.take_over(found)", "pass"),
        ("lambda: kept.append(True)", "lambda: None"),
        ("return self._talk.waits()", "return False"),
        ("own.learner.state = None", "pass"),
    ],
    ("rl/rollouts.py", "tests/rl/test_rollouts.py"): [
        (
            "workers.set_params(entry.weights.placed, entry.weights.version)",
            "workers.set_params(self.newest.placed, self.newest.version)",
        ),
        (
            "self._workers.set_params(self.newest.placed, self.newest.version)",
            "pass",
        ),
        (
            "given = entry.weights.policy, found.useful, watch",
            "given = self.newest.policy, found.useful, watch",
        ),
        ("dataclasses.replace(self.newest, step=step)", "self.newest"),
        ("if entry.step >= step + self.lag:", "if entry.step > step + self.lag:"),
        ("entry.made is None and entry.step < self._num_steps", "entry.made is None"),
        ("return left[0].before if left else {}", "return {}"),
        ("if self._has_ended:", "if False:"),
        ("made[step] = self._weights(step, version, arrays)", "made[step] = None"),
        ("return Weights(step, self._sync.place(policy), version, policy)", "return 0"),
        ("found = dataclasses.replace(found, useful=useful)", "pass"),
        (
            "first = self._entries[-1].step + 1 if self._entries else step",
            "first = step",
        ),
        ("self._workers.abandon()", "pass"),
    ],
    ("rl/rolled.py", "tests/rl/test_rollouts.py"): [
        ("batch = batch.with_logprobs_of(self.useful)", "pass"),
        ("self.useful and batch.places_of(self.useful)", "self.useful and [0]"),
        ('np.cumsum(arrays["num_routes"])', 'np.cumsum(arrays["lengths"])'),
    ],
    ("rl/adaptation/spot_trainer.py", _SPOT): [
        (
            'reason = self.report.num_steps, False, ""',
            'reason = self.report.num_steps, True, ""',
        ),
        ("self.learner.end(keep=False)", "pass"),
        ("if kept and self.report.num_steps > before:", "if kept:"),
        (
            "is drawn again.\n        self._sampler.restore(unused)",
            "is drawn again.",
        ),
    ],
    ("rl/adaptation/budget.py", "tests/rl/adaptation/test_budget.py"): [
        ("gain = _NEWEST * gain + (1 - _NEWEST) * self.gain_per_s", "gain = gain + 0"),
        (
            "if self.num_idle >= _PROBE_AFTER else 0.0",
            "if self.num_idle > _PROBE_AFTER else 0.0",
        ),
        ("num_idle=self.num_idle + 1", "num_idle=self.num_idle"),
    ],
    ("rl/adaptation/adaptation.py", "tests/rl/adaptation/test_adaptation.py"): [
        ('self._ngram_accept_length = meta["ngram_accept_length"]', "pass"),
        ('self.learner.sharpness = meta["sharpness"]', "pass"),
        ('meta.get("tau", drafter.TAU)', "drafter.TAU"),
        ('self.budget = budget.Budget(**meta["budget"])', "pass"),
        ("self.sampler.restore(part(_SAMPLER))", "pass"),
        ("self.version += 1", "self.version += 2"),
    ],
    ("rl/adaptation/learner.py", "tests/rl/adaptation/test_learner.py"): [
        ("if keep and self._placed is not None:", "if self._placed is not None:"),
        ('self.sharpness, self.tau = found["sharpness"], found["tau"]', "pass"),
        ("tau=np.float32(self.tau),", ""),
        (
            "self.sharpness, self.tau = learned",
            "_, _ = learned",
            "tests/rl/adaptation/test_adaptation.py -k taken_over",
        ),
    ],
    ("rl/workers/columns.py", "tests/rl/workers/test_columns.py"): [
        ("np.cumsum(lengths)[:-1]", "np.cumsum(lengths)[1:]"),
        (
            "parts(columns.routes, columns.num_routes)",
            "parts(columns.routes, columns.length)",
        ),
    ],
    ("runtime/transport/ring.py", "tests/runtime/transport/test_ring.py"): [
        ("self.num_bytes += len(piece)", "pass"),
    ],
    ("runtime/transport/messages.py", "tests/runtime/transport/test_messages.py"): [
        ("_MAKERS | _ARRAY_MAKERS if arrays else _MAKERS", "_MAKERS | _ARRAY_MAKERS"),
        ("if at != len(part):", "if at < len(part):"),
    ],
    ("launch.py", "tests/test_launch.py -k again"): [
        ("newest > self._newest else", "newest >= self._newest else"),
        (
            "            self._executor.restart(index)\n        self._begin()",
            "            pass\n        self._begin()",
        ),
    ],
    ("workdir/metrics.py", "tests/workdir/test_metrics.py"): [
        (
            'lambda one: one[0]["step"] < first_step',
            'lambda one: one[0]["step"] <= first_step',
        ),
        ("os.ftruncate(self._file, size)", "pass"),
        ("fcntl.LOCK_EX | fcntl.LOCK_NB", "fcntl.LOCK_SH | fcntl.LOCK_NB"),
    ],
}

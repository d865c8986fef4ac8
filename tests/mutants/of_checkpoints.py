"""Mutants of what survives a kill: by file and tests, (old, new) pairs."""

_CHECKPOINT = "tests/workdir/test_checkpoint.py"
_CHECKSUMS = "tests/workdir/test_checksums.py"
_STORE = "tests/workdir/test_drafter_checkpoint_store.py"
_DRAFTER = "tests/workdir/test_drafter_checkpoint.py"
_DAMAGE = f"{_CHECKPOINT} -k 'flipped or passed_over or not_read'"

EDITS = {
    ("workdir/state.py", "tests/workdir/test_state.py -k 'not resumed'"): [
        ('self._parts = dict(parts) | {"updater": learning}', "self._parts = parts"),
        ("part.restore(saved[name])", "pass"),
        ("store.restore(self.step)", "pass"),
        ("store.restore(0)", "pass"),
        ("store.save(self.step)", "pass"),
        ("self.step = found.step", "self.step = 0"),
        ("self._learning.train_state = state", "_ = state"),
        ("if saved.keys() != self._parts.keys():", "if False:"),
        ("counted = (state.opt_state, state.num_updates)", 'counted = ("o", 0)'),
        ('self._about | {"parts": self', '{"parts": self'),
        ("in self._parts.items()} | before", "in self._parts.items()}"),
        ('{_ROLLOUTS: waiting, "arrays": kinds}', "{_ROLLOUTS: waiting}"),
        ("found.meta.get(_ROLLOUTS, {}), found.arrays", "{}, found.arrays"),
        ('note if cfg.on_damage == "previous" else None', "None"),
        ("if self.step and self.latest_step() != self.step:", "if self.step:"),
    ],
    ("workdir/checkpoint.py", _CHECKPOINT): [
        ("_check_whole(self._directory, steps[-1])", "pass", _DAMAGE),
        ("if self._pass_over is None or len(steps) == 1:", "if True:", _DAMAGE),
        (
            "if self._pass_over is None or len(steps) == 1:",
            "if len(steps) == 1:",
            _DAMAGE,
        ),
        ("        self.delete_after(step)\n", "", _DAMAGE),
        ("=self._add_checksums", "=None", _DAMAGE),
        ("_check_whole(directory, step, items)", "pass", _DAMAGE),
        (
            'read.record["driver"],\n            read.arrays(item),',
            'read.record["driver"],',
            _DAMAGE,
        ),
        (
            "if checksums.damaged(folder, (_META,)):",
            "if False:",
            f"{_CHECKPOINT} -k believed",
        ),
        (
            '_check_shapes(step, read.record["shapes"],',
            "_ = (",
            f"{_CHECKPOINT} -k another",
        ),
        ("max_to_keep=keep,", "max_to_keep=keep + 1,", f"{_CHECKPOINT} -k bitwise"),
        (
            "        self._finish_begun()\n        self._begun = step",
            "        self._begun = step",
            f"{_CHECKPOINT} -k failure",
        ),
        (
            "step = steps[-1] if step is None else step",
            "step = steps[-1]",
            f"{_CHECKPOINT} -k alone",
        ),
        ("item) if item else (_META, _POLICY)", ")", f"{_DRAFTER} -k weights"),
    ],
    ("workdir/checksums.py", _CHECKSUMS): [
        ("zlib.crc32(block, crc)", "zlib.crc32(block)"),
        ("size + len(block)", "size + 1"),
        ('folder.glob("*/**/*")', 'folder.glob("*/*")'),
        ("if told != there:", "if there and told[0] != there[0]:"),
        ('n.split("/")[0] in parts', 'n.split("/")[-1] in parts'),
        ("        return FILE", '        return ""'),
    ],
    ("workdir/drafter_checkpoint.py", _STORE): [
        ("cfg.keep + 1, pass_over", "cfg.keep, pass_over"),
        ('observer.note if cfg.on_damage == "previous" else None', "None"),
        ("(there is None or there[0] < step)", "there is None"),
        ("found = found if self._group.is_first else given", "found = given"),
        ("trained.restore(found)", "pass"),
        (
            "if step and (there is None",
            "if (there is None",
            f"{_DRAFTER} -k anew",
        ),
        ("abstract_state(), at_most=step)", "abstract_state(), at_most=None)"),
        (
            "counted = (state.opt_state, state.num_updates)",
            "counted = (state.opt_state, 0 * state.num_updates)",
            _DRAFTER,
        ),
        (
            "            self._checkpointer.delete_after(at_most)",
            "            pass",
            _DRAFTER,
        ),
        (
            "more[_ARRAYS] = filled",
            "more[_ARRAYS] = dict(list(filled.items())[1:])",
            _DRAFTER,
        ),
        ("found.arrays, found.meta", "{}, found.meta", _DRAFTER),
        ('meta.get("sharpness", drafter.SHARPNESS)', "1.0", f"{_DRAFTER} -k weights"),
        ('meta.get("tau", drafter.TAU)', "0.5", f"{_DRAFTER} -k weights"),
        ('arrays.get("draft_ids")', "None", f"{_DRAFTER} -k weights"),
        (
            'record["step"], meta.get("version", 0)',
            'record["step"], 0',
            f"{_DRAFTER} -k weights",
        ),
    ],
    ("rl/collector.py", "tests/rl/test_collector.py"): [
        ('self.position = state["position"]', "pass"),
        ("int(key): value for key, value in", "key: value for key, value in"),
        ("self.position += count", "self.position += count - 1"),
        ("(step << 32) + round_index * count * size", "(step << 32)"),
        ("for i in np.argsort(judged))", "for i in range(len(judged)))"),
    ],
    ("rl/workers/weight_sync.py", "tests/rl/workers/test_weight_sync.py -k version"): [
        ('self.version = state["version"] - 1', "pass"),
        ('self.version = state["version"] - 1', 'self.version = state["version"]'),
        ("embed=(), expert=()", "", "tests/rl/workers/test_weight_sync.py -k host"),
    ],
    ("rl/update/updater.py", "tests/rl/update/test_updater.py -k resumed"): [
        ('self.skips.in_a_row = state["num_skipped"]', "pass"),
    ],
    (
        "rl/adaptation/adaptation.py",
        "tests/rl/adaptation/test_adaptation.py -k survives",
    ): [
        ("self.learner.state = jax.device_get(snapshot.state)", "pass"),
        ("self.learner.draft_ids = arrays.get(_DRAFT_IDS)", "pass"),
        ("self.buffer.restore(texts)", "pass"),
        ('self.version, self.is_ready = meta["version"], meta["is_ready"]', "pass"),
    ],
    (
        "rl/adaptation/offline.py",
        "tests/rl/adaptation/test_offline.py -k 'bit_for_bit or diverges'",
    ): [
        ("self.learner.state = jax.device_get(snapshot.state)", "pass"),
        ('self.skips.in_a_row = snapshot.meta["num_skipped"]', "pass"),
        ("self.num_steps = num_steps", "self.num_steps = 0"),
    ],
    ("specdec/texts/buffer.py", "tests/specdec/texts/test_buffer.py -k state"): [
        ('self.begin_step(int(state["version"]))', "pass"),
        ("if not (was_on_disk and works and", "if not (works and"),
        ("            self.num_appended = 0\n", ""),
    ],
    ("specdec/texts/sampling.py", "tests/specdec/texts/test_sampling.py"): [
        ('self.num_taken = np.asarray(state["taken"]).tolist()', "pass"),
    ],
    ("specdec/tuners/bandit.py", "tests/specdec/tuners/test_bandit.py -k restor"): [
        ("self._accept_lengths[arm].extend(lengths)", "pass"),
        ("            if arm in self._rewards:", "            if True:"),
    ],
    (
        "specdec/tuners/cost_model.py",
        "tests/specdec/tuners/test_cost_model.py -k 'restored or kept or refused'",
    ): [
        ('self._asked = bool(state["asked"])', "pass"),
        ('self.survival.restore(state.get("accepted", []))', "pass"),
        ('self.step_times.restore(state["step_times"])', "pass"),
    ],
    ("specdec/tuners/tuner.py", "tests/specdec/tuners -k 'threshold or goes_on'"): [
        ("own.restore(told)", "pass"),
    ],
}

"""Mutants of `rl/update`: by file and the tests that see them, (old, new) pairs."""

_LEARNER = "tests/rl/update/test_learner.py"
_UPDATER = "tests/rl/update/test_updater.py"

EDITS = {
    ("rl/update/advantages.py", "tests/rl/update/test_advantages.py"): [
        ("num = max(centred.shape[1] - 1, 1)", "num = centred.shape[1]"),
        ("(centred * num / max(num - 1, 1))", "centred"),
        ("max(centred.size - 1, 1)", "centred.size"),
        (
            "rewards.max(axis=1) > rewards.min(axis=1)",
            "rewards.max(axis=1) >= rewards.min(axis=1)",
        ),
        ("- (max_length - buffer)", "- max_length"),
        (
            "np.where(carries_signal(rewards)[:, None], rewards - mean, 0.0)",
            "rewards - mean",
        ),
    ],
    ("rl/update/losses.py", "tests/rl/update/test_losses.py"): [
        ("old_logprobs = jax.lax.stop_gradient(logprobs)", "old_logprobs = logprobs"),
        ("used = columns.valid & ~outside", "used = columns.valid"),
        ("log_ratio = jax.lax.stop_gradient(mean) + own", "log_ratio = mean + own"),
        (
            "jnp.minimum(old_logprobs - rollout_logprobs,",
            "jnp.minimum(rollout_logprobs - old_logprobs,",
        ),
        (
            "surrogate = surrogate * jax.lax.stop_gradient(capped)",
            "surrogate = surrogate * 1",
        ),
        (
            "per_token = per_token - cfg.entropy_coef * entropy",
            "per_token = per_token + cfg.entropy_coef * entropy",
        ),
        ("with_ref = used & ~jnp.isneginf(columns.ref_logprobs)", "with_ref = used"),
        ("/ tokens - mean_less_one**2", "/ tokens"),
        (
            "segment_sum(used.astype(values.dtype), ids,",
            "segment_sum(jnp.ones_like(values), ids,",
        ),
        (
            "below = (advantages < 0) & (ratio < low)",
            "below = (advantages < 0) & (ratio < high)",
        ),
        (
            "dual = (advantages < 0) & (ratio > cfg.dual_clip)",
            "dual = ratio > cfg.dual_clip",
        ),
        (
            "return xp.expm1(bounded) + difference",
            "return xp.expm1(bounded) - difference",
        ),
        (
            "weight = 1.0 / (num_sequences * np.maximum(lengths, 1))",
            "weight = 1.0 / (len(lengths) * np.maximum(lengths, 1))",
        ),
        ("shaped[i] -= cfg.kl_coef * kl.sum()", "shaped[i] -= cfg.kl_coef * kl.mean()"),
    ],
    ("rl/update/routing.py", "tests/rl/update/test_routing.py"): [
        ("jnp.sort(x, axis=1) for x in", "x for x in"),
        ("known_LCBT[:, 0] < num_experts", "known_LCBT[:, 0] <= num_experts"),
        ("cfg.balance_coef * balance + cfg.z_coef * z, sums", "0.0 * balance, sums"),
        ("if routes is None or not cfg.replay:", "if True:"),
        ("return len(chosen_X) * jnp.sum", "return jnp.sum"),
    ],
    ("rl/update/policy_gradient.py", _UPDATER): [
        (
            "rollout_logprobs=lay_out(rollout_logprobs),",
            "rollout_logprobs=lay_out(old_logprobs),",
        ),
        ("ref_logprobs=lay_out(ref_logprobs),", "ref_logprobs=lay_out(old_logprobs),"),
        (
            "advantages=lay_out(np.asarray(advantages)),",
            "advantages=lay_out(np.asarray(weights)),",
        ),
        (
            "return jax.tree.map(jnp.add, carry, own), sums, logprobs",
            "return own, sums, logprobs",
            f"{_LEARNER} -k add_up",
        ),
        (
            "source, target = cut(rows.source), cut(rows.target)",
            "source, target = cut(rows.source), cut(rows.source)",
            f"{_LEARNER} -k plain_forward",
        ),
    ],
    ("rl/update/packing.py", "tests/rl/update/test_packing.py"): [
        (
            "source=np.where(offsets == 0, last_of_prompt, column + offsets - 1),",
            "source=column + offsets - 1,",
        ),
        ("positions=len(tree.prompt) + offsets,", "positions=offsets,"),
        (
            'counted = arrays["sequence"] - start * packed.row_sequences',
            'counted = arrays["sequence"]',
        ),
        (
            "((segment_k == segment_q) | (segment_k == prefix_q))",
            "(segment_k == segment_q)",
        ),
        ("starts = np.cumsum(lengths) - lengths", "starts = np.cumsum(lengths)"),
        ("index=starts[number] + offsets,", "index=starts[number] + 0 * offsets,"),
    ],
    ("rl/update/row_filling.py", "tests/rl/update/test_packing.py"): [
        (
            "(num_rows * needed, num_rows) < best[0]",
            "(num_rows * needed, num_rows) > best[0]",
        ),
        ("min(round_up(longest, rounding), row_tokens)", "round_up(longest, rounding)"),
        ("return 1 << (value - 1).bit_length()", "return 1 << value.bit_length()"),
    ],
    ("rl/update/weights_digest.py", "tests/rl/update/test_weights_digest.py"): [
        ("stride *= shape[axis]", "stride += shape[axis]"),
        ("jnp.uint32(number * _LEAF & 0xFFFFFFFF)", "jnp.uint32(0)"),
        (
            "_places(leaf.shape) * jnp.uint32(_PLACE)",
            "_places(leaf.shape) * jnp.uint32(0)",
        ),
    ],
    ("rl/update/updater.py", _UPDATER): [
        (
            "ref_logprobs=_take(reference, rows),",
            "ref_logprobs=_take(old_logprobs, rows),",
        ),
        ("advantages_n[rows],", "advantages_n[: len(rows)],"),
        ('"num_skipped": self.skips.in_a_row', '"num_skipped": 0'),
        ("if mismatch is None:", "if True:"),
        ("cfg.epochs * cfg.minibatches > 1", "cfg.epochs * cfg.minibatches >= 1"),
        (
            "reference = self._logprobs(self.reference, batch)",
            "reference = self._logprobs(self.train_state.params, batch)",
        ),
        (
            "old_logprobs = self._logprobs(self.train_state.params, batch, own)",
            "old_logprobs = batch.logprobs",
        ),
        ("own = self._logprobs(policy, batch, routes)", "own = batch.logprobs"),
        ("algorithms.LAGGING if rollout.lag else {}", "{}"),
        ("if not self._lags:", "if True:"),
        ('passes |= self._lags and self._cfg.old_logprobs == "recompute"', "pass"),
    ],
    (
        "rl/update/experience.py",
        "tests/rl/update/test_experience.py tests/workdir/test_step_record.py",
    ): [
        (
            "rollout_logprobs=batch.logprobs if capped else None,",
            "rollout_logprobs=old_logprobs if capped else None,",
            _UPDATER,
        ),
        (
            'np.asarray(completion.tokens, "<i4").tobytes()',
            'np.sort(completion.tokens).astype("<i4").tobytes()',
        ),
        (
            "np.mean(~advantages.carries_signal(rewards))",
            "np.mean(advantages.carries_signal(rewards))",
        ),
        ("np.percentile(lengths, 95)", "np.percentile(lengths, 50)"),
        ("own.get(c.request_id, c.logprobs)", "c.logprobs"),
    ],
}

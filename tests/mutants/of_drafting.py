"""Mutants of `specdec`: by file and the tests that see them, (old, new) pairs."""

_LEARNED = "tests/specdec/proposers/test_learned.py"
_EXPANSION = "tests/specdec/proposers/test_expansion.py"
_SPECULATE = "tests/specdec/test_speculate.py"
_DRAFTS = "tests/rl/engine/test_engine_drafts.py"
_AHEAD = "tests/rl/engine/test_decode_calls.py"
_ENGINE = "tests/rl/engine/test_engine_speculation.py"
_ACCEPTED = f"{_DRAFTS} -k accepted"
_BLOCK = "tests/specdec/proposers/test_block.py"
_CALIBRATION = "tests/specdec/test_calibration.py"
_SHARED = f"{_SPECULATE} -k 'shared_block'"
_SHARE = f"{_SPECULATE} -k give_their"
_PAGES = f"{_DRAFTS} -k pages_are"

EDITS = {
    ("specdec/tree.py", "tests/specdec/test_tree.py"): [
        ("best, num), axis=1)", "best, num), axis=0)"),
        ("parent_of % (num + 1)", "parent_of % num"),
        ("jnp.where(scores > -jnp.inf, best, num)", "best"),
        ("room = budget - jnp.sum(alive)", "room = budget"),
        ("wanted = alive[:, None] & candidates", "wanted = candidates"),
        ("for _ in range(draft_depth + 1):", "for _ in range(draft_depth):"),
        ("seen = seen | jnp.where(", "seen = seen ^ jnp.where("),
        (">> (node % _WORD).astype(jnp.uint32)", ">> (node % 16).astype(jnp.uint32)"),
    ],
    ("specdec/candidates.py", "tests/specdec/test_candidates.py"): [
        ("where(found < num_first, found, itself)", "where(found < 0, found, itself)"),
        ("scores = jnp.maximum(first.scores,", "scores = jnp.minimum(first.scores,"),
        ("new = second.present() & (places == itself)", "new = second.present()"),
        ("(place < counts[:, None])", "(place <= counts[:, None])"),
        ("(index < index[:, None])", "(index <= index[:, None])"),
    ],
    ("specdec/calibration.py", _CALIBRATION): [
        ("return Slopes(-above_mean(scores),", "return Slopes(above_mean(scores),"),
        ("jnp.where(had_chance, chances * both, 0.0)", "chances * both"),
        ("self._pull + pull + weight @ off", "self._pull + pull"),
        ("_KEPT * self._weight, np.zeros(2)", "self._weight, np.zeros(2)"),
        ("if measured != self._measured:", "if True:"),
        ("own.restore(told)", "pass"),
    ],
    ("specdec/rooms.py", "tests/specdec/test_rooms.py"): [
        # A depth's exclusion; a row's rank for the batch's; no caps, no room, no rows
        # that ended; depth and room swapped; what was left out; ties.
        (
            "fits_BCD = depths_BC[..., None] <= levels_D",
            "fits_BCD = depths_BC[..., None] <= levels_D[-1:] + 0 * levels_D",
        ),
        ("    if num_rows > 1:", "    if False:"),
        (
            "order_N = jnp.argsort(losses_BC.reshape(-1), stable=True)",
            "order_N = jnp.argsort(depths_BC.reshape(-1), stable=True)",
        ),
        (" & (jnp.cumsum(fits_BCD, axis=1) <= most_BW)", ""),
        ("& (place_ND <= room)", ""),
        ("candidates.present() & alive[:, None]", "candidates.present()"),
        ("jnp.maximum(num_alive, 1)", "num_rows"),
        ("walk.num_accepted[:, None] + left_some_out", "walk.num_accepted[:, None]"),
        ("left_some_out = strategy", "left_some_out = True or strategy"),
        (
            "(levels[:, None] <= levels)[..., None]",
            "(levels[:, None] >= levels)[..., None]",
        ),
        ("jnp.floor(most_R), verified)", "jnp.floor(most_R), room)"),
    ],
    ("specdec/speculate.py", _ACCEPTED): [
        (
            "by_room = by_room + rooms.accepted_by_room(",
            "by_room = rooms.accepted_by_room(",
        ),
        ("return num_rows == 1 and strategy.topk == 1", "return strategy.topk == 1"),
        ("by_room = rooms.of_chains(state.num_accepted, num_verified)", "pass"),
    ],
    ("specdec/verify.py", f"{_SPECULATE} -k 'chain or tree'"): [
        (
            "lengths[:, None] + 1 + jnp.arange(num)",
            "lengths[:, None] + jnp.arange(num)",
        ),
        ("is_child = tree.valid & (index > tree_lib.ROOT)", "is_child = tree.valid"),
        ("num_accepted = num_accepted + going", "num_accepted = num_accepted + 1"),
        ("taken.path, axis=1)", "0 * taken.path, axis=1)"),
    ],
    ("specdec/noise.py", "tests/specdec/test_noise.py"): [
        ("schedule[(step + 1) % 3] + np.uint32(step)", "schedule[(step + 1) % 3]"),
        ("ROUNDS = 13", "ROUNDS = 12"),
        ("(high, low), rounds=20)", "(high, low), rounds=13)"),
        ("jnp.where(ids < half, *words)", "jnp.where(ids <= half, *words)"),
        ("+ 0.5) * 2.0**-31", "+ 1.0) * 2.0**-31"),
        ("if kernels.splits_vocab:", "if False:"),
        (
            "lengths.astype(jnp.uint32) | np.uint32(1 << 31)",
            "lengths.astype(jnp.uint32)",
        ),
    ],
    ("specdec/sampling.py", "tests/specdec/test_sampling.py"): [
        ("scores >= best[..., -1:]", "scores > best[..., -1:]"),
        ("likelier < top_p", "likelier <= top_p - 0.1"),
        ("is_stable=False", "is_stable=True"),
        ("keepdims=True) + jnp.log(cfg.min_p)", "keepdims=True) - jnp.log(cfg.min_p)"),
        ("ids, num - 1), jnp.min)", "ids, 0), jnp.max)"),
        (
            "return chosen - self.log_normaliser",
            "return chosen",
        ),
        (
            "(first[:, None] + which)",
            "(first[:, None] + 0 * which)",
            f"{_SPECULATE} {_ENGINE} -k 'chain or rows'",
        ),
    ],
    ("specdec/strategy.py", "tests/specdec/test_strategy.py"): [
        (
            "return self.topk + (self.draft_depth - 1) * self.topk**2",
            "return self.draft_depth * self.topk**2",
        ),
        ("if num_rows <= limit)", "if num_rows < limit)"),
        ("limits != sorted(set(limits))", "limits != sorted(limits)"),
        ("if self.tokens_to_verify <= self.draft_depth:", "if False:"),
    ],
    ("specdec/chain.py", "tests/specdec/test_chain_rules.py"): [
        (
            "weight = jnp.minimum(1.0, weight * ratios[..., i])",
            "weight *= ratios[..., i]",
        ),
        ("+ 1) == ratios.shape[-1]", "+ 1) == 0"),
        ("either = mass + 1.0 - weights", "either = mass + weights"),
        ("jnp.maximum(rest, 0.0), [", "jnp.abs(rest), ["),
    ],
    ("specdec/rejection.py", "tests/specdec/test_rejection.py"): [
        ("(stand.uniform < ratio_B)", "(stand.uniform < ratio_B**2)"),
        ("possible = (ours > 0) & (theirs > 0)", "possible = theirs > 0"),
        ("== num_before[:, None] + 1)", "== num_before[:, None] + 2)"),
        ("jnp.where(source_B < 0, 0, ", "jnp.where(source_B < 1, 0, "),
        ("last = jnp.minimum(steps, num_accepted[:, None])", "last = steps"),
        ("return (uniform - chance) / left", "return uniform"),
    ],
    ("specdec/speculate.py", _SPECULATE): [
        (
            "num_accepted[:, None] >= steps) & alive_B[:, None]",
            "num_accepted[:, None] >= steps)",
            f"{_SPECULATE} -k '[chain]'",
        ),
        (
            "was_drafted_BA = steps < walk.num_accepted[:, None]",
            "was_drafted_BA = steps <= walk.num_accepted[:, None]",
            f"{_ENGINE} -k 'plain_decoding and chain'",
        ),
        (
            "count_B = jnp.minimum(walk.num_accepted + 1, room)",
            "count_B = walk.num_accepted + 1",
        ),
        (
            "is_eos_BA = is_eos_BA & (steps < count_B[:, None])",
            "is_eos_BA = is_eos_BA & False",
        ),
        ("sources=path,", "sources=0 * path,"),
        ("path_BA = ragged_rows.columns(walk.path)", "path_BA = walk.path"),
        ("jnp.where(state.alive, rows.remaining, 0)", "rows.remaining", _SHARE),
        ("ancestor_words(tree, most - 1)", "ancestor_words(tree, most - 2)"),
    ],
    ("specdec/decode.py", "tests/specdec/test_decode.py"): [
        ("rows.keys, lengths_B + 1, settings", "rows.keys, lengths_B, settings"),
        ("(counts_B < rows.remaining)", "(counts_B <= rows.remaining)"),
        ("alive=alive_B & ~ended_B &", "alive=alive_B &"),
        ("jnp.where(has_finished, 0, step_limit)", "step_limit", _AHEAD),
        ("jnp.any(start.alive & ~end.alive)", "jnp.any(~end.alive)", _AHEAD),
        (
            "remaining=rows.remaining - end.emitted",
            "remaining=rows.remaining + 0 * end.emitted",
            _AHEAD,
        ),
    ],
    ("specdec/proposers/expansion.py", _LEARNED): [
        ("owners * num + level - 1", "owners * num + level", _ACCEPTED),
        (
            "score.noise, level - 1, axis=1, keepdims=False",
            "score.noise, level, axis=1, keepdims=False",
            _ACCEPTED,
        ),
        ("(score.noise, level - 1, axis=1)", "(score.noise, level, axis=1)"),
        ("mask=mask_BES | is_parent_BES,", "mask=mask_BES,"),
        ("jnp.repeat(live.index, topk, axis=1)", "jnp.tile(live.index, topk)"),
        (
            "(scores_BEV * score.sharpness + noise_B1V) / score.tau",
            "scores_BEV + noise_B1V",
        ),
        ("index=first + chosen_BE,", "index=chosen_BE,"),
        (
            "jnp.minimum(jnp.sum(is_above & alive[:, None], axis=-1), width - 1)",
            "jnp.sum(is_above & alive[:, None], axis=-1)",
        ),
        ("in_row_BE = alive[:, None] & (", "in_row_BE = ("),
        ("(jnp.sum(above_BEB, axis=2) < room)", "(jnp.sum(above_BEB, axis=2) <= room)"),
        ("num_above(live.scores)", "num_above(live.scores[:, :1])"),
        ("noise_B1V[rows.owners(), 0][None]", "noise_B1V[:1]"),
        ("jnp.where(own_BE[..., None], gains_BEE, -jnp.inf)", "gains_BEE"),
        # Too few columns, by a path that is too short or too long, and of one row.
        (
            "num_columns(num_rows) - 1, level - 1",
            "num_columns(num_rows), level",
            _EXPANSION,
        ),
        ("part = max(rest - path, 0) if", "part = 0 if", _EXPANSION),
        (
            "min(num_rows, room // (of_row + path))",
            "room // (of_row + path)",
            _EXPANSION,
        ),
        ("if spans and 2 * most > spans[-1][1]:", "if spans:", _EXPANSION),
        (
            "features=jnp.take_along_axis(out.hidden, parent_BE[None], axis=2)",
            "features=out.hidden",
        ),
        ("ids_BEE = draft_ids[ids_BEE]", "ids_BEE = ids_BEE + 0"),
        (
            "scores_BC = (live.scores[..., None] + gains_BEE)",
            "scores_BC = (0 * live.scores[..., None] + gains_BEE)",
        ),
    ],
    ("specdec/proposers/learned.py", f"{_LEARNED} {_SPECULATE} -k 'not wide'"): [
        (
            "positions_B = root_position_B + level - 1",
            "positions_B = root_position_B + level",
            _LEARNED,
        ),
        (
            "root_position_B = state.start + state.counts - 1",
            "root_position_B = state.start",
            _LEARNED,
        ),
        (
            "start=jnp.where(alive_B, rows.lengths, state.start),",
            "start=jnp.where(alive_B, rows.lengths + 1, state.start),",
            _PAGES,
        ),
        (
            "view.lengths[:, None] + jnp.arange(tokens.shape[1])",
            "view.lengths[:, None] + 1 + jnp.arange(tokens.shape[1])",
            _PAGES,
        ),
        (
            "last_B1 = jnp.maximum(state.counts - 1, 0)[:, None]",
            "last_B1 = (0 * state.counts)[:, None]",
            _ACCEPTED,
        ),
        (
            'return self.ranking == "coupled" and is_drawn',
            "return is_drawn",
            _LEARNED,
        ),
    ],
    ("specdec/proposers/block.py", f"{_DRAFTS} -k 'accepted and block'"): [
        # Masks at the root's place, the wrong token before, the next depth's noise.
        (
            "state.start[:, None] + root_B1 + place_BL",
            "state.start[:, None] + root_B1 + 0 * place_BL",
        ),
        (
            "found = children(live.tokens, level)",
            "found = children(0 * live.tokens + rows.pending[:, None], level)",
        ),
        ("*children(rows.pending[:, None], 1)", "*children(state.tokens[:, :1], 1)"),
        (
            "of_level_B1V + follows_BEV, level)",
            "of_level_B1V + follows_BEV, level + 1)",
        ),
        ("(logits_BLV, level - 1, axis=1)", "(logits_BLV, 0 * level, axis=1)"),
        ("root_B1 = state.counts[:, None] - 1", "root_B1 = 0 * state.counts[:, None]"),
        ("jnp.arange(keys.shape[3]) < root_B1", "jnp.arange(keys.shape[3]) <= root_B1"),
        ("keys, values = map(ragged_rows.unpack, (keys, values))", "pass", _SHARED),
    ],
    ("models/drafters/block.py", _BLOCK): [
        ("(index[:, None] > 0)", "(index[:, None] >= index[None, :])"),
        ("masks = jnp.concatenate([masks, params.masks])", "masks = params.masks"),
    ],
    ("specdec/training/unroll.py", "tests/specdec/training -k block"): [
        (
            "take(batch.positions, wide.bases) + place_C",
            "take(batch.positions, wide.bases)",
        ),
        ("return attention.join(shared, own)", "return shared"),
        ("is_mask[:, None] & is_mask)[None]", "is_mask[:, None] | is_mask)[None]"),
        (
            "before_DBM = _embed_ahead(batch, target, batch.bases, u + 1, cfg.dtype)",
            "before_DBM = _embed_ahead(batch, target, batch.bases, u, cfg.dtype)",
        ),
    ],
    ("specdec/proposers/ngram.py", "tests/specdec/proposers/test_ngram.py"): [
        (
            "(behind == ends[:, None, j - 1, None])",
            "(behind == ends[:, None, 0, None])",
        ),
        ("rank = match * num_sources + order[:, None]", "rank = match * num_sources"),
        (
            "place = corpus.lengths[:batch, None] - 1 - jnp.arange(longest)",
            "place = corpus.lengths[:batch, None] - jnp.arange(longest)",
        ),
        (
            "known = known & ((behind == chain[:, None, i, None]) | (behind < 0))",
            "known = known & (behind == chain[:, None, i, None])",
        ),
        (
            "match = jnp.minimum(matches[:, :, None] + level, longest)",
            "match = jnp.minimum(matches[:, :, None] + 0 * level, longest)",
        ),
        (
            "assumed = _PRIOR_WEIGHT * (lengths / (lengths + 4.0))",
            "assumed = _PRIOR_WEIGHT * 0.5",
        ),
    ],
    ("specdec/proposers/ngram_store.py", "tests/specdec/proposers"): [
        (
            "return [self._texts[serial][1] for serial in reversed(serials)]",
            "return [self._texts[serial][1] for serial in serials]",
        ),
        ("self.num_tokens -= len(text)", "self.num_tokens -= 0"),
        ("p == prompt_id and i != row]", "p == prompt_id]"),
    ],
    ("specdec/tuners/survival.py", "tests/specdec/tuners/test_survival.py"): [
        ("np.maximum(more[_AT_RISK], self._memory)", "self._memory"),
        ("np.minimum(self._kept, at_risk))", "0 * at_risk)"),
        (
            "size = strategy.tokens_to_verify if strategy.topk > 1 else 0",
            "size = strategy.tokens_to_verify",
        ),
        ("hazard = min(1.0, hazard + optimism * spread)", "hazard = min(1.0, hazard)"),
        ("hazard = _mean(here[depth], self._shared_weight, hazard)", "hazard = mean"),
        ('if drafted_only and proposer == "ngram":', "if False:"),
        # Depth and room change places; the room is the batch's, not a row's alive.
        (
            "np.diff(within_DR, axis=0, prepend=0)",
            "np.diff(within_DR, axis=1, prepend=0)",
        ),
        ("room_of(strategy, call.num_rows, call.bucket)", "math.inf"),
        ("room_of(strategy, num_rows or bucket, bucket)", "math.inf"),
        ("columns = strategy.num_columns(bucket) / num_rows", "columns = 1 + bucket"),
        (" | (most_D1 <= room)", ""),
        ("np.arange(len(_ROOMS)) <= own)", "np.arange(len(_ROOMS)) < own)"),
        ("(upper - lower) * (room - low) / (high - low)", "(upper - lower)"),
        ("fade * more, where=known)", "fade * more)"),
    ],
    ("specdec/tuners/bandit.py", "tests/specdec/tuners/test_bandit.py"): [
        (
            "if self._random.random() < self._epsilon:",
            "if self._random.random() > self._epsilon:",
        ),
        (
            "sum(call.num_accepted) / call.elapsed_s",
            "sum(call.num_accepted) / call.num_steps",
        ),
        ('self._random.bit_generator.state = state["random"]', '_ = state["random"]'),
        (
            "self._rewards[arm].extend(rewards)",
            "self._rewards[arm].extend(rewards[:1])",
        ),
    ],
    ("specdec/tuners/tuner.py", "tests/specdec/tuners"): [
        ('self._speculating = bool(state["speculating"])', "self._speculating = False"),
        ("elif num_rows > self._stop_rows:", "elif num_rows > self._start_rows:"),
    ],
    ("specdec/tuners/step_times.py", "tests/specdec/tuners/test_step_times.py"): [
        ("weight * math.log(expected_s)", "weight * math.log(own_s)"),
        (
            "own_weight = len(calls) / self.spread() ** 2",
            "own_weight = 1 / self.spread() ** 2",
        ),
        ("ridge = (spread / _PRIOR_SPREAD) ** 2", "ridge = 0.0"),
    ],
    ("specdec/training/acceptance.py", "tests/specdec/training/test_acceptance.py"): [
        ("jnp.square(weights[-2])", "jnp.square(weights[-1])"),
        ("jnp.where(exists_Q, errors_NMQ, 0.0)", "errors_NMQ"),
        ("(scores_QV) - hit_Q)", "(scores_QV) - is_hit(logits_QV))"),
        ("in_dim(drawn, u, size)", "in_dim(drawn, 0, size)"),
        ("in_dim(gumbel, u, size)", "in_dim(gumbel, 0, size)"),
        ("[:, best], axis=0)", "[:, 0], axis=0)"),
        ("* 2 ** (offset / 2)", "* 2**offset"),
    ],
    ("specdec/training/rules.py", "tests/specdec/training/test_rules.py"): [
        ("jnp.exp(jnp.minimum(least, 0.0))", "jnp.exp(jnp.minimum(running, 0.0))"),
        ("jnp.minimum(log_ratios, 0.0), axis=0", "log_ratios, axis=0"),
        ("jnp.where(known_Q[here], ratio_Q, -jnp.inf)", "ratio_Q"),
        ("hit_Q = hit_Q & known_Q[here]", "hit_Q = hit_Q | known_Q[here]"),
        ("sharpened.append(ratio_of(jax", "ratios.append(ratio_of(jax"),
    ],
    ("specdec/training/losses.py", "tests/specdec/training/test_losses.py"): [
        (
            "weight = lax.stop_gradient(jnp.exp(-rate * (1.0 - distance)))",
            "weight = jnp.exp(-rate * (1.0 - distance))",
        ),
        (
            "return 0.5 * jnp.sum(jnp.abs(difference), axis=-1)",
            "return jnp.sum(jnp.abs(difference), axis=-1)",
        ),
        ("distance - 0.5), axis=0)", "distance), axis=0)"),
    ],
    ("specdec/texts/sampling.py", "tests/specdec/texts/test_sampling.py"): [
        ('self._owed = float(state["owed"])', "self._owed = 0.0"),
        (
            "self._due = dict(zip(ids.tolist(), due.tolist(), strict=True))",
            "self._due = {}",
        ),
        (
            "return PREVIOUS if owed > 0 else CURRENT",
            "return CURRENT if owed > 0 else PREVIOUS",
        ),
        (
            'self._clock = np.array(state["clock"], np.float64)',
            "self._clock = np.zeros(2)",
        ),
        ("self._num_batches += 1", "self._num_batches += 0"),
    ],
    ("specdec/texts/layout.py", "tests/specdec/texts"): [
        (
            "return max(length - max(response_start, 2), 0)",
            "return max(length - response_start, 0)",
        ),
        ("bases[there] = first + span.first_base", "bases[there] = span.first_base"),
        ("keys[there] = record.key", "keys[there] = 0"),
    ],
}

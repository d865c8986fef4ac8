"""Mutants of `models` and the kernels: by file and tests, (old, new) pairs."""

_GGUF = "tests/models/formats/test_gguf_file.py"
_FORMS = "tests/models/test_transformer.py -k unrolled"
_PAGES = "tests/rl/engine/test_engine_drafts.py -k pages_are"

EDITS = {
    ("models/layers.py", "tests/models/test_layers.py"): [
        ("second * cos + first * sin]", "second * cos - first * sin]"),
        (
            "keep * freqs + (1 - keep) * freqs / scaling.factor",
            "(1 - keep) * freqs + keep * freqs / scaling.factor",
        ),
        ("factor = 0.1 * math.log(scaling.factor) + 1.0", "factor = 1.0"),
        (
            "lax.rsqrt(mean_square + eps)",
            "lax.rsqrt(mean_square)",
            "tests/models/test_parity.py -k qwen3-plain",
        ),
        (
            "jax.nn.silu(gate[0]) * up[0]",
            "gate[0] * jax.nn.silu(up[0])",
            "tests/models/test_parity.py -k qwen3-plain",
        ),
        (
            "axes=(columns, (1, 2)), precision=prec)",
            "axes=(columns, (1, 2)), precision=prec) * 2",
        ),
    ],
    ("models/rows.py", "tests/models/test_rows.py"): [
        (
            "closed = len(self.items) - (self._num_open or len(self.items))",
            "closed = 0",
        ),
        ("np.arange(len(tokens))", "np.arange(first, first + len(tokens))"),
        ("key=lambda i: -sizes[i]", "key=lambda i: sizes[i]"),
    ],
    ("models/kv_cache.py", "tests/models/test_kv_cache.py"): [
        (
            "j * page_size < counts[row], page_table[row, first]",
            "j * page_size <= counts[row], page_table[row, first]",
        ),
        (
            "page = lax.dynamic_slice_in_dim(pages, sources[i], 1, axis=1)",
            "page = lax.dynamic_slice_in_dim(pages, sources[0], 1, axis=1)",
        ),
        ("new.fresh, new.sources[row, t], page, slot)", "new.fresh, t, page, slot)"),
        (
            "per_row = 1 + (width - 1 + page_size - 1) // page_size",
            "per_row = (width - 1 + page_size - 1) // page_size",
        ),
        ("0, :, positions_BT % cache.page_size]", "0, :, positions_BT % 2]"),
        (
            "return 2 * columns * jnp.dtype(dtype).itemsize",
            "return columns * jnp.dtype(dtype).itemsize",
        ),
    ],
    ("models/attention.py", "tests/models/test_attention.py"): [
        (
            "(slots_S[None, :] < lengths[:, None])[",
            "(slots_S[None, :] <= lengths[:, None])[",
        ),
        (
            "visible_B1MS = visible_B1MS & near_BMS[:, None]",
            "visible_B1MS = visible_B1MS",
        ),
        (
            "mask_BTS = mask_BTS & (distance_BTS < window)",
            "mask_BTS = mask_BTS & (distance_BTS <= window)",
        ),
        (
            "left.normaliser * of_left_BKM + right.normaliser * of_right_BKM",
            "left.normaliser + right.normaliser",
        ),
        (
            "causal_TS = (column + steps)[None, :] <= (row + steps)[:, None]",
            "causal_TS = (column + steps)[None, :] < (row + steps)[:, None]",
        ),
    ],
    ("models/transformer.py", "tests/models/test_transformer.py"): [
        (
            "jnp.where(index == wanted, x_DBT, kept[slot])",
            "jnp.where(index >= wanted, x_DBT, kept[slot])",
            _FORMS,
        ),
        (
            "return jnp.concatenate(out.features) if out.features else out.hidden",
            "return out.hidden",
            _PAGES,
        ),
        (
            "tuple(outputs[i] for i in features)",
            "tuple(outputs[0] for i in features)",
            _FORMS,
        ),
        (
            "out, heads, kernels, layer.out_bias, residual=residual_DBT",
            "out, heads, kernels, layer.out_bias",
            "tests/models/test_parity.py -k llama-plain",
        ),
        (
            "layers.rms_norm(flat, scale.reshape(-1), eps)",
            "layers.rms_norm(flat, scale.reshape(-1)[::-1], eps)",
            "tests/models/test_parity.py -k olmoe",
        ),
    ],
    ("models/formats/hf_experts.py", "tests/models/formats/test_hf_config.py"): [
        ('normalised=family == "mixtral"', 'normalised=family != "qwen3_moe"'),
        ('if family == "qwen3_moe" else', 'if family != "mixtral" else'),
    ],
    ("models/experts.py", "tests/models/test_experts.py"): [
        ("if experts.normalised:", "if not experts.normalised:"),
        (
            "jnp.moveaxis(lax.stop_gradient(probs_XBT), 0, -1), count)",
            "probs_XBT, count)",
        ),
        ("(stops_X - blocks_X) * block", "stops_X * block"),
        ("given < experts.num, given, routes)", "given <= experts.num, given, routes)"),
        ("lax.axis_index(holders) * len(gate_up) if holders else 0", "0"),
        ("y_DCBT[:, c] * shares_CBT[c]", "y_DCBT[:, c] * shares_CBT[0]"),
        ("one.dot(own, weight[expert], 1, 0)", "one.dot(own, weight[0], 1, 0)"),
        ("return jnp.sum(back, axis=1), None, None", "return back[:, 0], None, None"),
    ],
    ("models/drafters/drafter.py", "tests/models/drafters"): [
        ("return low - 1, mid - 1, high - 1", "return low, mid, high"),
        ("if not 2 < chosen[1] < chosen[2]:", "if not 2 < chosen[1] <= chosen[2]:"),
    ],
    ("models/drafters/layouts.py", "tests/models/drafters/test_layouts.py"): [
        ('values["d2t"] = ids - np.arange(len(ids))', 'values["d2t"] = ids'),
        ("+ np.arange(cfg.draft_vocab_size)", "+ 0"),
        ('"gate": layer.gate_up[0],', '"gate": layer.gate_up[1],'),
    ],
    ("models/formats/gguf_file.py", _GGUF): [
        (
            "whole.reshape(-1, self.config.head_dim // 2, 2, *whole.shape[1:])",
            "whole.reshape(-1, 2, self.config.head_dim // 2, *whole.shape[1:])",
        ),
        ("return float(str(np.float32(value)))", "return float(value)"),
    ],
    ("models/formats/convert.py", "tests/models/formats/test_convert.py"): [
        ("if listed is not None and listed != present:", "if False:"),
        ("equal &= np.array_equal(", "equal |= np.array_equal("),
    ],
    ("cpu_kernels/gumbel.py", "tests/cpu_kernels/test_gumbel.py"): [
        ("_ROUNDS = 13", "_ROUNDS = 12"),
        (
            "x1 = code.add(x1, code.splat_integer(step, _WIDE))",
            "x1 = code.add(x1, code.splat_integer(1, _WIDE))",
        ),
        ("code.splat(0.5, _WIDE)", "code.splat(1.0, _WIDE)"),
        (
            "_put_first(code, high, second, column, code.sub(vocab_size, half))",
            "_put_first(code, low, second, column, code.sub(vocab_size, half))",
        ),
    ],
    (
        "pallas_kernels/verify_attention/tpu_kernel.py",
        "tests/pallas_kernels/test_verify_attention.py -k tpu",
    ): [
        ("mask = slots < self.length", "mask = slots <= self.length"),
        (
            "mask = mask & (position - slots < self.given.window[0])",
            "mask = mask & (position - slots <= self.given.window[0])",
        ),
        (
            "step.fetch(row, at + cut.pages, stop, 1 - turn)",
            "step.fetch(row, at, stop, 1 - turn)",
        ),
    ],
    (
        "models/flash_attention.py",
        "tests/models/test_flash_attention.py -k 'not compiles'",
    ): [
        ("splash_attention.SegmentIds(ids, ids)", "None"),
        ("scaled = (query.astype(jnp.float32) * scale)", "scaled = (query * 1.0)"),
        ("* text * (products + kernel) < tree", "* text * (products + kernel) > tree"),
        ("if any(model.windowed_layers):", "if all(model.windowed_layers):"),
    ],
    (
        "pallas_kernels/one_column/pallas_gpu.py",
        "tests/pallas_kernels/test_one_column.py",
    ): [
        ("part = part * factor * chunk", "part = part * chunk"),
        ("made += given.residual", "made = given.residual"),
    ],
    ("rl/update/packing.py", "tests/rl/update/test_packing.py -k pairs"): [
        ("        most_trees=most_sequences,\n", ""),
    ],
}

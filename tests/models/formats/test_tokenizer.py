"""Tokenizers: prompts, chat templates, decoding, files."""

import json

import numpy as np
import pytest
import tokenizers
import transformers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from tlt_jax.models.formats import tokenizer

TEXT = "Tëst 12+34 = 46.\n\n  5 naïve 漢字 🙂 don't <|end|>"
MESSAGES = (
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "1 + 1 < 3?"},
)
TEMPLATE = """{{ bos_token }}{% for m in messages %}
    {%- if m['role'] == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}
<|{{ m['role'] }}|>
{{ m['content'] | trim }}{{ m | tojson }}{{ eos_token }}
{% generation %}{{ tools is none }}{% endgeneration %}
  {% if loop.index > 9 %}{% break %}{% endif %}
{% endfor %}
{% if add_generation_prompt %}
<|assistant|>{{ 'think' if thinking is defined and thinking }}
{% endif %}"""

# How older files spell a special token.
ADDED = {
    "__type": "AddedToken",
    "content": "<|end|>",
    "lstrip": False,
    "normalized": False,
    "rstrip": False,
    "single_word": False,
}


def byte_level(template=TEMPLATE, bos_first=True):
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|begin|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([TEXT[:12]] * 4, trainer)
    if bos_first:
        backend.post_processor = processors.TemplateProcessing(
            single="<|begin|> $A", special_tokens=[("<|begin|>", 0)]
        )
    config = {"bos_token": "<|begin|>", "eos_token": ADDED}
    return tokenizer.Tokenizer(backend, config, template)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A tokenizer and what `transformers` loads from its files."""
    directory = tmp_path_factory.mktemp("tokenizer")
    byte_level().save(directory)
    theirs = transformers.AutoTokenizer.from_pretrained(directory)
    return tokenizer.from_directory(directory), theirs


def test_text_encodes_and_decodes_as_in_transformers(pair):
    ours, theirs = pair
    ids = ours.encode_prompt(TEXT)
    assert ids.dtype == np.int32
    assert ids.tolist() == theirs(TEXT)["input_ids"]
    assert ids[0] == ours.bos_id == 0  # the post-processor's doing
    assert ours.encode(TEXT, add_special_tokens=False).tolist() == ids[1:].tolist()
    assert ours.decode(ids) == TEXT.removesuffix("<|end|>")
    assert ours.decode(ids, skip_special=False) == "<|begin|>" + TEXT
    assert ours.eos_ids == (theirs.eos_token_id,)
    assert ours.vocab_size == len(theirs) and ours.pad_id is None


@pytest.mark.parametrize("arguments", [{}, {"thinking": True}])
def test_messages_render_as_in_transformers(pair, arguments):
    ours, theirs = pair
    expected = theirs.apply_chat_template(
        list(MESSAGES), add_generation_prompt=True, tokenize=False, **arguments
    )
    assert ours.render(MESSAGES, **arguments) == expected
    assert "<|assistant|>" in expected and "1 < 3" not in expected.split("{")[0]
    ids = ours.encode_prompt(MESSAGES, **arguments)
    assert ours.decode(ids, skip_special=False) == expected  # one BOS: the template's


def test_bytes_of_tokens_concatenate_to_the_text(pair):
    ours, _ = pair
    ids = ours.encode(TEXT, add_special_tokens=False)
    assert len(ids) > 20
    assert b"".join(ours.token_bytes(i) for i in ids) == TEXT.encode()
    every_byte = {ours.token_bytes(i) for i in range(ours.vocab_size)}
    assert {bytes([b]) for b in range(256)} <= every_byte


def test_ids_beyond_the_vocabulary_decode_to_nothing(pair):
    ours, _ = pair
    assert ours.decode([ours.vocab_size + 5]) == ""
    assert ours.token_bytes(ours.vocab_size + 5) == b""


def test_what_the_template_refuses_is_said(pair):
    ours, _ = pair
    with pytest.raises(ValueError, match="no tools here"):
        ours.encode_prompt([{"role": "tool", "content": "x"}])
    with pytest.raises(ValueError, match="no chat template.*chat_template.jinja"):
        byte_level(template=None).encode_prompt(MESSAGES)


def test_an_option_that_nothing_reads_is_refused(pair):
    ours, _ = pair
    assert ours.template_variables == ("thinking",)
    plain, thinks = (ours.encode_prompt(MESSAGES, thinking=x) for x in (False, True))
    assert len(plain) < len(thinks)
    with pytest.raises(ValueError, match="no option 'thinkin', .* it has thinking"):
        ours.encode_prompt(MESSAGES, thinking=True, thinkin=True)
    # What every template is given is none of its options.
    for name in ("messages", "tools", "bos_token", "raise_exception", "m", "range"):
        with pytest.raises(ValueError, match=f"no option {name!r}"):
            ours.encode_prompt(MESSAGES, **{name: 1})
    none = byte_level("{% for m in messages %}{{ m.content }}{% endfor %}")
    with pytest.raises(ValueError, match="'thinking', .* it has none"):
        none.encode_prompt(MESSAGES, thinking=True)
    with pytest.raises(ValueError, match="options thinking are given, but the prompt"):
        ours.encode_prompt(TEXT, thinking=True)
    with pytest.raises(ValueError, match="no chat template"):
        byte_level(template=None).encode_prompt(MESSAGES, thinking=True)
    with pytest.raises(ValueError, match="cannot be read: Expected an expression"):
        byte_level("{% for %}").encode_prompt(MESSAGES, thinking=True)


def test_a_template_runs_sandboxed():
    hostile = "{{ messages.__class__.__base__.__subclasses__() }}"
    with pytest.raises(ValueError, match="refuses"):
        byte_level(hostile).render(MESSAGES)


def test_files_of_several_ages_are_read(tmp_path):
    byte_level(template=None).save(tmp_path)
    assert tokenizer.from_directory(tmp_path).chat_template is None
    path = tmp_path / "tokenizer_config.json"
    config = json.loads(path.read_text())
    for stored, expected in (
        ("one", "one"),
        (
            [
                {"name": "tool_use", "template": "other"},
                {"name": "default", "template": "two"},
            ],
            "two",
        ),
    ):
        path.write_text(json.dumps(config | {"chat_template": stored}))
        assert tokenizer.from_directory(tmp_path).chat_template == expected
    (tmp_path / "chat_template.jinja").write_text("three")
    assert tokenizer.from_directory(tmp_path).chat_template == "three"
    path.unlink()
    assert tokenizer.from_directory(tmp_path).eos_ids == ()


def test_a_stored_length_limit_cuts_nothing(tmp_path):
    made = byte_level()
    made.backend.enable_truncation(4)
    made.backend.enable_padding(length=64)
    made.save(tmp_path)
    loaded = tokenizer.from_directory(tmp_path)
    assert loaded.encode(TEXT).tolist() == byte_level().encode(TEXT).tolist()


def test_files_that_are_missing_or_damaged_are_named(tmp_path):
    with pytest.raises(ValueError, match="tokenizer.json does not exist.*save_pretr"):
        tokenizer.from_directory(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="tokenizer.json cannot be read"):
        tokenizer.from_directory(tmp_path)


def test_an_alphabet_makes_a_tokenizer(tmp_path):
    made = tokenizer.from_alphabet("0123456789+= \n")
    assert (made.pad_id, made.bos_id, made.eos_ids) == (0, 1, (2,))
    ids = made.encode("1 + 1 =\n2<eos>")
    assert len(ids) == 10 and made.vocab_size == 17
    assert made.decode(ids) == "1 + 1 =\n2"
    assert made.decode(ids, skip_special=False) == "1 + 1 =\n2<eos>"
    assert b"".join(made.token_bytes(i) for i in ids[:4]) == b"1 + "
    made.save(tmp_path)
    for loaded in (
        tokenizer.from_directory(tmp_path),
        transformers.AutoTokenizer.from_pretrained(tmp_path),
    ):
        assert list(loaded.encode("1 + 1 =\n2<eos>")) == ids.tolist()
    with pytest.raises(ValueError, match="cannot encode '1 x 1'"):
        made.encode("1 x 1")
    with pytest.raises(ValueError, match="characters=''"):
        tokenizer.from_alphabet("")

"""Text to token ids and back, with a model's chat template."""

import dataclasses
import datetime
import functools
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.sandbox
import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from tlt_jax.models.formats import hf_config

_SPECIAL_ROLES = ("bos_token", "eos_token", "pad_token", "unk_token")
# What a template sees besides special tokens and the options that one gives it.
_GIVEN = ("messages", "add_generation_prompt", "tools", "documents")


@dataclasses.dataclass(eq=False)
class Tokenizer:
    """A tokenizer of the `tokenizers` library and what `transformers` adds to it.

    Attributes:
      backend: the `tokenizers.Tokenizer`.
      config: contents of `tokenizer_config.json`; roles of special tokens are read from
        it.
      chat_template: Jinja source that renders messages, or None.
    """

    backend: tokenizers.Tokenizer
    config: dict[str, Any]
    chat_template: str | None = None

    @functools.cached_property
    def vocab_size(self) -> int:
        """One more than the largest id; a model's table may be larger."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    @functools.cached_property
    def special_tokens(self) -> Mapping[str, str]:
        """Text of the special tokens by role, `eos_token` and so on."""
        found = {}
        for role in _SPECIAL_ROLES:
            token = self.config.get(role)
            token = token.get("content") if isinstance(token, Mapping) else token
            if token is not None:
                found[role] = token
        return found

    @functools.cached_property
    def template_variables(self) -> tuple[str, ...]:
        """Names of the options that the chat template reads, such as enable_thinking.

        Raises:
          ValueError: if it is no template.
        """
        if self.chat_template is None:
            return ()
        environment = _environment()
        try:
            parsed = environment.parse(self.chat_template)
        except jinja2.TemplateError as error:
            raise ValueError(f"the chat template cannot be read: {error}.") from error
        names = jinja2.meta.find_undeclared_variables(parsed)
        given = {*_GIVEN, *_SPECIAL_ROLES, *environment.globals}
        return tuple(sorted(names - given))

    @property
    def bos_id(self) -> int | None:
        """Id of the token that begins a text, if there is one."""
        return self._special_id("bos_token")

    @property
    def pad_id(self) -> int | None:
        """Id of the padding token, if there is one."""
        return self._special_id("pad_token")

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Ids that end a completion, as far as the tokenizer knows: one or none."""
        eos = self._special_id("eos_token")
        return () if eos is None else (eos,)

    def encode(self, text: str, add_special_tokens: bool = True) -> np.ndarray:
        """Encode text to `[n] int32`; special tokens spelled out in it are recognised.

        Args:
          text: any text.
          add_special_tokens: let the tokenizer's own post-processor add what it adds,
            such as a first BOS.

        Raises:
          ValueError: if the tokenizer has no tokens for a part of the text.
        """
        try:
            encoding = self.backend.encode(text, add_special_tokens=add_special_tokens)
        except Exception as error:  # the library raises nothing more specific
            raise ValueError(
                f"cannot encode {text[:60]!r} ({error}): use only characters of the "
                "tokenizer's alphabet."
            ) from error
        return np.asarray(encoding.ids, np.int32)

    def encode_prompt(
        self, prompt: str | Sequence[Mapping[str, Any]], **template_options
    ) -> np.ndarray:
        """Encode text as it stands, and messages through the chat template.

        Args:
          prompt: text, or messages with `role` and `content`; the rendered text ends
            where the assistant's turn begins.
          **template_options: seen by the template, such as `enable_thinking=False`.

        Raises:
          ValueError: if there are messages but no chat template, or the template
            refuses them; or there are options that nothing reads.
        """
        if isinstance(prompt, str):
            if template_options:
                raise ValueError(
                    f"the chat template's options {', '.join(template_options)} are "
                    f"given, but the prompt {prompt[:40]!r} is text, which goes "
                    "without a template: give messages (of a file's text, "
                    "task.options.chat=True makes them), or leave the options out."
                )
            return self.encode(prompt)
        text = self.render(prompt, **template_options)
        return self.encode(text, add_special_tokens=False)

    def render(self, messages: Sequence[Mapping[str, Any]], **template_options) -> str:
        """Render messages through the chat template, up to the assistant's turn.

        Raises:
          ValueError: if there is no chat template, or it refuses the messages, or does
            not know an option.
        """
        if self.chat_template is None:
            raise ValueError(
                "the prompt is a list of messages but this tokenizer has no chat "
                "template: give the prompt as text, use an instruction-tuned model, or "
                "put a chat_template.jinja beside tokenizer.json."
            )
        unknown = sorted(set(template_options) - set(self.template_variables))
        if unknown:
            has = ", ".join(self.template_variables) or "none"
            raise ValueError(
                f"the chat template of this model knows no option {unknown[0]!r}, "
                f"which would have no effect; it has {has}."
            )
        try:
            return _compile(self.chat_template).render(
                messages=[dict(message) for message in messages],
                add_generation_prompt=True,
                tools=None,
                documents=None,
                **self.special_tokens,
                **template_options,
            )
        except jinja2.TemplateError as error:
            raise ValueError(
                f"the chat template refuses the messages: {error}."
            ) from error

    def decode(self, ids: Sequence[int] | np.ndarray, skip_special: bool = True) -> str:
        """Decode ids; bytes that are no UTF-8 become replacement characters.

        Ids beyond the tokenizer's vocabulary, which a padded model can produce, decode
        to nothing.
        """
        ids = [int(i) for i in ids]
        return self.backend.decode(ids, skip_special_tokens=skip_special)

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes that a token stands for.

        A special token stands for its name. Concatenated bytes decode to what `decode`
        gives, except for a leading space that some tokenizers drop.
        """
        token = self.backend.id_to_token(int(token_id))
        if token is None:
            return b""
        decoder = None if int(token_id) in self._added else self.backend.decoder
        if isinstance(decoder, decoders.ByteLevel):
            return bytes(_byte_of()[character] for character in token)
        if isinstance(decoder, decoders.Sequence):  # sentencepiece with byte fallback
            if len(token) == 6 and token.startswith("<0x"):
                return bytes([int(token[3:5], 16)])
            token = token.replace("\u2581", " ")
        return token.encode()

    def save(self, directory: str | os.PathLike) -> None:
        """Write the files from which `from_directory` and `transformers` load it."""
        os.makedirs(directory, exist_ok=True)
        self.backend.save(os.path.join(directory, "tokenizer.json"))
        config = {"tokenizer_class": "PreTrainedTokenizerFast"} | self.config
        if self.chat_template is not None:
            # Older programs look in the configuration, newer ones beside it.
            config["chat_template"] = self.chat_template
            path = pathlib.Path(directory, "chat_template.jinja")
            path.write_text(self.chat_template, encoding="utf-8", newline="")
        text = json.dumps(config, indent=2, ensure_ascii=False)
        path = pathlib.Path(directory, "tokenizer_config.json")
        path.write_text(text, encoding="utf-8")

    @functools.cached_property
    def _added(self) -> frozenset[int]:
        return frozenset(self.backend.get_added_tokens_decoder())

    def _special_id(self, role: str) -> int | None:
        token = self.special_tokens.get(role)
        return None if token is None else self.backend.token_to_id(token)


def from_directory(directory: str | os.PathLike) -> Tokenizer:
    """Read `tokenizer.json`, `tokenizer_config.json` and the chat template.

    Raises:
      ValueError: naming a file that is missing or cannot be read.
    """
    path = os.path.join(directory, "tokenizer.json")
    if not os.path.exists(path):
        raise ValueError(
            f"{path} does not exist: only tokenizers in this form are read; "
            "transformers' AutoTokenizer.from_pretrained(...).save_pretrained(...) "
            "writes it."
        )
    try:
        backend = tokenizers.Tokenizer.from_file(path)
    except Exception as error:  # the library raises nothing more specific
        raise ValueError(f"{path} cannot be read ({error}): fetch it again.") from error
    # Limits stored with a tokenizer serve other programs and would cut prompts here.
    backend.no_truncation()
    backend.no_padding()
    path = os.path.join(directory, "tokenizer_config.json")
    config = hf_config.read_json(path) if os.path.exists(path) else {}
    template = config.pop("chat_template", None)
    if isinstance(template, list):
        named = {entry["name"]: entry["template"] for entry in template}
        template = named.get("default")
    path = os.path.join(directory, "chat_template.jinja")
    if os.path.exists(path):
        with open(path, encoding="utf-8", newline="") as file:
            template = file.read()
    return Tokenizer(backend, config, template)


def from_alphabet(characters: str) -> Tokenizer:
    """Make a tokenizer with a token per character, for models made on the spot.

    Ids: 0 `<pad>`, 1 `<bos>`, 2 `<eos>`, then `characters`; nothing is added to a text.

    Args:
      characters: the alphabet; a repeated one counts once.

    Raises:
      ValueError: if the alphabet is empty.
    """
    if not characters:
        raise ValueError("characters='' makes no alphabet: give at least one.")
    special = ["<pad>", "<bos>", "<eos>"]
    tokens = dict.fromkeys([*special, *characters])
    backend = tokenizers.Tokenizer(
        models.WordLevel({token: i for i, token in enumerate(tokens)}, "<none>")
    )
    backend.pre_tokenizer = pre_tokenizers.Split(
        tokenizers.Regex(r"[\s\S]"), "isolated"
    )
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens(
        [tokenizers.AddedToken(t, normalized=False) for t in special]
    )
    config = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}
    return Tokenizer(backend, config)


@functools.lru_cache(maxsize=8)
def _compile(source: str) -> jinja2.Template:
    """Compile a chat template."""
    return _environment().from_string(source)


def _environment() -> jinja2.Environment:
    """Make what templates run in, with the names that those on the hub rely on.

    A template comes with the weights, from strangers: it runs sandboxed.
    """
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[jinja2.ext.loopcontrols, _Generation],
    )

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    def tojson(value, ensure_ascii=False, **arguments):
        # Jinja's own filter escapes for HTML.
        return json.dumps(value, ensure_ascii=ensure_ascii, **arguments)

    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(
        form
    )
    return environment


class _Generation(jinja2.ext.Extension):
    """`{% generation %}`, which marks the assistant's own text: rendered as it is."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body).set_lineno(line)


@functools.cache
def _byte_of() -> Mapping[str, int]:
    """Byte that each character of a byte-level vocabulary stands for.

    Printable Latin-1 bytes stand for themselves, the others in order for the characters
    from 256 on.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = sorted(set(range(256)) - set(printable))
    return {chr(byte): byte for byte in printable} | {
        chr(256 + i): byte for i, byte in enumerate(others)
    }

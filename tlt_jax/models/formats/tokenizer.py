"""Text to token ids and back, with a model's chat template."""

import dataclasses
import functools
import json
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from tlt_jax.models.formats import chat_template, hf_config, json_file

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
        ids = self.backend.get_vocab(with_added_tokens=True).values()
        return max(ids, default=-1) + 1

    @functools.cached_property
    def special_tokens(self) -> Mapping[str, str]:
        """Text of the special tokens by role, `eos_token` and so on."""
        found = {}
        for role in _SPECIAL_ROLES:
            token = self.config.get(role)
            token = token.get("content") if isinstance(token, Mapping) else token
            if token is not None and not isinstance(token, str):
                raise ValueError(
                    f"tokenizer_config.json has {role}={json_file.show(token)}; "
                    "accepted: text, or an object with `content`."
                )
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
        names = chat_template.variables(self.chat_template)
        given = {*_GIVEN, *_SPECIAL_ROLES}
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
        self, prompt: str | Sequence[Mapping[str, Any]], /, **template_options
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

    def render(
        self, messages: Sequence[Mapping[str, Any]], /, **template_options
    ) -> str:
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
        variables = {
            "messages": [dict(message) for message in messages],
            "add_generation_prompt": True,
            "tools": None,
            "documents": None,
            **self.special_tokens,
            **template_options,
        }
        return chat_template.render(self.chat_template, variables)

    def decode(self, ids: Sequence[int] | np.ndarray, skip_special: bool = True) -> str:
        """Decode ids; bytes that are no UTF-8 become replacement characters.

        Ids beyond the tokenizer's vocabulary, which a padded model can produce, decode
        to nothing.
        """
        ids = [int(i) for i in ids]
        return self.backend.decode(ids, skip_special_tokens=skip_special)

    def decoder_for(self, stop: Sequence[str]) -> Callable[[Sequence[int]], str]:
        """Return a `decode` whose texts hold the special tokens that `stop` names.

        In `decode` they are nothing, so that a completion would not stop at them.
        """
        named = {
            token_id: token.content
            for token_id, token in self.backend.get_added_tokens_decoder().items()
            if token.special and any(token.content in one for one in stop)
        }
        if not named:
            return self.decode

        def decode(ids: Sequence[int]) -> str:
            parts, since = [], 0
            for i, token_id in enumerate(map(int, ids)):
                if token_id in named:
                    parts += [self.decode(ids[since:i]), named[token_id]]
                    since = i + 1
            return "".join([*parts, self.decode(ids[since:])])

        return decode

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
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{path} cannot be read ({reason}): fetch it again."
        ) from error
    # Limits stored with a tokenizer serve other programs and would cut prompts here.
    backend.no_truncation()
    backend.no_padding()
    path = os.path.join(directory, "tokenizer_config.json")
    config = hf_config.read_json(path) if os.path.exists(path) else {}
    template = config.pop("chat_template", None)
    if isinstance(template, list):
        named = [entry for entry in template if isinstance(entry, Mapping)]
        chosen = [e.get("template") for e in named if e.get("name") == "default"]
        template = chosen[0] if chosen else None
    if not isinstance(template, str | None):
        raise ValueError(
            f"{path} has chat_template={json_file.show(template)}; accepted: text, "
            "or a list of named templates."
        )
    path = os.path.join(directory, "chat_template.jinja")
    if os.path.exists(path):
        try:
            with open(path, encoding="utf-8", newline="") as file:
                template = file.read()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(
                f"{path} cannot be read ({error}): fetch it again."
            ) from error
    made = Tokenizer(backend, config, template)
    if not made.vocab_size:
        raise ValueError(f"{directory}: tokenizer.json has no token: fetch it again.")
    _ = made.special_tokens  # what is no text is refused now
    return made


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

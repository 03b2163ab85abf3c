"""The shape of a language model, read without loading torch.

Planning needs few numbers: how many layers keep keys and values, how many heads and bytes each, and where
positions end. They stand in a model's `config.json` or in the header of its GGUF file, so reading them takes
milliseconds, while loading torch takes seconds.

Configs speak dialects: GPT-2 writes `n_layer` where Llama writes `num_hidden_layers`, and a `config.json` may
omit a key that equals its class's default. The defaults are read from the *source* of transformers' config
class with `ast`, because importing the class imports torch.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

GGUF_COMPUTE_DTYPE = "bfloat16"
"""A GGUF file names no dtype to compute in. SmolLM2's hidden states reach 22,560 on one
short sentence, a third of what float16 can hold, so `dtype: auto` on a GPU means bfloat16."""

BYTES_PER_VALUE = {"float32": 4, "bfloat16": 2, "float16": 2}

LEARNED_POSITIONS = {"gpt2", "gpt_bigcode", "gpt_neo", "opt", "openai-gpt", "biogpt", "bert", "roberta"}
"""Model types with a table of learned positions: beyond its last row there is nothing to look up."""

FULL_EVERY = {"gemma2": 2, "gpt_oss": 2, "gpt-oss": 2, "cohere2": 4, "gemma3": 6, "gemma3_text": 6}
"""Every how many layers one has full attention, if the config gives neither `layer_types` nor a pattern."""

LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads")
KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_head_kv")
HIDDEN = ("hidden_size", "n_embd", "n_embed", "d_model")
POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx")


# --- errors -------------------------------------------------------------------------------------------------


class RouteClosed(Exception):
    """One route does not lead to the model.

    Args:
        reason: why, in one line.
        fix: the command that would open the route, if there is one.
    """

    def __init__(self, reason: object, fix: str | None = None):
        lines = str(reason).strip().splitlines()
        self.reason, self.fix = (lines[0] if lines else "no reason given"), fix
        super().__init__(self.reason)


# --- shapes -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelShape:
    """The numbers of a model that decide its KV cache.

    `n_kv_heads` and `head_dim` are those of the keys that HF caches, `[batch, n_kv_heads, tokens, head_dim]`.
    """

    model_type: str
    n_layers: int
    n_paged_layers: int
    """Layers with full attention; a sliding-window layer keeps HF's own small cache."""
    n_attention_heads: int
    n_kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int | None
    learned_positions: bool
    """Whether `max_positions` is a hard end (a table of learned positions) or only the length trained for."""
    dtype_name: str | None
    """The dtype the model's config asks for, or None when it is silent."""

    def kv_bytes_per_token(self, dtype: str) -> int:
        """Bytes of keys and values one token adds over all paged layers, at `dtype` (`"float32"`, ...)."""
        return 2 * self.n_paged_layers * self.n_kv_heads * self.head_dim * BYTES_PER_VALUE[dtype]


def runtime_dtype(dtype: str, device: str, own: str | None) -> str:
    """The dtype a model runs in: `auto` is the model's own on CUDA, float32 on a CPU or if it has none."""
    if dtype != "auto":
        return dtype
    return own if device.startswith("cuda") and own in BYTES_PER_VALUE else "float32"


def shape_from_config(config: Mapping[str, Any]) -> ModelShape:
    """A `config.json` in any of the dialects as a `ModelShape`; of a multimodal one, its `text_config`.

    Raises:
        RouteClosed: a needed key is absent and its class gives no default.
    """
    text = config.get("text_config") or config
    model_type = str(text.get("model_type", config.get("model_type", "unknown")))
    known = {**class_fields(model_type), **text}
    n_layers, heads = required(known, LAYERS), required(known, HEADS)
    return ModelShape(
        model_type=model_type,
        n_layers=n_layers,
        n_paged_layers=count_full_attention(known, n_layers),
        n_attention_heads=heads,
        n_kv_heads=cached_kv_heads(known, heads),
        head_dim=known.get("head_dim") or required(known, HIDDEN) // heads,
        vocab_size=required(known, ("vocab_size",)),
        max_positions=first(known, POSITIONS),
        learned_positions=model_type in LEARNED_POSITIONS,
        dtype_name=first({**config, **text}, ("dtype", "torch_dtype")),
    )


def first(config: Mapping[str, Any], keys: tuple[str, ...]) -> Any:
    """The value of the first of `keys` that is present and not null, or None."""
    return next((config[key] for key in keys if config.get(key) is not None), None)


def required(config: Mapping[str, Any], keys: tuple[str, ...]) -> int:
    """`first`, for a value without which there is no shape.

    Raises:
        RouteClosed: none of the keys holds a positive whole number.
    """
    value = first(config, keys)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        model_type = config.get("model_type")
        raise RouteClosed(f"its config gives no {keys[0]!r} (found {value!r}; model type {model_type!r})")
    return value


def cached_kv_heads(config: Mapping[str, Any], heads: int) -> int:
    """How many heads of keys HF caches per layer.

    Falcon's newer decoder has few KV heads but repeats them to all heads *before* caching; the older one and
    BigCode share a single head when `multi_query` is set.
    """
    if config.get("model_type") in ("falcon", "gpt_bigcode"):
        shared = config.get("multi_query") and not config.get("new_decoder_architecture")
        return 1 if shared else heads
    return first(config, KV_HEADS) or heads


def count_full_attention(config: Mapping[str, Any], n_layers: int) -> int:
    """How many layers attend to the whole context, by HF's rule.

    `layer_types` decides where it is given. Otherwise a `sliding_window` holds for every layer, except for
    each n-th (`sliding_window_pattern`), or except for the first `max_window_layers`, or not at all
    (`use_sliding_window`).
    """
    if layer_types := config.get("layer_types"):
        return sum(kind in ("full_attention", "attention") for kind in layer_types)
    if not config.get("sliding_window") or config.get("use_sliding_window") is False:
        return n_layers
    period = config.get("sliding_window_pattern") or FULL_EVERY.get(str(config.get("model_type")))
    return n_layers // period if isinstance(period, int) else min(n_layers, config.get("max_window_layers") or 0)


@functools.cache
def class_fields(model_type: str) -> dict[str, Any]:
    """The fields of transformers' config class for `model_type` with their defaults; empty if it has none.

    Since transformers 5 these are annotated class attributes (`n_layer: int = 12`), so they can be read from
    the source file in milliseconds. A default that is computed reads as None.
    """
    package = importlib.util.find_spec("transformers")
    if package is None or package.origin is None:
        return {}
    for stem in dict.fromkeys((model_type.replace("-", "_"), model_type.removesuffix("_text"))):
        source = Path(package.origin).parent / "models" / stem / f"configuration_{stem}.py"
        if source.is_file():
            tree = ast.parse(source.read_text(encoding="utf-8"))
            classes = [literal_fields(node) for node in tree.body if isinstance(node, ast.ClassDef)]
            return next((fields for fields in classes if fields.get("model_type") == model_type), {})
    return {}


def literal_fields(node: ast.ClassDef) -> dict[str, Any]:
    """The assignments in a class body, by name, with their values where these are literals."""
    fields: dict[str, Any] = {}
    for statement in node.body:
        if isinstance(statement, (ast.Assign, ast.AnnAssign)) and statement.value is not None:
            target = statement.target if isinstance(statement, ast.AnnAssign) else statement.targets[0]
            if isinstance(target, ast.Name):
                fields[target.id] = constant(statement.value)
    return fields


def constant(node: ast.expr) -> Any:
    """The value of a literal or of a product of literals (Mistral's `4096 * 32`), else None."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
        factors = constant(node.left), constant(node.right)
        return factors[0] * factors[1] if all(isinstance(factor, int) for factor in factors) else None
    try:
        return ast.literal_eval(node)
    except ValueError:
        return None


# --- GGUF headers -------------------------------------------------------------------------------------------


def read_gguf_config(path: Path) -> dict[str, Any]:
    """The header of a GGUF file in the words of a `config.json`.

    Raises:
        RouteClosed: the file is not a readable GGUF.
    """
    try:
        header = read_gguf_header(path)
        architecture = header["general.architecture"]
    except (OSError, ValueError, KeyError, IndexError, struct.error) as error:
        raise RouteClosed(f"{path} is not a readable GGUF file ({error})") from None
    own = {key.removeprefix(f"{architecture}."): value for key, value in header.items()}
    return {
        "model_type": architecture,
        "num_hidden_layers": own.get("block_count"),
        "num_attention_heads": own.get("attention.head_count"),
        "num_key_value_heads": own.get("attention.head_count_kv"),
        "head_dim": own.get("attention.key_length"),
        "hidden_size": own.get("embedding_length"),
        "vocab_size": own.get("vocab_size") or len(own.get("tokenizer.ggml.tokens", ())),
        "max_position_embeddings": own.get("context_length"),
        "sliding_window": own.get("attention.sliding_window"),
        "dtype": GGUF_COMPUTE_DTYPE,
    }


def read_gguf_header(path: Path) -> dict[str, Any]:
    """The key-value header of a GGUF file (version 2 or 3); an array is given as a `range` of its length.

    The layout is https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The `gguf` package reads it too,
    but builds an array object per token of the vocabulary: 1.7 s where this takes a few hundredths.
    """
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if data[:4] != b"GGUF":
            raise ValueError("it does not begin with 'GGUF'")
        cursor = GgufCursor(data, offset=4)
        if (version := cursor.number("I")) not in (2, 3):
            raise ValueError(f"version {version}, where 2 or 3 was expected")
        _n_tensors, n_keys = cursor.number("Q"), cursor.number("Q")
        return {cursor.text(): cursor.value(cursor.number("I")) for _ in range(n_keys)}


GGUF_FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
GGUF_STRING, GGUF_ARRAY = 8, 9


class GgufCursor:
    """A reading position in the bytes of a GGUF header."""

    def __init__(self, data: mmap.mmap, offset: int):
        self.data, self.offset = data, offset

    def number(self, code: str) -> Any:
        value = struct.unpack_from(f"<{code}", self.data, self.offset)[0]
        self.offset += struct.calcsize(f"<{code}")
        return value

    def text(self) -> str:
        start, length = self.offset + 8, self.number("Q")
        self.skip(length)
        return self.data[start : self.offset].decode("utf-8", "replace")

    def skip(self, n_bytes: int) -> None:
        self.offset += n_bytes
        if self.offset > len(self.data):
            raise ValueError("it ends in the middle of its header")

    def value(self, kind: int) -> Any:
        if kind == GGUF_STRING:
            return self.text()
        return self.array() if kind == GGUF_ARRAY else self.number(GGUF_FORMATS[kind])

    def array(self) -> range:
        kind, length = self.number("I"), self.number("Q")
        if kind in GGUF_FORMATS:
            self.skip(length * struct.calcsize(f"<{GGUF_FORMATS[kind]}"))
        else:
            for _ in range(length):
                self.value(kind)
        return range(length)

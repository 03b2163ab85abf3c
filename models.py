"""Loading a language model: from a name to a model on its device, or to an error that says what to do.

The names and where they lead are in `model_routes.py`; this module walks the same routes and loads what it
finds there. What holds for every model:

- **Weights are safetensors or GGUF.** A pickle file can run any code while it is read, so it is refused.
- **Nothing is made up.** A checkpoint that lacks weights is refused: transformers would fill them with random
  numbers. Random weights are had only by asking for them (`random:...`), and `LoadedModel.random_weights`
  says so.
- **Out of memory is the caller's business** (`torch.cuda.OutOfMemoryError`, `MemoryError`): it is a result,
  not a typo.
- **What was downloaded is not asked for again**: a model in the Hub's local cache loads without a network.

torch and transformers are imported inside functions, so that importing this module costs nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from converted_models import convert
from model_routes import (
    ConvertedRoute,
    FolderRoute,
    GgufRoute,
    HubRoute,
    ModelUnavailable,
    RandomRoute,
    Route,
    read_shape,
    walk,
)
from model_shapes import ModelShape, RouteClosed, runtime_dtype, shape_from_config
from utils import is_out_of_memory

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "LoadedModel",
    "ModelShape",
    "ModelUnavailable",
    "load_model",
    "load_only_tokenizer",
    "quiet_libraries",
    "read_shape",
]

log = logging.getLogger(__name__)

RANDOM_WEIGHTS_SEED = 0

WHY_NO_PICKLES = "pickles can run any code while they are read, so only safetensors are loaded"

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt")


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to generate, in eval mode."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    """None where there is none: random weights, or a folder without tokenizer files."""
    shape: ModelShape
    source: str
    """Where the weights came from, for the record, such as `"Hub owner/name at <commit>"`."""
    random_weights: bool
    device: torch.device
    """Where input ids go."""
    dtype: torch.dtype
    """What is computed in; weights may be quantised below it."""

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Wish:
    """How a model is wanted, whatever it is. `dtype` may be `auto` until the config is known."""

    dtype: str
    device: str
    device_map: str | None
    quantization: str | None
    trust_remote_code: bool

    @property
    def torch_dtype(self) -> torch.dtype:
        import torch

        return getattr(torch, self.dtype)


def load_model(
    model_name: str,
    *,
    dtype: str = "auto",
    device: str = "auto",
    device_map: str | None = None,
    quantization: str | None = None,
    trust_remote_code: bool = False,
) -> LoadedModel:
    """Load the model behind a name.

    Args:
        model_name: an alias, a Hub id, a folder, a `.gguf` file or `random:<config>`; see `model_routes`.
        dtype: `float32`, `bfloat16`, `float16`, or `auto`: the model's own on CUDA, float32 on a CPU.
        device: `cpu`, `cuda`, `cuda:N`, or `auto`: CUDA where there is one.
        device_map: `auto` lets accelerate spread the layers over the devices.
        quantization: `8bit` or `4bit` (bitsandbytes), or None or `none`.
        trust_remote_code: whether code from the model's own repository may run.

    Raises:
        ModelUnavailable: the model cannot be had; lists what was tried and what would help.
        torch.cuda.OutOfMemoryError, MemoryError: it does not fit.
    """
    quiet_libraries()
    quantization = None if quantization == "none" else quantization
    wish = Wish(dtype, pick_device(model_name, device), device_map, quantization, trust_remote_code)

    def visit(route: Route) -> LoadedModel:
        config = route.trusted_config(trust_remote_code, allow_network=True)
        own = shape_from_config(config).dtype_name
        loaded = LOADERS[type(route)](route, replace(wish, dtype=runtime_dtype(dtype, wish.device, own)))
        # HF overwrites the dtype in the config with the one that was asked for.
        return replace(loaded, shape=replace(loaded.shape, dtype_name=own))

    return walk(model_name, visit)


def load_only_tokenizer(model_name: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer behind a name, by the routes of `load_model`, without the weights.

    Raises:
        ModelUnavailable: the model cannot be had, or has no tokenizer.
    """
    quiet_libraries()

    def visit(route: Route) -> PreTrainedTokenizerBase:
        if isinstance(route, RandomRoute):
            raise RouteClosed("random weights have no tokenizer", "name a model that has one, such as smollm2-135m")
        route.trusted_config(trust_remote_code, allow_network=True)
        if isinstance(route, GgufRoute):
            convert_gguf(route)
        options = {"trust_remote_code": trust_remote_code}
        if isinstance(route, HubRoute):
            try:
                return load_tokenizer(route.hub_id, {**options, "local_files_only": True})
            except RouteClosed:
                return load_tokenizer(route.hub_id, options)
        tokenizer = load_tokenizer(route.folder if isinstance(route, FolderRoute) else route.converted.folder, options)
        if tokenizer is None:
            raise RouteClosed("it has no tokenizer files")
        return tokenizer

    return walk(model_name, visit)


def pick_device(model_name: str, device: str) -> str:
    """`auto` as `cuda` or `cpu`; any other device is checked.

    Raises:
        ModelUnavailable: there is no such device.
    """
    import torch

    n_devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "auto":
        return "cuda" if n_devices else "cpu"
    wanted = torch.device(device)
    if wanted.type == "cuda" and (wanted.index or 0) >= n_devices:
        closed = RouteClosed(f"torch {torch.__version__} sees {n_devices} CUDA devices", "set `device: auto`")
        raise ModelUnavailable(model_name, [(f"device {device}", closed)])
    return device


# --- one loader per kind of route ---------------------------------------------------------------------------


def load_random(route: RandomRoute, wish: Wish) -> LoadedModel:
    """Build a model of the given shape on its device and in its dtype; it is never float32 on the CPU first.

    Its weights are the same in every run on one kind of device; the caller's random state is left alone.
    """
    import torch
    from transformers import AutoModelForCausalLM

    if wish.quantization or wish.device_map:
        raise RouteClosed("random weights can be neither quantised nor spread", "set `device` and `dtype` instead")
    on_cuda = [torch.device(wish.device)] if wish.device.startswith("cuda") else []
    with torch.random.fork_rng(devices=on_cuda), torch.device(wish.device):
        torch.manual_seed(RANDOM_WEIGHTS_SEED)
        model = opened(
            lambda: AutoModelForCausalLM.from_config(
                config_object(route.read_config()),
                dtype=wish.torch_dtype,
                trust_remote_code=wish.trust_remote_code,
            )
        )
    return finished(model, None, wish, f"random weights, seed {RANDOM_WEIGHTS_SEED}, of {route.text}")


def load_folder(route: FolderRoute, wish: Wish) -> LoadedModel:
    """Load what `save_pretrained` wrote."""
    return load_from(route.folder, wish, f"folder {route.folder}")


def load_converted(route: ConvertedRoute, wish: Wish) -> LoadedModel:
    """Load a converted model. One that turns out broken is spoiled, so that the next route makes it anew."""
    try:
        return load_from(route.converted.folder, wish, f"converted from {route.converted.origin_text()}")
    except RouteClosed as closed:
        if not (wish.quantization or isinstance(closed.__cause__, ImportError)):
            route.converted.spoil()
        raise


def load_gguf(route: GgufRoute, wish: Wish) -> LoadedModel:
    """Convert a GGUF file and load what came of it."""
    convert_gguf(route)
    return load_converted(ConvertedRoute(route.converted), wish)


def convert_gguf(route: GgufRoute) -> None:
    """Make the converted model of a GGUF file, where there is none yet.

    Raises:
        RouteClosed: with the reason, and what would help if it cannot be written.
    """
    try:
        opened(lambda: convert(route.converted))
    except RouteClosed as closed:
        unwritable = getattr(closed.__cause__, "errno", None)  # transformers' own OSErrors carry no errno
        fix = "export KV_PREFETCH_CACHE=/a/folder/with/room/to/write" if unwritable else None
        raise RouteClosed(f"converting it failed ({closed.reason})", fix) from closed


def load_from_hub(route: HubRoute, wish: Wish) -> LoadedModel:
    """Load from the Hub's local cache, and only if that is not enough from the network."""
    try:
        loaded = load_from(route.hub_id, wish, f"Hub {route.hub_id}", local_files_only=True)
    except RouteClosed as local:
        try:
            route.fetch_config()
        except RouteClosed as remote:  # within seconds, where transformers would retry for long
            reason = f"its local cache does not do ({local.reason}), and {remote.reason}"
            raise RouteClosed(reason, remote.fix) from local
        log.info("downloading %s", route.hub_id)
        loaded = download(route.hub_id, wish)
    return replace(loaded, source=f"{loaded.source} at {route.cached_config().parent.name}")


def download(hub_id: str, wish: Wish) -> LoadedModel:
    """Load from the Hub over the network.

    Raises:
        RouteClosed: also for a repository that has pickles only, in plainer words than transformers' own.
    """
    try:
        return load_from(hub_id, wish, f"Hub {hub_id}")
    except RouteClosed as closed:
        if "use_safetensors" not in str(closed.__cause__):
            raise
        fix = "https://huggingface.co/spaces/safetensors/convert converts a repository's weights"
        raise RouteClosed(f"it has no safetensors weights; {WHY_NO_PICKLES}", fix) from closed


LOADERS: dict[type[Route], Callable[[Any, Wish], LoadedModel]] = {
    RandomRoute: load_random,
    FolderRoute: load_folder,
    ConvertedRoute: load_converted,
    GgufRoute: load_gguf,
    HubRoute: load_from_hub,
}


# --- what the loaders share ---------------------------------------------------------------------------------


def load_from(place: Path | str, wish: Wish, source: str, **hub_options: Any) -> LoadedModel:
    """Load a pretrained model and its tokenizer from a folder or a Hub id.

    Raises:
        RouteClosed: the weights are absent, incomplete, of a refused kind, or not understood.
    """
    from transformers import AutoModelForCausalLM

    refuse_pickle(place)
    options = {"trust_remote_code": wish.trust_remote_code, **hub_options}
    model, report = opened(
        lambda: AutoModelForCausalLM.from_pretrained(
            place,
            dtype=wish.torch_dtype,
            device_map=placement(wish),
            quantization_config=quantization_config(wish),
            use_safetensors=True,
            output_loading_info=True,
            **options,
        )
    )
    if missing := sorted(report["missing_keys"]):
        raise RouteClosed(f"its weights lack {len(missing)} of the tensors a causal LM needs, such as {missing[0]!r}")
    return finished(model, load_tokenizer(place, options), wish, source)


def load_tokenizer(place: Path | str, options: dict[str, Any]) -> PreTrainedTokenizerBase | None:
    """The tokenizer beside the weights; None for a folder that has none."""
    from transformers import AutoTokenizer

    if isinstance(place, Path) and not any((place / name).is_file() for name in TOKENIZER_FILES):
        return None
    return opened(lambda: AutoTokenizer.from_pretrained(place, **options))


def refuse_pickle(place: Path | str) -> None:
    """Close the route to a folder whose only weights are pickles.

    Raises:
        RouteClosed: with the command that converts them, to be run where they are trusted.
    """
    if not isinstance(place, Path) or any(place.glob("*.safetensors")):
        return
    pickles = sorted(path.name for kind in ("*.bin", "*.pt", "*.pth", "*.ckpt") for path in place.glob(kind))
    if pickles:
        command = "from transformers import AutoModelForCausalLM as M; "
        command += f"M.from_pretrained({str(place)!r}, use_safetensors=False).save_pretrained({str(place)!r})"
        raise RouteClosed(
            f"its weights are {pickles[0]}; {WHY_NO_PICKLES}",
            f'python -c "{command}"  (only if you trust their author)',
        )


def placement(wish: Wish) -> Any:
    """The `device_map` for transformers: straight to the device, without a copy in main memory first."""
    if wish.device_map:
        return wish.device_map
    return {"": wish.device} if wish.quantization or wish.device != "cpu" else None


def quantization_config(wish: Wish) -> Any:
    """bitsandbytes' settings for `8bit` or `4bit` (NF4, computing in the wish's dtype), or None."""
    from transformers import BitsAndBytesConfig

    if wish.quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    if wish.quantization == "4bit":
        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=wish.torch_dtype)
    return None


def config_object(config: dict[str, Any]) -> Any:
    """A config dictionary as transformers' config object."""
    from transformers import AutoConfig

    return type(AutoConfig.for_model(config["model_type"])).from_dict(config)


def finished(model: Any, tokenizer: Any, wish: Wish, source: str) -> LoadedModel:
    """A loaded model with its record; its shape is read from the config as HF completed it.

    The attention implementation is transformers' own choice: sdpa, or eager for a class that has no sdpa.
    """
    return LoadedModel(
        model=model.eval(),
        tokenizer=tokenizer,
        shape=shape_from_config(model.config.to_dict()),
        source=source,
        random_weights=source.startswith("random weights"),
        device=model.device,
        dtype=wish.torch_dtype,
    )


def opened(load: Callable[[], Any]) -> Any:
    """`load()`, with every error that means "this cannot be loaded" as `RouteClosed`.

    Raises:
        torch.cuda.OutOfMemoryError, MemoryError: passed on.
    """
    import torch

    try:
        return load()
    except (torch.cuda.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # a checkpoint can be wrong in every way there is, in six libraries
        if is_out_of_memory(error):
            raise MemoryError(str(error)) from error
        raise RouteClosed(f"{type(error).__name__}: {error}") from error


def quiet_libraries() -> None:
    """Silence the progress bars and warnings of the libraries below, unless debug logging is on."""
    if logging.getLogger().isEnabledFor(logging.DEBUG):
        return
    import huggingface_hub.utils
    import transformers.utils.logging

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    huggingface_hub.utils.disable_progress_bars()
    for name in ("huggingface_hub", "accelerate", "bitsandbytes"):
        logging.getLogger(name).setLevel(logging.ERROR)

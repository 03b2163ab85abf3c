"""What a list of runs would do, before anything heavy is loaded: sizes, what fits, and the floor of each run.

`plan` joins each `RunSpec` with the shape of its model, which is read without torch. It finds what cannot work before
the first run starts: a context that exceeds a model's learned positions is clamped here, and the clamp is said.

The floor is what physics leaves: with exact attention, pages that do not fit have to cross the link at every step, so a
step takes at least their bytes over the link's bandwidth. (The other floor, computing, is measured in the run.)
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from links import choose_link
from model_shapes import ModelShape, runtime_dtype
from models import ModelUnavailable, read_shape
from run_specs import RunSpec, clamp


@dataclass(frozen=True)
class PlannedRun:
    """One run and what is known of it beforehand; None where the model's shape, or the link, is not known.

    Attributes:
        spec: the run, clamped to the model's positions.
        kv_bytes_per_token: of all paged layers, for one sequence.
        kv_bytes: of the whole context at its end, for the batch.
        device_kv_bytes: most keys and values that are on the device, staging included; a selector's digests come on
            top of them.
        resident_fraction: share of the context's pages that the budget holds, at its end.
        transfer_floor_ms: least time per token for the bytes that must cross the link.
        notes: what a user should know: a clamp, a model that could not be looked at.
    """

    spec: RunSpec
    kv_bytes_per_token: int | None = None
    kv_bytes: int | None = None
    device_kv_bytes: int | None = None
    resident_fraction: float | None = None
    transfer_floor_ms: float | None = None
    notes: tuple[str, ...] = ()


def plan(specs: Iterable[RunSpec], allow_network: bool = True) -> list[PlannedRun]:
    """Plan every run; two runs that a clamp has made the same are planned once.

    Raises:
        ValueError: a model has too few positions for even one prompt token.
    """
    shapes: dict[tuple, ModelShape | str] = {}
    planned: dict[str, PlannedRun] = {}
    for spec in specs:
        key = (spec.model_name, spec.trust_remote_code)
        if key not in shapes:
            shapes[key] = _shape_or_reason(spec, allow_network)
        run = _plan_one(spec, shapes[key])
        same = replace(run.spec, requested_context_length=run.spec.context_length).run_id
        if same in planned:  # what was said about either run holds for the one that is left
            run = replace(planned[same], notes=tuple(dict.fromkeys((*planned[same].notes, *run.notes))))
        planned[same] = run
    return list(planned.values())


def _shape_or_reason(spec: RunSpec, allow_network: bool) -> ModelShape | str:
    try:
        return read_shape(spec.model_name, spec.trust_remote_code, allow_network=allow_network)
    except ModelUnavailable as error:
        reasons = "; ".join(dict.fromkeys(closed.reason for _, closed in error.tried))
        return f"{str(error).splitlines()[0].removesuffix('. Tried:')}: {reasons}"


def _plan_one(spec: RunSpec, shape: ModelShape | str) -> PlannedRun:
    if isinstance(shape, str):
        return PlannedRun(spec, notes=(f"sizes unknown: {shape}",))
    spec, notes = fit_positions(spec, shape)
    device = "cuda" if _uses_cuda(spec.device) else "cpu"
    per_token = shape.kv_bytes_per_token(runtime_dtype(spec.dtype, device, shape.dtype_name))
    kv_bytes = per_token * spec.batch_size * (spec.context_length + spec.max_new_tokens - 1)
    if spec.paging is None:
        return PlannedRun(spec, per_token, kv_bytes, notes=notes, **_baseline_sizes(spec, shape, kv_bytes))
    return PlannedRun(spec, per_token, kv_bytes, notes=notes, **_paged_sizes(spec, shape, per_token, device))


def fit_positions(spec: RunSpec, shape: ModelShape) -> tuple[RunSpec, tuple[str, ...]]:
    """The run clamped to the model's positions where they are a hard limit, and what to say about it."""
    wanted = spec.context_length + spec.max_new_tokens
    if shape.max_positions is None or wanted <= shape.max_positions:
        return spec, ()
    if not shape.learned_positions:
        return spec, (f"{wanted} positions exceed the {shape.max_positions} the model was made for; quality suffers",)
    fitted = clamp(spec, shape.max_positions)
    note = (
        f"context clamped from {spec.context_length} to {fitted.context_length}: the model has"
        f" {shape.max_positions} positions, {spec.max_new_tokens} of them for new tokens"
    )
    return fitted, (note,)


def _baseline_sizes(spec: RunSpec, shape: ModelShape, kv_bytes: int) -> dict[str, float | int | None]:
    if spec.cache_implementation == "quantized":
        return {}  # its size is measured, not planned
    if spec.cache_implementation != "offloaded":
        return {"device_kv_bytes": kv_bytes, "resident_fraction": 1.0, "transfer_floor_ms": 0.0}
    held = min(1.0, 2 / shape.n_layers)  # the layer that computes, and the one that is being fetched
    return {"device_kv_bytes": round(kv_bytes * held), "resident_fraction": held}


def _paged_sizes(spec: RunSpec, shape: ModelShape, per_token: int, device: str) -> dict[str, float | int | None]:
    paging = spec.paging
    n_pages = -(-(spec.context_length + spec.max_new_tokens - 1) // paging.page_size)
    page_of_all_layers = per_token * paging.page_size * spec.batch_size
    dense = 1.0 if not paging.selects else min(1.0, paging.dense_layers / shape.n_layers)  # of the paged layers, about
    attended = (
        (dense, n_pages),
        (1.0 - dense, paging.n_attended(n_pages)),
    )  # share of the layers, pages they attend to
    must_move = sum(share * max(0, pages - paging.max_gpu_pages) for share, pages in attended) * page_of_all_layers
    bandwidth_gb_s = choose_link(paging.link, device).bandwidth_gb_s
    floor_ms = 0.0 if must_move == 0 else None
    if bandwidth_gb_s and floor_ms is None:
        floor_ms = must_move / bandwidth_gb_s / 1e6
    return {
        "device_kv_bytes": (paging.max_gpu_pages + paging.staging_pages) * page_of_all_layers,
        "resident_fraction": min(1.0, paging.max_gpu_pages / n_pages),
        "transfer_floor_ms": floor_ms,
    }


def _uses_cuda(device: str) -> bool:
    """Whether a run would be on CUDA, without asking torch: `auto` means a GPU if the driver knows one."""
    if device != "auto":
        return device.startswith("cuda")
    try:
        import pynvml

        pynvml.nvmlInit()
        try:
            return pynvml.nvmlDeviceGetCount() > 0
        finally:
            pynvml.nvmlShutdown()
    except Exception:  # no driver, no library: NVML's error classes exist only once it is imported
        return False

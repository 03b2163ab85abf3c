"""A page table on the device: wanted pages are found, made room for and brought in, and the host waits for nothing.

The page table of page_table.py lies with the host. Where a selector chooses pages, the host has to read what it chose
before it can look anything up, so it waits for the device once in every layer of every decode step. Here the choice
stays on the device, and so does the table:

    1. of the chosen pages, those that have a slot are found, and the others are given the slots used least recently;
    2. the chosen pages are put side by side for attention; those that were missing come from host memory, in the same
       pass, and stay in their slots.

On CUDA both are Triton kernels, which read pinned host memory where it lies (page_kernels.py). On a CPU the definitions
below do the same with torch. What was hit and missed is read after the run.

The table serves the pages that a selector chooses. Those that are always resident, the open page among them, stay with
the host's table, which lends its other slots, as every page that is in one of these is in host memory too, and takes
them back when something else than a selecting decode step needs pages.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from types import ModuleType

import torch
from torch.nn.functional import pad

from page_selection import UNRANKABLE
from page_store import PageStore
from page_table import PageTable
from pool_reads import Stretch, device_index
from yardstick import Yardstick

ABSENT = -1  # in place of a slot, or of a page
LEAST_ALLOCATED = 512  # bytes, that PyTorch gives a tensor on CUDA


class DevicePageTable:
    """Where the pages of one layer of one sequence are, for the device to know.

    Args:
        store: the layer's.
        lent: the slots of its pool that it may use, with the pages that lie in them, None where there is none.
        rows: where the first pages lie on the host, the pages in slots among them.
    """

    def __init__(self, store: PageStore, lent: Mapping[int, int | None], rows: Sequence[int]):
        device = store.pool.device
        pages = [ABSENT if page is None else page for page in lent.values()]
        held = [(page, slot) for slot, page in enumerate(pages) if page != ABSENT]
        self.store = store
        self.kernels = triton_kernels() if device.type == "cuda" else None
        with torch.inference_mode(False):
            self.places = device_index(list(lent), device)  # of each slot, in the pool
            self._page_in = device_index(pages, device)
            self._used_at = torch.zeros_like(self.places)
            self._slot_of = torch.full((0,), ABSENT, device=device)
            self._address_of = torch.zeros(0, dtype=torch.int64, device=device)
        self._rows: list[int] = []
        self._now = 1
        self.learn(rows)
        if held:
            at, slots = (device_index(column, device) for column in zip(*held, strict=True))
            self._slot_of[at] = slots

    @property
    def n_known(self) -> int:
        """Pages that may be chosen: page ids below it."""
        return len(self._rows)

    @property
    def n_slots(self) -> int:
        return self._page_in.numel()

    @property
    def n_held(self) -> int:
        """Pages in slots; asking waits for the device."""
        return int((self._page_in != ABSENT).sum())

    def learn(self, rows: Sequence[int]) -> None:
        """Pages `n_known`, `n_known + 1`, ... lie on the host in these rows. What computes next waits for them to have
        arrived there.

        Raises:
            RuntimeError: kernels cannot read them there.
        """
        if not rows:
            return
        require_device_table(self.store)
        for row in rows:
            self.store.await_seal(row)
        addresses = [self.store.host.page(row).data_ptr() for row in rows]
        first, end, room = self.n_known, self.n_known + len(rows), self._slot_of.numel()
        if end > room:
            more = max(end, 2 * room) - room
            with torch.inference_mode(False):
                self._slot_of = pad(self._slot_of, (0, more), value=ABSENT)
                self._address_of = pad(self._address_of, (0, more))
        self._address_of[first:end] = device_index(addresses, self.places.device)
        self._rows += rows

    def bring_in(self, wanted: torch.Tensor, known: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Find pages, and have them come.

        Args:
            wanted: [w] page ids below `n_known`, each once, most wanted first; at most as many as there are slots.
            known: [k] places in the pool of pages that the host knows of, to be put behind them.

        Returns:
            The pages side by side, [w + k, P, 2, K, D], and which of the wanted ones were there, [w], 1 or 0.

        Raises:
            ValueError: more pages are wanted than there are slots.
        """
        if wanted.numel() > self.n_slots:
            raise ValueError(
                f"{wanted.numel()} pages are to be chosen, and 'page_table: device' has slots for {self.n_slots} beside"
                " those always resident; raise max_gpu_pages, or attend to fewer pages"
            )
        found = (wanted, self._slot_of, self._page_in, self._used_at, self._now)
        self._now += wanted.numel()
        pool = self.store.pool
        if self.kernels is None:
            slots, was_there = look_up_with_torch(*found)
            rows = [self._rows[page] for page in wanted.tolist()]
            hosts = [self.store.host.page(row) for row in rows]
            return gather_with_torch(pool, self.places, slots, was_there, hosts, known), was_there
        slots, was_there = self.kernels.look_up(*found)
        block = self.kernels.gather(pool, self.places, slots, was_there, wanted, self._address_of, known)
        return block, was_there


class DeviceReads:
    """How selecting decode steps of a sequence read pages while a `DevicePageTable` serves them.

    Args:
        table: the host's, which lends its slots: of the budget, all but those of pinned pages.
        store: the layer's.
        pinned: pages that stay with the host's table.
        rows: the host rows of pages that may be chosen, and of those before them.
    """

    def __init__(self, table: PageTable, store: PageStore, pinned: Collection[int], rows: Sequence[int]):
        self._host_table, self._store = table, store
        self._lent = table.lend(table.max_resident - len(pinned), pinned)
        self._table = DevicePageTable(store, self._lent, rows)
        self._n_free = sum(page is None for page in self._lent.values())
        self._known: tuple[list[int], torch.Tensor] = [], device_index([], store.pool.device)

    @property
    def n_held(self) -> int:
        """Pages in the lent slots; asking waits for the device."""
        return self._table.n_held

    def read(
        self,
        chosen: torch.Tensor,
        rows: Sequence[int],
        n_choosable: int,
        pinned: Mapping[int, int],
        part_tokens: int,
        names_pages: bool,
    ) -> tuple[list[Stretch], torch.Tensor]:
        """Have chosen pages come, to be read together with the pinned ones.

        Args:
            chosen: [w] page ids below `n_choosable`, most wanted first.
            rows: the host rows of all full pages.
            pinned: slots of the pinned pages, by page; the page after the full ones, if there is one, is open.
            part_tokens: positions that a part should have.
            names_pages: whether the stretches are to name the pages they hold, which the host has to wait for; else
                they number them.

        Returns:
            What to read, and which of the chosen pages were there, [w], 1 or 0.
        """
        self._table.learn(rows[self._table.n_known : n_choosable])
        full = {page: slot for page, slot in pinned.items() if page < len(rows)}
        if self._known[0] != [*full.values()]:
            self._known = [*full.values()], device_index([*full.values()], self._store.pool.device)
        block, was_there = self._table.bring_in(chosen, self._known[1])
        names = [*chosen.tolist(), *full] if names_pages else range(len(block))
        stretches = [Stretch(names, block, None, part_tokens, None)]
        if len(rows) in pinned:
            at = pinned[len(rows)]
            stretches.append(Stretch([len(rows)], self._store.pool[at : at + 1], None, part_tokens, 0))
        return stretches, was_there

    def counts(
        self,
        yardstick: Yardstick,
        pinned: Collection[int],
        chosen: torch.Tensor,
        was_there: torch.Tensor,
        ranked: torch.Tensor,
    ) -> dict[str, int]:
        """The counts of a request, once the device has served it. To be asked once for each, in their order.

        Args:
            pinned, chosen, was_there: as for, and from, `read`.
            ranked: whether the scores could be ranked, bool [].

        Raises:
            ValueError: they could not.
        """
        if not ranked:
            raise ValueError(UNRANKABLE)
        pages = chosen.tolist()
        hits = [*pinned, *(page for page, there in zip(pages, was_there.tolist(), strict=True) if there)]
        n_missed = len(pinned) + len(pages) - len(hits)
        n_into_free, self._n_free = min(n_missed, self._n_free), max(0, self._n_free - n_missed)
        counts = yardstick.answer([*sorted(pinned), *pages], pinned, hits)
        evictions = n_missed - n_into_free
        return counts | {"hits": len(hits), "misses": n_missed, "h2d_pages": n_missed, "evictions": evictions}

    @staticmethod
    def kept_bytes(chosen: torch.Tensor) -> int:
        """Bytes of device memory that a request takes until its `counts` are asked for: three tensors as long."""
        return 3 * max(LEAST_ALLOCATED, chosen.nbytes)

    def end(self) -> None:
        """Give the slots back; the pages in them are on the host."""
        self._host_table.take_back(self._lent)


def look_up_with_torch(
    wanted: torch.Tensor, slot_of: torch.Tensor, page_in: torch.Tensor, used_at: torch.Tensor, now: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Find the slot of each wanted page; one that has none is given the slot used least recently of those that hold no
    wanted page, the first missing page the first of them, and of slots used at the same time the first.

    Args:
        wanted: [w] page ids, each once, most wanted first; w is at most S.
        slot_of: [n] by page, its slot or ABSENT; brought up to date.
        page_in: [S] by slot, its page or ABSENT; brought up to date.
        used_at: [S] by slot, when it was used last; brought up to date: the most wanted page last of all.
        now: later than all of `used_at`.

    Returns:
        The slots, [w], and which pages were there, int8 [w]. All of int64 but for that.
    """
    used = now + torch.arange(wanted.numel() - 1, -1, -1, device=wanted.device)
    slots = slot_of[wanted]
    there = slots != ABSENT
    used_at[slots[there]] = used[there]
    given = used_at.argsort(stable=True)[: int((~there).sum())]  # what was used now comes last, and is never reached
    evicted = page_in[given]
    slot_of[evicted[evicted != ABSENT]] = ABSENT
    slots[~there] = given
    slot_of[wanted], page_in[slots], used_at[slots] = slots, wanted, used
    return slots, there.to(torch.int8)


def gather_with_torch(
    pool: torch.Tensor,
    places: torch.Tensor,
    slots: torch.Tensor,
    was_there: torch.Tensor,
    hosts: Sequence[torch.Tensor],
    known: torch.Tensor,
) -> torch.Tensor:
    """The wanted pages and the known ones side by side, [w + k, P, 2, K, D]; those that were not there are put into
    their slots of the pool too.

    Args:
        pool: [N, P, 2, K, D].
        places: [S] by slot, its place in the pool.
        slots, was_there: as from `look_up_with_torch`.
        hosts: the wanted pages in host memory, [P, 2, K, D] each.
        known: [k] places in the pool.
    """
    taken = places[slots]
    for nth in (was_there == 0).nonzero().flatten().tolist():
        pool[taken[nth]] = hosts[nth]
    return pool.index_select(0, torch.cat([taken, known]))


def require_device_table(store: PageStore) -> None:
    """Refuse a layer that no `DevicePageTable` can serve: ValueError for a simulated link, RuntimeError for what the
    system lacks."""
    if store.transport.link.kind == "simulated":
        raise ValueError(
            "'page_table: device' reads host memory as it computes, which a simulated link cannot hold back; on a CPU"
            " set 'link: memory', or 'page_table: host'"
        )
    if store.pool.device.type == "cuda":
        triton_kernels()
        if not store.host.is_pinned:
            raise RuntimeError("'page_table: device' reads pinned host memory, and pinning was refused; see the log")


def triton_kernels() -> ModuleType:
    """The kernels; raises RuntimeError if Triton is not there."""
    try:
        import page_kernels
    except ImportError as error:
        raise RuntimeError(
            f"'page_table: device' needs Triton on CUDA, which could not be imported ({error}); it comes with PyTorch's"
            " CUDA builds for Linux. Install it, or set 'page_table: host'"
        ) from error
    return page_kernels

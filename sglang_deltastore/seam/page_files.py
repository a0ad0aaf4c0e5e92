"""SGLang's storage in files, of sealed pages: what is not whole, or not this store's, is a miss, never an answer."""

from __future__ import annotations

import logging
import os
from itertools import takewhile
from typing import Any

import torch
from sglang.srt.mem_cache.hicache_storage import HiCacheFile, HiCacheStorageConfig

from ..policy.refusals import Refused
from ..store.sealed_page import HEADER_BYTES, Seal, body_bytes

logger = logging.getLogger(__name__)


class PageFiles(HiCacheFile):
    """A file for each page of a host_pool.DeltaHostPool. Any thread may read, one writes; none is ended by a disk."""

    def __init__(self, config: HiCacheStorageConfig, _given: dict[str, Any] | None = None) -> None:
        try:
            super().__init__(config)
        except OSError as error:
            raise Refused(
                f"--hicache-storage-backend file: {error.filename} cannot be made ({error.strerror}); allowed is a "
                "folder that can be written; set SGLANG_HICACHE_FILE_BACKEND_STORAGE_DIR, or file_storage_path in "
                "--hicache-storage-backend-extra-config"
            ) from error

    def register_mem_pool_host(self, mem_pool_host: Any) -> None:
        super().register_mem_pool_host(mem_pool_host)
        self._seal, self._counts = Seal(mem_pool_host.pool.identity), mem_pool_host.storage_counts
        self._first_page_bytes = mem_pool_host.first_page_bytes

    def set(self, key: str, value: Any = None, target_location: Any = None, target_sizes: Any = None) -> bool:
        if self.exists(key):
            return super().set(key, value)
        is_written = super().set(key, self._seal.seal(key, value))
        self._counts.written_pages += is_written
        return is_written

    def get(self, key: str, target_location: torch.Tensor, target_sizes: Any = None) -> torch.Tensor | None:
        """A page's body, or None where it is not there or is refused. target_location: get_dummy_flat_data_page's."""
        try:
            sealed = super().get(key, target_location)
            if sealed is not None and body_bytes(sealed) == self._first_page_bytes:
                sealed = super().get(key, torch.empty(HEADER_BYTES + self._first_page_bytes, dtype=torch.uint8))
        except OSError as error:
            return self._refuse(key, str(error))
        if sealed is None:
            return None
        body = self._seal.opened(key, sealed)
        if body is None:
            return self._refuse(key, "its header or its checksum is not that of this page")
        self._counts.loaded_pages += 1
        return body

    def batch_get(
        self, keys: list[str], target_locations: list[torch.Tensor], target_sizes: Any = None
    ) -> list[torch.Tensor | None]:
        """No further than the first miss: a hit is a prefix."""
        found = (self.get(key, target) for key, target in zip(keys, target_locations, strict=True))
        pages: list[torch.Tensor | None] = list(takewhile(lambda page: page is not None, found))
        return pages + [None] * (len(keys) - len(pages))

    def _refuse(self, key: str, why: str) -> None:
        """A miss; and the file goes, so that the page can be written anew."""
        self._counts.refused_pages += 1
        logger.warning(
            "DeltaStore: a stored page is not loaded, and will be computed and written anew: %s (%s)", key, why
        )
        name = self._get_suffixed_key(key)
        try:
            os.remove(os.path.join(self.file_path, f"{name}.bin"))
        except OSError:
            return  # it is gone, or will be refused again
        self._evictor.abort(name)
        if self.metadata_cache is not None:
            self.metadata_cache.remove(name)

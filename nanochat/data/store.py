"""Token stores: memory-mapped token ids of many documents, encoded once before training.

A store is a folder:

    tokens.bin    the ids of all documents, end to end (uint16; uint32 if the vocabulary needs it)
    mask.bin      one byte a token, for conversations only: bit 0 the loss mask, above it the role
                  (`nanochat.tokenizer.pack_mask`)
    offsets.npy   (documents + 1,) int64: document i is tokens[offsets[i] : offsets[i + 1]]
    meta.json     what it was made from (tokenizer hash, source fingerprint), its name and sizes,
                  the SHA-256 of every other file and its own

A store is written under a temporary name and then renamed, so a folder with the final name is
complete. Opening it checks its name, sizes and offsets. `verify_once` checks the contents before
the first use after a change of the files, and notes that in `.verified`. Several processes encode a
large source in slices; a slice is itself a store, and `merge_stores` joins slices.
"""

import hashlib
import json
from array import array
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np

from nanochat import paths
from nanochat.errors import UserError
from nanochat.tokenizer import unpack_mask

VERSION = 1
_DTYPES: dict[str, np.dtype[Any]] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
_OFFSETS_BLOCK = 2**20
_BLOCK = 1 << 22  # bytes read at a time
_AT_ONCE = 64 << 20  # largest store, in bytes, that is verified before its first use
_VERIFIED = ".verified"


class TokenStore:
    """Random access to the documents of a store folder. Use `TokenStore.open`."""

    def __init__(self, folder: Path, meta: dict[str, Any]):
        self.folder = folder
        self.meta = meta
        self.num_tokens: int = meta["num_tokens"]
        self.has_mask: bool = meta["has_mask"]
        dtype = _DTYPES[meta["dtype"]]
        # A plain ndarray view of the memmap, since slicing the subclass costs several times more.
        self._tokens = _map(folder / "tokens.bin", dtype, self.num_tokens)
        self._mask = _map(folder / "mask.bin", np.dtype("u1"), self.num_tokens, self.has_mask)
        try:
            offsets = np.load(folder / "offsets.npy", mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise _torn(folder / "offsets.npy", f"cannot be read ({error})") from error
        if offsets.dtype != np.int64 or offsets.shape != (meta["num_documents"] + 1,):
            raise _torn(
                folder / "offsets.npy",
                f"holds {offsets.dtype} {offsets.shape}, meta.json promises int64 "
                f"({meta['num_documents'] + 1},)",
            )
        self._offsets = offsets.view(np.ndarray)
        if self._offsets[0] != 0 or self._offsets[-1] != self.num_tokens:
            raise _torn(
                folder / "offsets.npy",
                f"ends at token {self._offsets[-1]}, meta.json promises {self.num_tokens}",
            )
        for start in range(0, len(offsets) - 1, _OFFSETS_BLOCK):
            lengths = np.diff(self._offsets[start : start + _OFFSETS_BLOCK + 1])
            if lengths.min() < 1:
                number = start + int(lengths.argmin())
                raise _torn(folder / "offsets.npy", f"gives document {number} no tokens")

    @classmethod
    def open(cls, folder: Path, tokenizer_hash: str | None = None) -> "TokenStore":
        """Open a store; UserError if it is missing or damaged, or if its tokenizer is another one.

        The tokenizer is checked only if its hash is given.
        """
        folder = Path(folder)
        try:
            meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError) as error:
            raise UserError(
                f"{folder} is no token store (no meta.json in it); build it first, for example "
                "with python -m scripts.tok_encode"
            ) from error
        except ValueError as error:
            raise _torn(folder / "meta.json", f"is not valid JSON ({error})") from error
        wanted: dict[str, type] = {
            "version": int,
            "tokenizer_hash": str,
            "fingerprint": str,
            "num_documents": int,
            "num_tokens": int,
            "has_mask": bool,
            "dtype": str,
        }
        if not isinstance(meta, dict) or not all(
            isinstance(meta.get(key), kind) for key, kind in wanted.items()
        ):
            raise _torn(folder / "meta.json", f"lacks one of {', '.join(wanted)}")
        if meta["version"] != VERSION:
            raise UserError(
                f"{folder} is a token store of format {meta['version']}, this program reads format "
                f"{VERSION}; delete the folder and build it again"
            )
        if meta["dtype"] not in _DTYPES:
            raise _torn(folder / "meta.json", f"names the unknown dtype {meta['dtype']!r}")
        digest = paths.meta_digest(meta)
        if meta.get("digest", digest) != digest:  # older stores have none
            raise _torn(folder / "meta.json", "was changed after it was written")
        if meta.get("name", folder.name) != folder.name:
            raise UserError(
                f"{folder} holds the store {meta['name']}, which was renamed or copied there; give "
                f"it its name back, or delete {folder} and build it again"
            )
        if tokenizer_hash is not None and meta["tokenizer_hash"] != tokenizer_hash:
            raise UserError(
                f"{folder} was encoded with the tokenizer {meta['tokenizer_hash'][:12]}, the one "
                f"in use is {tokenizer_hash[:12]}; build the store again or use its tokenizer"
            )
        return cls(folder, meta)

    @classmethod
    def open_if_current(
        cls, folder: Path, tokenizer_hash: str, fingerprint: str
    ) -> "TokenStore | None":
        """Open the store if it is complete and made from exactly this, else return None."""
        try:
            store = cls.open(folder, tokenizer_hash)
        except UserError:
            return None
        return store if store.meta["fingerprint"] == fingerprint else None

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def identity(self) -> str:
        """Digest of the contents: equal for equal tokens, masks and documents.

        Stores of earlier versions have no digests; theirs is of what they were made from.
        """
        if "files" not in self.meta:
            return self.meta["fingerprint"]
        digests = {name: file["sha256"] for name, file in self.meta["files"].items()}
        return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()

    @property
    def vocab_size(self) -> int:
        """Upper bound of the ids, exclusive; for older stores that of their dtype."""
        limit = 2 ** (8 * _DTYPES[self.meta["dtype"]].itemsize)
        return int(self.meta.get("vocab_size", limit))

    @property
    def num_targets(self) -> int:
        """Number of tokens that can be predicted: all but each document's first."""
        return self.num_tokens - len(self)

    def __len__(self) -> int:
        """Number of documents in the store."""
        return len(self._offsets) - 1

    # Contents

    def verify(self) -> None:
        """Read every file and compare its SHA-256; UserError names the one that is damaged."""
        for name, expected in self.meta.get("files", {}).items():
            try:
                found = paths.file_sha256(self.folder / name)
            except OSError as error:
                raise _torn(self.folder / name, f"cannot be read ({error})") from error
            if found != expected["sha256"]:
                raise _damaged(self.folder / name)

    def verify_once(self, in_background: bool = True) -> None:
        """Verify the store unless that was done since the files last changed.

        Small stores are verified before this returns. Larger ones are verified on a thread if
        `in_background`, else not at all; `check` raises the thread's error.
        """
        state = self._state()
        if _verifications.get(self.folder, (None, None))[0] == state or self._noted() == state:
            return
        if self.num_tokens * _DTYPES[self.meta["dtype"]].itemsize <= _AT_ONCE:
            self.verify()
            self._note(state)
        elif in_background:

            def work() -> None:
                self.verify()
                self._note(state)

            _verifications[self.folder] = (
                state,
                paths.in_background(work, f"verify {self.name}", daemon=True),
            )

    def check(self) -> None:
        """Raise the error of the verification in the background, if it found one so far."""
        verification = _verifications.get(self.folder, (None, None))[1]
        if verification is not None and verification.done():
            verification.result()

    def _state(self) -> dict[str, list[int]]:
        """Size and times of each file by name; they change with a file and in a copy."""
        stats = {name: (self.folder / name).stat() for name in self.meta.get("files", {})}
        return {n: [s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino] for n, s in stats.items()}

    def _noted(self) -> Any:
        try:
            return json.loads((self.folder / _VERIFIED).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    def _note(self, state: dict[str, list[int]]) -> None:
        _verifications[self.folder] = state, None
        with suppress(OSError):  # the folder may be read-only
            (self.folder / _VERIFIED).write_text(json.dumps(state) + "\n", encoding="utf-8")

    def lengths(self, indices: np.ndarray) -> np.ndarray:
        """Number of tokens in each of the documents `indices`; int64, same shape."""
        return self._offsets[indices + 1] - self._offsets[indices]

    def _span(self, index: int, start: int, stop: int | None) -> slice:
        if not 0 <= index < len(self):
            raise IndexError(f"document {index} of {len(self)} in {self.name}")
        return self._slice(index, start, stop)

    def _slice(self, index: int, start: int, stop: int | None) -> slice:
        first, end = int(self._offsets[index]), int(self._offsets[index + 1])
        return slice(min(first + start, end), end if stop is None else min(first + stop, end))

    def ids(self, index: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Tokens `start:stop` of document `index` as a read-only view (tokens,); no copy."""
        return self._tokens[self._span(index, start, stop)]

    def mask_bytes(self, index: int, start: int = 0, stop: int | None = None) -> np.ndarray | None:
        """Bytes of mask.bin for the same tokens as `ids`, uint8; None for plain documents."""
        return None if self._mask is None else self._mask[self._span(index, start, stop)]

    def mask(self, index: int, start: int = 0, stop: int | None = None) -> np.ndarray | None:
        """Loss mask (0 or 1, uint8) of the same tokens as `ids`; None for plain documents."""
        packed = self.mask_bytes(index, start, stop)
        return None if packed is None else unpack_mask(packed)[0]


class StoreView(TokenStore):
    """Some documents of a store, each up to `limit` tokens; it may be empty.

    No token is copied. The view needs 8 bytes of memory per document.
    """

    def __init__(self, store: TokenStore, indices: np.ndarray, limit: int = 2**62):
        """View the documents `indices` of the store, in this order."""
        vars(self).update(vars(store))
        self._indices, self._limit = indices, limit
        self.num_tokens = int(self.lengths(np.arange(len(self))).sum())

    def __len__(self) -> int:
        return len(self._indices)

    def lengths(self, indices: np.ndarray) -> np.ndarray:
        return np.minimum(super().lengths(self._indices[indices]), self._limit)

    def _slice(self, index: int, start: int, stop: int | None) -> slice:
        stop = self._limit if stop is None else min(stop, self._limit)
        return super()._slice(int(self._indices[index]), min(start, stop), stop)


class LongDocuments(StoreView):
    """A view of a store's documents of at least `minimum` tokens, in the store's order.

    The offsets are read once, in blocks. `longest` is the number of tokens of the store's longest
    document.
    """

    def __init__(self, store: TokenStore, minimum: int):
        self.minimum = minimum
        self.longest = 0
        found = []
        for start in range(0, len(store), _OFFSETS_BLOCK):
            lengths = np.diff(store._offsets[start : start + _OFFSETS_BLOCK + 1])
            self.longest = max(self.longest, int(lengths.max()))
            found.append(start + np.flatnonzero(lengths >= minimum))
        super().__init__(store, np.concatenate(found) if found else np.empty(0, np.int64))

    @property
    def name(self) -> str:
        return f"{self.folder.name} from {self.minimum} tokens"


_verifications: dict[Path, tuple[dict[str, list[int]], Future[None] | None]] = {}
"""State of the files when this process began to verify a store, and the verification that is or was
in the background, by folder."""


def _damaged(path: Path) -> UserError:
    return UserError(
        f"{path} is damaged: its SHA-256 is not the one in meta.json; delete {path.parent} and "
        "build it again"
    )


def _torn(path: Path, what: str) -> UserError:
    return UserError(f"{path} {what}: the store is torn; delete {path.parent} and build it again")


def _map(path: Path, dtype: np.dtype, count: int, wanted: bool = True) -> Any:
    """Map a file of `count` items read-only; UserError if it has another size."""
    if not wanted:
        return None
    try:
        size = path.stat().st_size
    except OSError as error:
        raise _torn(path, "is missing") from error
    if size != count * dtype.itemsize:
        raise _torn(path, f"has {size} bytes, meta.json promises {count * dtype.itemsize}")
    if count == 0:  # an empty file cannot be mapped
        return np.empty(0, dtype)
    return np.memmap(path, dtype=dtype, mode="r").view(np.ndarray)


class StoreWriter:
    """Writes a store; the folder appears if the `with` block ends without an error.

        with StoreWriter(folder, vocab_size=tokenizer.vocab_size,
                         tokenizer_hash=tokenizer.hash, fingerprint=corpus.fingerprint("train")
                         ) as writer:
            for text in texts:
                writer.add([tokenizer.bos, *tokenizer.encode(text)])

    An existing store of that name is then replaced. The writer needs 8 bytes of memory per
    document. Further JSON values for meta.json can be set (`writer.extra[...] = ...`) at any time
    before the block ends.
    """

    def __init__(
        self,
        folder: Path,
        *,
        vocab_size: int,
        tokenizer_hash: str,
        fingerprint: str,
        with_mask: bool = False,
        extra: Mapping[str, Any] | None = None,
    ):
        self.folder = Path(folder)
        self.vocab_size = vocab_size
        self.with_mask = with_mask
        self.num_documents = 0
        self.num_tokens = 0
        self.extra = dict(extra or {})
        self._made_from = {"tokenizer_hash": tokenizer_hash, "fingerprint": fingerprint}
        self._dtype_name = "uint16" if vocab_size <= 2**16 else "uint32"
        self._dtype = _DTYPES[self._dtype_name]
        self._lengths = array("q")
        self._digests = {name: hashlib.sha256() for name in ("tokens.bin", "mask.bin")}
        self._stack = ExitStack()

    def __enter__(self) -> "StoreWriter":
        self._temporary = self._stack.enter_context(paths.atomic_folder(self.folder))
        names = ("tokens.bin", "mask.bin") if self.with_mask else ("tokens.bin",)
        self._files: dict[str, BinaryIO] = {
            name: self._stack.enter_context((self._temporary / name).open("wb", buffering=1 << 20))
            for name in names
        }
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # Everything goes through the stack, so that an error here, such as a full disk, also
        # removes the temporary folder.
        if error is not None:
            self._stack.__exit__(kind, error, traceback)
            return
        with self._stack:
            self._finish()

    def add(
        self, ids: Sequence[int] | np.ndarray, mask: Sequence[int] | np.ndarray | None = None
    ) -> None:
        """Append one document of at least one token.

        `mask` has one byte per token, a 0/1 mask or the bytes of `nanochat.tokenizer.pack_mask`. It
        is required if the store is `with_mask`, else it must be None.
        """
        tokens = np.asarray(ids, dtype=np.int64)
        if tokens.ndim != 1 or len(tokens) == 0:
            raise ValueError(f"document {self.num_documents} has the shape {tokens.shape}")
        lowest, highest = int(tokens.min()), int(tokens.max())
        if lowest < 0 or highest >= self.vocab_size:
            raise UserError(
                f"document {self.num_documents} has token id {lowest if lowest < 0 else highest}, "
                f"outside the vocabulary of {self.vocab_size}; was another tokenizer used?"
            )
        if (mask is None) == self.with_mask:
            raise ValueError(f"with_mask={self.with_mask}, but mask is {type(mask).__name__}")
        if mask is not None:
            packed = np.asarray(mask, dtype=np.uint8)
            if packed.shape != tokens.shape:
                raise ValueError(f"{packed.shape} mask bytes for {tokens.shape} tokens")
            self._write("mask.bin", packed.tobytes())
        self._write("tokens.bin", tokens.astype(self._dtype).tobytes())
        self._lengths.append(len(tokens))
        self.num_documents += 1
        self.num_tokens += len(tokens)

    def _write(self, name: str, data: bytes) -> None:
        self._files[name].write(data)
        self._digests[name].update(data)

    def add_store(self, store: TokenStore) -> None:
        """Append all documents of another store of the same tokenizer, and verify them."""
        if (store.has_mask, store.meta["dtype"]) != (self.with_mask, self._dtype_name):
            raise UserError(
                f"{store.folder} ({store.meta['dtype']}, mask: {store.has_mask}) does not fit "
                f"into {self.folder} ({self._dtype_name}, mask: {self.with_mask}); build it again"
            )
        for name in self._files:
            digest = hashlib.sha256()
            with (store.folder / name).open("rb") as source:
                while block := source.read(_BLOCK):
                    self._write(name, block)
                    digest.update(block)
            expected = store.meta.get("files", {}).get(name, {"sha256": digest.hexdigest()})
            if digest.hexdigest() != expected["sha256"]:
                raise _damaged(store.folder / name)
        self._lengths.frombytes(np.diff(store._offsets).tobytes())
        self.num_documents += len(store)
        self.num_tokens += store.num_tokens

    def _finish(self) -> None:
        # The files are closed first, since their buffers must be on disk before the rename.
        for file in self._files.values():
            file.close()
        offsets = np.zeros(self.num_documents + 1, dtype=np.int64)
        if self.num_documents:
            np.cumsum(np.frombuffer(self._lengths, dtype=np.int64), out=offsets[1:])
        np.save(self._temporary / "offsets.npy", offsets)
        saved = hashlib.sha256((self._temporary / "offsets.npy").read_bytes())
        digests = {**{name: self._digests[name] for name in self._files}, "offsets.npy": saved}
        meta = {
            **self.extra,
            **self._made_from,
            "version": VERSION,
            "name": self.folder.name,
            "num_documents": self.num_documents,
            "num_tokens": self.num_tokens,
            "has_mask": self.with_mask,
            "dtype": self._dtype_name,
            "vocab_size": self.vocab_size,
            "files": {
                name: {
                    "size": (self._temporary / name).stat().st_size,
                    "sha256": digest.hexdigest(),
                }
                for name, digest in digests.items()
            },
        }
        meta["digest"] = paths.meta_digest(meta)
        text = json.dumps(meta, indent=2, ensure_ascii=False) + "\n"
        (self._temporary / "meta.json").write_text(text, encoding="utf-8")


def merge_stores(
    folder: Path,
    slices: Sequence[Path],
    *,
    vocab_size: int,
    tokenizer_hash: str,
    fingerprint: str,
    extra: Mapping[str, Any] | None = None,
) -> TokenStore:
    """Join several stores, in the given order, into a new one; the slices are kept.

    All must have been written with this tokenizer, and either all or none have a mask. Slices may
    be empty. The disk needs room for both the slices and the new store.
    """
    stores = [TokenStore.open(piece, tokenizer_hash) for piece in slices]
    if not stores:
        raise UserError(f"{folder} would be merged from no slices at all; encode some first")
    with StoreWriter(
        folder,
        vocab_size=vocab_size,
        tokenizer_hash=tokenizer_hash,
        fingerprint=fingerprint,
        with_mask=stores[0].has_mask,
        extra=extra,
    ) as writer:
        for store in stores:
            writer.add_store(store)
    return TokenStore.open(folder, tokenizer_hash)

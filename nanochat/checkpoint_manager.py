"""Save, find and load checkpoints; a step folder that exists is complete.

    checkpoints/<stage>/<tag>/step_000500/
        model.safetensors    float32 weights by parameter name
        optim/               optimizer state by parameter name: safetensors written and resharded
                             by torch.distributed.checkpoint
        meta.json            model and run configuration, train and loader state, metrics, tokenizer
                             hash, size and SHA-256 of every other file, versions

A step folder is built under a temporary name and renamed at the end. After a kill, a full disk or a
power cut, the previous checkpoint is therefore still the newest one. No pickle is ever loaded.
Saving copies the state to host memory; a thread writes it while training goes on.
"""

import io
import json
import os
import platform
import re
import shutil
import warnings
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from safetensors.torch import load_file

from nanochat import paths
from nanochat.config import from_dict, to_dict
from nanochat.errors import UserError
from nanochat.gpt import GPT, GPTConfig
from nanochat.hardware import physical_cores
from nanochat.optim import Optimizer
from nanochat.paths import HashedFile, file_sha256, in_background, meta_digest
from nanochat.runtime import Runtime
from nanochat.tokenizer import SystemStyle, Tokenizer

T = TypeVar("T")
FORMAT = 1
WEIGHTS = "model.safetensors"
REMEDY = "restore it from a copy, or use an earlier step"
_STEP = re.compile(r"step_(\d{6,})")


class CheckpointManager:
    """Writes the checkpoints of one run, in the background, and prunes old ones."""

    def __init__(self, folder: Path, runtime: Runtime, keep_last: int = 0):
        self.folder, self.runtime, self.keep_last = folder, runtime, keep_last
        self._saving: Future[None] | None = None
        # The writer's collectives must not mix with the training's on another thread.
        self._group = dist.new_group(backend="gloo") if runtime.world_size > 1 else None

    def save(self, step: int, model: GPT, optimizer: Optimizer, meta: dict[str, Any]) -> None:
        """Copy the state to host memory and start writing it; every rank must call this.

        An earlier save is waited for first; if it failed, its error is raised on every rank.
        """
        self.wait()
        weights = {}
        with optimizer.masters():
            if self.runtime.is_main:
                weights = {name: _host_copy(t) for name, t in model.state_dict().items()}
        state = optimizer.state_dict(host_copy=True)
        meta = {
            **meta,
            "format": FORMAT,
            "step": step,
            "model_config": to_dict(model.config),
            "optimizer_steps": optimizer.steps,
            "versions": {"torch": torch.__version__, "python": platform.python_version()},
        }
        self._saving = in_background(
            lambda: self._write(step, weights, state, meta), "checkpoint writer"
        )

    @property
    def busy(self) -> bool:
        """True while a save is being written."""
        return self._saving is not None and not self._saving.done()

    def check(self) -> None:
        """Raise the last save's error if it has failed; called after every step."""
        if not self.busy:
            self.wait()

    def wait(self) -> None:
        """Wait until the last save is written; raises UserError or OSError if it failed."""
        saving, self._saving = self._saving, None
        if saving is not None:
            saving.result()

    def _write(
        self,
        step: int,
        weights: dict[str, torch.Tensor],
        state: dict[str, torch.Tensor],
        meta: dict[str, Any],
    ) -> None:
        final = self.folder / f"step_{step:06d}"
        temporary = self.folder / f".step_{step:06d}.tmp"
        try:
            # The ranks agree after every part, so that no rank waits for one that failed.
            self._agree(lambda: self._prepare(temporary))
            written: dict[str, Any] = {}
            saving = None
            if self.runtime.is_main:  # beside its share of the optimizer's state
                path = temporary / WEIGHTS
                saving = in_background(lambda: save_file(weights, path))
            self._attempt(
                lambda: written.update(
                    save_optimizer_state(state, temporary / "optim", self._group)
                )
            )
            if saving is not None:
                wait([saving])
                self._attempt(lambda: written.update({path.name: saving.result()}))
            self._agree(lambda: None)
            files = {name: file for share in self._gather(written) for name, file in share.items()}
            self._agree(lambda: self._finish(temporary, final, {**meta, "files": files}))
        except BaseException:  # wait() raises it on the training thread
            if self.runtime.is_main:
                shutil.rmtree(temporary, ignore_errors=True)
            raise

    _failed: str | None = None

    def _attempt(self, action: Any) -> None:
        """Run an action on this rank; keep its error for the next _agree."""
        if self._failed is None:
            try:
                action()
            except BaseException as error:  # torch.distributed.checkpoint raises no Exception
                rank = self.runtime.rank
                by_rank = getattr(error, "failures", None)
                if by_rank:  # every rank gets this error: name the rank that it happened on
                    rank, (error, _) = next(iter(by_rank.items()))
                self._failed = f"rank {rank}: {type(error).__name__}: {error}"

    def _agree(self, action: Any) -> None:
        """Run an action on rank 0, then raise an error on every rank if any rank failed."""
        if self.runtime.is_main:
            self._attempt(action)
        failures = self._gather(self._failed)
        self._failed = None
        for failure in failures:
            if failure:
                raise OSError(
                    f"saving to {self.folder} failed on {failure}; "
                    "the checkpoints before it are whole. Free some space and run with --resume"
                )

    def _gather(self, value: T) -> list[T]:
        """Gather the values of all ranks on every rank."""
        gathered = [value] * self.runtime.world_size
        if self._group is not None:
            dist.all_gather_object(gathered, value, group=self._group)
        return gathered

    def _prepare(self, temporary: Path) -> None:
        shutil.rmtree(temporary, ignore_errors=True)
        (temporary / "optim").mkdir(parents=True)

    def _finish(self, temporary: Path, final: Path, meta: dict[str, Any]) -> None:
        for name, file in meta["files"].items():
            size = (temporary / name).stat().st_size
            if size != file["size"]:
                raise OSError(f"{temporary / name} has {size:,} bytes instead of {file['size']:,}")
        meta["digest"] = meta_digest(meta)
        (temporary / "meta.json").write_text(json.dumps(meta, indent=1))
        paths.sync_path(temporary / "meta.json")
        paths.sync_path(temporary / "optim")
        paths.sync_path(temporary)
        # `final` exists where the run was resumed from an earlier step.
        paths.replace_folder(temporary, final)
        if self.keep_last > 0:
            for step in list_steps(self.folder)[: -self.keep_last]:
                # Renamed first, so that a kill while deleting leaves no incomplete step folder.
                doomed = self.folder / f".step_{step:06d}.old.tmp"
                os.replace(self.folder / f"step_{step:06d}", doomed)
                shutil.rmtree(doomed, ignore_errors=True)


def save_file(tensors: dict[str, torch.Tensor], path: Path) -> dict[str, Any]:
    """Write float32 and int32 tensors as safetensors; returns the file's size and SHA-256.

    The library's own function first makes bytes of all tensors. That needs a second copy of the
    weights, and meanwhile holds the interpreter's lock, which stops the training thread.
    """
    header: dict[str, Any] = {}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + 4 * tensor.numel()
        dtype = {torch.float32: "F32", torch.int32: "I32"}[tensor.dtype]
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with HashedFile(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            file.write(tensor.numpy().reshape(-1).view("uint8").data)
        os.fsync(file.fileno())
    return file.record


def _host_copy(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()


def save_optimizer_state(
    state: dict[str, torch.Tensor], folder: Path, group: dist.ProcessGroup | None
) -> dict[str, Any]:
    """Write this rank's share of an optimizer state as safetensors; every rank must call this.

    Returns the size and SHA-256 of what this rank wrote, by its name in the checkpoint.
    """
    from torch.distributed.checkpoint.filesystem import FileSystem
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    written: dict[str, Any] = {}

    class Hashed(FileSystem):
        @contextmanager
        def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[io.IOBase]:
            with HashedFile(Path(path)) as file:
                yield file
            written[f"{folder.name}/{Path(path).name}"] = file.record

    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    writer.fs = Hashed()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        save(state, storage_writer=writer, process_group=group, no_dist=group is None)
    return written


def load_optimizer_state(
    state: dict[str, torch.Tensor], folder: Path, group: dist.ProcessGroup | None
) -> None:
    """Fill the tensors of `state` in place from files that any number of ranks saved."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        load(
            state,
            storage_reader=HuggingFaceStorageReader(str(folder)),
            process_group=group,
            no_dist=group is None,
        )


def list_steps(folder: Path) -> list[int]:
    """List the steps saved in a run's folder, in rising order."""
    if not folder.is_dir():
        return []
    matches = (_STEP.fullmatch(path.name) for path in folder.iterdir() if path.is_dir())
    return sorted(int(match[1]) for match in matches if match)


def latest(folder: Path) -> Path | None:
    """Return the newest step folder of a run, or None if it has none."""
    steps = list_steps(folder)
    return folder / f"step_{steps[-1]:06d}" if steps else None


def find(source: str, step: int | None = None, tag: str | None = None) -> Path:
    """Find a step folder. `source` is a stage, stage/tag, a run's folder or a step folder.

    A stage alone means the tag `tag` if it was trained, else `default`, else the only tag there is.
    Without a step, the newest one is taken. Raises UserError if nothing or several tags fit.
    """
    path = paths.user_path(source)
    preferred = tag
    stage, _, tag = source.partition("/")
    if not tag and preferred and stage in paths.STAGES:
        tag = preferred if list_steps(paths.checkpoints_dir(stage, preferred)) else ""
    if stage in paths.STAGES and not list_steps(path) and not _STEP.fullmatch(path.name):
        folder = paths.checkpoints_dir(stage, tag or "default")
        if not tag and not folder.is_dir():
            tags = sorted(p.name for p in folder.parent.glob("*") if list_steps(p))
            if len(tags) == 1:
                folder = folder.parent / tags[0]
            elif tags:
                raise UserError(
                    f"{stage} has several tags ({', '.join(tags)}); name one: {stage}/TAG"
                )
    elif _STEP.fullmatch(path.name) and path.is_dir():
        return path
    else:
        folder = path
    steps = list_steps(folder)
    if not steps:
        raise UserError(
            f"no checkpoint of {source} in {folder}; train that stage first, or name another source"
        )
    chosen = steps[-1] if step is None else step
    if chosen not in steps:
        raise UserError(f"{folder} has no step {chosen}; it has {', '.join(map(str, steps))}")
    return folder / f"step_{chosen:06d}"


def read_meta(folder: Path) -> dict[str, Any]:
    """Read a step folder's metadata; check that every file is there and has its size.

    Contents are checked where they are read: `verify`. Raises UserError that names the file which
    is missing, truncated or changed.
    """
    path = folder / "meta.json"
    try:
        meta: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(
            f"{path} is missing; {REMEDY}" if folder.is_dir() else _gone(folder)
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid JSON ({error}); {REMEDY}") from None
    if not isinstance(meta, dict):
        raise UserError(f"{path} is not the metadata of a checkpoint; {REMEDY}")
    if meta.get("format") != FORMAT:
        raise UserError(
            f"{path} has format {meta.get('format')}, this version reads {FORMAT}; "
            "load it with the version of nanochat that wrote it"
        )
    if meta.get("digest") != meta_digest(meta):
        raise UserError(f"{path} was changed after it was written; {REMEDY}")
    number = _STEP.fullmatch(folder.name)
    if number and int(number[1]) != meta["step"]:
        raise UserError(
            f"{folder} holds step {meta['step']}, which was renamed or copied there; give it its "
            "name back"
        )
    for name, expected in meta["files"].items():
        file = folder / name
        if not file.is_file():
            raise UserError(f"{file} is missing; {REMEDY}")
        size = file.stat().st_size
        if size != expected["size"]:
            raise UserError(f"{file} has {size:,} bytes instead of {expected['size']:,}; {REMEDY}")
    return meta


def check_digests(folder: Path, meta: dict[str, Any], names: Iterable[str]) -> None:
    """Hash these files of a step folder, several at once; UserError names one that is damaged."""

    def check(name: str) -> None:
        try:
            digest = file_sha256(folder / name)
        except FileNotFoundError:
            raise UserError(_gone(folder)) from None
        if digest != meta["files"][name]["sha256"]:
            raise UserError(
                f"{folder / name} is damaged: its SHA-256 is not the recorded one; {REMEDY}"
            )

    with ThreadPoolExecutor(physical_cores()) as pool:
        list(pool.map(check, names))


def verify(folder: Path, meta: dict[str, Any], names: Iterable[str], runtime: Runtime) -> None:
    """Run `check_digests` on one rank of each machine, while the others wait for the result.

    Every rank must call this, and every rank raises UserError if a file on any machine is damaged.
    """
    damage = None
    if runtime.local_rank == 0:
        try:
            check_digests(folder, meta, names)
        except UserError as error:
            damage = error
    for found in runtime.gather_objects(damage):
        if found is not None:
            raise found


def _gone(folder: Path) -> str:
    return (
        f"{folder} is gone: a run that is still training deletes its older steps (--keep-last); "
        "try again, which takes the newest one"
    )


def load_weights(folder: Path, meta: dict[str, Any], model: GPT, runtime: Runtime) -> None:
    """Verify the weights of a step folder and copy them into the model; every rank calls it.

    Raises UserError where they are damaged or another model's.
    """
    verify(folder, meta, [WEIGHTS], runtime)
    _load_weights(folder, model)


def _load_weights(folder: Path, model: GPT) -> None:
    try:
        weights = load_file(folder / WEIGHTS)
    except FileNotFoundError:
        raise UserError(_gone(folder)) from None
    parameters = model.state_dict()
    missing, unknown = set(parameters) - set(weights), set(weights) - set(parameters)
    wrong = [n for n in set(parameters) & set(weights) if parameters[n].shape != weights[n].shape]
    if missing or unknown or wrong:
        raise UserError(
            f"{folder / WEIGHTS} is of another model: "
            f"missing {sorted(missing)[:3]}, unknown {sorted(unknown)[:3]}, other shape {wrong[:3]}"
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])


def read_meta_once(folder: Path, runtime: Runtime) -> dict[str, Any]:
    """Run `read_meta` on rank 0; every rank gets its result or raises its error."""
    return runtime.on_main(lambda: read_meta(folder))


def saved_config(meta: dict[str, Any], where: str) -> GPTConfig:
    """The model's configuration in a checkpoint's metadata; `where` names it in errors.

    Checkpoints from before the token shift and spelled embeddings have none.
    """
    older = {"token_shift": False, "spelling_bytes": 0}
    return from_dict(GPTConfig, older | meta["model_config"], where)


def build_model(config: GPTConfig, runtime: Runtime) -> GPT:
    """Build a model with undefined weights; the caller loads them."""
    with runtime.device:
        return GPT(config, runtime.dtype)


def loaded_model(config: GPTConfig, folder: Path, meta: dict[str, Any], runtime: Runtime) -> GPT:
    """Build a model and load the weights of a step folder; every rank must call this."""
    model = build_model(config, runtime)
    load_weights(folder, meta, model, runtime)
    return model


def restore(
    folder: Path, meta: dict[str, Any], model: GPT, optimizer: Optimizer, runtime: Runtime
) -> None:
    """Verify and load weights and optimizer state for resuming, at any world size.

    meta is the result of `read_meta`. Raises UserError if it describes another model, or a file is
    damaged.
    """
    saved = saved_config(meta, str(folder / "meta.json"))
    if saved != model.config:
        ours = to_dict(model.config)
        other = {k: v for k, v in to_dict(saved).items() if ours[k] != v}
        raise UserError(
            f"{folder} holds another model: it has {other}; resume with the same model flags, "
            "or choose another --tag. If you gave the same, a rule of this version differs: start "
            "a new run, or go on from that checkpoint with scripts.mid_train"
        )
    verify(folder, meta, meta["files"], runtime)
    _load_weights(folder, model)
    optimizer.take_masters()
    group = dist.new_group(backend="gloo") if runtime.world_size > 1 else None
    state = optimizer.state_dict(host_copy=True)
    load_optimizer_state(state, folder / "optim", group)
    optimizer.load_state_dict(state)
    optimizer.steps = meta["optimizer_steps"]


def load_model(
    source: str,
    runtime: Runtime,
    *,
    step: int | None = None,
    tokenizer: Tokenizer | None = None,
) -> tuple[GPT, Tokenizer, dict[str, Any]]:
    """Load a model for evaluation or chat; returns it with its tokenizer and its metadata.

    Every rank calls it; the runtime has the model's device and dtype. `source` and `step` are those
    of `find`. Raises UserError if `tokenizer` is not the one that the model was trained with.
    """
    folder = find(source, step)
    meta = read_meta(folder)
    config = saved_config(meta, str(folder / "meta.json"))
    if tokenizer is None:
        tokenizer = tokenizer_of(meta, folder)
    check_tokenizer(meta, tokenizer, folder)
    return loaded_model(config, folder, meta, runtime), tokenizer, meta


def system_style(meta: Mapping[str, Any]) -> SystemStyle:
    """Style in which a checkpoint's training rendered system messages."""
    config = meta.get("run_config") or {}
    return "merge" if config.get("system") == "merge" else "tokens"


def tokenizer_of(meta: dict[str, Any], folder: Path) -> Tokenizer:
    """Load the tokenizer that a checkpoint was trained with."""
    try:
        return Tokenizer.find(meta["tokenizer_hash"])
    except UserError:
        tokenizer = Tokenizer.load()  # its error is the clearer one if there is no tokenizer
        check_tokenizer(meta, tokenizer, folder)
        raise


def trained_with(digest: str) -> list[str]:
    """List `stage/tag` of every run whose newest checkpoint was trained with this tokenizer."""
    found = []
    for stage in paths.STAGES:
        for folder in sorted((paths.base_dir() / "checkpoints" / stage).glob("*")):
            newest = latest(folder)
            try:
                meta = json.loads((newest / "meta.json").read_text()) if newest else {}
            except (OSError, ValueError):
                continue
            if isinstance(meta, dict) and meta.get("tokenizer_hash") == digest:
                found.append(f"{stage}/{folder.name}")
    return found


def check_tokenizer(meta: dict[str, Any], tokenizer: Tokenizer, folder: Path) -> None:
    if meta["tokenizer_hash"] != tokenizer.hash:
        raise UserError(
            f"{folder} was trained with tokenizer {meta['tokenizer_hash'][:12]} and vocabulary "
            f"{meta['model_config']['vocab_size']}, the one in {paths.tokenizer_dir()} is "
            f"{tokenizer.hash[:12]} with {tokenizer.vocab_size}; set NANOCHAT_BASE_DIR to where it "
            "was trained, or train again from the base stage"
        )

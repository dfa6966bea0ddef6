"""The run directory: the one place where the truth about a run stands.

```
config.yaml  plan.json  events.jsonl  (tokenizer.json, for text)
blocks/00/attempt.json  blocks/00/workers.jsonl  blocks/00/metrics.jsonl  blocks/00/checkpoints/step-00000500/...
(blocks/00/relay/step-00000500.safetensors  blocks/01/relay.jsonl, where blocks go on from each other's features)
model/
```
Starting a run again on its directory resumes it; a directory of another run is refused, the difference shown.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from dbtrain.config import RunConfig
from dbtrain.config_file import differences, parse_config
from dbtrain.errors import CorruptData, UserError
from dbtrain.plan import Plan
from dbtrain.storage import Storage

CONFIG = "config.yaml"
PLAN = "plan.json"
EVENTS = "events.jsonl"
ATTEMPT = "attempt.json"
METRICS = "metrics.jsonl"
WORKERS = "workers.jsonl"
RELAY = "relay.jsonl"
TOKENIZER = "tokenizer.json"
EVALUATION = "evaluation.json"

_log = logging.getLogger(__name__)


class StaleAttempt(RuntimeError):
    """A newer attempt has claimed the block; what the older one wanted to write was not written."""

    def __init__(self, block: str, attempt: int, current: int):
        self.block = block
        self.attempt = attempt
        self.current = current
        super().__init__(block, attempt, current)

    def __str__(self) -> str:
        return f"{self.block} belongs to attempt {self.current}; attempt {self.attempt} may not write there"


class BlockDirectory:
    """What one block of a run leaves behind."""

    def __init__(self, storage: Storage, index: int):
        self.storage = storage
        self.index = index

    @property
    def checkpoints(self) -> Storage:
        """The folder of the block's checkpoints."""
        return self.storage.sub("checkpoints")

    def claim(self, attempt: int) -> None:
        """Make `attempt` the one that may write checkpoints; all with a lower number are refused from now on.

        Raises:
            StaleAttempt: the block belongs to a newer attempt already.
        """
        # Nobody may claim between the look and the claim, or a late one would open the fence again.
        with self.storage.alone():
            self.check_fence(attempt)
            self.storage.write_atomic(ATTEMPT, (json.dumps({"attempt": attempt}) + "\n").encode())

    def current_attempt(self) -> int:
        """The newest attempt that claimed the block; 0 before the first."""
        try:
            attempt = json.loads(self.storage.read_bytes(ATTEMPT))["attempt"]
        except FileNotFoundError:
            return 0
        except (ValueError, KeyError, TypeError):
            attempt = None
        if type(attempt) is not int:
            raise CorruptData(
                f"{self.storage.uri}/{ATTEMPT} does not hold an attempt number",
                mend="remove the file when no worker of this run is alive",
            )
        return attempt

    def check_fence(self, attempt: int) -> None:
        """Raise StaleAttempt if a newer attempt than `attempt` has claimed the block."""
        current = self.current_attempt()
        if current > attempt:
            raise StaleAttempt(self.storage.uri, attempt, current)

    @property
    def metrics_uri(self) -> str:
        """Where `log_metrics` writes."""
        return f"{self.storage.uri}/{METRICS}"

    def log_metrics(self, values: Mapping[str, Any]) -> None:
        """Append one line to metrics.jsonl, with the time in seconds since 1970."""
        self.storage.append_line(METRICS, _line(values))

    def metrics(self) -> list[dict[str, Any]]:
        """All lines of metrics.jsonl, oldest first. A block that was restarted may have told a step twice.

        Lines with an "event" tell of a roll-back, and have no loss.
        """
        return list(_read_lines(self.storage, METRICS))

    def log_relay(self, line: Mapping[str, Any]) -> None:
        """Append one line to relay.jsonl: from which step on which weights of other blocks are used."""
        self.storage.append_line(RELAY, _line(line))

    def relay_schedule(self) -> list[dict[str, Any]]:
        """All lines of relay.jsonl, oldest first."""
        return list(_read_lines(self.storage, RELAY))

    def log_worker(self, facts: Mapping[str, Any]) -> None:
        """Append one line to workers.jsonl, with the time in seconds since 1970: an attempt is ready to train."""
        self.storage.append_line(WORKERS, _line(facts))


class RunDirectory:
    """A run directory that exists: its configuration, its plan, its journal and its blocks."""

    def __init__(self, storage: Storage, config: RunConfig, plan: Plan):
        self.storage = storage
        self.config = config
        self.plan = plan

    @classmethod
    def create_or_resume(cls, where: str | Path | Storage, config: RunConfig, plan: Plan) -> RunDirectory:
        """Start a run in a new directory, or go on with the same run in an existing one.

        The same run has the same configuration (`RunConfig.identity`), kind and data. Its plan stays; fields
        outside the identity (placement, cadences) take their new values.

        Raises:
            UserError: the directory holds another run (the message lists what differs), or cannot be written.
        """
        storage = where if isinstance(where, Storage) else Storage.open(where)
        if storage.exists(PLAN):
            existing = cls.open_same(storage, config, plan)
            if config != existing.config:
                storage.write_atomic(CONFIG, config.to_yaml().encode())
            return cls(storage, config, existing.plan)
        check_vacant(storage)
        # The plan comes last: a directory without one is not a run yet, and a start that died is repeated.
        storage.write_atomic(CONFIG, config.to_yaml().encode())
        _keep_tokenizer(storage, config, plan)
        storage.write_atomic(PLAN, (plan.model_dump_json(indent=2) + "\n").encode())
        return cls(storage, config, plan)

    @classmethod
    def open_same(cls, where: str | Path | Storage, config: RunConfig, plan: Plan) -> RunDirectory:
        """An existing run directory that `create_or_resume` would go on with; nothing is written.

        Raises:
            UserError: it holds another run, or none.
            CorruptData: its files cannot be read.
        """
        existing = cls.open(where)
        found = list(_run_differences(existing, config, plan))
        if found:
            raise UserError(
                f"holds another run; there -> here: {'; '.join(found)}",
                field="--run",
                value=existing.uri,
                mend="choose another directory, or the configuration it was started with",
            )
        return existing

    @classmethod
    def open(cls, where: str | Path | Storage) -> RunDirectory:
        """An existing run directory.

        Raises:
            UserError: there is none, or its configuration has keys that this version does not know.
            CorruptData: its files cannot be read.
        """
        storage = where if isinstance(where, Storage) else Storage.open(where)
        try:
            raw_plan, raw_config = storage.read_bytes(PLAN), yaml.safe_load(storage.read_bytes(CONFIG))
            plan = Plan.model_validate_json(raw_plan)
        except OSError as error:
            if not isinstance(error, FileNotFoundError | NotADirectoryError):
                reason = error.strerror or " ".join(str(error).split())
                raise UserError(f"cannot be read: {reason}", field="RUN", value=storage.uri) from None
            raise UserError(
                f"is not a run directory: it has no {CONFIG} and {PLAN}",
                field="RUN",
                value=storage.uri,
                mend="give the directory that `dbtrain train CONFIG --run DIR` wrote",
            ) from None
        except (yaml.YAMLError, UnicodeDecodeError, ValidationError) as error:
            name = PLAN if isinstance(error, ValidationError) else CONFIG
            raise CorruptData(f"{name} cannot be read", field="RUN", value=storage.uri) from error
        if not isinstance(raw_config, dict):
            raise CorruptData(f"{CONFIG} is not a mapping", field="RUN", value=storage.uri)
        return cls(storage, parse_config(raw_config), plan)

    @property
    def uri(self) -> str:
        """What `RunDirectory.open` takes to come back here."""
        return self.storage.uri

    def block(self, index: int) -> BlockDirectory:
        """The directory of block `index`; blocks/00 is the one with the highest noise."""
        if not 0 <= index < len(self.plan.blocks):
            raise IndexError(f"block {index} of a plan of {len(self.plan.blocks)}")
        return BlockDirectory(self.storage.sub(f"blocks/{index:02d}"), index)

    def journal(self, event: Mapping[str, Any]) -> None:
        """Append one event to events.jsonl, with the time in seconds since 1970."""
        self.storage.append_line(EVENTS, _line(event))

    def events(self) -> list[dict[str, Any]]:
        """The events of all starts of the run, oldest first; lines that a dying writer tore are left out."""
        return list(_read_lines(self.storage, EVENTS))


def check_vacant(storage: Storage) -> None:
    """Whether a new run may go there: nobody's files are mixed with ours.

    Raises:
        UserError: it is a file, or a folder that holds more than a start that died leaves.
    """
    path = storage.local_path
    if path is not None and path.exists() and not path.is_dir():
        raise UserError("is a file", field="--run", value=storage.uri, mend="choose a new directory")
    ours = (CONFIG, "driver.lock", "lost+found")  # the last one is in every new file system
    strangers = [name for name in storage.list() if name not in ours and not name.startswith(".")]
    if strangers:
        raise UserError(
            f"holds no run, but other files: {', '.join(strangers[:3])}{', ...' if len(strangers) > 3 else ''}",
            field="--run",
            value=storage.uri,
            mend="choose a new or empty directory",
        )


def _keep_tokenizer(storage: Storage, config: RunConfig, plan: Plan) -> None:
    """The tokenizer of a text goes with its run, which may outlive the data."""
    expected = None if plan.data is None else plan.data.tokenizer_sha256
    if expected is None:
        return
    data = Storage.open(config.data.location)
    try:
        tokenizer = data.read_bytes(TOKENIZER)
    except OSError as error:
        raise UserError(
            f"cannot be read: {error.strerror or ' '.join(str(error).split())}",
            field="data.path",
            value=data.sub(TOKENIZER).uri,
            mend="put back the whole folder that `dbtrain prepare` made",
        ) from None
    if hashlib.sha256(tokenizer).hexdigest() != expected:
        raise CorruptData(
            "is not the tokenizer of the manifest beside it (SHA-256 differs)",
            field="data.path",
            value=data.sub(TOKENIZER).uri,
            mend="prepare the data again with `dbtrain prepare --overwrite`",
        )
    storage.write_atomic(TOKENIZER, tokenizer)


def _run_differences(existing: RunDirectory, config: RunConfig, plan: Plan) -> Iterator[str]:
    yield from differences(existing.config.identity(), config.identity())
    yield from differences(_plan_identity(existing.plan), _plan_identity(plan))


def _plan_identity(plan: Plan) -> dict[str, Any]:
    return {"plan.kind": plan.kind, "plan.data.sha256": None if plan.data is None else plan.data.sha256}


def _line(values: Mapping[str, Any]) -> str:
    return json.dumps({"time": round(time.time(), 3), **values})


def _read_lines(storage: Storage, rel: str) -> Iterator[dict[str, Any]]:
    try:
        data = storage.read_bytes(rel)
    except FileNotFoundError:
        return
    for number, line in enumerate(data.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if isinstance(record, dict):
            yield record
        else:
            _log.warning("%s/%s: line %d is torn and left out", storage.uri, rel, number)
